"""A stack as the final norm and the unembedding read it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dla_hooks.call import Inputs
from dla_hooks.errors import ArgumentTypeError, ShapeMismatchError
from dla_hooks.inputs.answers import read_answers
from dla_hooks.inputs.positions import parse
from dla_hooks.inputs.prompts import check_ids
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.stacks.arguments import apply_final_norm, measured, place_of, scale_at
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.own_logits import OwnLogits
from dla_hooks.targets.token_sets import TokenSets
from dla_hooks.targets.tokens import read_out


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
    check: bool = True,
    **options: Any,
) -> Tensor:
    """Normalise a stack by the scale that a norm of this run divided by.

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
        check: hold the norm's outputs against its form with that scale.
        **options: as in :func:`decompose_resid`.

    Returns:
        The normalised stack, of the same shape but for ``batch_slice``.

    Raises:
        ShapeMismatchError: (a RuntimeError) for a stack of other positions.
        DecompositionError: when the norm did something else than its form says.

    >>> from dla_hooks import decompose_resid, demo
    >>> model, tokenizer = demo.load()
    >>> stack = decompose_resid(model, "the cat", tokenizer=tokenizer)
    >>> normed = apply_ln_to_stack(model, "the cat", stack, tokenizer=tokenizer)
    >>> normed.shape == stack.shape
    True
    """
    _check_type(residual_stack)

    def measure(inputs: Inputs) -> Tensor:
        stream = inputs.stream
        place = place_of(stream, layer, mlp_input)
        kept = Kept.of(inputs, pos_slice, check)
        key = scale_at(kept, place, mlp_input)
        kept.run()
        _check_shape(residual_stack, kept, has_batch_dim)
        if recompute_ln and place == len(stream.blocks):
            return apply_final_norm(stream, _rows(residual_stack, kept, batch_slice, has_batch_dim))
        return _normalised(residual_stack, kept, key, batch_slice, has_batch_dim)

    return measured(model, input, options, measure)


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
    check: bool = True,
    **options: Any,
) -> Tensor:
    """Compute how much each vector of a stack adds to a token's logit, or to a difference of two.

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
        check: at a few positions, hold what the last stream itself adds to these tokens' logits
            against the model's own logits. A cache does not say which logits the model gave.
        **options: as in :func:`decompose_resid`.

    Returns:
        [component, *batch_and_pos]: vector . d / s, with d the final norm folded into W_U.

    Raises:
        TokenError: for what is no token of the model.
        ShapeMismatchError: (a RuntimeError) for a stack of other positions.
        DecompositionError: when the model's logits are something else.

    >>> from dla_hooks import decompose_resid, demo
    >>> model, tokenizer = demo.load()
    >>> stack = decompose_resid(model, "the cat", pos_slice=-1, tokenizer=tokenizer)
    >>> logit_attrs(model, "the cat", stack, 5, pos_slice=-1, tokenizer=tokenizer).shape
    torch.Size([10, 1])
    """
    _check_type(residual_stack)

    def measure(inputs: Inputs) -> Tensor:
        stream = inputs.stream
        answers = read_answers(
            tokens,
            incorrect_tokens,
            model=stream.model,
            tokenizer=stream.backend.answer_tokenizer(inputs.tokenizer),
        )
        for ids in (answers.correct, answers.incorrect):
            if ids is not None:
                check_ids(ids, stream.vocabulary)
        wrong = None if answers.incorrect is None else answers.incorrect.reshape(-1)
        targets = TokenSets.of(answers.correct.reshape(-1), wrong)
        centred = inputs.model.conventions(center_unembed).center_unembed
        kept = Kept.of(inputs, pos_slice, check)
        key = scale_at(kept, len(stream.blocks), False)
        own = OwnLogits(kept, key, targets)
        logits = kept.run(own.columns)
        _check_shape(residual_stack, kept, has_batch_dim)
        if logits is not None:
            own.hold(logits)
        normed = _normalised(residual_stack, kept, key, batch_slice, has_batch_dim)
        d_KM = read_out(stream, targets, center_unembed=centred).d_KM
        shape = answers.correct.shape if answers.correct.numel() > 1 else ()
        d = d_KM.reshape(*shape, -1).to(normed.device)
        if has_batch_dim and normed.ndim == 4 and d.ndim == 2 and len(d) == normed.shape[1]:
            d = d.unsqueeze(-2)  # one per row of the batch, at every position
        return (normed.to(d.dtype) * d).sum(-1)

    return measured(model, input, options, measure)


@outside_autocast
def _normalised(
    stack: Tensor, kept: Kept, key: Any, batch_slice: Any, has_batch_dim: bool
) -> Tensor:
    """A stack divided by a scale that was kept, and centred where the norm centres."""
    scale = kept[key]
    rows = _slice(batch_slice, kept)
    if rows is not None and kept.entries.batched:
        scale = scale[rows]
    if not has_batch_dim and kept.entries.batched and scale.shape[0] == 1:
        scale = scale[0]
    stack = _rows(stack, kept, batch_slice, has_batch_dim)
    if kept.norm(key).centred:
        stack = stack - stack.mean(-1, keepdim=True)
    return stack / scale.to(stack)


def _rows(stack: Tensor, kept: Kept, batch_slice: Any, has_batch_dim: bool) -> Tensor:
    rows = _slice(batch_slice, kept)
    return stack[:, rows] if has_batch_dim and rows is not None else stack


def _slice(batch_slice: Any, kept: Kept) -> Any:
    return None if batch_slice is None else parse(batch_slice, kept.inputs.source.prompt.shape[0])


def _check_type(stack: Any) -> None:
    if not isinstance(stack, Tensor) or not stack.is_floating_point():
        given = f"a tensor of {stack.dtype}" if isinstance(stack, Tensor) else type(stack).__name__
        raise ArgumentTypeError(
            "residual_stack must be a floating-point tensor [component, *batch_and_pos, d_model], "
            f"got {given}; torch.as_tensor makes one of an array"
        )


def _check_shape(stack: Tensor, kept: Kept, batched: bool) -> None:
    """Refuse a stack that does not hold the positions that were selected."""
    places = kept.entries.shape if kept.entries.batched else kept.entries.shape[1:]
    if not batched and kept.entries.batched and kept.inputs.source.prompt.shape[0] == 1:
        places = places[1:]
    expected = (*places, kept.stream.d_model)
    if stack.ndim == 0 or tuple(stack.shape[1:]) != expected:
        raise ShapeMismatchError(
            f"the stack has shape {list(stack.shape)}, but these positions of this prompt need "
            f"[component, {', '.join(map(str, expected))}]; pass the pos_slice that it was made "
            "with"
        )
