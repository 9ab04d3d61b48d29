"""What the caller's hooks write: the difference between two looks at one place.

One look is ahead of the hooks and one behind them. Both are projected at once, since a hook may
write in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View

_MOST_AXES = 3
"""Of what attention writes: row, position, d_model."""


class HookWrites:
    """Records what the caller's hooks write at some places.

    Args:
        places: each with the directions that a write there is projected on.
        n_entries: number of entries.
        dtype: of the numbers.
        may_rest: which of the places need not run, or hold what else has another form.
    """

    def __init__(
        self,
        places: Sequence[tuple[Place, Directions]],
        n_entries: int,
        dtype: torch.dtype,
        may_rest: Sequence[bool] = (),
    ) -> None:
        self.places = places
        self._may_rest = may_rest or [False] * len(places)
        self._rows = FixedRows(2 * len(places), n_entries, dtype)

    def taps(self, view: View) -> list[Tap]:
        """Two taps for each place."""
        found = []
        for number, (place, directions) in enumerate(self.places):
            rest = self._may_rest[number]
            for row, at in ((2 * number, place.ahead), (2 * number + 1, place)):
                found.append(Tap(at, self._see(row, directions, view, rest), optional=rest))
        return found

    def finish(self, device: torch.device) -> Tensor:
        """The writes [places, N], in the directions; not divided by any scale."""
        rows = self._rows.gathered(device)
        return rows[1::2] - rows[::2]

    def _see(
        self, row: int, directions: Directions, view: View, may_rest: bool
    ) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            x = call.activation
            if may_rest and x.ndim > _MOST_AXES:
                return  # attention's probabilities
            project(x, view, directions, self._rows.row(row, x.device))

        return see
