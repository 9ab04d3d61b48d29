"""Where taps write their scalars, on whatever device each runs."""

from __future__ import annotations

import torch
from torch import Tensor


class Scalars:
    """Rows of one number per site, each written where its activation lives.

    A model may be spread over devices; its numbers meet on one of them once it has run, so that
    no hook waits for another device.

    Args:
        n_rows: number of rows.
        n_sites: numbers in each.
        dtype: of the numbers.
    """

    def __init__(self, n_rows: int, n_sites: int, dtype: torch.dtype) -> None:
        self._shape = n_rows, n_sites
        self._dtype = dtype
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The rows [C, N] to write to on a device; each row is for one device only."""
        if device not in self._on:
            self._on[device] = torch.zeros(self._shape, dtype=self._dtype, device=device)
        return self._on[device]

    def gathered(self, device: torch.device | None = None) -> Tensor:
        """All rows [C, N] on one device (by default the first that was written on)."""
        device = device or next(iter(self._on), torch.device("cpu"))
        whole = self.on(device)
        for other, rows in self._on.items():
            if other != device:
                whole += rows.to(device)  # zero but for the rows that were written there
        self._on = {device: whole}
        return whole
