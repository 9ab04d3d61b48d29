"""Ledgers: the scalars that taps write, on each tap's own device.

A ledger holds one number per row and entry. :class:`FixedRows` holds every row. :class:`TopRows`
holds the strongest rows of each entry, and separately the sum of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.projection.tiles import Tile

_MOST_HELD = 2**20
"""Numbers of ranked rows that wait for the final scale: 4 MiB in float32."""


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
    """

    def __init__(
        self,
        k: int | None,
        n_rows: int,
        n_entries: int,
        dtype: torch.dtype,
        n_beside: int = 0,
        of_rows: bool = True,
    ) -> None:
        n_numbers = 1 + n_beside
        few = n_entries == 1 or n_numbers * n_rows * n_entries <= _MOST_HELD
        self._whole = few and of_rows
        self._k = n_rows if k is None else min(k, n_rows)
        n_places = n_rows if self._whole else self._k
        self._shape, self._dtype = (n_numbers, n_places, n_entries), dtype
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def add(
        self, values_RT: Tensor, rows_R: Tensor, tile: Tile, beside: Sequence[Tensor] = ()
    ) -> None:
        """Add some rows at the entries of one tile.

        Args:
            values_RT: their values, before the final norm's scale is divided out.
            rows_R: their numbers among all rows [R]; or [R, T], where each entry has its own, -1
                for a place that holds none, whose value is 0.
            tile: the entries.
            beside: what else they bring along, each [R, T].
        """
        values_PKN, index_KN, sum_N = self._state(values_RT.device)
        rows_RT = rows_R.to(values_RT.device)
        rows_RT = rows_RT[:, None].expand_as(values_RT) if rows_R.ndim == 1 else rows_RT
        numbers = [each.to(self._dtype) for each in (values_RT, *beside)]
        sum_N[tile.index] += numbers[0].sum(0)
        if self._whole:
            entries_T = torch.arange(len(sum_N), device=sum_N.device)[tile.index]
            where = (rows_RT >= 0).nonzero(as_tuple=True)
            place = rows_RT[where], entries_T[where[1]]
            index_KN[place] = place[0]
            for held_KN, each_RT in zip(values_PKN, numbers, strict=True):
                held_KN[place] = each_RT[where]
            return
        kept = _strongest(numbers[0], rows_RT, self._k)
        new_PRT = torch.stack([each.gather(0, kept) for each in numbers])
        both_PRT = torch.cat((values_PKN[:, :, tile.index], new_PRT), 1)
        names_RT = torch.cat((index_KN[:, tile.index], rows_RT.gather(0, kept)))
        kept = _strongest(both_PRT[0], names_RT, self._k)
        values_PKN[:, :, tile.index] = _taken(both_PRT, kept)
        index_KN[:, tile.index] = names_RT.gather(0, kept)

    def gathered(self, scale_N: Tensor, entries: Entries) -> Top:
        """The kept numbers, on one device.

        Args:
            scale_N: what the values (not what they brought along) are divided by.
            entries: all entries.
        """
        device = scale_N.device
        self._state(device)
        states = [[t.to(device) for t in state] for state in self._on.values()]
        values_PKN = torch.cat([state[0] for state in states], 1)
        index_KN = torch.cat([state[1] for state in states])
        values_PKN[0] /= scale_N
        sums_RB = None
        if self._whole:  # each row was written on one device, and is zero on the others
            values_RN = values_PKN[0].unflatten(0, (-1, self._shape[1])).sum(0)
            sums_RB = values_RN.new_zeros(len(values_RN), entries.prompt_shape[0])
            sums_RB.index_add_(1, entries.rows.to(device), values_RN)
        kept = _strongest(values_PKN[0], index_KN, self._k)
        values_PKN, index_KN = _taken(values_PKN, kept), index_KN.gather(0, kept)
        sum_N = torch.stack([state[2] for state in states]).sum(0) / scale_N
        return Top(values_PKN[0], index_KN, sum_N, sums_RB, tuple(values_PKN[1:]))

    def _state(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = (
                torch.zeros(self._shape, dtype=self._dtype, device=device),
                torch.full(self._shape[1:], -1, dtype=torch.long, device=device),
                torch.zeros(self._shape[2], dtype=self._dtype, device=device),
            )
        return self._on[device]


def _strongest(values_RT: Tensor, names_RT: Tensor, k: int) -> Tensor:
    """Which rows to keep at each entry [<= k, T], the strongest first."""
    # An empty place (number -1) is weaker than any row, and than a row of zero.
    strength = values_RT.abs().masked_fill_(names_RT < 0, -1.0)
    return strength.topk(min(k, len(strength)), dim=0).indices


def _taken(values_PRT: Tensor, kept_KT: Tensor) -> Tensor:
    return values_PRT.gather(1, kept_KT.expand(len(values_PRT), -1, -1))


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
