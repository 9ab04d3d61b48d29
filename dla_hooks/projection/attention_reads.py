"""What heads read from each token: from one call of the attention function to scalars.

A head's z is the sum over sources of p_j v_j, possibly times a gate g. So its projection on u is
the sum of p_j (v_j . (g * u)), and nothing wider than one number per head and source is made.

Axes: H head, T entry of a tile, S source, I = all heads side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.errors import DecompositionError, UnsupportedModelError
from dla_hooks.modules.attention_interface import AttentionCall
from dla_hooks.modules.attention_rows import (
    HeadBlock,
    attention_weights,
    head_blocks,
    read_values,
)
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.tiles import Tile, View

_TILE_ELEMENTS = 2**19
"""Numbers of one tile: 2 MiB in float32."""


@dataclass(frozen=True)
class Reads:
    """What some entries of one prompt read.

    Attributes:
        row: the prompt's row in the batch.
        tile: the entries.
        values_HTS: what each source contributed through each head.
        weights_HTS: the attention weight of each.
        first: the column of the prompt that the first source is; negative where the model reads
            positions of its own before the prompt. 0 where the sources are an encoder's.
    """

    row: int
    tile: Tile
    values_HTS: Tensor
    weights_HTS: Tensor
    first: int


def reads(
    call: AttentionCall,
    view: View,
    folded: Directions,
    heads: Sequence[int],
    softmax_dtype: torch.dtype,
    z: Tensor | None,
    *,
    of_encoder: bool = False,
) -> Iterator[Reads]:
    """Yield what the entries in view read, by tiles.

    Args:
        call: of the attention function.
        view: where to read.
        folded: u, the directions pulled back through the output projection [I].
        heads: which heads.
        softmax_dtype: what the model computes its weights in.
        z: the output projection's input [..., I], where a gate or a norm stands before it; None
            where z is what attention returned.
        of_encoder: whether the sources are an encoder's positions, and none of the prompt's.

    Raises:
        UnsupportedModelError: where the call does not line up with the prompt.
    """
    _check_lines_up(call, view, of_encoder=of_encoder)
    width, n_queries, n_sources = len(view.columns), call.query.shape[2], call.key.shape[2]
    n_heads, d_head = call.query.shape[1], call.value.shape[-1]
    device, dtype = call.query.device, folded.dtype
    size = max(1, _TILE_ELEMENTS // max(1, len(heads) * n_sources))
    for row, columns, tile in view.by_prompt(size, device):
        queries = columns + (n_queries - width)
        u_KI = folded.at(tile, device)
        which, gate_TI = tile.which, None
        if z is not None:
            gate_TI = gates(call, z, row, queries, dtype)
            u_KI, which = tile.spread(u_KI) * gate_TI, None
        u_HKD = u_KI.view(len(u_KI), n_heads, d_head).transpose(0, 1)
        shape = len(heads), tile.size, n_sources
        values_HTS, weights_HTS = (torch.empty(shape, dtype=dtype, device=device) for _ in "vw")
        for block in head_blocks(call, heads, tile.size):
            if gate_TI is not None:
                _checkgates(call, row, block, gate_TI.view(-1, n_heads, d_head))
            p_HTS = attention_weights(call, row, queries, block, dtype, softmax_dtype)
            given_HKS = read_values(call, row, block, u_HKD[block.heads])
            if which is not None:
                given_HKS = given_HKS.index_select(1, which)
            weights_HTS[block.place] = p_HTS
            torch.mul(p_HTS, given_HKS, out=values_HTS[block.place])
        first = 0 if of_encoder else view.columns.stop - n_sources
        yield Reads(row, tile, values_HTS, weights_HTS, first)


def read_sums(
    call: AttentionCall,
    view: View,
    folded: Directions,
    softmax_dtype: torch.dtype,
    z: Tensor | None,
    parts: Sequence[tuple[Tensor, Tensor]],
    out_CN: Tensor,
) -> None:
    """What the heads of one layer read in all, and what some terms of their values are of it.

    A term of the values is given by what makes it: v_j = B a_j, with few channels of a.

    Args:
        call: of the attention function.
        view: where to read.
        folded: as in :func:`reads`.
        softmax_dtype: the same.
        z: the same.
        parts: for each term, a [batch, S, R] of every source and B [key-value head, D, R].
        out_CN: written in place: a row for all that is read, and one for each term.

    Raises:
        UnsupportedModelError: where the call does not line up with the prompt.
    """
    _check_lines_up(call, view)
    n_heads, d_head = call.query.shape[1], call.value.shape[-1]
    n_queries, n_sources = call.query.shape[2], call.key.shape[2]
    device, dtype = call.query.device, folded.dtype
    size = max(1, _TILE_ELEMENTS // max(1, n_heads * n_sources))
    for row, columns, tile in view.by_prompt(size, device):
        queries, u_KI = columns + (n_queries - len(view.columns)), folded.at(tile, device)
        which, gate_TI = tile.which, None
        if z is not None:
            gate_TI = gates(call, z, row, queries, dtype)
            u_KI, which = tile.spread(u_KI) * gate_TI, None
        u_HKD = u_KI.view(len(u_KI), n_heads, d_head).transpose(0, 1)
        sums_CT = torch.zeros(len(out_CN), tile.size, dtype=dtype, device=device)
        for block in head_blocks(call, range(n_heads), tile.size):
            if gate_TI is not None:
                _checkgates(call, row, block, gate_TI.view(-1, n_heads, d_head))
            p_HTS = attention_weights(call, row, queries, block, dtype, softmax_dtype)
            u_BKD = u_HKD[block.heads]
            given = [read_values(call, row, block, u_BKD)]
            for a_BSR, B_VDR in parts:
                B_XDR = B_VDR[block.shared]
                w_XGR = torch.bmm(u_BKD.reshape(len(B_XDR), -1, d_head), B_XDR)
                given.append((w_XGR @ a_BSR[row].T).view(len(u_BKD), len(u_KI), -1))
            for sums_T, given_HKS in zip(sums_CT, given, strict=True):
                of_entry = given_HKS if which is None else given_HKS.index_select(1, which)
                sums_T += (p_HTS * of_entry).sum((0, 2))
        out_CN[:, tile.index] = sums_CT


def _check_lines_up(call: AttentionCall, view: View, *, of_encoder: bool = False) -> None:
    """Refuse a call whose queries are not those of the prompt.

    Raises:
        UnsupportedModelError: with both shapes.
    """
    batch, width = view.entries.prompt_shape[0], len(view.columns)
    n_queries, n_sources = call.query.shape[2], call.key.shape[2]
    fits = of_encoder or n_sources >= n_queries
    if len(call.query) != batch or n_queries < width or not fits:
        raise UnsupportedModelError(
            f"attention runs on queries of shape {list(call.query.shape)} and {n_sources} sources, "
            f"which do not line up with {width} columns of a prompt of shape "
            f"{list(view.entries.prompt_shape)}"
        )


def gates(call: AttentionCall, z: Tensor, row: int, queries: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention's output is multiplied by at some queries [T, I]; 0 where both are zero."""
    flat_a = call.output.reshape(len(call.query), -1, z.shape[-1])
    flat_z = z.reshape(len(flat_a), -1, z.shape[-1])
    a_TI = flat_a[row].index_select(0, queries).to(dtype)
    z_TI = flat_z[row].index_select(0, queries + (flat_z.shape[1] - flat_a.shape[1])).to(dtype)
    return (z_TI / a_TI).masked_fill_((a_TI == 0) & (z_TI == 0), 0)


def _checkgates(call: AttentionCall, row: int, block: HeadBlock, gate_THD: Tensor) -> None:
    """Refuse a gate that cannot be told, where what it multiplies sums to zero by chance.

    Raises:
        DecompositionError: saying so.
    """
    unclear_HD = (gate_THD[:, block.heads] == 0).any(0)
    if not bool(unclear_HD.any()):
        return
    v_VSD = call.value[row, block.shared]
    unclear_VD = unclear_HD.view(len(v_VSD), -1, unclear_HD.shape[-1]).any(1)
    if bool((v_VSD.ne(0).any(1) & unclear_VD).any()):
        raise DecompositionError(
            "attention returned exactly zero in a channel whose values are not zero, so that what "
            "its output is multiplied by cannot be told; leave this layer out (layers=), or "
            "attribute whole heads, or components"
        )
