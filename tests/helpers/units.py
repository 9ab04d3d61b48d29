"""The names of the units, for tests of what holds for each."""

from dla_hooks.units import UNITS

UNIT_NAMES = tuple(UNITS)
