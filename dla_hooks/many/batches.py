"""Batches of many prompts: their composition, their padding, and their results.

Decided here: which prompts run together, and what happens when a batch fails or memory runs out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dla_hooks.attribution import Plan, prepare
from dla_hooks.backends import Backend
from dla_hooks.calibration.invariance import length_limits, padding_is_ignored
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.errors import DecompositionError, DLAError, InputError, UnsupportedModelError
from dla_hooks.inputs.forms import pad_left
from dla_hooks.inputs.rows_of_positions import PerRow
from dla_hooks.many.order import batches_of
from dla_hooks.many.questions import Asking, OneForAll, together
from dla_hooks.modules.user_hooks import hooked_modules
from dla_hooks.residual.stream import Stream
from dla_hooks.results.ranked import RankedAttribution, Result
from dla_hooks.verification.recognise import stream_of


@dataclass(frozen=True)
class Item:
    """One prompt among many, as token ids.

    Attributes:
        index: its place in the caller's order, from 0.
        ids: its tokens [pos].
        correct: its answer [], or one for each selected position [pos'].
        incorrect: the same for the incorrect tokens, or None.
        n_entries: how many positions are selected; 1 for a single one.
        given_as_ids: whether it was given as ids without a mask.
        follows: whether tokens were put behind it.
        question: what is asked, where that is no plain token; ``correct`` then says nothing.
        columns: the selected positions, where prompts have their own; else None.
        given: the same before its question was put to the prompt, or None.
        extras: further arguments of the model's forward that it runs with, by itself.
    """

    index: int
    ids: Tensor
    correct: Tensor
    incorrect: Tensor | None
    n_entries: int = 1
    given_as_ids: bool = False
    follows: bool = False
    question: Asking | None = None
    columns: Sequence[int] | None = None
    given: Item | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


def side_by_side(answers: Sequence[Tensor], items: Sequence[Item], *, one_position: bool) -> Tensor:
    """Arrange the answers of a batch's prompts over the selected positions.

    Args:
        answers: of each item, [] or [pos'].
        items: in the order of the batch.
        one_position: whether the result has no position axis.

    Returns:
        Ids [batch], [batch, 1] where no prompt has more than one answer, or [batch, pos'].
    """
    if all(ids.ndim == 0 for ids in answers):
        column = torch.stack(list(answers))
        return column if one_position else column[:, None]
    pairs = zip(answers, items, strict=True)
    return pad_left([ids.expand(item.n_entries) for ids, item in pairs])[0]


def split(batch: Result) -> Iterator[Result]:
    """Split the result of a batch that is padded on the left into one result per row.

    The numbers are copies on the CPU, so that the batch can be freed. ``gap`` and
    ``logit_gap`` are the batch's: the largest of its rows. Tokens and answers are left out.
    """
    positions = batch.positions
    if batch.several:
        positions = positions[..., 0]
    width = positions.shape[-1]
    real = (positions >= 0).reshape(len(positions), -1).sum(-1)
    for row, n_real in enumerate(real.tolist()):
        place: tuple[slice, ...] = (slice(row, row + 1),)
        if positions.ndim > 1:
            place += (slice(width - n_real, width),)
        single = batch.at(place)
        if isinstance(single, RankedAttribution) and isinstance(batch, RankedAttribution):
            # Padding alone is left out, so that the means stay what they are.
            means = batch.prompt_means
            single.prompt_means = None if means is None else means[:, row : row + 1]
        for name, value in vars(single).items():
            if isinstance(value, Tensor):
                setattr(single, name, value.cpu().clone())
        if single.seen is not None:
            single.seen = single.seen.changed(_copied, _copied)
        single.beside = {name: value.cpu().clone() for name, value in single.beside.items()}
        single.tokens, single.answer, single.incorrect = [], [], None
        yield single


def _copied(value: Tensor) -> Tensor:
    return value.cpu().clone()


class Runner:
    """Runs prompts in batches.

    Args:
        backend: of the model.
        options: of every call.
        max_tokens: the most tokens in a batch. It shrinks when a batch runs out of memory.
    """

    def __init__(self, backend: Backend, options: dict[str, Any], max_tokens: int) -> None:
        self._backend = backend
        options = dict(options)
        self._pos, self._chunk_size = options.pop("pos"), options.pop("chunk_size")
        self._prepare: Callable[..., Plan] = partial(prepare, backend.model, **options)
        self._kept: tuple[Any, Plan] | None = None
        self._one_position = isinstance(self._pos, int) or (
            isinstance(self._pos, PerRow) and self._pos.one_position
        )
        self._max_tokens = max_tokens

    @cached_property
    def stream(self) -> Stream:
        """The located model. It is located only when a prompt has to run."""
        return stream_of(self._backend.model)

    def try_out(self, answers: dict[str, Any]) -> None:
        """Run a few synthetic tokens, so that errors of every prompt show at once."""
        nothing = torch.tensor(0, device="cpu")
        question = answers.get("question")
        answer = answers.get("answer_tokens", nothing)
        incorrect = answers.get("incorrect_tokens", nothing)
        prompt = short_prompt(self.stream)
        # A failed check may be due to these tokens alone, so it is left to the prompts. So are the
        # caller's hooks.
        with contextlib.suppress(DecompositionError), self._backend.without_user_hooks():
            if question is None:
                plan = self._plan(answer, incorrect)
            else:
                plan = self._asking(question.known() if self._pos != -1 else question)
            plan(prompt.input_ids, attention_mask=prompt.mask, chunk_size=self._chunk_size)

    def outcomes(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result | DLAError]]:
        """Yield every prompt with its result (still without texts) or its error, by batches."""
        lengths = [len(item.ids) for item in items]
        same_length = len(set(lengths)) > 1 and not self._may_pad()
        limits = length_limits(self.stream)
        order = batches_of(
            lengths, self._max_tokens, same_length=same_length, longest_padded=limits.longest_padded
        )
        if limits.grows:
            order.reverse()
        pending = [part for one in order for part in _by_extras([items[i] for i in one])][::-1]
        while pending:
            batch = pending.pop()
            n_tokens = len(batch) * max(len(item.ids) for item in batch)
            failure: DLAError | None = None
            if len(batch) == 1 or n_tokens <= self._max_tokens:
                try:
                    results = self._run(batch)
                except DLAError as error:
                    failure = freed(error)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not ran_out_of_memory(error):
                        raise
                    failure = _out_of_memory(error, n_tokens)
                    if len(batch) > 1:
                        self._max_tokens = max(1, n_tokens // 2)
                else:
                    yield from zip(batch, results, strict=True)
                    continue
            if len(batch) > 1:
                half = len(batch) // 2
                pending += [batch[half:], batch[:half]]
            elif failure is not None:
                yield batch[0], failure

    def _may_pad(self) -> bool:
        """Whether prompts of different lengths may run together.

        Hooks and wrappers of the caller's may count positions from the left, or read padding.
        """
        if hooked_modules(self._backend.hookable()) or self.stream.backend.wrappers:
            return False
        try:
            return padding_is_ignored(self.stream, left=True)
        except UnsupportedModelError:  # it takes no mask
            return False

    def _run(self, batch: Sequence[Item]) -> list[Result]:
        ids, padded = pad_left([item.ids for item in batch])
        given: Any = ids
        mask: Tensor | None = padded
        if batch[0].extras:  # it runs by itself, without padding
            given, mask = {"input_ids": ids, **batch[0].extras}, None
        pos = self._pos
        if batch[0].columns is not None:
            pos = self._own_positions(batch)
        if batch[0].question is not None:
            plan = self._asking(self._together(batch))
            result = plan(given, pos=pos, attention_mask=mask, chunk_size=self._chunk_size)
            return list(split(result))
        lay = partial(side_by_side, items=batch, one_position=self._one_position)
        correct = lay([item.correct for item in batch])
        wrong = [item.incorrect for item in batch if item.incorrect is not None]
        incorrect = None
        if wrong:
            correct, incorrect = torch.broadcast_tensors(correct, lay(wrong))
        plan = self._plan(correct, incorrect)
        result = plan(given, pos=pos, attention_mask=mask, chunk_size=self._chunk_size)
        return list(split(result))

    def _one_each(self, batch: Sequence[Item]) -> bool:
        """Whether results have no axis of positions; what follows a prompt gives it one."""
        return self._one_position and not batch[0].follows

    def _own_positions(self, batch: Sequence[Item]) -> PerRow:
        """The positions of each prompt of a batch."""
        columns = [item.columns or () for item in batch]
        if self._one_each(batch):
            return PerRow([own[0] for own in columns])
        return PerRow.of_any_length(columns)

    def _together(self, batch: Sequence[Item]) -> Asking:
        questions = [item.question for item in batch if item.question is not None]
        if len(questions) != len(batch):
            raise InputError("plain answers stand beside others; give all prompts one kind")
        counts = None if self._one_each(batch) else [item.n_entries for item in batch]
        return together(questions, counts)

    def _asking(self, question: Asking) -> Plan:
        """The plan for a question; the last one is kept."""
        if self._kept is None or self._kept[0] != question:
            given = question.request if isinstance(question, OneForAll) else question
            self._kept = question, self._prepare(given)
        return self._kept[1]

    def _plan(self, correct: Tensor, incorrect: Tensor | None) -> Plan:
        """The plan of a batch. If all prompts have the same answers, it is prepared once."""
        both = [correct] if incorrect is None else [correct, incorrect]
        distinct = [ids.unique() for ids in both]
        if any(len(ids) > 1 for ids in distinct):
            return self._prepare(correct, incorrect)
        question = int(distinct[0]), None if incorrect is None else int(distinct[1])
        if self._kept is None or self._kept[0] != question:
            self._kept = question, self._prepare(*question)
        return self._kept[1]


def _by_extras(batch: Sequence[Item]) -> Iterator[list[Item]]:
    """A batch without the prompts that have arguments of their own, and each of these alone."""
    together = [item for item in batch if not item.extras]
    if together:
        yield together
    yield from ([item] for item in batch if item.extras)


def freed(error: DLAError) -> DLAError:
    """Strip an error of its traceback, so that frames and tensors of the call can be freed."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _out_of_memory(error: Exception, n_tokens: int) -> DLAError:
    first_line = str(error).partition("\n")[0]
    return DLAError(
        f"a prompt of {n_tokens} tokens runs out of memory by itself ({first_line}); give a "
        "chunk_size (or a smaller one), shorten it, select fewer positions, or load the model in a "
        "smaller dtype"
    )
