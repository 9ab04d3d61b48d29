"""Which entries of the prompt are read, and which answer each of them is held against.

A site is one (row, column) of the batch together with one target. Selecting positions and
broadcasting answers both end here, as three flat lists of numbers, so that the kernels know
nothing of argument forms, padding, ragged rows, or prompts that are run in pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.projection.tiles import _TILE_ELEMENTS, _TILE_ELEMENTS_ELSEWHERE, Tile


class Entries:
    """N flat (row, column, target) triples, and how they unfold into the result's axes.

    Args:
        rows: batch rows [*shape].
        cols: columns of the prompt [*shape].
        target: index of the distinct target [*shape].
        valid: False where the result has an entry but the prompt has no token [*shape].
        prompt_shape: (batch, pos) of the prompt.
    """

    def __init__(
        self,
        rows: Tensor,
        cols: Tensor,
        target: Tensor,
        valid: Tensor,
        prompt_shape: tuple[int, int],
    ) -> None:
        self.shape = tuple(valid.shape)
        self.prompt_shape = prompt_shape
        self._valid = valid
        self._all_valid = bool(valid.all())
        self.batched = True  # whether the result has an axis for the batch
        self.target_of_entry = target  # padding included
        self.rows = rows[valid]
        self.cols = cols[valid]
        self.target = target[valid]
        self.look_at(0, prompt_shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def look_at(self, start: int, stop: int) -> bool:
        """See only the columns from ``start`` up to ``stop``, as the model is about to run them.

        Returns:
            Whether any site is among them.
        """
        self._view = range(start, stop)
        batch, width = self.prompt_shape[0], len(self._view)
        inside = ((self.cols >= start) & (self.cols < stop)).nonzero()[:, 0]
        self._inside = inside
        self._contiguous = not len(inside) or int(inside[-1]) - int(inside[0]) + 1 == len(inside)
        cols = self.cols[inside] - start
        flat = self.rows[inside] * width + cols
        # Every entry in view, in order: activations can be read without any gathering.
        self._everything = len(flat) == batch * width and bool(
            (flat == torch.arange(batch * width)).all()
        )
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {torch.device("cpu"): (flat, cols)}
        self._tiles: dict[tuple[int, torch.device], list[tuple[slice, Tile]]] = {}
        return bool(len(inside))

    def take(self, x: Tensor, tile: slice = slice(None)) -> Tensor:
        """The activations [tile, d] at the entries in view, or at some of them.

        Args:
            x: [batch, pos, d]; or [1, pos, d], shared by the rows; or [batch * pos, d], as
                modules that flatten their input see it; or [batch, more + pos, d], where the
                model puts positions of its own before the prompt.
            tile: which of the entries in view.
        """
        batch, width = self.prompt_shape[0], len(self._view)
        if x.ndim == 3 and x.shape[0] == batch and x.shape[1] > width:
            x = x[:, x.shape[1] - width :]
        flat_x = x.reshape(-1, x.shape[-1])
        if flat_x.shape[0] == batch * width:
            if self._everything:
                return flat_x[tile]
            flat, _ = self._indices(x.device)
            return flat_x.index_select(0, flat[tile])
        if flat_x.shape[0] == width:
            _, cols = self._indices(x.device)
            return flat_x.index_select(0, cols[tile])
        raise UnsupportedModelError(
            f"an activation of shape {tuple(x.shape)} does not line up with a prompt of "
            f"shape {(batch, width)}"
        )

    def tiles(self, width: int, device: torch.device) -> list[tuple[slice, Tile]]:
        """The entries in view, cut into tiles: places among those in view, and the tile.

        Args:
            width: of the activations that are to be read.
            device: where they are.
        """
        key = width, device
        if key not in self._tiles:
            self._tiles[key] = self._cut(*key)
        return self._tiles[key]

    def target_on(self, device: torch.device) -> Tensor:
        """The targets [N] of all entries, on a device."""
        return self.target.to(device)

    def unfold(self, values: Tensor) -> Tensor:
        """Scalars [..., N] as [..., *shape], with NaN where the prompt has no token."""
        lead = values.shape[:-1]
        if self._all_valid:
            out = values.reshape(*lead, *self.shape)
        else:
            out = values.new_full((*lead, *self.shape), float("nan"))
            out[..., self._valid.to(values.device)] = values
        return out if self.batched else out.squeeze(-len(self.shape))

    def _cut(self, width: int, device: torch.device) -> list[tuple[slice, Tile]]:
        elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ELSEWHERE)
        size = max(1, elements // max(1, width))
        inside, tiles = self._inside, []
        for start in range(0, len(inside), size):
            place = slice(start, min(start + size, len(inside)))
            here = inside[place]
            index: slice | Tensor = here.to(device)
            if self._contiguous:
                index = slice(int(here[0]), int(here[-1]) + 1)
            targets = self.target[here]
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
