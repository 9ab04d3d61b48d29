"""Tiles of entries, each small enough for a processor's cache.

The model may run a prompt in pieces. A view holds the entries of one piece, and reads them from an
activation of that piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.onto import onto

_TILE_ELEMENTS = {"cpu": 2**19}
"""Elements of an activation in a tile, small enough for a CPU's cache (2 MiB in float32)."""
_TILE_ELEMENTS_ELSEWHERE = 2**24
"""Elements in a tile on other devices: large, so that kernel launches cost little."""


@dataclass(frozen=True)
class Tile:
    """Some of the entries in view, read together.

    Attributes:
        place: which of the entries in view, or None for all of them (or where nobody asks).
        index: their places among all entries: a slice, or indices on the device.
        size: their number.
        targets: their targets, on the CPU: one for all [1], one for each [size], or the distinct
            ones in any number between, to which ``which`` points.
        which: for every entry its place in ``targets`` [size] on the device, or None.
        is_all: whether these are all entries of the call, in their order.
    """

    place: slice | None
    index: slice | Tensor
    size: int
    targets: Tensor
    which: Tensor | None
    is_all: bool = False

    def spread(self, rows_K: Tensor) -> Tensor:
        """Spread rows for the targets in the tile to rows for its entries (or one row for all)."""
        return rows_K if self.which is None else rows_K.index_select(0, self.which)


class _Way(NamedTuple):
    """How an activation of some shape is read.

    Attributes:
        ahead: positions of the model's own before the prompt.
        column: the one that is read in every row, if that is all.
        run: the first entry and their number, where they are neighbours.
        axis: of the indices, where they are not.
    """

    ahead: int
    column: int | None
    run: tuple[int, int] | None
    axis: int


