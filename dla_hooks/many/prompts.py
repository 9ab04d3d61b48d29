"""Many prompts as the caller gave them, read one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from dla_hooks.backends import Backend
from dla_hooks.errors import InputError, ShapeMismatchError, TokenError
from dla_hooks.inputs import positions
from dla_hooks.inputs.answers import check_answers, read_ids
from dla_hooks.inputs.forms import as_tensor
from dla_hooks.inputs.plain import check_dense
from dla_hooks.inputs.prompts import Prompt, read_prompt, to_strings, tokenizer_for
from dla_hooks.many.batches import Item
from dla_hooks.residual.stream import Stream
from dla_hooks.results.ranked import Result
from dla_hooks.sources.cautions import warn_of_padding
from dla_hooks.sources.prompt import check_length

_END = object()
_UNORDERED = (set, frozenset)
_REAL = torch.ones((), dtype=torch.bool, device="cpu")  # a prompt alone has no padding


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
        answers = {name: value for name, value in answers.items() if value is not None}
        self.for_all = {name: value for name, value in answers.items() if _for_all(value)}
        self._columns = {name: v for name, v in answers.items() if name not in self.for_all}
        for name, column in self._columns.items():
            n_answers = _length(column)
            if None not in (self.total, n_answers) and n_answers != self.total:
                raise _uneven(name, f"{n_answers} for {self.total} prompts")

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


@dataclass(frozen=True)
class Reader:
    """Reads prompts and answers to ids.

    Attributes:
        backend: of the model.
        tokenizer: for strings, or None.
        prepend_bos: for strings.
        pos: the caller's.
    """

    backend: Backend
    tokenizer: Any
    prepend_bos: bool | None
    pos: Any

    def read(self, row: Row) -> Item:
        """Read one prompt as ids, without checking it against the model's limits.

        Raises:
            InputError: for a prompt or an answer that cannot be read.
        """
        tokenizer = None
        if isinstance(row.prompt, str):
            tokenizer = tokenizer_for(self.backend.model, self.tokenizer, "a prompt")
        read = read_prompt(
            row.prompt if isinstance(row.prompt, str) else _as_ids(row.prompt),
            tokenizer=tokenizer,
            attention_mask=None,
            vocabulary=self.backend.n_tokens(),
            encode=lambda text: self._encode(text, tokenizer),
        )
        if read.extras:
            raise InputError(
                f"a prompt holds {', '.join(read.extras)}, and attribute_many takes texts and "
                "token ids only; leave it out, or call a plan of prepare(...) for each prompt"
            )
        if len(read.input_ids) != 1:
            raise InputError(
                f"a prompt must be one row of token ids, got shape {list(read.input_ids.shape)}"
            )
        found = {name: self.read_answer(name, value) for name, value in row.answers.items()}
        correct, incorrect = found["answer_tokens"], found.get("incorrect_tokens")
        mask = row.prompt.get("attention_mask") if isinstance(row.prompt, Mapping) else None
        given_as_ids = not isinstance(row.prompt, str) and mask is None
        return Item(
            row.index, read.input_ids[read.mask], correct, incorrect, given_as_ids=given_as_ids
        )

    def read_answer(self, name: str, value: Any) -> Tensor:
        """One prompt's answer as ids, [] where it is one token."""
        tokenizer = self.backend.answer_tokenizer(self.tokenizer)
        ids = read_ids(value, name, self.backend.model, tokenizer)
        return ids.reshape(()) if ids.numel() == 1 else ids

    def check(self, item: Item, stream: Stream) -> Item:
        """Check one prompt against the model's limits, and count its positions.

        Raises:
            InputError: for a prompt that is too long, or answers that do not fit it.
            PositionError: when it lacks a position.
        """
        ids = item.ids[None]
        prompt = Prompt(ids, torch.ones_like(ids, dtype=torch.bool))
        check_length(stream, prompt)
        self.backend.check_prompt(prompt)
        if item.given_as_ids:
            warn_of_padding(stream, ids, self.tokenizer)
        selection = positions.select(positions.parse(self.pos, len(item.ids)), prompt.mask)
        n_entries = selection.cols.numel()
        given = {"answer_tokens": item.correct, "incorrect_tokens": item.incorrect}
        for name, tokens in given.items():
            if tokens is not None and tokens.ndim and tokens.shape != (n_entries,):
                raise ShapeMismatchError(
                    f"{name} of one prompt has shape {list(tokens.shape)}, where one token or one "
                    f"for each of its {n_entries} selected positions is expected"
                )
            if tokens is not None and n_entries:
                check_answers(tokens, _REAL.expand_as(tokens), name, stream.vocabulary)
        return replace(item, n_entries=n_entries)

    def _encode(self, text: str, tokenizer: Any) -> list[int]:
        try:
            return self.backend.encode(text, tokenizer, self.prepend_bos)
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            # One prompt of many must not end the sweep.
            raise TokenError(f"the prompt {text!r:.80} cannot be tokenized: {error}") from None


class Names:
    """Tokens as text, each made once.

    Args:
        tokenizer: or None, which names tokens by their ids.
        answers_with: names answers; a tokenizer, too, or a classifier's labels.
    """

    def __init__(self, tokenizer: Any, answers_with: Any) -> None:
        self._prompts, self._answers = _Names(tokenizer), _Names(answers_with)

    def put_on(self, result: Result, item: Item) -> Result:
        """Say in a result which prompt and answers it is of."""
        result.tokens = [self._prompts.of(item.ids.tolist())]
        result.of_tokens(len(item.ids))
        correct = item.correct.expand(item.n_entries).tolist()
        wrong = correct
        if item.incorrect is not None:
            wrong = item.incorrect.expand(item.n_entries).tolist()
        if len(set(zip(correct, wrong, strict=True))) == 1:  # one name stands for all entries
            correct, wrong = correct[:1], wrong[:1]
        result.answer = self._answers.of(correct)
        result.incorrect = None if item.incorrect is None else self._answers.of(wrong)
        return result


class _Names:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, ids: list[int]) -> list[str]:
        new = [i for i in set(ids) if i not in self._known]
        self._known.update(zip(new, to_strings(new, self._tokenizer), strict=True))
        return [self._known[i] for i in ids]


def _as_ids(prompt: Any) -> Any:
    """Turn lists and arrays of ids into a tensor; return anything else unchanged."""
    if isinstance(prompt, (Tensor, Mapping)):
        return prompt
    if not isinstance(prompt, (list, tuple)) and not hasattr(prompt, "__array__"):
        raise InputError(
            "a prompt must be a string, or token ids [pos] as a list, an array or a tensor; "
            f"got {type(prompt).__name__}: {prompt!r:.80}"
        )
    if not len(prompt):
        raise InputError("the prompt is empty: there is no position to attribute")
    return as_tensor(prompt, "a prompt", "token ids")


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


def _for_all(value: Any) -> bool:
    """True for an answer shared by all prompts, False for an iterable of answers."""
    one = isinstance(value, (str, bytes)) or not isinstance(value, Iterable)
    return one or getattr(value, "ndim", 1) == 0


def _length(values: Any) -> int | None:
    return len(values) if hasattr(values, "__len__") else None


def _uneven(name: str, count: str) -> InputError:
    return InputError(
        f"{name} must be one token for all prompts, or hold as many answers as there are prompts; "
        f"it holds {count}"
    )
