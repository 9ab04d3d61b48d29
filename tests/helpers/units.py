"""The names of units, as the library finds them."""

from dla_hooks.residual.registry import adapter_for
from dla_hooks.units import unit_names, units_of

EVERY_UNIT = unit_names()
UNIT_NAMES = units_of(adapter_for("gpt2"))
"""Those of the declaration alone; whether a model has the others is found out on the model."""
