"""What the stream is split into: one small file per unit.

A unit is found by its file: ``head.py`` holds the unit ``head``, the one class of that file whose
``words.name`` is ``head``. Nothing else names it. Names are known without loading any of them, so
that ``dla-hooks --help`` need not wait for torch.

Decided here: which names ``unit=`` takes, which unit is the default, and which units a declared
architecture has.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dla_hooks.errors import InputError
from dla_hooks.residual.architecture import Architecture, Write
from dla_hooks.results.rows import Words

if TYPE_CHECKING:
    from dla_hooks.units.base import Unit

_SHARED = {
    "adapter_inner",
    "adapter_inner_rows",
    "adapter_site",
    "base",
    "head_layer",
    "head_rows",
    "parts",
    "parts_plan",
    "plan",
    "source_layer",
    "source_mixers",
    "source_rows",
}
"""Files of this folder that hold no unit."""

UnitName = str
"""The name of a unit: that of its file."""

DEFAULT_UNIT = "component"
"""The unit of a call that names none."""

_NAMES = tuple(sorted({entry.name for entry in pkgutil.iter_modules(__path__)} - _SHARED))
_DECLARED = {field.name for field in dataclasses.fields(Write)}
_classes: dict[str, type[Unit]] = {}


def unit_names() -> tuple[str, ...]:
    """The names that ``unit=`` takes."""
    return _NAMES


def units_of(architecture: Architecture) -> tuple[str, ...]:
    """The names of the units that all models of a declared architecture can be split into.

    A unit may need a part of the declaration, which is the field of :class:`dla_hooks.Write` that
    is called as the unit in the plural: ``heads`` for ``head``. Others need nothing, or look for
    what they need in the model itself (``of_every_model = False``); of these no declaration tells.
    """

    def has(name: str) -> bool:
        needs = f"{name}s"
        if needs not in _DECLARED:
            return _of_every_model(name)
        return any(getattr(write, needs) is not None for write in architecture.writes)

    return tuple(filter(has, _NAMES))


@lru_cache
def _of_every_model(name: str) -> bool:
    """What the class says, read from the text of its file: loading it would load torch."""
    path = Path(__path__[0], f"{name}.py")
    return "\n    of_every_model = False\n" not in path.read_text(encoding="utf-8")


def unit_class(name: str) -> type[Unit]:
    """The class of a unit.

    Args:
        name: one of :func:`unit_names`.
    """
    if name not in _classes:
        module = importlib.import_module(f"{__name__}.{name}")
        found = [one for one in vars(module).values() if _is_unit(one) and one.words.name == name]
        if len(found) != 1:
            raise ImportError(f"{module.__name__} must hold one unit with words.name {name!r}")
        _classes[name] = found[0]
    return _classes[name]


def unit_classes() -> dict[str, type[Unit]]:
    """The classes of all units, by the name of the class: ``Components``, ``Heads``, …"""
    classes = [unit_class(name) for name in unit_names()]
    return {found.__name__: found for found in classes}


def read_units(unit: Any) -> tuple[dict[str, Unit], bool]:
    """Read the ``unit`` argument.

    Args:
        unit: a name, a unit object, a tuple or list of these, or a mapping from keys of the
            caller's own to them.

    Returns:
        The units by the key of their result, and whether there is only the one that was given by
        itself.

    Raises:
        InputError: for anything else, and for a name that comes twice.
    """
    if isinstance(unit, Mapping):
        if not unit or not all(isinstance(key, str) for key in unit):
            raise InputError(
                f"unit as a mapping needs names of your own as keys, got {list(unit)!r:.80}"
            )
        return {key: _read_one(value) for key, value in unit.items()}, False
    if not isinstance(unit, (tuple, list)):
        read = _read_one(unit)
        return {read.words.name: read}, True
    if not unit:
        raise InputError(f"unit is empty: give one or more of {_NAMES}")
    units = [_read_one(one) for one in unit]
    by_name = {one.words.name: one for one in units}
    if len(by_name) < len(units):
        names = [one.words.name for one in units]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"unit holds {twice!r} twice, and results are named by their units; give a mapping "
            'with keys of your own: unit={"first": ..., "second": ...}'
        )
    return by_name, False


def _read_one(unit: Any) -> Unit:
    if isinstance(unit, str) and unit in _NAMES:
        return unit_class(unit)()
    if _is_unit(type(unit)):
        read: Unit = unit
        return read
    if _is_unit(unit):
        raise InputError(f"unit is the class {unit.__name__}; make one: unit={unit.__name__}()")
    raise InputError(
        f"unit must be one of {_NAMES}, got {unit!r:.80}; options go in an object, such as "
        f"dla_hooks.{next(iter(unit_classes()))}(), and several units in a tuple"
    )


def _is_unit(value: Any) -> bool:
    return isinstance(value, type) and isinstance(getattr(value, "words", None), Words)
