"""Numbers of a page as bytes: [row, entry] each, as exact as fits the file.

A grid keeps float32 where there is room. Otherwise its numbers are steps of the largest value of
their entry, 32,767 or 63 to either side. The page knows which, and says so; at the entry that it
opens with, numbers are always float32.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUDGET = 1_950_000
"""What all grids of a page may cost together: bytes, as far as they can be compressed."""
_COSTS = {"f4": 4.0, "i4": 3.0, "i2": 2.0, "i1": 0.8}
_LEVELS = {"i2": 32767, "i1": 63}
_INTS = {"i2": torch.int16, "i1": torch.int8}


def room(n_rows: int, budget: float) -> int:
    """How many entries of so many rows fit, rounded as far as need be."""
    return max(1, int(budget / (_COSTS["i1"] * max(1, n_rows))))


@dataclass
class Grid:
    """Numbers [row, entry].

    Attributes:
        values: float32, or int32 for numbers that count something.
        rounded: whether they may be rounded to fit.
    """

    values: Tensor
    rounded: bool = False

    @classmethod
    def of(cls, values: Tensor, rounded: bool = False) -> Grid:
        """The same numbers on the CPU."""
        kind = torch.float32 if values.is_floating_point() else torch.int32
        return cls(values.detach().to("cpu", kind).contiguous(), rounded)

    def tolist(self) -> Any:
        """Nested lists; None for what JSON has no number for."""
        return [[_finite(value) for value in row] for row in self.values.tolist()]


def plain(value: Any) -> Any:
    """A page's content with every grid as nested lists."""
    return _changed(value, Grid.tolist)


def packed(value: Any) -> tuple[Any, str]:
    """A page's content with every grid as a place among bytes, and these bytes.

    Returns:
        The content, where a grid is ``{"type", "shape", "start", "scale"}``: of rounded ones,
        ``scale`` times the integer is the value, one scale for each entry, and the least integer
        stands for no number. And all bytes, little-endian, deflated, in base64.
    """
    kinds = _kinds(list(_grids(value)))
    parts: list[bytes] = []
    start = 0

    def place(grid: Grid) -> dict[str, Any]:
        nonlocal start
        kind = kinds[id(grid)]
        integers, scale = _rounded(grid.values, kind)
        data = integers.numpy().astype(f"<{kind}").tobytes()
        data += b"\0" * (-len(data) % 4)
        parts.append(data)
        start += len(data)
        shape = list(grid.values.shape)
        return {"type": kind, "shape": shape, "start": start - len(data), "scale": scale}

    content = _changed(value, place)
    return content, base64.b64encode(zlib.compress(b"".join(parts), 9)).decode()


def _kinds(grids: list[Grid]) -> dict[int, str]:
    """The type of each grid's numbers: all fit in the least, and small ones are exact first."""
    least = {id(one): _least(one) for one in grids}
    left = BUDGET - sum(one.values.numel() * _COSTS[least[id(one)]] for one in grids)
    kinds = dict(least)
    for grid in sorted((one for one in grids if one.rounded), key=lambda one: one.values.numel()):
        n = grid.values.numel()
        for kind in ("f4", "i2"):
            more = n * (_COSTS[kind] - _COSTS["i1"])
            if more <= left:
                kinds[id(grid)] = kind
                left -= more
                break
    return kinds


def _least(grid: Grid) -> str:
    if grid.rounded:
        return "i1"
    if grid.values.is_floating_point():
        return "f4"
    return "i2" if not grid.values.numel() or int(grid.values.abs().max()) <= 32767 else "i4"


def _rounded(values: Tensor, kind: str) -> tuple[Tensor, list[float] | None]:
    """Integers in place of numbers, and what one of them is worth at each entry."""
    if not values.is_floating_point() or kind == "f4":
        return values, None
    finite = values.isfinite()
    scale = values.where(finite, 0.0).abs().amax(0) / _LEVELS[kind]
    steps = (values / scale.clamp(min=torch.finfo(torch.float32).tiny)).where(finite, 0.0)
    least = torch.iinfo(_INTS[kind]).min
    integers = steps.round().to(_INTS[kind]).masked_fill(~finite, least)
    return integers, [float(f"{one:.7g}") for one in scale.tolist()]


def _grids(value: Any) -> Iterator[Grid]:
    if isinstance(value, Grid):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _grids(one)
    elif isinstance(value, list):
        for one in value:
            yield from _grids(one)


def _changed(value: Any, change: Any) -> Any:
    if isinstance(value, Grid):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    return value


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
