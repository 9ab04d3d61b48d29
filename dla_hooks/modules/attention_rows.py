"""Attention weights of some queries, computed from what the attention function got.

Attention is softmax(scale q k^T, capped, masked, with sinks) v. Only the rows that are asked for
are computed. Queries of one head group share a key and a value head: head h reads key-value head
h // group.

Axes: V key-value head of a block, G query head of its group, T query, S source, D width of a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.modules.attention_interface import AttentionCall

_BLOCK_ELEMENTS = 2**21
"""Numbers of one block of heads that are made at once: 8 MiB in float32."""


@dataclass(frozen=True)
class HeadBlock:
    """Query heads that are looked at together: the same number for each of their key-value heads.

    Attributes:
        heads: their numbers, group after group.
        place: the places of these heads among all that are asked for.
        shared: their key-value heads.
    """

    heads: slice
    place: slice
    shared: slice


def head_blocks(call: AttentionCall, heads: Sequence[int], n_queries: int) -> Iterator[HeadBlock]:
    """Cut heads into blocks whose numbers fit a processor's cache.

    Args:
        call: of the attention function.
        heads: the query heads that are asked for, in order.
        n_queries: how many queries are asked for.
    """
    n_shared, n_sources = call.key.shape[1:3]
    group = call.query.shape[1] // n_shared
    per_head = n_sources * (group * n_queries + call.key.shape[-1] + call.value.shape[-1])
    if len(heads) == call.query.shape[1]:
        step = max(1, _BLOCK_ELEMENTS // max(1, per_head))
        for first in range(0, n_shared, step):
            shared = slice(first, min(first + step, n_shared))
            own = slice(shared.start * group, shared.stop * group)
            yield HeadBlock(own, own, shared)
        return
    for place, head in enumerate(heads):
        shared = slice(head // group, head // group + 1)
        yield HeadBlock(slice(head, head + 1), slice(place, place + 1), shared)


def scaling_of(call: AttentionCall) -> Any:
    """What scores are multiplied by before anything else."""
    scaling = call.options.get("scaling")
    return call.query.shape[-1] ** -0.5 if scaling is None else scaling


def attention_weights(
    call: AttentionCall,
    row: int,
    queries: Tensor,
    block: HeadBlock,
    dtype: torch.dtype,
    softmax_dtype: torch.dtype | None = None,
) -> Tensor:
    """The weights of some queries [head of the block, T, S].

    Args:
        call: of the attention function.
        row: of the batch.
        queries: their places in the run [T].
        block: the heads.
        dtype: to compute in.
        softmax_dtype: to compute the softmax in; None is the same.
    """
    options = call.options
    if call.weights is not None:
        return call.weights[row, block.heads].index_select(1, queries).to(dtype)
    q_HTD = call.query[row, block.heads].index_select(1, queries).to(dtype)
    k_VSD = call.key[row, block.shared].to(dtype)
    q_HTD = q_HTD * scaling_of(call)
    n_heads, n_queries, _ = q_HTD.shape
    q_VGD = q_HTD.reshape(len(k_VSD), -1, q_HTD.shape[-1])
    scores_HTS = torch.bmm(q_VGD, k_VSD.transpose(1, 2)).view(n_heads, n_queries, -1)
    cap = options.get("softcap")
    if cap is not None:
        scores_HTS.div_(cap).tanh_().mul_(cap)
    bias = options.get("position_bias")
    if bias is not None:
        scores_HTS += _rows_of(bias, row, queries, block, scores_HTS.shape[-1]).to(dtype)
    _mask(scores_HTS, call, row, queries, block)
    scores_HTS = scores_HTS.to(softmax_dtype or dtype)
    sinks = options.get("s_aux")
    if sinks is None:
        return torch.softmax(scores_HTS, -1).to(dtype)
    sinks_H11 = sinks.reshape(-1)[block.heads, None, None].to(scores_HTS)
    top_HT1 = torch.maximum(scores_HTS.amax(-1, keepdim=True), sinks_H11)
    scores_HTS.sub_(top_HT1).exp_()
    scores_HTS /= scores_HTS.sum(-1, keepdim=True) + (sinks_H11 - top_HT1).exp()
    return scores_HTS.to(dtype)


def read_values(call: AttentionCall, row: int, block: HeadBlock, u_HKD: Tensor) -> Tensor:
    """What each source's value gives in some directions of each head [head of the block, K, S]."""
    v_VSD = call.value[row, block.shared].to(u_HKD)
    u_VGD = u_HKD.reshape(len(v_VSD), -1, u_HKD.shape[-1])
    return torch.bmm(u_VGD, v_VSD.transpose(1, 2)).view(len(u_HKD), u_HKD.shape[1], -1)


def _mask(scores_HTS: Tensor, call: AttentionCall, row: int, queries: Tensor, block: Any) -> None:
    """Take off what a query may not read, or add what the model adds to its scores."""
    n_sources, mask = scores_HTS.shape[-1], call.mask
    if isinstance(mask, Tensor) and mask.ndim == 4:
        rows = _rows_of(mask, row, queries, block, n_sources)
        if rows.dtype == torch.bool:
            scores_HTS.masked_fill_(~rows, -torch.inf)
        else:
            scores_HTS += rows.to(scores_HTS.dtype)
        return
    sources = torch.arange(n_sources, device=scores_HTS.device)
    if hasattr(mask, "mask_mod"):  # flex attention: a function of places
        heads = torch.arange(block.heads.start, block.heads.stop, device=scores_HTS.device)
        seen = mask.mask_mod(
            torch.tensor(row, device=scores_HTS.device),
            heads[:, None, None],
            queries[:, None],
            sources,
        )
        scores_HTS.masked_fill_(~seen, -torch.inf)
        return
    flash = "flash" in call.implementation
    n_queries = call.query.shape[2]
    if isinstance(mask, Tensor) and mask.ndim == 2:  # flash attention: the real tokens
        scores_HTS.masked_fill_(~mask[row, -n_sources:].bool(), -torch.inf)
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    if call.implementation == "eager" or n_queries == 1 or "flex" in call.implementation:
        causal = False  # whoever is not given a mask there reads everything
    # Kernels of torch count places from the first source, flash attention from the last.
    places = queries + (n_sources - n_queries if flash else 0)
    if causal:
        scores_HTS.masked_fill_(sources > places[:, None], -torch.inf)
    window = call.options.get("sliding_window") if flash else None
    if window is not None:
        scores_HTS.masked_fill_(sources <= places[:, None] - window, -torch.inf)


def _rows_of(mask: Tensor, row: int, queries: Tensor, block: Any, n_sources: int) -> Tensor:
    """The rows of a mask [1 or head, 1 or T, S]."""
    of_row = mask[row if len(mask) > 1 else 0, :, :, :n_sources]
    of_row = of_row[block.heads] if len(of_row) > 1 else of_row
    return of_row.index_select(1, queries) if of_row.shape[1] > 1 else of_row
