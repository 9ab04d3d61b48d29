"""Ledgers: the scalars that taps write, on each tap's own device.

A ledger holds one number per row and entry. :class:`FixedRows` holds every row. :class:`TopRows`
holds the strongest rows of each entry, and separately the sum of all rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dla_hooks.projection.tiles import Tile


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite: a sum of finite ones nearly always is finite."""
    return math.isfinite(float(numbers.sum())) or bool(torch.isfinite(numbers).all())


class FixedRows:
    """Rows of one number per entry, each written on the device of its activation.

    A model may be spread over devices. The numbers are moved to one device after the run, so
    that no hook waits for another device.

    Args:
        n_rows: number of rows.
        n_entries: numbers in each.
        dtype: of the numbers.
    """

    def __init__(self, n_rows: int, n_entries: int, dtype: torch.dtype) -> None:
        self._shape = n_rows, n_entries
        self._dtype = dtype
        self._on: dict[torch.device, Tensor] = {}
        self._each: dict[torch.device, tuple[Tensor, ...]] = {}
        self._given_away = False

    def on(self, device: torch.device) -> Tensor:
        """The rows [C, N] to write to on a device; each row is for one device only."""
        if device not in self._on:
            self._on[device] = torch.zeros(self._shape, dtype=self._dtype, device=device)
        return self._on[device]

    def row(self, number: int, device: torch.device) -> Tensor:
        """One of the rows [N] to write to on a device."""
        each = self._each.get(device)
        if each is None:
            each = self._each[device] = self.on(device).unbind()
        return each[number]

    def gathered(self, device: torch.device | None = None) -> Tensor:
        """All rows [C, N] on one device (by default the first that was written on), once.

        Whoever gathers them may write to them. A second time they would no longer be what was
        written by the taps.
        """
        if self._given_away:
            raise RuntimeError("the rows of a run are gathered once")
        self._given_away = True
        device = device or next(iter(self._on), torch.device("cpu"))
        whole = self.on(device)
        for other, rows in self._on.items():
            if other != device:
                whole += rows.to(device)  # zero in all rows that were not written there
        self._on = {device: whole}
        return whole


class TopRows:
    """The strongest rows of every entry, for units with too many rows to keep.

    Rows come in any order, some at a time, each of them once. Three things are kept: the ``k``
    rows of largest absolute value at each entry, the sum of all rows at each entry, and each
    row's sum over the entries. The sum of all rows is accumulated from the rows themselves. So the
    rest (that sum minus the kept rows) is measured, not derived from a total.

    Args:
        k: rows to keep per entry; None keeps all.
        n_rows: number of rows that will come.
        n_entries: number of entries.
        dtype: of the numbers.
    """

    def __init__(self, k: int | None, n_rows: int, n_entries: int, dtype: torch.dtype) -> None:
        self._k = n_rows if k is None else min(k, n_rows)
        self._n_rows, self._n_entries, self._dtype = n_rows, n_entries, dtype
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def add(self, values_RT: Tensor, rows_R: Tensor, tile: Tile) -> None:
        """Add some rows at the entries of one tile.

        Args:
            values_RT: their values.
            rows_R: their numbers among all rows.
            tile: the entries.
        """
        values_KN, index_KN, sum_N, row_sum_R = self._state(values_RT.device)
        values_RT = values_RT.to(self._dtype)
        rows_R = rows_R.to(values_RT.device)
        sum_N[tile.index] += values_RT.sum(0)
        row_sum_R.index_add_(0, rows_R, values_RT.sum(1))
        both = torch.cat((values_KN[:, tile.index], values_RT))
        names = torch.cat((index_KN[:, tile.index], rows_R[:, None].expand(-1, values_RT.shape[1])))
        # An empty place (number -1) is weaker than any row, and than a row of zero.
        strength = both.abs().masked_fill(names < 0, -1.0)
        kept = strength.topk(self._k, dim=0).indices
        values_KN[:, tile.index] = both.gather(0, kept)
        index_KN[:, tile.index] = names.gather(0, kept)

    def gathered(self, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the kept numbers, on one device.

        Returns:
            Values [k, N] and row numbers [k, N], strongest first; the sum of all rows [N]; each
            row's sum over the entries [rows].
        """
        device = device or next(iter(self._on), torch.device("cpu"))
        parts = [tuple(t.to(device) for t in state) for state in self._on.values()]
        if not parts:
            return self._state(device)
        values = torch.cat([part[0] for part in parts])
        index = torch.cat([part[1] for part in parts])
        order = values.abs().masked_fill(index < 0, -1.0).topk(self._k, dim=0).indices
        sum_N = torch.stack([part[2] for part in parts]).sum(0)
        row_sum_R = torch.stack([part[3] for part in parts]).sum(0)
        return values.gather(0, order), index.gather(0, order), sum_N, row_sum_R

    def _state(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if device not in self._on:
            shape = self._k, self._n_entries
            self._on[device] = (
                torch.zeros(shape, dtype=self._dtype, device=device),
                torch.full(shape, -1, dtype=torch.long, device=device),
                torch.zeros(self._n_entries, dtype=self._dtype, device=device),
                torch.zeros(self._n_rows, dtype=self._dtype, device=device),
            )
        return self._on[device]
