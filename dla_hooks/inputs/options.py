"""Options of units that are whole numbers."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from dla_hooks.errors import InputError


def whole_number(value: Any, name: str, least: int) -> int:
    """A whole number that is not too small.

    Raises:
        InputError: naming the option, for anything else.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise InputError(
            f"{name} takes whole numbers from {least}, or None for all; got {value!r:.80}"
        )
    return number


def some_layers(value: Any) -> tuple[int, ...]:
    """One layer or several, in order.

    Raises:
        InputError: for anything else, and for none.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return (whole_number(value, "layers", least=0),)
    several = sorted({whole_number(one, "layers", least=0) for one in value})
    if not several:
        raise InputError("layers is empty: give a layer or several, or None for all")
    return tuple(several)
