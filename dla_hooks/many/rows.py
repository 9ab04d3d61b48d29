"""Many prompts with their answers, in the caller's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from dla_hooks.errors import InputError
from dla_hooks.inputs.plain import check_dense
from dla_hooks.targets.base import Request
from dla_hooks.targets.continuation import Continuation
from dla_hooks.targets.sets import Each

_END = object()
_UNORDERED = (set, frozenset)


@dataclass(frozen=True)
class Row:
    """One prompt as it was given.

    Attributes:
        index: its place, from 0.
        prompt: as given.
        answers: its own answers, by argument name.
    """

    index: int
    prompt: Any
    answers: dict[str, Any]


class Rows:
    """Prompts with their answers, in the caller's order.

    Args:
        prompts: an iterable of prompts.
        answers: by argument name: one answer for all, an iterable with one for each, or None.

    Attributes:
        total: the number of prompts, or None while it is unknown.
        for_all: answers shared by all prompts, by argument name.
        mismatch: the error for a different number of answers than prompts, once that shows.

    Raises:
        InputError: if this is no iterable of prompts, or has another length than the answers.
    """

    def __init__(self, prompts: Any, answers: Mapping[str, Any]) -> None:
        _check_prompts(prompts)
        self.total: int | None = _length(prompts)
        self.mismatch: InputError | None = None
        for name, value in answers.items():
            if isinstance(value, (*_UNORDERED, Mapping)):
                raise InputError(
                    f"{name} must be one token for all prompts, or a list or other iterable with "
                    f"one answer for each, in their order; a {type(value).__name__} has none that "
                    "would say which prompt an answer belongs to"
                )
        self._prompts: Iterable[Any] = prompts
        answers = {name: one_each(value) for name, value in answers.items() if value is not None}
        self.for_all = {name: value for name, value in answers.items() if _for_all(value)}
        self._columns = {name: v for name, v in answers.items() if name not in self.for_all}
        for name, column in self._columns.items():
            n_answers = _length(column)
            if None not in (self.total, n_answers) and n_answers != self.total:
                raise _uneven(name, f"{n_answers} for {self.total} prompts")

    @property
    def has_columns(self) -> bool:
        """Whether some answers are each prompt's own."""
        return bool(self._columns)

    def __iter__(self) -> Iterator[Row]:
        columns = self._columns.values()
        together = zip_longest(self._prompts, *columns, fillvalue=_END)
        for index, (prompt, *own) in enumerate(together):
            answers = dict(zip(self._columns, own, strict=True))
            ended = [name for name, answer in answers.items() if answer is _END]
            if prompt is _END:
                name = next(name for name in answers if name not in ended)
                self.mismatch = _uneven(name, f"more than the {index} prompts")
                return
            if ended:
                self.mismatch = _uneven(ended[0], f"{index}, and there are more prompts")
                return
            yield Row(index, prompt, {**self.for_all, **answers})


def _check_prompts(prompts: Any) -> None:
    check_dense(prompts, "prompts")
    what = ""
    if isinstance(prompts, (str, bytes)):
        what = "one string; put it in a list"
    elif isinstance(prompts, Mapping):
        what = f"a mapping; give the column that holds them, of {sorted(map(str, prompts))}"
    elif isinstance(prompts, _UNORDERED):
        what = f"a {type(prompts).__name__}, whose order means nothing; put them in a list"
    elif getattr(prompts, "ndim", 2) < 2 and "int" in str(getattr(prompts, "dtype", "")):
        what = "one row of ids; put it in a list"
    elif not isinstance(prompts, Iterable):
        what = f"{type(prompts).__name__}: {prompts!r:.80}"
    if what:
        raise InputError(f"prompts must be an iterable of prompts, got {what}")


def one_each(value: Any) -> Any:
    """Answers that one object holds for each prompt, as a list with one for each."""
    if isinstance(value, Continuation) and len(value.rows) > 1:
        return [Continuation(row) for row in value.rows]
    if isinstance(value, Each) and len(value.shape) > 1:
        n = len(value.flat) // value.shape[0]
        lines = [value.flat[start : start + n] for start in range(0, len(value.flat), n)]
        if len(value.shape) > 2:
            lines = [_folded(line, value.shape[-1]) for line in lines]
        return Each(lines[0]) if len(lines) == 1 else [Each(line) for line in lines]
    return value


def _folded(line: list[Any], n: int) -> list[Any]:
    return [line[start : start + n] for start in range(0, len(line), n)]


def _for_all(value: Any) -> bool:
    """True for an answer shared by all prompts, False for an iterable of answers."""
    if isinstance(value, Request):
        return True
    one = isinstance(value, (str, bytes)) or not isinstance(value, Iterable)
    return one or getattr(value, "ndim", 1) == 0


def _length(values: Any) -> int | None:
    return len(values) if hasattr(values, "__len__") else None


def _uneven(name: str, count: str) -> InputError:
    return InputError(
        f"{name} must be one token for all prompts, or hold as many answers as there are prompts; "
        f"it holds {count}"
    )
