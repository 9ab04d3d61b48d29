"""What a report asks of a model: the units of one prompt, and the tokens that rows promote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dla_hooks.attribution import direct_logit_attribution, prepare
from dla_hooks.call import ReadModel, source_of
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.positions import Selection, select
from dla_hooks.results.promoted import PromotedTokens
from dla_hooks.stacks.promoted import promoted_tokens
from dla_hooks.units import unit_class
from dla_hooks.units.base import Unit

_DENSE = ("component", "layer", "head")
_RANKED = ("source", "neuron", "expert")
"""Units with more rows than a page has room for at every position."""
_TOP = {"source": 4096, "neuron": 64}
_MOST_AT_ONCE = 64
_WITH_VECTORS = ("head", "component")


@dataclass(frozen=True)
class Prompt:
    """One prompt with its question, as they were given."""

    input: Any
    answer: Any
    incorrect: Any


@dataclass
class Answer:
    """What was measured.

    Attributes:
        results: by the name of their unit.
        last: the last selected position; None where prompts of a batch have different ones.
        notes: sentences about what was left out.
    """

    results: dict[str, Any]
    last: int | None
    notes: list[str] = field(default_factory=list)


def ask(
    model: Any,
    prompt: Prompt,
    read: ReadModel,
    *,
    pos: Any,
    units: Mapping[str, Unit] | None,
    options: Mapping[str, Any],
) -> Answer:
    """Measure all units in one run; in two, where many positions are selected.

    Args:
        model: any.
        prompt: with its question.
        read: the model, located.
        pos: which positions.
        units: those to measure, or None for those that the model has.
        options: further arguments of :func:`dla_hooks.direct_logit_attribution`.
    """
    notes: list[str] = []
    if units is None:
        units, notes = _units_of(model, prompt, options)
    source = source_of(
        read,
        prompt.input,
        attention_mask=options["attention_mask"],
        chunk_size=options["chunk_size"],
        purpose="report",
    )
    selection = select(pos, source.prompt.mask)
    n = selection.cols.shape[1] if selection.cols.ndim > 1 else 1
    last = _last(selection)

    def measured(some: Mapping[str, Unit], at: Any) -> dict[str, Any]:
        found: dict[str, Any] = direct_logit_attribution(
            model, prompt.input, prompt.answer, prompt.incorrect, unit=some, pos=at, **options
        )
        return found

    later = {name: unit for name, unit in units.items() if unit.words.name not in _DENSE}
    if n <= _MOST_AT_ONCE or not later or len(later) == len(units):
        return Answer(measured(units, pos), last, notes)
    if last is None:
        raise InputError(
            f"pos selects {n} positions that end at different places of the prompts, and units "
            f"such as {next(iter(later))!r} are then measured at the last one; give one prompt at "
            "a time, or positions that all end alike"
        )
    found = measured({name: unit for name, unit in units.items() if name not in later}, pos)
    return Answer({**found, **measured(later, last)}, last, notes)


def promoted_of(
    model: Any, prompt: Prompt, found: Answer, count: int, options: Mapping[str, Any]
) -> list[PromotedTokens]:
    """The tokens that heads and components promote, at the last selected position.

    Args:
        model: any.
        prompt: with its question.
        found: what was measured of it.
        count: how many tokens each way; 0 for none.
        options: further arguments of :func:`dla_hooks.promoted_tokens`.
    """
    names = {result.words.name for result in found.results.values()}
    if not count:
        return []
    if found.last is None:
        found.notes.append("Promoted tokens were left out: the prompts end at different places.")
        return []
    listed = []
    for unit in _WITH_VECTORS:
        if unit in names:
            try:
                listed.append(
                    promoted_tokens(
                        model, prompt.input, unit=unit, pos=found.last, k=count, **options
                    )
                )
            except UnsupportedModelError as error:
                found.notes.append(f"Promoted tokens of {unit}s were left out: {error}")
    return listed


def _units_of(
    model: Any, prompt: Prompt, options: Mapping[str, Any]
) -> tuple[dict[str, Unit], list[str]]:
    """The units that the model has, and why it has not the others."""
    some: dict[str, Unit] = {}
    for name in (*_DENSE, *_RANKED):
        made: Any = unit_class(name)
        some[name] = made(top=_TOP[name]) if name in _TOP else made()
    names = ("tokenizer", "prepend_bos", "center_unembed", "fold_value_biases")
    own = {name: options[name] for name in names}
    notes = []
    for name, unit in list(some.items()):
        try:
            prepare(model, prompt.answer, prompt.incorrect, unit=unit, **own)
        except UnsupportedModelError as error:
            if name == _DENSE[0]:
                raise
            some.pop(name)
            if name != "expert":  # few models have any
                notes.append(f"{unit.words.title} were left out: {error}")
    return some, notes


def _last(selection: Selection) -> int | None:
    """The last selected position, as one number for all prompts; None where there is none."""
    real, valid = selection.mask, selection.valid
    cols = selection.cols.reshape(len(real), -1).masked_fill(~valid.reshape(len(real), -1), -1)
    ends = cols.amax(1)
    if bool((ends < 0).any()):
        return None
    before = [int(real[row, : end + 1].sum()) for row, end in enumerate(ends.tolist())]
    from_end = [number - int(real[row].sum()) - 1 for row, number in enumerate(before)]
    if len(set(from_end)) == 1:
        return from_end[0]
    return before[0] - 1 if len(set(before)) == 1 else None
