"""Why do two runs answer differently? What was written differs, or how it is read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from dla_hooks.backends import Conventions
from dla_hooks.call import ReadModel, check_given, checked, model_of, source_of, target_of
from dla_hooks.errors import ArgumentTypeError, DecompositionError, HookError, InputError
from dla_hooks.inputs import positions
from dla_hooks.inputs.prompts import is_text
from dla_hooks.measure.completeness import Outcome, seems_current
from dla_hooks.measure.one_prompt import measure
from dla_hooks.modules.user_hooks import hooked_modules, refuse_second_run
from dla_hooks.modules.version import forget
from dla_hooks.questions.alike import (
    check_plans,
    check_prompts,
    check_selections,
    check_streams,
)
from dla_hooks.questions.differences import Run, comparison_of
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.base import Source
from dla_hooks.targets.base import Target
from dla_hooks.targets.pair import PairTarget, lent
from dla_hooks.units import DEFAULT_UNIT, UnitName, read_units
from dla_hooks.units.base import Unit
from dla_hooks.units.plan import Measurement, Plan, make_plan

Context = Callable[[], AbstractContextManager[Any]]


def compare(
    model: Any,
    other: Any = None,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    other_input: Any = None,
    other_context: Callable[[], AbstractContextManager[Any]] | None = None,
    other_pos: Any = None,
    unit: UnitName | Unit | tuple[UnitName | Unit, ...] | Mapping[str, Any] = DEFAULT_UNIT,
    pos: Any = -1,
    tokenizer: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    check: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """Split the difference of two runs' logits: by who wrote otherwise, and what is read otherwise.

    Two checkpoints, an adapter on and off, a clean and a corrupted prompt, before and after an
    ablation: the result is first minus second, row by row. With x what a row wrote to the last
    stream, d a run's direction there and s its final norm's scale, each row's difference is exactly

        written = (x_A - x_B) . (d_A / s_A + d_B / s_B) / 2
        read    = (x_A + x_B) / 2 . (d_A / s_A - d_B / s_B)

    ``written`` is what the row put out otherwise. ``read`` is what the same write counts otherwise:
    the final norm's scale differs, or its weights and the unembedding do. The rows and the
    difference of the biases sum to the difference of the logits, before any cap. Exchanging the two
    runs changes all signs.

    Each run measures its rows on both runs' directions, so that no vector is kept: the cost is that
    of two attributions.

    Args:
        model: the first run's model, as for :func:`direct_logit_attribution`; so are all arguments
            that are not described here.
        other: the second run's model, of the same shape; None is the same model.
        input: what the first model is run on.
        answer_tokens: whose logit, in both runs.
        incorrect_tokens: whose logit is subtracted, or None.
        other_input: what the second model is run on; None is the same input. The prompts must have
            the same number of tokens, row by row, unless ``other_pos`` is given.
        other_context: a function without arguments that returns a context manager, in which the
            second run is read and made: ``model.disable_adapter`` of a PEFT model, or one that puts
            on hooks. It is called more than once.
        other_pos: the positions of the second run that are compared with ``pos`` of the first, for
            prompts whose tokens stand at different places; None is the same positions.
        unit: into which rows. Of a ranked unit all rows are measured, and the ``top`` strongest
            differences kept.
        pos: which positions.
        tokenizer: for strings, of both runs.
        attention_mask: for padded ids. It holds for ``other_input`` too, unless that is text or a
            mapping.
        prepend_bos: for strings.
        center_unembed: take the vocabulary's mean off every row of W_U, in both runs; None is as
            the first model was wrapped. So is the next.
        fold_value_biases: move each head's constant part to the remainder, in both runs.
        check: hold each run's parts against its last stream and its own logits.
        chunk_size: run the prompts so many tokens at a time.

    Returns:
        A :class:`Comparison`, or for several units a dictionary of them. A row that one run alone
        has (of a hook, of an adapter) counts nothing in the other.

    Raises:
        InputError: (a ValueError) for any argument that cannot be used.
        ShapeMismatchError: for prompts of different lengths without ``other_pos``.
        UnsupportedModelError: for models of different shapes, and for rows that do not pair up.
        DecompositionError: when the parts of a run do not sum to its own numbers.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> found = dla_hooks.compare(
    ...     model, input="The keys near the cabinet", other_input="The key near the cabinet",
    ...     answer_tokens=" are", incorrect_tokens=" is", tokenizer=tokenizer)
    >>> bool((found.attribution - found.written - found.read).abs().max() < 1e-5)
    True
    >>> bool((found.attribution.sum(0) + found.bias - found.logit).abs().max() < 1e-3)
    True
    """
    units, single = read_units(unit)
    if answer_tokens is None:
        raise InputError("answer_tokens is required: the token whose logit is attributed")
    check_given(input, None)
    if other_context is not None and not callable(other_context):
        raise ArgumentTypeError(
            "other_context must be a function that returns a context manager, such as "
            f"model.disable_adapter; got {type(other_context).__name__}: {other_context!r:.80}"
        )
    question = _Question(
        first=_Asked(model, input, attention_mask, pos),
        second=_Asked(
            model if other is None else other,
            input if other_input is None else other_input,
            _mask_of_second(other_input, attention_mask),
            pos if other_pos is None else other_pos,
        ),
        same_input=other_input is None,
        aligned=other_pos is not None,
        context=other_context,
        answers=(answer_tokens, incorrect_tokens),
        units=units,
        tokenizer=tokenizer,
        prepend_bos=prepend_bos,
        center_unembed=center_unembed,
        fold_value_biases=fold_value_biases,
        check=bool(check),
        chunk_size=chunk_size,
    )
    first, second = _currently(question)
    found = {key: comparison_of(key, one, first, second) for key, one in units.items()}
    return next(iter(found.values())) if single else found


@dataclass(frozen=True)
class _Asked:
    """What one run is asked for, as the caller gave it."""

    model: Any
    input: Any
    attention_mask: Any
    pos: Any


@dataclass(frozen=True)
class _Question:
    """Both runs, as the caller gave them."""

    first: _Asked
    second: _Asked
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
    selection: positions.Selection
    target: Target
    conventions: Conventions

    @property
    def stream(self) -> Stream:
        return self.read.stream


def _currently(question: _Question) -> tuple[Run, Run]:
    """Both runs, measured of the models as they are now.

    Weights may have changed in a way that leaves no trace, since a model was measured. Where the
    numbers then do not hold, both models are measured anew, once.
    """
    models = list(dict.fromkeys((question.first.model, question.second.model)))
    streams: list[Stream] = []
    failed: DecompositionError | HookError | None = None
    try:
        runs = _both(question, streams)
        current = question.check or all(_seems_current(run) for run in runs)
        if current or not any(stream.remembered for stream in streams):
            return runs
    except (DecompositionError, HookError) as error:
        if not any(stream.remembered for stream in streams):
            raise
        failed = error
    for model in models:
        backend = checked(model)
        forget(backend.model)
        if failed is not None:
            refuse_second_run(backend.model, failed)
    return _both(question, [])


def _seems_current(run: Run) -> bool:
    return seems_current(run.found, run.outcome) or bool(
        hooked_modules(run.stream.backend.hookable())
    )


def _both(question: _Question, streams: list[Stream]) -> tuple[Run, Run]:
    """Read both, refuse what is not alike, then run one after the other.

    Args:
        question: what is asked.
        streams: takes the located models, for a caller whose call fails.
    """
    context: Context = question.context or nullcontext
    changes = question.context is not None
    first = _first_side(question)
    streams.append(first.stream)
    with context():
        second = _second_side(question, first)
        streams.append(second.stream)
        _check_alike(question, first, second)
        lent_second = lent(second.target.readouts[0], ahead=changes)
    lent_first = lent(first.target.readouts[0], ahead=changes)
    plan = _plan(question, first, PairTarget(first.target, lent_second))
    entries = _own_entries(first), _own_entries(second)
    with context():
        other_plan = _plan(question, second, PairTarget(second.target, lent_first))
        check_plans(plan, other_plan, question.units, entries)
        other_found = measure(other_plan, second.source, second.selection, question.check)
    found = measure(plan, first.source, first.selection, question.check)
    return _run(first, entries[0], *found), _run(second, entries[1], *other_found)


def _first_side(question: _Question) -> _Side:
    asked = question.first
    read = model_of(asked.model, tokenizer=question.tokenizer, prepend_bos=question.prepend_bos)
    conventions = read.conventions(question.center_unembed, question.fold_value_biases)
    make = target_of(read, *question.answers, conventions)
    return _side(question, asked, read, make, conventions)


def _second_side(question: _Question, first: _Side) -> _Side:
    """The second run; its strings and answers are read as the first's, by its conventions."""
    asked, read = question.second, first.read
    if not question.one_model:
        read = model_of(
            asked.model, tokenizer=first.read.tokenizer, prepend_bos=first.read.prepend_bos
        )
        check_streams(first.stream, read.stream)
    make = target_of(first.read, *question.answers, first.conventions)
    return _side(question, asked, read, make, first.conventions)


