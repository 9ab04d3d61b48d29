"""Which layers a caller means."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from dla_hooks.errors import InputError


def read_layers(layers: int | Iterable[int]) -> tuple[int, ...]:
    """One layer or several, in order and each once.

    Raises:
        InputError: for anything else.
    """
    try:
        several = layers if isinstance(layers, Iterable) else [layers]
        found = {operator.index(layer) for layer in several}
    except TypeError:
        found = set()
    if not found or min(found) < 0:
        raise InputError(f"layers must be numbers of layers, such as [3, 5]; got {layers!r:.80}")
    return tuple(sorted(found))
