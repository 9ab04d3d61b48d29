"""Which entries of the prompt are read, and which answer each of them is held against.

A site is one (row, column) of the batch together with one target. Selecting positions and
broadcasting answers both end here, as three flat lists of numbers, so that the kernels know
nothing of argument forms, padding or ragged rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.errors import UnsupportedModelError


class Sites:
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
        self.batched = True  # whether the result has an axis for the batch
        self.target_of_entry = target  # padding included
        self.rows = rows[valid]
        self.cols = cols[valid]
        self.target = target[valid]
        batch, width = prompt_shape
        flat = self.rows * width + self.cols
        # Every entry of the prompt, in order: activations can be read without any gathering.
        self._everything = len(flat) == batch * width and bool(
            (flat == torch.arange(batch * width)).all()
        )
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {
            torch.device("cpu"): (flat, self.cols, self.target)
        }

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, x: Tensor, tile: slice) -> Tensor:
        """The activations [tile, d] at some of the sites.

        Args:
            x: [batch, pos, d]; or [1, pos, d], shared by the rows; or [batch * pos, d], as
                modules that flatten their input see it; or [batch, more + pos, d], where the
                model puts positions of its own before the prompt.
            tile: which sites.
        """
        batch, width = self.prompt_shape
        flat_x = x.reshape(-1, x.shape[-1])
        flat, cols, _ = self._indices(x.device)
        if x.ndim == 3 and x.shape[0] == batch and x.shape[1] > width:
            before = x.shape[1] - width
            return x[:, before:].flatten(0, 1).index_select(0, flat[tile])
        if flat_x.shape[0] == width != batch * width:
            return flat_x.index_select(0, cols[tile])
        if flat_x.shape[0] != batch * width:
            raise UnsupportedModelError(
                f"an activation of shape {tuple(x.shape)} does not line up with a prompt of "
                f"shape {self.prompt_shape}"
            )
        if self._everything:
            return flat_x[tile]
        return flat_x.index_select(0, flat[tile])

    def target_on(self, device: torch.device) -> Tensor:
        """The targets [N] on a device."""
        return self._indices(device)[2]

    def unfold(self, values: Tensor) -> Tensor:
        """Scalars [..., N] as [..., *shape], with NaN where the prompt has no token."""
        out = values.new_full((*values.shape[:-1], *self.shape), float("nan"))
        out[..., self._valid.to(values.device)] = values
        return out if self.batched else out.squeeze(-len(self.shape))

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on:
            flat, cols, target = self._on[torch.device("cpu")]
            self._on[device] = flat.to(device), cols.to(device), target.to(device)
        return self._on[device]
