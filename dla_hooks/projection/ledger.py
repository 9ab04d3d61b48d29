"""Ledgers: the scalars that taps write, on each tap's own device.

A ledger holds one number per row and entry. :class:`FixedRows` holds every row. :class:`TopRows`
holds the strongest rows of each entry, and separately the sum of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.projection.strongest import Best, Every
from dla_hooks.projection.tiles import Tile

_FEW_ENTRIES = 32
"""Of so many entries, and one more for each prompt, all ranked rows wait for the final scale."""
_MOST_HELD = 2**18
"""Of more entries, so many numbers: 1 MiB in float32."""


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite: a sum of finite ones nearly always is finite."""
    return math.isfinite(float(numbers.sum())) or bool(torch.isfinite(numbers).all())


def largest(numbers: Tensor) -> float:
    """The largest absolute value; NaN if any is, and 0 of nothing."""
    return float(torch.linalg.vector_norm(numbers, torch.inf)) if numbers.numel() else 0.0


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
        self._columns: Tensor | None = None
        self._given_away = self._is_spread = False

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

    def columns(self, device: torch.device) -> Tensor:
        """All rows [C, N, 1] to write to on a device."""
        if self._columns is None or self._columns.device != device:
            self._columns = self.on(device).unsqueeze(-1)
        return self._columns

    def gathered(self, device: torch.device | None = None) -> Tensor:
        """All rows [C, N] on one device (by default the first that was written on), once.

        Whoever gathers them may write to them, but not keep them. A second time they would no
        longer be what was written by the taps.
        """
        if self._given_away:
            raise RuntimeError("the rows of a run are gathered once")
        self._given_away = True
        device = device or next(iter(self._on), torch.device("cpu"))
        whole = self.on(device)
        for other, rows in self._on.items():
            if other != device:
                whole += rows.to(device)  # zero in all rows that were not written there
                self._is_spread = True
        self._on = {device: whole}
        return whole

    def again(self) -> bool:
        """Make the same rows ready for another run; False where they were on several devices."""
        if not self._is_spread:
            for rows in self._on.values():
                rows.zero_()
            self._given_away = False
        return not self._is_spread


class TopRows:
    """The strongest rows of every entry, for units with too many rows to keep.

    Rows come in any order, some at a time, each of them once for an entry. Two things are kept: the
    ``k`` rows of largest absolute value at each entry, and the sum of all rows at each entry. That
    sum is accumulated from the rows themselves. So the rest (that sum minus the kept rows) is
    measured, not derived from a total.

    The final norm's scale is known when the last row has come. Sums of one row over several entries
    are therefore there only if all numbers are few enough to wait for it.

    Args:
        k: rows to keep per entry; None keeps all.
        n_rows: number of rows that will come.
        n_entries: number of entries.
        dtype: of the numbers.
        n_beside: how many further numbers each row brings along.
        of_rows: whether a row means the same at each entry, so that its sum is asked for.
        n_prompts: of how many prompts the entries are.
    """

    def __init__(
        self,
        k: int | None,
        n_rows: int,
        n_entries: int,
        dtype: torch.dtype,
        n_beside: int = 0,
        of_rows: bool = True,
        n_prompts: int = 1,
    ) -> None:
        n_numbers = 1 + n_beside
        few = n_entries <= _FEW_ENTRIES + n_prompts or n_numbers * n_rows * n_entries <= _MOST_HELD
        self._of_rows = of_rows
        self._k = n_rows if k is None else min(k, n_rows)
        self._whole = self._k == n_rows or (few and of_rows)
        self._shape = n_numbers, n_entries, n_rows if self._whole else self._k
        self._dtype = dtype
        self._on: dict[torch.device, tuple[Every | Best, Tensor]] = {}

    def add(
        self,
        values_RT: Tensor,
        rows_R: Tensor | range,
        tile: Tile,
        beside: Sequence[Tensor] = (),
    ) -> Tensor:
        """Add some rows at the entries of one tile.

        This is fastest for neighbouring rows, given as a range, whose values lie in memory entry by
        entry.

        Args:
            values_RT: their values, before the final norm's scale is divided out.
            rows_R: their numbers among all rows [R]; or [R, T], where each entry has its own, -1
                for a place that holds none, whose value is 0.
            tile: the entries.
            beside: what else they bring along, each [R, T].

        Returns:
            The sum of these rows at each entry [T].
        """
        rows, sum_N = self._state(values_RT.device)
        numbers = [each.T.to(self._dtype) for each in (values_RT, *beside)]
        sum_T = numbers[0].sum(1)
        sum_N[tile.index] += sum_T
        names = rows_R.t().to(values_RT.device) if isinstance(rows_R, Tensor) else rows_R
        rows.add(numbers, names, tile)
        return sum_T

    def gathered(self, scale_N: Tensor, entries: Entries) -> Top:
        """The kept numbers, on one device.

        Args:
            scale_N: what the values (not what they brought along) are divided by.
            entries: all entries.
        """
        self._state(scale_N.device)
        rows, sum_N = self._on.pop(scale_N.device)
        others = list(self._on.values())
        self._on.clear()
        if others:
            same_kind: list[Any] = [each for each, _ in others]
            rows = rows.joined(same_kind)
            sum_N = sum_N + sum(each_N.to(sum_N.device) for _, each_N in others)
        rows.values_PNR[0] /= scale_N[:, None]
        sums_RB = None
        if self._whole and self._of_rows:
            values_NR = rows.values_PNR[0]
            sums_BR = values_NR.new_zeros(entries.prompt_shape[0], values_NR.shape[1])
            sums_RB = sums_BR.index_add_(0, entries.rows.to(values_NR.device), values_NR).T
        values_PNK, names_NK = rows.best(self._k)
        values_KN, *beside = values_PNK.transpose(1, 2)
        return Top(values_KN, names_NK.T, sum_N / scale_N, sums_RB, tuple(beside))

    def _state(self, device: torch.device) -> tuple[Every | Best, Tensor]:
        if device not in self._on:
            kind: type[Every | Best] = Every if self._whole else Best
            sum_N = torch.zeros(self._shape[1], dtype=self._dtype, device=device)
            self._on[device] = kind(*self._shape, self._dtype, device), sum_N
        return self._on[device]


@dataclass(frozen=True)
class Top:
    """What :class:`TopRows` kept.

    Attributes:
        values_KN: the strongest values of each entry, the largest absolute value first.
        index_KN: their rows' numbers; -1, with the value 0, where an entry had fewer rows.
        sum_N: the sum of all rows.
        row_sums_RB: each row's sum over the entries of each prompt of the batch; None where these
            are too many to be kept.
        beside: what the kept rows brought along, each [K, N].
    """

    values_KN: Tensor
    index_KN: Tensor
    sum_N: Tensor
    row_sums_RB: Tensor | None
    beside: tuple[Tensor, ...]

    @property
    def rest_N(self) -> Tensor:
        """What was not kept."""
        return self.sum_N - self.values_KN.sum(0)
