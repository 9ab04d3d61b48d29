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


class HookWrites:
    """Records what the caller's hooks write at some places.

    Args:
        places: each with the directions that a write there is projected on.
        n_entries: number of entries.
        dtype: of the numbers.
    """

    def __init__(
        self, places: Sequence[tuple[Place, Directions]], n_entries: int, dtype: torch.dtype
    ) -> None:
        self.places = places
        self._rows = FixedRows(2 * len(places), n_entries, dtype)

    def taps(self, view: View) -> list[Tap]:
        """Two taps for each place."""
        found = []
        for number, (place, directions) in enumerate(self.places):
            for row, at in ((2 * number, place.ahead), (2 * number + 1, place)):
                found.append(Tap(at, self._see(row, directions, view)))
        return found

    def finish(self, device: torch.device) -> Tensor:
        """The writes [places, N], in the directions; not divided by any scale."""
        rows = self._rows.gathered(device)
        return rows[1::2] - rows[::2]

    def _see(self, row: int, directions: Directions, view: View) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            x = call.activation
            project(x, view, directions, self._rows.row(row, x.device))

        return see
