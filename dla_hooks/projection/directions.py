"""Directions that activations are projected on, at one place of the model.

A call may have one target, or a different one at every position. In the second case all directions
together would be as large as an activation. ``Directions`` therefore stores a function that makes
directions on demand. One or few are kept; otherwise they are made for one tile of entries at a
time, from directions later in the model, and finally from rows of the unembedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.onto import onto
from dla_hooks.projection.tiles import Tile

_AT_ONCE = 256
_HELD_ELEMENTS = 2**21
"""Largest number of elements of directions that a call keeps (8 MiB in float32)."""


def few(n_targets: int, width: int) -> bool:
    """True if the directions are few enough to be kept."""
    return n_targets == 1 or n_targets * width <= _HELD_ELEMENTS


class Directions:
    """One direction [width] per target.

    Args:
        make: from target indices [k], on the CPU, to their directions [k, width].
        n_targets: how many targets there are.
        dtype: of the directions: the dtype of every contraction with them.
    """

    def __init__(
        self, make: Callable[[Tensor], Tensor], n_targets: int, dtype: torch.dtype
    ) -> None:
        self._make = make
        self._n_targets = n_targets
        self.dtype = dtype
        self._held = n_targets == 1
        self._on: dict[torch.device, Tensor] = {}
        self._only_on: dict[torch.device, Tensor] = {}
        self._by_head_on: dict[tuple[int, torch.device], Tensor] = {}

    @classmethod
    def held(cls, d_KM: Tensor) -> Directions:
        """Wrap directions that are made already, and keep them."""
        directions = cls(lambda _: d_KM, len(d_KM), d_KM.dtype)
        directions._held = True
        directions._on[d_KM.device] = d_KM
        return directions

    def __len__(self) -> int:
        return self._n_targets

    def of(self, targets: Tensor) -> Tensor:
        """Return directions [k, width] of some targets [k], on the device of their weights."""
        if not self._held:
            return self._make(targets)
        self.prepare()
        home, made = next(iter(self._on.items()))
        return made if self._n_targets == 1 else made.index_select(0, targets.to(home))

    def prepare(self) -> None:
        """Make all directions now, if they are few enough to be kept."""
        if self._held and not self._on:
            made = self._make(torch.arange(self._n_targets, device="cpu"))
            self._on[made.device] = made

    def at(self, tile: Tile, device: torch.device) -> Tensor:
        """Return the directions of a tile's targets, on a device."""
        if self._n_targets > 1:
            return onto(self.of(tile.targets), device)
        return self.on(device)

    def on(self, device: torch.device) -> Tensor:
        """Return the direction [1, width] of the only target, on a device."""
        if device not in self._on:
            self._on[device] = self.of(torch.zeros(1, dtype=torch.long, device="cpu")).to(device)
        return self._on[device]

    @outside_autocast
    def of_constant(self, constant_M: Tensor) -> Tensor:
        """What a vector [width] that is the same at every position gives: one number per target.

        No prompt changes these numbers, and they are few: they are kept, where directions may be
        too many to be.
        """
        if self._held:
            self.prepare()
            d_KM = next(iter(self._on.values()))
            return d_KM @ constant_M.to(d_KM)
        found = []
        for some in torch.arange(self._n_targets, device="cpu").split(_AT_ONCE):
            d_KM = self.of(some)
            found.append(d_KM @ constant_M.to(d_KM))
        return torch.cat(found)

    def only(self, device: torch.device) -> Tensor | None:
        """Return the direction [width] of the only target, on a device; None if it has others."""
        found = self._only_on.get(device)
        if found is None and self._n_targets == 1:
            found = self._only_on[device] = self.on(device)[0]
        return found

    def only_at_home(self) -> Tensor | None:
        """The same on the device of its weights, if it is made already."""
        home = next(iter(self._on), None) if self._n_targets == 1 else None
        return None if home is None else self.only(home)

    def only_by_head(self, n_heads: int, device: torch.device) -> Tensor | None:
        """The same, cut into heads [head, d_head, 1]."""
        key = n_heads, device
        found = self._by_head_on.get(key)
        if found is None and self._n_targets == 1:
            found = self._by_head_on[key] = self.on(device).view(n_heads, -1, 1)
        return found

    def then(self, change: Callable[[Tensor], Tensor]) -> Directions:
        """Make directions earlier in the model from these, by ``change``."""
        return Directions(lambda targets: change(self.of(targets)), self._n_targets, self.dtype)


def of_constants(constants: Sequence[tuple[Directions, Tensor | None]]) -> Tensor | None:
    """What constants give for each target, one row each [L, K]; None where all are nothing."""
    found = [None if c_M is None else directions.of_constant(c_M) for directions, c_M in constants]
    some = next((of_K for of_K in found if of_K is not None), None)
    if some is None:
        return None
    return torch.stack([torch.zeros_like(some) if of_K is None else of_K for of_K in found])
