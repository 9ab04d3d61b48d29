"""The two sides of a comparison: read, held against each other, measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dla_hooks.backends import Conventions
from dla_hooks.call import ReadModel, checked, model_of, placed, source_of, target_of
from dla_hooks.errors import DecompositionError, HookError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.measure.asked import Asked as AskedOfPrompt
from dla_hooks.measure.asked import settled, with_next
from dla_hooks.measure.completeness import seems_current
from dla_hooks.measure.one_prompt import measure
from dla_hooks.modules.user_hooks import hooked_modules, refuse_second_run
from dla_hooks.modules.version import forget
from dla_hooks.questions.alike import (
    check_plans,
    check_prompts,
    check_selections,
    check_streams,
    check_target,
)
from dla_hooks.questions.contexts import Context, entered
from dla_hooks.questions.differences import Run
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.base import Source
from dla_hooks.targets.base import Target
from dla_hooks.targets.pair import PairTarget, lent
from dla_hooks.units.base import Unit
from dla_hooks.units.plan import Plan, make_plan


@dataclass(frozen=True)
class Asked:
    """What one run is asked for, as the caller gave it."""

    model: Any
    input: Any
    attention_mask: Any
    pos: Any


@dataclass(frozen=True)
class Question:
    """Both runs, as the caller gave them.

    Attributes:
        first: the run that is subtracted from.
        second: the other.
        same_input: whether both are of one input.
        aligned: whether positions are given for each of the two.
        context: what the second is read and run in, or None.
        answers: the answer and the incorrect one.
        units: by key.
        tokenizer: for strings; so is the next.
        prepend_bos: or None.
        center_unembed: or None; so is the next.
        fold_value_biases: or None.
        check: whether each run is checked.
        chunk_size: or None.
    """

    first: Asked
    second: Asked
    same_input: bool
    aligned: bool
    context: Context | None
    answers: tuple[Any, Any]
    units: Mapping[str, Unit]
    tokenizer: Any
    prepend_bos: bool | None
    center_unembed: bool | None
    fold_value_biases: bool | None
    check: bool
    chunk_size: int | None

    @property
    def one_model(self) -> bool:
        """Whether both runs are of one model as it stands."""
        return self.first.model is self.second.model and self.context is None


@dataclass(frozen=True)
class _Side:
    """One run, read and located."""

    read: ReadModel
    source: Source
    asked: AskedOfPrompt
    target: Target
    conventions: Conventions

    @property
    def stream(self) -> Stream:
        return self.read.stream

    def entries(self) -> Entries:
        """Those of its own target."""
        return self.target.align(self.selection, self.source.prompt.shape)

    @property
    def selection(self) -> Selection:
        return self.asked.selection


def both_runs(question: Question) -> tuple[Run, Run]:
    """Both runs, measured of the models as they are now.

    Weights may have changed in a way that leaves no trace, since a model was measured. Where the
    numbers then do not hold, both models are measured anew, once.

    Raises:
        DLAError: as :func:`dla_hooks.compare` says.
    """
    streams = list[Stream]()
    failed: DecompositionError | HookError | None = None
    try:
        runs = _measured(question, streams)
        current = question.check or all(map(_seems_current, runs))
        if current or not any(stream.remembered for stream in streams):
            return runs
    except (DecompositionError, HookError) as error:
        if not any(stream.remembered for stream in streams):
            raise
        failed = error
    for stream in streams:
        forget(stream.backend.model)
        if failed is not None:
            refuse_second_run(stream.backend.model, failed)
    return _measured(question, [], anew=True)


def _seems_current(run: Run) -> bool:
    hooked = hooked_modules(run.stream.backend.hookable())
    return seems_current(run.found, run.outcome) or bool(hooked)


def _measured(question: Question, streams: list[Stream], *, anew: bool = False) -> tuple[Run, Run]:
    """Read both, refuse what is not alike, then run one after the other.

    Each is made and run in its own context. Only directions cross over.

    Args:
        question: what is asked.
        streams: takes the located models, for a caller whose call fails.
        anew: measure the model on each side of the context, which may change it without a trace.
    """
    changes = question.context is not None
    context = partial(entered, question.context, streams if anew and changes else ())
    first = _first(question)
    streams.append(first.stream)
    with context():
        second = _second(question, first)
        streams.append(second.stream)
        check_prompts(
            first.source.prompt,
            second.source.prompt,
            same=question.same_input,
            aligned=question.aligned,
        )
        check_selections(first.selection, second.selection)
        entries = first.entries(), second.entries()
        of_second = lent(second.target.readouts[0], ahead=changes)
    of_first = lent(first.target.readouts[0], ahead=changes)
    pairs = PairTarget(first.target, of_second), PairTarget(second.target, of_first)
    plan = _plan(question, first, pairs[0])
    with context():
        plan_of_second = _plan(question, second, pairs[1])
        check_plans(plan, plan_of_second, question.units, entries)
        found_second = measure(plan_of_second, second.source, second.selection, question.check)
    found = measure(plan, first.source, first.selection, question.check)
    return (
        Run(
            first.stream,
            first.source,
            first.read.tokenizer,
            entries[0],
            pairs[0],
            *found,
            first.asked.seen,
        ),
        Run(
            second.stream, second.source, first.read.tokenizer, entries[1], pairs[1], *found_second
        ),
    )


def _first(question: Question) -> _Side:
    read = model_of(
        question.first.model, tokenizer=question.tokenizer, prepend_bos=question.prepend_bos
    )
    conventions = read.conventions(question.center_unembed, question.fold_value_biases)
    return _side(question, question.first, read, read, conventions)


def _second(question: Question, first: _Side) -> _Side:
    """The second run; its strings and answers are read as the first's, by its conventions."""
    read = first.read
    if not question.one_model:
        read = model_of(
            checked(question.second.model), tokenizer=read.tokenizer, prepend_bos=read.prepend_bos
        )
        check_streams(first.stream, read.stream)
    return _side(question, question.second, read, first.read, first.conventions, first.asked)


def _side(
    question: Question,
    asked: Asked,
    read: ReadModel,
    answered: ReadModel,
    conventions: Conventions,
    known: AskedOfPrompt | None = None,
) -> _Side:
    """One side.

    Args:
        question: what is asked.
        asked: of this side.
        read: its model.
        answered: the model that reads the answers.
        conventions: of both sides.
        known: what the first side was asked: tokens that it named are those of the second, too.
    """
    source = source_of(
        read,
        asked.input,
        attention_mask=asked.attention_mask,
        chunk_size=question.chunk_size,
        purpose=tuple(unit.words.name for unit in question.units.values()),
    )
    about = target_of(answered, *question.answers, conventions)
    about, source, selection = placed(
        read, about, source, asked.input, asked.pos, question.chunk_size
    )
    if known is None:
        found = settled(about, read.stream, source, selection)
    else:
        found = AskedOfPrompt(known.question, with_next(about, source.prompt, selection))
    target = found.question(read.stream)
    check_target(target, "compare", question.answers[0])
    return _Side(read, source, found, target, conventions)


def _plan(question: Question, side: _Side, target: Target) -> Plan:
    units = {key: _whole(unit) for key, unit in question.units.items()}
    return make_plan(target, units, side.conventions)


def _whole(unit: Unit) -> Unit:
    """The unit with all of its rows: the strongest differences may be in any."""
    if getattr(unit, "top", None) is None:
        return unit
    every: Any = copy.copy(unit)
    every.top = None
    found: Unit = every
    return found
