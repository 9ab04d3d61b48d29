"""Answers: the token whose logit is attributed, at each position.

:func:`read_answers` brings every form of ``answer_tokens`` and ``incorrect_tokens`` to ids.
:func:`over_positions` broadcasts them over the selected positions. The rule is TransformerLens':
positions are selected first, then the tokens align with the last axes of [component, batch, pos'].
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError, TokenError
from dla_hooks.inputs.plain import check_dense, check_text
from dla_hooks.inputs.prompts import tokenizer_for


@dataclass(frozen=True)
class Answers:
    """Token ids as given, before they are laid over positions.

    Attributes:
        correct: ids of any shape up to [batch, pos'].
        incorrect: ids of the same shape, or None for the logit itself.
    """

    correct: Tensor
    incorrect: Tensor | None


def read_answers(
    answer_tokens: Any, incorrect_tokens: Any, *, model: Any, tokenizer: Any
) -> Answers:
    """Read ``answer_tokens`` and ``incorrect_tokens``.

    Args:
        answer_tokens: a string of one token, an int, a list of either, or an integer tensor.
        incorrect_tokens: the same form and shape, or None.
        model: asked for a tokenizer when none is given.
        tokenizer: needed for strings.

    Raises:
        InputError: for any other type, or when the two shapes differ.
        TokenError: for a string that is not one token.
    """
    correct = read_ids(answer_tokens, "answer_tokens", model, tokenizer)
    if incorrect_tokens is None:
        return Answers(correct, None)
    incorrect = read_ids(incorrect_tokens, "incorrect_tokens", model, tokenizer)
    if incorrect.shape != correct.shape:
        raise ShapeMismatchError(
            f"incorrect_tokens has shape {list(incorrect.shape)}, but answer_tokens has "
            f"{list(correct.shape)}; the two must be equal (a string or int counts as [])"
        )
    return Answers(correct, incorrect)


def check_answers(ids: Tensor, valid: Tensor, name: str, vocabulary: int) -> Tensor:
    """Check that ids are tokens of the model; at padding any id is allowed.

    Raises:
        TokenError: naming the first id that is no token of the model.
    """
    outside = (ids < 0) | (ids >= vocabulary)
    bad = ids[outside & valid] if valid.numel() else ids[outside]
    if bad.numel():
        raise TokenError(
            f"{name} holds token id {int(bad[0])}, which is outside the model's vocabulary "
            f"(0 to {vocabulary - 1})"
        )
    return ids.masked_fill(outside, 0)


def over_positions(ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape answers so that they broadcast against the selected positions.

    Args:
        ids: of shape [], [batch], [pos'], [1, pos'], [batch, 1] or [batch, pos'].
        shape: of the selected positions, [batch] (a single position) or [batch, pos'].

    Raises:
        ShapeMismatchError: when they do not broadcast; it names both shapes.
    """
    if ids.numel() == 1:
        return ids.reshape(())
    batch, one_position = shape[0], len(shape) == 1
    fits: Tensor | None = None
    if one_position:
        # The position axis is gone; a two-axis form keeps its meaning if one axis is 1.
        flat = ids.reshape(-1) if ids.ndim == 1 or (ids.ndim == 2 and 1 in ids.shape) else None
        if flat is not None and (len(flat) == batch or batch == 1):
            fits = flat
    elif ids.ndim == 1:
        if len(ids) == batch > 1:
            fits = ids[:, None]
        elif len(ids) == shape[1] or shape[1] == 1:
            fits = ids[None]
    elif ids.ndim == 2 and all(
        given == have or 1 in (given, have) for given, have in zip(ids.shape, shape, strict=True)
    ):
        fits = ids
    if fits is None:
        axes = "[batch]" if one_position else "[batch, pos']"
        raise ShapeMismatchError(
            f"answers of shape {list(ids.shape)} do not fit the selected positions, which have "
            f"shape {axes} = {list(shape)}; give one token, or a shape that broadcasts "
            "(positions are selected first: answers are not sliced by pos). Several answers to one "
            "prompt are dla_hooks.Each([[...], ...]), and a weighted set of tokens is "
            "dla_hooks.Tokens({token: weight})"
        )
    return fits


def read_ids(value: Any, name: str, model: Any, tokenizer: Any) -> Tensor:
    """Read one argument's tokens as ids, in their given shape.

    Args:
        value: a string of one token, an int, a list of either, or an integer tensor.
        name: of the argument, for messages.
        model: asked for a tokenizer when none is given.
        tokenizer: needed for strings.

    Raises:
        InputError: for any other type.
        TokenError: for a string that is not one token.
    """
    check_dense(value, name)
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"{name} must hold integer token ids, got a tensor of {value.dtype}")
        if value.numel() == 0:
            raise InputError(f"{name} is empty")
        ids = value.detach().to("cpu", torch.long)
    elif isinstance(value, list):
        if not value:
            raise InputError(f"{name} is empty")
        ids = torch.tensor(
            [_read_one(item, name, model, tokenizer) for item in value], device="cpu"
        )
    else:
        ids = torch.tensor(_read_one(value, name, model, tokenizer), device="cpu")
    return ids


def _read_one(value: Any, name: str, model: Any, tokenizer: Any) -> int:
    if isinstance(value, str):
        return single_token(value, name, tokenizer_for(model, tokenizer, name))
    if not isinstance(value, bool) and getattr(value, "ndim", 0) == 0:
        try:
            # Ids beyond 64 bits are outside every vocabulary, and beyond a tensor.
            return max(-(2**62), min(operator.index(value), 2**62))
        except TypeError:
            pass  # no integer of any kind: refused with everything else
    if isinstance(value, (list, tuple)):
        raise InputError(
            f"{name} holds a list within a list: a tensor lays one token over each position, and "
            f"dla_hooks.Each asks for several answers per prompt; got {value!r:.80}"
        )
    raise InputError(
        f"{name} must be a string of one token, an int, a list of these, or an integer tensor "
        f"(torch.as_tensor makes one of an array); got {type(value).__name__}: {value!r:.80}"
    )


def single_token(text: str, name: str, tokenizer: Any) -> int:
    """Return the id of a string that is one token.

    Raises:
        TokenError: when it is none, several (shows the pieces), or unknown.
    """
    check_text(text, name)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) == 1 and (ids[0] != unknown or text == getattr(tokenizer, "unk_token", None)):
        return int(ids[0])
    respaced = text[1:] if text.startswith(" ") else f" {text}"
    other = list(tokenizer.encode(respaced, add_special_tokens=False)) if respaced.strip() else []
    hint = ""
    if len(other) == 1 and other[0] != unknown:
        hint = f"; {respaced!r} is a single token: mind the leading space"
    if not ids:
        raise TokenError(f"{name} {text!r} is no token at all{hint}")
    if len(ids) == 1 or unknown in ids:
        raise TokenError(f"{name} {text!r} is not in the tokenizer's vocabulary{hint}")
    pieces = ", ".join(repr(str(tokenizer.decode([i]))) for i in ids)
    raise TokenError(
        f"{name} {text!r} is {len(ids)} tokens ({pieces}), and a logit belongs to one{hint}. "
        "Choose one of the pieces, or a shorter answer."
    )
