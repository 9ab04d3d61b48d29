"""Some of the entries, read together: what a processor's cache holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_TILE_ELEMENTS = {"cpu": 2**19}
"""Entries of an activation in a tile: what a processor's cache holds (2 MiB in float32), ..."""


_TILE_ELEMENTS_ELSEWHERE = 2**24
"""... and elsewhere so many that starting a kernel costs little against running it."""


@dataclass(frozen=True)
class Tile:
    """Some of the entries in view, read together.

    Attributes:
        index: which of all entries they are: a slice, or indices on the device.
        size: how many.
        targets: their targets, on the CPU: one for all [1], one for each [size], or the distinct
            ones in any number between, to which ``which`` points.
        which: for every site its place in ``targets`` [size] on the device, or None.
    """

    index: slice | Tensor
    size: int
    targets: Tensor
    which: Tensor | None

    def spread(self, rows_K: Tensor) -> Tensor:
        """A row for every target in the tile as a row for every site; or the one row for all."""
        return rows_K if self.which is None else rows_K.index_select(0, self.which)
