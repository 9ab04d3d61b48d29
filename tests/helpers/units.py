"""The units, by name, as the library lists them: tests of all units take them from here."""

from __future__ import annotations

from dla_hooks.units import UNITS

UNIT_NAMES = tuple(UNITS)
