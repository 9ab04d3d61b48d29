"""Positions that differ from prompt to prompt: given row by row, or by a span of the text."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dla_hooks.errors import InputError, ShapeMismatchError


class PerRow:
    """Positions of each prompt's own, given as ``pos``.

    With one int for each prompt the result has no position axis. With one list for each, all of
    one length, it has an axis pos' of that length. Positions are counted among a row's real tokens;
    negative ones count from the end.

    Example:
        >>> prompts = ["The keys near the cabinet", "The dogs"]
        >>> result = direct_logit_attribution(
        ...     model, prompts, " are", pos=dla_hooks.PerRow([1, -1]), tokenizer=tokenizer
        ... )
        >>> result.positions.tolist()
        [1, 1]

    Args:
        rows: any iterable of ints, or of lists of ints; one for each prompt.

    Raises:
        InputError: for anything else.
        ShapeMismatchError: for lists of different lengths.
    """

    __module__ = "dla_hooks"

    def __init__(self, rows: Any) -> None:
        if hasattr(rows, "tolist"):
            rows = rows.tolist()
        if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
            raise InputError(
                f"PerRow takes one int, or one list of ints, for each prompt; got {rows!r:.80}"
            )
        self.rows = [_row(row) for row in rows]
        lengths = {len(row) if isinstance(row, list) else -1 for row in self.rows}
        if len(lengths) > 1:
            raise ShapeMismatchError(
                "PerRow takes an int for every prompt, or lists of one length, so that the result "
                f"has one shape; got lengths {sorted(lengths)} (-1: an int). Select spans of "
                "different lengths with dla_hooks.Span"
            )

    @classmethod
    def of_any_length(cls, rows: Sequence[Sequence[int]]) -> PerRow:
        """Positions of rows that need not have as many; shorter ones are padded."""
        made = cls([])
        made.rows = [list(row) for row in rows]
        return made

    @property
    def one_position(self) -> bool:
        """Whether each prompt has a single position, so that the result has no axis for it."""
        return not any(isinstance(row, list) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerRow) and self.rows == other.rows

    def __hash__(self) -> int:
        return hash(repr(self.rows))

    def __repr__(self) -> str:
        return f"PerRow({self.rows!r:.200})"


class Span:
    """The tokens that a piece of the text covers, given as ``pos``.

    ``Span("the store")`` is a piece that the prompt holds once; where it holds it several times,
    ``nth`` says which. ``Span(4, 13)`` are characters. The tokenizer says which characters a token
    stands for; every token that has one of them is selected. Prompts may have different numbers of
    such tokens: the result is padded with NaN.

    Example:
        >>> result = direct_logit_attribution(
        ...     model, "The keys near the cabinet", " are", pos=dla_hooks.Span("the cabinet"),
        ...     tokenizer=tokenizer,
        ... )
        >>> result.positions.tolist()
        [[3, 4]]

    Args:
        text: a piece of the prompt; or the first character.
        stop: the character after the last, where the first is given.
        nth: which of several occurrences of the piece, from 0; negative ones count from the end.

    Raises:
        InputError: for anything else.
    """

    __module__ = "dla_hooks"

    def __init__(self, text: str | int, stop: int | None = None, *, nth: int | None = None) -> None:
        self.text = text if isinstance(text, str) else None
        self.start, self.stop, self.nth = 0, 0, nth
        if isinstance(text, str):
            if not text or stop is not None:
                raise InputError(
                    f"Span takes a piece of text, or two characters; got {text!r:.40}, {stop!r}"
                )
            if nth is not None:
                self.nth = _int(nth, "nth")
            return
        if nth is not None or stop is None:
            raise InputError(
                'Span takes a piece of text, as Span("the store", nth=0), or the first character '
                f"and the one after the last, as Span(4, 13); got {text!r:.40}, {stop!r}"
            )
        self.start, self.stop = _int(text, "the first character"), _int(stop, "the stop")
        if not 0 <= self.start < self.stop:
            raise InputError(f"Span({self.start}, {self.stop}) holds no character")

    def tokens(self, text: str, ids: Sequence[int], encode: Callable[[str], Any]) -> list[int]:
        """The positions of its tokens.

        Args:
            text: the prompt.
            ids: its tokens, as the model reads them.
            encode: the tokenizer's encoding of a text, with offsets.

        Raises:
            InputError: for a piece that is not there, or there several times without ``nth``.
        """
        start, stop = self._characters(text)
        ahead, offsets = _offsets(text, ids, encode)
        found = [
            ahead + place
            for place, (first, after) in enumerate(offsets)
            if first < stop and after > start and after > first
        ]
        if not found:
            raise InputError(
                f"no token of the prompt {text!r:.80} stands for the characters {start} to {stop}"
            )
        return found

    def _characters(self, text: str) -> tuple[int, int]:
        if self.text is None:
            if self.stop > len(text):
                raise InputError(
                    f"Span({self.start}, {self.stop}) goes beyond the prompt {text!r:.80}, which "
                    f"has {len(text)} characters"
                )
            return self.start, self.stop
        places, place = [], text.find(self.text)
        while place >= 0:
            places.append(place)
            place = text.find(self.text, place + 1)
        if not places:
            raise InputError(f"the prompt {text!r:.80} does not hold {self.text!r:.80}")
        if self.nth is None and len(places) > 1:
            raise InputError(
                f"the prompt {text!r:.80} holds {self.text!r:.80} {len(places)} times; say which "
                f"with Span({self.text!r:.80}, nth=0)"
            )
        nth = self.nth or 0
        if not -len(places) <= nth < len(places):
            raise InputError(
                f"the prompt {text!r:.80} holds {self.text!r:.80} {len(places)} times, so nth goes "
                f"from {-len(places)} to {len(places) - 1}; got {nth}"
            )
        return places[nth], places[nth] + len(self.text)

    def __repr__(self) -> str:
        if self.text is None:
            return f"Span({self.start}, {self.stop})"
        return f"Span({self.text!r}{'' if self.nth is None else f', nth={self.nth}'})"


def encoder(tokenizer: Any, prepend_bos: bool | None) -> Callable[[str], Any]:
    """A tokenizer's encoding of a text, with the characters of each token.

    Raises:
        InputError: for a tokenizer that does not know them.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"pos=Span(...) needs a tokenizer that says which characters a token stands for (a "
            f"fast one), and {type(tokenizer).__name__} does not; give positions, as an int or a "
            "list"
        )

    def encode(text: str) -> Any:
        return tokenizer(text, add_special_tokens=prepend_bos is None, return_offsets_mapping=True)

    return encode


def _offsets(
    text: str, ids: Sequence[int], encode: Callable[[str], Any]
) -> tuple[int, list[tuple[int, int]]]:
    """How many tokens stand ahead of those that the tokenizer makes, and the characters of each."""
    encoded = encode(text)
    own = torch.as_tensor(encoded["input_ids"], device="cpu").tolist()
    given = list(ids)
    for ahead in (0, 1):  # a BOS
        if given[ahead:] == own:
            return ahead, [tuple(pair) for pair in encoded["offset_mapping"]]
    for fewer in (1, 2):
        if own[fewer:] == given:  # special tokens that the model's own reading leaves out
            return 0, [tuple(pair) for pair in encoded["offset_mapping"]][fewer:]
    raise InputError(
        f"the tokens of {text!r:.80} are not those that its tokenizer makes of it, so that a Span "
        "cannot be found among them; give positions, as an int or a list"
    )


def _row(row: Any) -> int | list[int]:
    if hasattr(row, "tolist"):
        row = row.tolist()
    if isinstance(row, (list, tuple, range)):
        return [_int(item, "a position") for item in row]
    return _int(row, "a position")


def _int(value: Any, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{what} must be an int, got {value!r:.80}") from None
