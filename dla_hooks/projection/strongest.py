"""The rows that a ledger keeps on one device: all of them, or the strongest of each entry.

A top-k here looks at few of many numbers. The k largest lie within those k groups of numbers whose
largest is largest. So one look at each number finds the groups, and the choice is made among their
numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_hooks.projection.tiles import Tile

_GROUP = 16
"""Numbers in a group."""
_AT_ONCE = 2**19
"""Elements whose sizes are taken together (2 MiB in float32)."""


class Every:
    """All rows, each in its own place.

    Args:
        n_numbers: of each row, the ranked one first.
        n_entries: number of entries.
        n_rows: number of rows.
        dtype: of the numbers.
        device: where they are.

    Attributes:
        values_PNR: the numbers of each row; zero where none came.
        there_NR: which rows came.
    """

    def __init__(
        self, n_numbers: int, n_entries: int, n_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.values_PNR = torch.zeros(n_numbers, n_entries, n_rows, dtype=dtype, device=device)
        self.there_NR = torch.zeros(n_entries, n_rows, dtype=torch.bool, device=device)

    def add(self, numbers: Sequence[Tensor], rows: Tensor | range, tile: Tile) -> None:
        """Put some rows in their places; see :meth:`Best.add`."""
        place: tuple[slice | Tensor, slice | Tensor]
        if isinstance(rows, range):
            place = tile.index, slice(rows.start, rows.stop)
        else:
            entries_T = torch.arange(len(self.there_NR), device=rows.device)[tile.index]
            place = entries_T[:, None], rows
            if rows.ndim > 1:
                at, column = (rows >= 0).nonzero(as_tuple=True)
                place = entries_T[at], rows[at, column]
                numbers = [each[at, column] for each in numbers]
        self.there_NR[place] = True
        for held_NR, each in zip(self.values_PNR, numbers, strict=True):
            held_NR[place] = each

    def joined(self, others: Sequence[Every]) -> Every:
        """The same with the rows of other devices."""
        device = self.there_NR.device
        for other in others:  # zero where a row did not come
            self.values_PNR += other.values_PNR.to(device)
            self.there_NR |= other.there_NR.to(device)
        return self

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` strongest rows of each entry, the strongest first.

        Returns:
            Their numbers [P, N, k], and which rows they are [N, k]; -1 for none.
        """
        kept_Nk = strongest(self.values_PNR[0], k, self.there_NR)
        rows_Nk = kept_Nk.masked_fill(~self.there_NR.gather(1, kept_Nk), -1)
        return _taken(self.values_PNR, kept_Nk), rows_Nk


class Best:
    """The strongest rows of each entry, of all that came so far.

    Args:
        n_numbers: as in :class:`Every`; so are all others.
        n_entries: number of entries.
        k: rows to keep.
        dtype: of the numbers.
        device: where they are.

    Attributes:
        values_PNR: their numbers.
        rows_NR: which rows they are; -1 for none.
    """

    def __init__(
        self, n_numbers: int, n_entries: int, k: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.values_PNR = torch.zeros(n_numbers, n_entries, k, dtype=dtype, device=device)
        self.rows_NR = torch.full((n_entries, k), -1, dtype=torch.long, device=device)

    def add(self, numbers: Sequence[Tensor], rows: Tensor | range, tile: Tile) -> None:
        """Let some rows compete with those that are kept.

        Args:
            numbers: of each row at each entry of the tile [T, R], the ranked one first.
            rows: which they are [R] or [T, R], -1 for none.
            tile: the entries.
        """
        k = self.rows_NR.shape[1]
        if isinstance(rows, Tensor) and rows.ndim > 1:
            kept_Tk = strongest(numbers[0], k, rows >= 0)
            names_Tk = rows.gather(1, kept_Tk)
        else:
            kept_Tk = strongest(numbers[0], k)
            names_Tk = kept_Tk + rows.start if isinstance(rows, range) else rows[kept_Tk]
        new_PTk = torch.stack([each.gather(1, kept_Tk) for each in numbers])
        both_PTR = torch.cat((self.values_PNR[:, tile.index], new_PTk), 2)
        names_TR = torch.cat((self.rows_NR[tile.index], names_Tk), 1)
        kept_Tk = strongest(both_PTR[0], k, names_TR >= 0)
        self.values_PNR[:, tile.index] = _taken(both_PTR, kept_Tk)
        self.rows_NR[tile.index] = names_TR.gather(1, kept_Tk)

    def joined(self, others: Sequence[Best]) -> Best:
        """The same with the rows of other devices."""
        device = self.rows_NR.device
        every = [self, *others]
        self.values_PNR = torch.cat([one.values_PNR.to(device) for one in every], 2)
        self.rows_NR = torch.cat([one.rows_NR.to(device) for one in every], 1)
        return self

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        """As of :class:`Every`."""
        kept_Nk = strongest(self.values_PNR[0], k, self.rows_NR >= 0)
        return _taken(self.values_PNR, kept_Nk), self.rows_NR.gather(1, kept_Nk)


def strongest(values_TR: Tensor, k: int, there_TR: Tensor | None = None) -> Tensor:
    """The places of the ``k`` largest absolute values of each entry, the largest first.

    Args:
        values_TR: the numbers of each entry.
        k: how many.
        there_TR: where there is a number; what is not there is weaker than a zero. None is
            everywhere.

    Returns:
        [T, min(k, R)].
    """
    n_rows = values_TR.shape[1]
    k = min(k, n_rows)
    size = max(1, _AT_ONCE // max(1, n_rows))
    if len(values_TR) <= size:
        return _strongest(values_TR, k, there_TR)
    kept_Tk = torch.empty(len(values_TR), k, dtype=torch.long, device=values_TR.device)
    for start in range(0, len(values_TR), size):
        here = slice(start, start + size)
        there = None if there_TR is None else there_TR[here]
        kept_Tk[here] = _strongest(values_TR[here], k, there)
    return kept_Tk


def _strongest(values_TR: Tensor, k: int, there_TR: Tensor | None) -> Tensor:
    sizes_TR = values_TR.abs()
    if there_TR is not None:
        sizes_TR.masked_fill_(~there_TR, -1.0)
    n_rows = values_TR.shape[1]
    n_groups = n_rows // _GROUP
    if n_groups < 2 * k:  # most groups would be looked at again
        plain_Tk: Tensor = sizes_TR.topk(k).indices
        return plain_Tk
    # A group is every n-th number: its largest is then found along memory.
    n = n_groups * _GROUP
    largest_TG = sizes_TR[:, :n].unflatten(1, (_GROUP, n_groups)).amax(1)
    groups_Tk = largest_TG.topk(k, sorted=False).indices
    first_of = torch.arange(0, n, n_groups, device=values_TR.device)
    among_TC = (groups_Tk[:, None] + first_of[:, None]).flatten(1)
    if n < n_rows:
        left_over = torch.arange(n, n_rows, device=values_TR.device)
        among_TC = torch.cat((among_TC, left_over.expand(len(values_TR), -1)), 1)
    kept_Tk: Tensor = sizes_TR.gather(1, among_TC).topk(k).indices
    found_Tk: Tensor = among_TC.gather(1, kept_Tk)
    return found_Tk


def _taken(values_PTR: Tensor, kept_Tk: Tensor) -> Tensor:
    taken: Tensor = values_PTR.gather(2, kept_Tk.expand(len(values_PTR), -1, -1))
    return taken