class View:
    """The entries of one range of columns, which run together.

    Args:
        entries: all entries of the call.
        start: the first column that is run.
        stop: the column after the last; None is the end of the prompt.

    Attributes:
        columns: the columns that are run.
        inside: which of all entries are in view [n], on the CPU.
        column: the only column that is read, if it is read in every row.
        one_column: how that is read at once (:class:`dla_hooks.projection.one_column.OneColumn`).
    """

    one_column: Any = None

    def __init__(self, entries: Entries, start: int = 0, stop: int | None = None) -> None:
        batch, width = entries.prompt_shape
        stop = width if stop is None else stop
        self._entries, self.columns = entries, range(start, stop)
        self._batch, self._width = batch, stop - start
        rows, cols, n = entries.rows, entries.cols, len(entries)
        self._run: slice | None = slice(0, n)  # of the entries in view, where they are neighbours
        self.inside = torch.arange(n, device="cpu")
        if (start, stop) != (0, width):
            self.inside = ((cols >= start) & (cols < stop)).nonzero()[:, 0]
            rows, cols = rows[self.inside], cols[self.inside] - start
            self._run = _run_of(self.inside)
        flat = rows * self._width + cols if batch > 1 else cols
        # Neighbours can be read as a slice of the activation, without gathering.
        self._cols_run = _run_of(cols)
        self._flat_run = _run_of(flat) if batch > 1 else self._cols_run
        self._n = len(self.inside)
        self.column: int | None = None
        if self._n == batch and torch.equal(rows, torch.arange(batch, device="cpu")):
            only = cols.unique()
            self.column = int(only) if len(only) == 1 else None
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {torch.device("cpu"): (flat, cols)}
        self._tiles: dict[tuple[int, torch.device], list[Tile]] = {}
        self._ways: dict[torch.Size, _Way] = {}

    @classmethod
    def whole(cls, entries: Entries) -> View:
        """The view of all columns; made once for entries that may be kept."""
        found: View | None = entries.view
        if found is None:
            found = cls(entries)
            if entries.few:
                entries.view = found
        return found

    def __len__(self) -> int:
        return self._n

    @property
    def n_prompts(self) -> int:
        """The rows of the batch."""
        return self._batch

    @property
    def entries(self) -> Entries:
        """All entries of the call."""
        return self._entries

    def part(self, start: int, stop: int) -> View:
        """The view of some columns of the prompt; this one, if these are its own."""
        if range(start, stop) == self.columns:
            return self
        return View(self._entries, start, stop)

    def take(self, x: Tensor, place: slice | None = None) -> Tensor:
        """Read the activations [tile, d] at the entries in view, or at some of them.

        Args:
            x: [batch, pos, d]; or [1, pos, d], shared by the rows; or [batch * pos, d], as
                modules that flatten their input see it; or [batch, more + pos, d], where the
                model puts positions of its own before the prompt.
            place: which of the entries in view; None is all.
        """
        way = self._ways.get(x.shape)
        if way is None:
            way = self._ways[x.shape] = self._way(x.shape)
        if way.ahead:
            x = x[:, way.ahead :]
        if way.column is not None:
            found = x.select(1, way.column)
            return found if place is None else found[place]
        flat_x = x.reshape(-1, x.shape[-1])
        if way.run is not None:
            found = flat_x.narrow(0, *way.run)
            return found if place is None else found[place]
        indices = self._indices(x.device)[way.axis]
        return flat_x.index_select(0, indices if place is None else indices[place])

    def _way(self, shape: torch.Size) -> _Way:
        batch, width = self._batch, self._width
        more = shape[1] - width if len(shape) == 3 and shape[0] == batch else 0
        ahead, n = max(0, more), shape[:-1].numel() - batch * max(0, more)
        column = None
        if n == batch * width:
            run, axis = self._flat_run, 0
            column = self.column if len(shape) == 3 and shape[0] == batch else None
        elif n == width:
            run, axis = self._cols_run, 1
        else:
            raise UnsupportedModelError(
                f"an activation of shape {tuple(shape)} does not line up with a prompt of "
                f"shape {(batch, width)}"
            )
        neighbours = None if run is None else (run.start, run.stop - run.start)
        return _Way(ahead, column, neighbours, axis)

    def tiles(self, width: int, device: torch.device) -> list[Tile]:
        """Cut the entries in view into tiles.

        Args:
            width: of the activations.
            device: of the activations.
        """
        key = width, device
        found = self._tiles.get(key)
        if found is None:
            found = self._tiles[key] = self._cut(*key)
        return found

    def by_prompt(self, size: int, device: torch.device) -> Iterator[tuple[int, Tensor, Tile]]:
        """Cut the entries in view into tiles of one prompt each.

        Args:
            size: the most entries of a tile.
            device: of the activations.

        Yields:
            The prompt's row in the batch, the columns of these entries among those that are run
            [T], and the tile.
        """
        rows = self._entries.rows[self.inside]
        for row in rows.unique().tolist():
            for here in self.inside[rows == row].split(size):
                columns = self._entries.cols[here] - self.columns.start
                yield row, onto(columns, device), self._tile(None, here, device)

    def _cut(self, width: int, device: torch.device) -> list[Tile]:
        elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ELSEWHERE)
        size = max(1, elements // max(1, width))
        n, tiles = len(self), []
        for start in range(0, n, size):
            stop = min(start + size, n)
            place = None if (start, stop) == (0, n) else slice(start, stop)
            tiles.append(self._tile(place, self.inside[start:stop], device))
        return tiles

    def _tile(self, place: slice | None, here: Tensor, device: torch.device) -> Tile:
        run, which = _run_of(here), None
        targets = self._entries.target[here if run is None else run]
        if len(targets) > 1:
            distinct, which_T = targets.unique(return_inverse=True)
            if len(distinct) == 1:
                targets = distinct
            elif 2 * len(distinct) <= len(targets):  # few entries have a target of their own
                targets, which = distinct, onto(which_T, device)
        index = onto(here, device) if run is None else run
        is_all = run is not None and len(here) == len(self._entries)
        return Tile(place, index, len(here), targets, which, is_all)

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            flat, cols = self._on[torch.device("cpu")]
            self._on[device] = onto(flat, device), onto(cols, device)
        return self._on[device]


def _run_of(numbers: Tensor) -> slice | None:
    """Return consecutive numbers as a slice, or None for any others."""
    if not len(numbers):
        return slice(0, 0)
    first = int(numbers[0])
    if len(numbers) == 1:
        return slice(first, first + 1)
    run = torch.arange(first, first + len(numbers), device="cpu")
    return slice(first, first + len(numbers)) if torch.equal(numbers, run) else None
