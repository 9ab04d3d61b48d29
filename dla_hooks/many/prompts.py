"""Many prompts as the caller gave them, read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dla_hooks.backends import Backend
from dla_hooks.errors import InputError, ShapeMismatchError, TokenError
from dla_hooks.inputs import positions
from dla_hooks.inputs.answers import check_answers, read_ids
from dla_hooks.inputs.extras import EMBEDS, MASK, OF_TEXT
from dla_hooks.inputs.forms import as_tensor
from dla_hooks.inputs.positions import Selection
from dla_hooks.inputs.prompts import Prompt, read_prompt, tokenizer_for
from dla_hooks.inputs.rows_of_positions import PerRow, Span, encoder
from dla_hooks.many.batches import Item
from dla_hooks.many.questions import Asking, OneForAll, put
from dla_hooks.many.rows import Row, Rows
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.cautions import warn_of_padding, warn_of_unknown
from dla_hooks.sources.prompt import check_length
from dla_hooks.targets.base import Request
from dla_hooks.targets.question import Question, read_question

_TAKEN = OF_TEXT - {EMBEDS, MASK}
_NOTHING = torch.zeros((), dtype=torch.long, device="cpu")
_REAL = torch.ones((), dtype=torch.bool, device="cpu")  # a prompt alone has no padding


@dataclass(frozen=True)
class Reader:
    """Reads prompts and answers to ids.

    Attributes:
        backend: of the model.
        tokenizer: for strings, or None.
        prepend_bos: for strings.
        pos: the caller's.
        centred: whether the vocabulary's mean is taken off every row of W_U.
    """

    backend: Backend
    tokenizer: Any
    prepend_bos: bool | None
    pos: Any
    centred: bool = False

    def read_for_all(self, rows: Rows) -> None:
        """Read the answers that all prompts share, once.

        Raises:
            InputError: for an answer that cannot be read.
        """
        shared = rows.for_all
        if any(isinstance(value, Request) for value in shared.values()):
            if not rows.has_columns:
                rows.for_all = {"question": self.read_question(shared)}
            return
        rows.for_all = {name: self.read_answer(name, value) for name, value in shared.items()}

    def trial(self, rows: Rows) -> dict[str, Any]:
        """Answers to try the model out with: those that all prompts share, and token 0."""
        shared = rows.for_all
        if any(isinstance(value, Request) for value in shared.values()):
            return {"question": self.read_question({"answer_tokens": 0, **shared})}
        return shared

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
        if isinstance(row.prompt, str):
            warn_of_unknown(read.input_ids, tokenizer, row.prompt)
        if read.extras and (read.extras.keys() - _TAKEN or not bool(read.mask.all())):
            raise InputError(
                f"a prompt holds {', '.join(read.extras)}, and beside token ids without padding "
                f"attribute_many takes {' and '.join(sorted(_TAKEN))} only; call a plan of "
                "prepare(...) for each such prompt"
            )
        if len(read.input_ids) != 1:
            raise InputError(
                f"a prompt must be one row of token ids, got shape {list(read.input_ids.shape)}"
            )
        question = row.answers.get("question")
        if question is None and any(isinstance(own, Request) for own in row.answers.values()):
            question = self.read_question(row.answers)
        correct, incorrect = _NOTHING, None
        if question is None:
            found = {name: self.read_answer(name, value) for name, value in row.answers.items()}
            correct, incorrect = found["answer_tokens"], found.get("incorrect_tokens")
        mask = row.prompt.get("attention_mask") if isinstance(row.prompt, Mapping) else None
        given_as_ids = not isinstance(row.prompt, str) and mask is None
        ids, columns = read.input_ids[read.mask], None
        if isinstance(self.pos, Span):
            if not isinstance(row.prompt, str):
                raise InputError(
                    f"pos={self.pos!r:.80} needs prompts that are strings, got "
                    f"{type(row.prompt).__name__}; give positions, as an int or a list"
                )
            encode = encoder(tokenizer, self.prepend_bos)
            columns = self.pos.tokens(row.prompt, ids.tolist(), encode)
        elif isinstance(self.pos, PerRow):
            if row.index >= len(self.pos):
                raise InputError(
                    f"PerRow holds positions of {len(self.pos)} prompts, and there are more; give "
                    "one int, or one list, for each"
                )
            own = self.pos.rows[row.index]
            columns = own if isinstance(own, list) else [own]
        return Item(
            row.index,
            ids,
            correct,
            incorrect,
            given_as_ids=given_as_ids,
            question=question,
            columns=columns,
            extras=read.extras,
        )

    def read_question(self, answers: Mapping[str, Any]) -> Asking:
        """One prompt's question, or that of all, where it is no plain token.

        Raises:
            InputError: for tokens that cannot be read, or beside a target that is none.
        """
        given, wrong = answers["answer_tokens"], answers.get("incorrect_tokens")
        question = read_question(
            given,
            wrong,
            model=self.backend.model,
            tokenizer=self.backend.answer_tokenizer(self.tokenizer),
            centred=self.centred,
        )
        return question if isinstance(question, Question) else OneForAll(given)

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
        prompt = replace(_alone(item.ids), extras=item.extras)
        check_length(stream, prompt)
        self.backend.check_prompt(prompt)
        if item.given_as_ids:
            warn_of_padding(stream, prompt.input_ids, self.tokenizer)
        selection = self._selection(item, prompt)
        if item.question is not None:
            return self._put(item, selection, stream)
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

    def settled(self, item: Item) -> Item:
        """One prompt whose result is stored, as it was checked in the run that made it."""
        if item.question is None:
            return item
        return self._put(item, self._selection(item, _alone(item.ids)), None)

    def _selection(self, item: Item, prompt: Prompt) -> Selection:
        if item.columns is not None:
            return positions.select(list(item.columns), prompt.mask)
        return positions.select(positions.parse(self.pos, len(item.ids)), prompt.mask)

    def _put(self, item: Item, selection: Selection, stream: Stream | None) -> Item:
        """A prompt whose question is no plain token, at its own positions where it has such."""
        assert item.question is not None
        follows = item.question.follows is not None
        own = put(item.question, item.ids, selection, stream, self.pos)
        if follows and stream is not None:
            check_length(stream, _alone(own.ids))
        moved = own.question is not item.question
        return replace(
            item,
            ids=own.ids,
            question=own.question,
            n_entries=len(own.columns),
            columns=own.columns if moved else item.columns,
            follows=follows,
            given=item,
        )

    def _encode(self, text: str, tokenizer: Any) -> list[int]:
        try:
            return self.backend.encode(text, tokenizer, self.prepend_bos)
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            # One prompt of many must not end the sweep.
            raise TokenError(f"the prompt {text!r:.80} cannot be tokenized: {error}") from None


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


def _alone(ids: Tensor) -> Prompt:
    """A prompt by itself, without padding."""
    return Prompt(ids[None], torch.ones_like(ids[None], dtype=torch.bool))
