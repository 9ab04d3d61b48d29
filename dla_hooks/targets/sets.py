"""Weighted sets of tokens, means of several, and several answers to one prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError
from dla_hooks.targets.base import TokenRequest

Cell = tuple[list[int], list[float]]
"""One set: its ids and their weights."""
_MOST_AXES = 3  # batch, positions, answers


class Tokens(TokenRequest):
    """A weighted set of logits: the sum of ``weight * logit`` over its tokens.

    Given as ``answer_tokens``: one for all prompts and positions, or a list with one for each
    prompt. ``incorrect_tokens`` is then None, one token, or another set, whose sum is subtracted.

    Example:
        >>> plural = dla_hooks.Tokens({" are": 0.5, " were": 0.5, " is": -0.5, " was": -0.5})
        >>> result = direct_logit_attribution(
        ...     model, "The keys near the cabinet", plural, tokenizer=tokenizer
        ... )
        >>> bool(result.logit > 0)
        True

    Args:
        weights: of each token, a string or an id; finite numbers, not all of them 0.

    Raises:
        InputError: for anything else.
    """

    __module__ = "dla_hooks"

    def __init__(self, weights: Mapping[Any, float]) -> None:
        if not isinstance(weights, Mapping) or not weights:
            raise InputError(
                "Tokens takes a mapping from tokens (strings or ids) to weights, as "
                f'{{" are": 1, " is": -1}}; got {weights!r:.80}'
            )
        self.weights = {token: _weight(token, weight) for token, weight in weights.items()}
        if not any(self.weights.values()):
            raise InputError("every weight of Tokens is 0, so that there is nothing to attribute")

    def cell(self, read: Callable[[Any], int]) -> Cell:
        """Its ids and weights.

        Args:
            read: from a token to its id.
        """
        kept = {token: weight for token, weight in self.weights.items() if weight}
        return [read(token) for token in kept], list(kept.values())

    def __repr__(self) -> str:
        return f"Tokens({self.weights!r})"


class Mean(TokenRequest):
    """The mean logit of several tokens.

    Given as ``incorrect_tokens``, the right token is held against the mean of several wrong ones.

    Example:
        >>> result = direct_logit_attribution(
        ...     model, "The keys near the cabinet", " are", dla_hooks.Mean([" is", " was"]),
        ...     tokenizer=tokenizer,
        ... )
        >>> result.incorrect
        ["mean of ' is', ' was'"]

    Args:
        tokens: a list of strings or ids, or a tensor of ids with one axis.

    Raises:
        InputError: for anything else.
    """

    __module__ = "dla_hooks"

    def __init__(self, tokens: Any) -> None:
        given = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        nested = isinstance(given, (list, tuple)) and any(
            isinstance(one, (list, tuple, TokenRequest)) for one in given
        )
        if not isinstance(given, (list, tuple)) or not given or nested:
            raise InputError(
                f"Mean takes a list of at least one token (strings or ids); got {tokens!r:.80}"
            )
        self.tokens = list(given)

    def cell(self, read: Callable[[Any], int]) -> Cell:
        """Its ids and weights.

        Args:
            read: from a token to its id.
        """
        n = len(self.tokens)
        return [read(token) for token in self.tokens], [1 / n] * n

    def __repr__(self) -> str:
        return f"Mean({self.tokens!r})"


class Each(TokenRequest):
    """Several answers to each prompt: the result has a last axis with one entry for each.

    ``attribution`` is then [row, batch, n] for a single position and [row, batch, pos', n]
    otherwise. ``incorrect_tokens`` is another ``Each`` of the same shape, or a token or mean that
    is subtracted from every answer. ``result.each(i)`` is the result for one of the answers.

    Example:
        >>> result = direct_logit_attribution(
        ...     model, "The keys near the cabinet", dla_hooks.Each([" are", " were"]),
        ...     tokenizer=tokenizer,
        ... )
        >>> result.logit.shape, result.answer
        (torch.Size([1, 2]), [' are', ' were'])

    Args:
        answers: a list of n answers for all prompts, or one such list for each prompt; or one for
            each prompt and position; or a tensor of ids with these axes. An answer is a string, an
            id, :class:`Tokens` or :class:`Mean`.

    Raises:
        InputError: for anything else.
        ShapeMismatchError: when prompts have different numbers of answers.
    """

    __module__ = "dla_hooks"

    def __init__(self, answers: Any) -> None:
        if hasattr(answers, "tolist") and not isinstance(answers, Tensor):
            answers = answers.tolist()
        if isinstance(answers, Tensor):
            answers = answers.tolist() if answers.numel() else []
        if not isinstance(answers, (list, tuple)) or not answers:
            raise InputError(
                "Each takes a list of answers, or such a list for each prompt, as "
                f'[[" are", " is"], [" was", " were"]]; got {answers!r:.80}'
            )
        self.shape, self.flat = _grid(answers)

    def __repr__(self) -> str:
        return f"Each(<{' x '.join(map(str, self.shape))} answers>)"


def _weight(token: Any, weight: Any) -> float:
    try:
        value = math.nan if isinstance(weight, (bool, str)) else float(weight)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"the weight of {token!r:.40} in Tokens must be a finite number, got {weight!r:.40}"
        )
    return value


def _grid(values: Any) -> tuple[list[int], list[Any]]:
    """Nested lists as their shape and their items."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        return [], [values]
    parts = [_grid(value) for value in values]
    shapes = [shape for shape, _ in parts]
    if any(shape != shapes[0] for shape in shapes) or 0 in (len(parts), *shapes[0]):
        raise ShapeMismatchError(
            "Each needs as many answers for every prompt, and at least one; got lines of "
            f"{[shape[0] if shape else 1 for shape in shapes]}. Attribute prompts with other "
            "numbers of answers in calls of their own"
        )
    if len(shapes[0]) >= _MOST_AXES:
        raise ShapeMismatchError(
            "Each takes at most three axes: prompts, positions and the answers; got more"
        )
    return [len(parts), *shapes[0]], [item for _, flat in parts for item in flat]
