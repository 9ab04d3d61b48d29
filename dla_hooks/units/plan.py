"""A plan: one model, one target and some units, with everything that no prompt changes.

A plan is data. Prompts come and go: each makes a :class:`Recording`, whose taps write scalars
while a source shows activations, and at its end a :class:`Measurement`, which is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dla_hooks.backends import Conventions
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.hooks import Tap
from dla_hooks.projection.reading_point import PointRecorder, Reading
from dla_hooks.projection.tiles import View
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Target
from dla_hooks.units.base import RankedSplit, Split, Unit, UnitPlan
from dla_hooks.units.parts import Missing, Parts, PartsRecorder
from dla_hooks.units.parts_plan import PartsPlan


@dataclass(frozen=True)
class Plan:
    """What is measured of every prompt.

    Attributes:
        stream: the located model.
        target: what is attributed.
        parts: the terms of the stream, and what they are projected on.
        units: the units, by the key of their result.
    """

    stream: Stream
    target: Target
    parts: PartsPlan
    units: Mapping[str, UnitPlan]


def make_plan(
    stream: Stream, target: Target, units: Mapping[str, Unit], conventions: Conventions
) -> Plan:
    """Fold the directions of a target for the parts and for each unit.

    Args:
        stream: the located model.
        target: what is attributed.
        units: by the key of their result.
        conventions: what is done where a unit's own options leave it open.

    Raises:
        UnsupportedModelError: when a unit finds nothing of its kind in the model.
    """
    parts = PartsPlan(stream, target.readouts[0].directions)
    plans = {key: unit.prepare(parts, conventions) for key, unit in units.items()}
    return Plan(stream, target, parts, plans)


@dataclass(frozen=True)
class Measurement:
    """The scalars of one prompt.

    Attributes:
        plan: what was measured.
        entries: where.
        reading: what the final norm saw: the whole stream.
        parts: the terms of the stream.
        splits: the rows of each unit.
    """

    plan: Plan
    entries: Entries
    reading: Reading
    parts: Parts
    splits: Mapping[str, Split | RankedSplit]


class Recording:
    """One prompt while it is being measured.

    Args:
        plan: what is measured.
        entries: where.
        missing: why the source of activations does not have a place, or None where it has it.

    Attributes:
        view: all entries, for the source to show.
    """

    def __init__(self, plan: Plan, entries: Entries, missing: Missing) -> None:
        self._plan, self._entries = plan, entries
        self.view = view = View(entries)
        target = plan.target
        self._point = PointRecorder(target.point, target.readouts, entries)
        self._parts = PartsRecorder(plan.parts, entries, missing)
        self._units = {key: unit.recorder(view) for key, unit in plan.units.items()}

    @property
    def needs_all_logits(self) -> bool:
        """Whether the model's logits are needed at every entry."""
        return self._point.needs_all_logits

    def taps(self, view: View) -> list[Tap]:
        """Everything to watch while the entries in view are run."""
        taps = [*self._parts.taps(view), *self._point.taps(view)]
        for recorder in self._units.values():
            taps += recorder.taps(view)
        return taps

    def finish(self) -> Measurement:
        """The measurement, once the source has shown everything."""
        reading = self._point.finish()
        parts = self._parts.finish(reading)
        splits = {key: recorder.finish(parts) for key, recorder in self._units.items()}
        return Measurement(self._plan, self._entries, reading, parts, splits)
