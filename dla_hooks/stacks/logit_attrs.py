"""A stack as the final norm and the unembedding read it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dla_hooks.errors import ShapeMismatchError
from dla_hooks.inputs.answers import read_answers
from dla_hooks.inputs.positions import parse
from dla_hooks.inputs.prompts import check_ids
from dla_hooks.stacks.arguments import (
    apply_final_norm,
    inputs_of,
    layer_of,
    scale_at,
)
from dla_hooks.stacks.kept import Kept
from dla_hooks.targets.tokens import TokenPairs, read_out


def apply_ln_to_stack(
    model: Any,
    input: Any,
    residual_stack: Tensor,
    layer: int | None = None,
    mlp_input: bool = False,
    pos_slice: Any = None,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
    recompute_ln: bool = False,
    **options: Any,
) -> Tensor:
    """A stack normalised by the scale that a norm of this run divided by.

    Args:
        model: as in :func:`decompose_resid`.
        input: the prompt whose scales are used.
        residual_stack: [component, *batch_and_pos, d_model], already of these positions.
        layer: whose norm; None, -1 or n_layers for the final one.
        mlp_input: the norm before that block's MLP instead of its attention.
        pos_slice: the positions that the stack holds.
        batch_slice: the rows of the batch to take, of the stack too.
        has_batch_dim: whether the stack has an axis for the batch.
        recompute_ln: apply the final norm itself to each entry instead (final layer only).
        **options: as in :func:`decompose_resid`.

    Returns:
        The normalised stack, of the same shape but for ``batch_slice``.
    """
    inputs = inputs_of(model, input, options)
    stream = inputs.stream
    end = layer_of(stream, layer, mlp_input)
    kept = Kept.of(inputs, pos_slice)
    key = scale_at(kept, end, mlp_input)
    kept.run()
    _check_stack(residual_stack, kept, has_batch_dim, inputs.source.prompt.shape[0])
    rows = _slice(batch_slice, inputs.source.prompt.shape[0])
    if has_batch_dim and rows is not None:
        residual_stack = residual_stack[:, rows]
    if recompute_ln and end == len(stream.blocks):
        return apply_final_norm(stream, residual_stack)
    scale = kept[key]
    if rows is not None and kept.entries.batched:
        scale = scale[rows]
    if not has_batch_dim and kept.entries.batched and scale.shape[0] == 1:
        scale = scale[0]
    if kept.norm(key).centred:
        residual_stack = residual_stack - residual_stack.mean(-1, keepdim=True)
    return residual_stack / scale.to(residual_stack)


def logit_attrs(
    model: Any,
    input: Any,
    residual_stack: Tensor,
    tokens: Any,
    incorrect_tokens: Any = None,
    pos_slice: Any = None,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
    center_unembed: bool | None = None,
    **options: Any,
) -> Tensor:
    """How much each vector of a stack adds to a token's logit, or to a difference of two.

    Args:
        model: as in :func:`decompose_resid`.
        input: the prompt whose final scale is used.
        residual_stack: [component, *batch_and_pos, d_model], already of these positions.
        tokens: as ``answer_tokens`` of :func:`direct_logit_attribution`.
        incorrect_tokens: of the same shape, or None.
        pos_slice: the positions that the stack holds.
        batch_slice: the rows of the batch to take, of the stack too.
        has_batch_dim: whether the stack has an axis for the batch.
        center_unembed: as in :func:`direct_logit_attribution`.
        **options: as in :func:`decompose_resid`.

    Returns:
        [component, *batch_and_pos]: vector . d / s, with d the final norm folded into W_U.
    """
    normed = apply_ln_to_stack(
        model,
        input,
        residual_stack,
        pos_slice=pos_slice,
        batch_slice=batch_slice,
        has_batch_dim=has_batch_dim,
        **options,
    )
    inputs = inputs_of(model, input, options)
    answers = read_answers(
        tokens, incorrect_tokens, model=inputs.stream.model, tokenizer=inputs.tokenizer
    )
    for ids in (answers.correct, answers.incorrect):
        if ids is not None:
            check_ids(ids, inputs.stream.vocabulary)
    flat = TokenPairs(
        answers.correct.reshape(-1),
        None if answers.incorrect is None else answers.incorrect.reshape(-1),
    )
    center_unembed = inputs.model.conventions(center_unembed).center_unembed
    d_KM = read_out(inputs.stream, flat, center_unembed=center_unembed).d_KM
    shape = answers.correct.shape if answers.correct.numel() > 1 else ()
    d = d_KM.reshape(*shape, -1).to(normed.device)
    if has_batch_dim and normed.ndim == 4 and d.ndim == 2 and len(d) == normed.shape[1]:
        d = d.unsqueeze(-2)  # one per row of the batch, at every position
    normed = normed.to(d.dtype)
    return (normed * d).sum(-1)


def _check_stack(stack: Tensor, kept: Kept, batched: bool, batch: int) -> None:
    """Refuse a stack that does not hold the positions that were selected."""
    places = kept.entries.shape if kept.entries.batched else kept.entries.shape[1:]
    if not batched and kept.entries.batched and batch == 1:
        places = places[1:]
    expected = (*places, kept.stream.d_model)
    if tuple(stack.shape[1:]) != expected:
        raise ShapeMismatchError(
            f"the stack has shape {list(stack.shape)}, but these positions of this prompt need "
            f"[component, {', '.join(map(str, expected))}]; pass the pos_slice that it was made "
            "with"
        )


def _slice(batch_slice: Any, batch: int) -> Any:
    return None if batch_slice is None else parse(batch_slice, batch)
