"""The names of all units, as the library finds them."""

from dla_hooks.units import unit_names

UNIT_NAMES = unit_names()
