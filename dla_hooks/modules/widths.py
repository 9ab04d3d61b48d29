"""Widths that a linear module may read, by the shapes of what it holds."""

from __future__ import annotations

import math

from torch import nn

Shapes = tuple[tuple[int, ...], ...]

_LARGEST = 2**20
"""No product of axes above this is a width."""


def held_shapes(module: nn.Module) -> Shapes:
    """The shapes of a module's parameters and buffers: quantised weights are often buffers."""
    return tuple(tuple(one.shape) for one in (*module.parameters(), *module.buffers()))


def possible_widths(shapes: Shapes) -> list[int]:
    """Every axis, and what neighbours make together: [head, d_head, d_out] reads two axes."""
    found = {size for shape in shapes for size in shape}
    for shape in shapes:
        for n in range(2, len(shape)):
            joined = (math.prod(shape[i : i + n]) for i in range(len(shape) - n + 1))
            found.update(size for size in joined if size <= _LARGEST)
    return sorted(size for size in found if size > 1)