def _side(
    question: _Question,
    asked: _Asked,
    read: ReadModel,
    make: Callable[[Stream], Target],
    conventions: Conventions,
) -> _Side:
    source = source_of(
        read,
        asked.input,
        attention_mask=asked.attention_mask,
        chunk_size=question.chunk_size,
        purpose=tuple(unit.words.name for unit in question.units.values()),
    )
    selection = positions.select(asked.pos, source.prompt.mask)
    return _Side(read, source, selection, make(read.stream), conventions)


def _check_alike(question: _Question, first: _Side, second: _Side) -> None:
    prompts = first.source.prompt, second.source.prompt
    check_prompts(*prompts, same=question.same_input, aligned=question.aligned)
    check_selections(first.selection, second.selection)


def _plan(question: _Question, side: _Side, target: Target) -> Plan:
    units = {key: _whole(unit) for key, unit in question.units.items()}
    return make_plan(side.stream, target, units, side.conventions)


def _whole(unit: Unit) -> Unit:
    """The unit with all of its rows: the strongest differences may be in any."""
    if getattr(unit, "top", None) is None:
        return unit
    every: Any = copy.copy(unit)
    every.top = None
    return every


def _own_entries(side: _Side) -> Any:
    return side.target.align(side.selection, side.source.prompt.shape, True)


def _run(side: _Side, entries: Any, found: Measurement, outcome: Outcome) -> Run:
    target = found.plan.target
    assert isinstance(target, PairTarget)
    return Run(
        stream=side.stream,
        source=side.source,
        tokenizer=side.read.tokenizer,
        entries=entries,
        target=target,
        found=found,
        outcome=outcome,
    )


def _mask_of_second(other_input: Any, attention_mask: Any) -> Any:
    """A mask of ids holds for both inputs; text and mappings have their own."""
    if isinstance(other_input, Mapping) or (other_input is not None and is_text(other_input)):
        return None
    return attention_mask
