"""A plan: one model, one target and some units, with everything that no prompt changes.

A plan is data. Prompts come and go: each makes a :class:`Recording`, whose taps write scalars
while a source shows activations, and at its end a :class:`Measurement`, which is whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.version import State
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.reading_point import PointRecorder, Reading
from dla_hooks.projection.tiles import View
from dla_hooks.residual.hooked import changed_behind
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Target, Witness
from dla_hooks.units.base import RankedSplit, Recorder, Split, Unit, UnitPlan
from dla_hooks.units.parts import Missing, Parts, PartsRecorder
from dla_hooks.units.parts_plan import PartsPlan


@dataclass(frozen=True)
class Plan:
    """What is measured of every prompt.

    Attributes:
        stream: the located model, up to where it is read.
        target: what is attributed.
        parts: the terms of the stream, and what they are projected on.
        units: the units, by the key of their result.
        conventions: that they were made with.
    """

    stream: Stream
    target: Target
    parts: PartsPlan
    units: Mapping[str, UnitPlan]
    conventions: Conventions

    def in_prompt(self, source: Any, selection: Selection) -> Plan:
        """The plan for one prompt: the direction of some targets depends on it.

        Args:
            source: shows the activations (:class:`dla_hooks.sources.base.Source`).
            selection: the selected entries.
        """
        target = self.target.in_prompt(source, selection)
        if target is self.target:
            return self
        units = {key: plan.unit for key, plan in self.units.items()}
        return make_plan(target, units, self.conventions)


def make_plan(target: Target, units: Mapping[str, Unit], conventions: Conventions) -> Plan:
    """Fold the directions of a target for the parts and for each unit.

    Args:
        target: what is attributed, of a located model.
        units: by the key of their result.
        conventions: what is done where a unit's own options leave it open.

    Raises:
        UnsupportedModelError: when a unit finds nothing of its kind in the model.
    """
    stream = target.stream
    by_itself = any(unit.reads_parts for unit in units.values())
    parts = PartsPlan(stream, target.readouts[0].directions, by_itself)
    plans = {key: unit.prepare(parts, conventions) for key, unit in units.items()}
    return Plan(stream, target, parts, plans, conventions)


@dataclass(frozen=True)
class Measurement:
    """The scalars of one prompt.

    Attributes:
        plan: what was measured.
        entries: where.
        reading: what the final norm saw: the whole stream.
        parts: the terms of the stream.
        splits: the rows of each unit.
        theirs_N: what the model itself computed, where the target has a witness or was seen before.
        recording: what it was made by.
    """

    plan: Plan
    entries: Entries
    reading: Reading
    parts: Parts
    splits: Mapping[str, Split | RankedSplit]
    theirs_N: Tensor | None
    recording: Recording


class Recording:
    """One prompt while it is being measured.

    Args:
        plan: what is measured.
        entries: where.
        missing: why the source of activations does not have a place, or None where it has it.
        by_itself: whether each part is measured by itself, though no unit reads it.

    Attributes:
        plan: what is measured.
        entries: where.
        view: all entries, for the source to show.
    """

    def __init__(
        self, plan: Plan, entries: Entries, missing: Missing, by_itself: bool = False
    ) -> None:
        self.plan, self.entries = plan, entries
        self.view = view = View.whole(entries)
        target = plan.target
        self._point = PointRecorder(target.point, target.readouts, entries, by_itself)
        self._units = {key: unit.recorder(view) for key, unit in plan.units.items()}
        self._of_view: list[Tap] | None = None
        self._tells: Recorder | None = None
        if not (by_itself or plan.parts.by_itself):
            self._tells = next((one for one in self._units.values() if one.whole_writes), None)
        told = () if self._tells is None else self._tells.whole_writes
        self._parts = PartsRecorder(plan.parts, entries, missing, told)
        self._theirs: FixedRows | None = None
        if target.witness is not None:
            self._theirs = FixedRows(1, len(entries), plan.stream.work_dtype)

    @property
    def needs_all_logits(self) -> bool:
        """Whether the model's logits are needed at every entry."""
        return self._point.needs_all_logits

    @cached_property
    def is_changed_behind(self) -> bool:
        """Whether the caller may change activations behind the last stream, out of sight."""
        return changed_behind(self.plan.stream)

    def again(self) -> bool:
        """Make ready for another run at the same entries; False where it has to be made anew."""
        if self._theirs is not None and not self._theirs.again():
            return False
        units = all(recorder.again() for recorder in self._units.values())
        return units and self._point.again() and self._parts.again()

    def taps(self, view: View) -> list[Tap]:
        """Everything to watch while the entries in view are run."""
        if view is not self.view:
            return self._taps(view)
        if self._of_view is None:
            self._of_view = self._taps(view)
        return self._of_view

    def _taps(self, view: View) -> list[Tap]:
        taps = [*self._parts.taps(view), *self._point.taps(view)]
        for recorder in self._units.values():
            taps += recorder.taps(view)
        witness, theirs = self.plan.target.witness, self._theirs
        if witness is None or theirs is None:
            return taps
        return [*taps, _tap(witness, theirs, view)]

    def taps_before(self, view: View) -> list[Tap]:
        """What to watch in a piece of the prompt without entries, which later pieces read."""
        return [tap for recorder in self._units.values() for tap in recorder.taps_before(view)]

    def finish(self) -> Measurement:
        """The measurement, once the source has shown everything."""
        reading = self._point.finish()
        told_LN = None
        if self._tells is not None:
            told_LN = self._tells.wrote(reading.scale_N.device, self.entries)
        parts = self._parts.finish(reading, told_LN)
        splits = {key: recorder.finish(parts) for key, recorder in self._units.items()}
        theirs = self._theirs
        theirs_N = self.plan.target.known_N
        if theirs is not None:
            theirs_N = theirs.gathered(reading.scale_N.device)[0]
        return Measurement(self.plan, self.entries, reading, parts, splits, theirs_N, self)


class Kept:
    """A recording that is finished, for the next call of the same plan at the same entries."""

    def __init__(self) -> None:
        self._recordings: deque[Recording] = deque(maxlen=1)
        self._code = 0

    def under(self, state: State | None) -> Kept | None:
        """What is kept for a model in a state; None where anybody's hooks are on it."""
        if state is None or state.hooked:
            return None
        if state.code != self._code:  # what a plan leaves out may be needed now
            self._recordings.clear()
        self._code = state.code
        return self

    def take(self, plan: Plan, entries: Entries) -> Recording:
        """A recording for a run without anyone's hooks: the one that is kept, if it fits."""
        try:
            kept = self._recordings.pop()  # no other thread has it then
        except IndexError:
            return Recording(plan, entries, _has_all)
        fits = kept.plan is plan and kept.entries is entries and kept.again()
        return kept if fits else Recording(plan, entries, _has_all)

    def put(self, recording: Recording) -> None:
        """Keep a recording of which nothing is read any more."""
        if recording.entries.few and not torch.is_inference_mode_enabled():
            self._recordings.append(recording)


def _has_all(place: Place) -> None:
    """A run of the model has every place."""


def _tap(witness: Witness, theirs: FixedRows, view: View) -> Tap:
    """Reads what the model itself computes of a target."""

    def see(call: Call) -> None:
        x = witness.look(call)
        project(x, view, witness.directions, theirs.row(0, x.device))

    return Tap(witness.place, see)
