"""What the stream is split into: one small file per unit.

A unit is built for one run. It may put taps of its own on the model, turns the run's scalars into
labelled rows, and states what must hold if those rows are right.
"""

from __future__ import annotations

from dla_hooks.errors import InputError
from dla_hooks.units.base import Claim, Split, Unit
from dla_hooks.units.component import ComponentUnit
from dla_hooks.units.head import HeadUnit
from dla_hooks.units.layer import LayerUnit

UNITS: dict[str, type[Unit]] = {
    "component": ComponentUnit,
    "layer": LayerUnit,
    "head": HeadUnit,
}


def unit_named(name: object) -> type[Unit]:
    """The unit of that name.

    Raises:
        InputError: for any other name; it lists the units.
    """
    if not isinstance(name, str) or name not in UNITS:
        raise InputError(f"unit must be one of {tuple(UNITS)}, got {name!r}")
    return UNITS[name]


__all__ = ["UNITS", "Claim", "Split", "Unit", "unit_named"]
