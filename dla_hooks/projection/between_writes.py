"""What a model adds to the stream between its blocks: the difference between two looks at it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View
from dla_hooks.residual.between import Between


class BetweenWrites:
    """Records what is added behind some blocks.

    A stream that reaches the next block as the very tensor that the last one put out has nothing
    added. Where that is so in the whole run, there is no row.

    Args:
        places: each with the directions that an addition there is projected on.
        n_entries: number of entries.
        dtype: of the numbers.
    """

    def __init__(
        self, places: Sequence[tuple[Between, Directions]], n_entries: int, dtype: torch.dtype
    ) -> None:
        self.places = places
        self._rows = FixedRows(2 * len(places), n_entries, dtype)
        self._left: dict[int, weakref.ref[Tensor]] = {}
        self._added: set[int] = set()

    def taps(self, view: View) -> list[Tap]:
        """Two taps for each place."""
        found = []
        for number, (place, directions) in enumerate(self.places):
            found.append(Tap(place.behind, self._see_left(number, directions, view)))
            found.append(Tap(place.ahead, self._see_entered(number, directions, view)))
        return found

    def finish(self, device: torch.device) -> list[tuple[Between, Tensor]]:
        """What was added behind each block [N], in the directions; not divided by any scale."""
        rows = self._rows.gathered(device)
        added = rows[1::2] - rows[::2]
        here = enumerate(zip(self.places, added, strict=True))
        return [
            (place, own)
            for number, ((place, _), own) in here
            if number in self._added or bool(own.any())  # it may be added in place, too
        ]

    def _see_left(self, number: int, directions: Directions, view: View) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            x = call.activation
            self._left[number] = weakref.ref(x)
            project(x, view, directions, self._rows.row(2 * number, x.device))

        return see

    def _see_entered(
        self, number: int, directions: Directions, view: View
    ) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            x = call.activation
            project(x, view, directions, self._rows.row(2 * number + 1, x.device))
            left = self._left.pop(number, None)
            if left is None or left() is not x:
                self._added.add(number)

        return see
