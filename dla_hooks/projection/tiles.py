"""Tiles of entries, each small enough for a processor's cache.

The model may run a prompt in pieces. A view holds the entries of one piece, and reads them from an
activation of that piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.inputs.entries import Entries

_TILE_ELEMENTS = {"cpu": 2**19}
"""Elements of an activation in a tile, small enough for a CPU's cache (2 MiB in float32)."""
_TILE_ELEMENTS_ELSEWHERE = 2**24
"""Elements in a tile on other devices: large, so that kernel launches cost little."""


@dataclass(frozen=True)
class Tile:
    """Some of the entries in view, read together.

    Attributes:
        index: their places among all entries: a slice, or indices on the device.
        size: their number.
        targets: their targets, on the CPU: one for all [1], one for each [size], or the distinct
            ones in any number between, to which ``which`` points.
        which: for every entry its place in ``targets`` [size] on the device, or None.
    """

    index: slice | Tensor
    size: int
    targets: Tensor
    which: Tensor | None

    def spread(self, rows_K: Tensor) -> Tensor:
        """Spread rows for the targets in the tile to rows for its entries (or one row for all)."""
        return rows_K if self.which is None else rows_K.index_select(0, self.which)


class View:
    """The entries of one range of columns, which run together.

    Args:
        entries: all entries of the call.
        start: the first column that is run.
        stop: the column after the last; None is the end of the prompt.

    Attributes:
        columns: the columns that are run.
        inside: which of all entries are in view [n], on the CPU.
    """

    def __init__(self, entries: Entries, start: int = 0, stop: int | None = None) -> None:
        batch, width = entries.prompt_shape
        stop = width if stop is None else stop
        self._entries, self.columns = entries, range(start, stop)
        self._batch, self._width = batch, stop - start
        cols = entries.cols
        if start == 0 and stop == width:
            self.inside = torch.arange(len(cols), device="cpu")
        else:
            self.inside = ((cols >= start) & (cols < stop)).nonzero()[:, 0]
            cols = cols[self.inside]
        cols = cols - start
        flat = entries.rows[self.inside] * self._width + cols
        self._contiguous = _run_of(self.inside) is not None
        # Neighbours can be read as a slice of the activation, without gathering.
        self._flat_run, self._cols_run = _run_of(flat), _run_of(cols)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {torch.device("cpu"): (flat, cols)}
        self._tiles: dict[tuple[int, torch.device], list[tuple[slice, Tile]]] = {}

    def __len__(self) -> int:
        return len(self.inside)

    def part(self, start: int, stop: int) -> View:
        """The view of some columns of the prompt; this one, if these are its own."""
        if range(start, stop) == self.columns:
            return self
        return View(self._entries, start, stop)

    def take(self, x: Tensor, tile: slice = slice(None)) -> Tensor:
        """Read the activations [tile, d] at the entries in view, or at some of them.

        Args:
            x: [batch, pos, d]; or [1, pos, d], shared by the rows; or [batch * pos, d], as
                modules that flatten their input see it; or [batch, more + pos, d], where the
                model puts positions of its own before the prompt.
            tile: which of the entries in view.
        """
        batch, width = self._batch, self._width
        if x.ndim == 3 and x.shape[0] == batch and x.shape[1] > width:
            x = x[:, x.shape[1] - width :]
        flat_x = x.reshape(-1, x.shape[-1])
        if flat_x.shape[0] == batch * width:
            run, place = self._flat_run, 0
        elif flat_x.shape[0] == width:
            run, place = self._cols_run, 1
        else:
            raise UnsupportedModelError(
                f"an activation of shape {tuple(x.shape)} does not line up with a prompt of "
                f"shape {(batch, width)}"
            )
        if run is not None:
            return flat_x[run][tile]
        return flat_x.index_select(0, self._indices(x.device)[place][tile])

    def tiles(self, width: int, device: torch.device) -> list[tuple[slice, Tile]]:
        """Cut the entries in view into tiles: the place of each among them, and the tile.

        Args:
            width: of the activations.
            device: of the activations.
        """
        key = width, device
        if key not in self._tiles:
            self._tiles[key] = self._cut(*key)
        return self._tiles[key]

    def _cut(self, width: int, device: torch.device) -> list[tuple[slice, Tile]]:
        elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ELSEWHERE)
        size = max(1, elements // max(1, width))
        tiles = []
        for start in range(0, len(self), size):
            place = slice(start, min(start + size, len(self)))
            here = self.inside[place]
            index: slice | Tensor = here.to(device)
            if self._contiguous:
                index = slice(int(here[0]), int(here[-1]) + 1)
            targets = self._entries.target[here]
            distinct, which = targets.unique(return_inverse=True)
            if len(distinct) == 1:
                tile = Tile(index, len(here), distinct, None)
            elif 2 * len(distinct) > len(here):  # most entries have a target of their own
                tile = Tile(index, len(here), targets, None)
            else:
                tile = Tile(index, len(here), distinct, which.to(device))
            tiles.append((place, tile))
        return tiles

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            flat, cols = self._on[torch.device("cpu")]
            self._on[device] = flat.to(device), cols.to(device)
        return self._on[device]


def _run_of(numbers: Tensor) -> slice | None:
    """Return consecutive numbers as a slice, or None for any others."""
    if not len(numbers):
        return slice(0, 0)
    first = int(numbers[0])
    run = torch.arange(first, first + len(numbers), device="cpu")
    return slice(first, first + len(numbers)) if torch.equal(numbers, run) else None
