"""Activations of a single entry, held until the run is over, so that one product serves all rows.

A hook works between two matrix products of the model, where the code and data that it needs
have left the caches. There a copy of one vector costs less than a product with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View

_MOST = 2**16
"""Numbers that are held at most: 256 KiB in float32."""


class HeldRows:
    """One vector for each row, at the only entry, on the device of its activation.

    Args:
        n_rows: number of rows.
        width: of their vectors.
        dtype: of the contractions.
    """

    def __init__(self, n_rows: int, width: int, dtype: torch.dtype) -> None:
        self._rows = FixedRows(n_rows, width, dtype)

    @staticmethod
    def fit(n_entries: int, n_targets: int, n_rows: int, width: int) -> bool:
        """Whether rows may be held: there is one entry and one target, and they are few."""
        return n_entries == 1 and n_targets == 1 and n_rows * width <= _MOST

    def keep(self, row: int, x: Tensor, view: View) -> None:
        """Copy the entry in view from an activation."""
        self._rows.row(row, x.device).copy_(view.take(x)[0])

    @outside_autocast
    def add_along(self, d_M: Tensor, out_C: Tensor) -> None:
        """Add each row along one direction to the numbers of these rows."""
        out_C += torch.mv(self._rows.gathered(out_C.device), d_M)

    def write_by_head(self, u_CM: Tensor, out_H: Tensor) -> None:
        """Write each row along a direction of its own, head by head; all rows have as many."""
        products_CM = self._rows.gathered(out_H.device) * u_CM
        torch.sum(products_CM.view(len(out_H), -1), 1, out=out_H)
