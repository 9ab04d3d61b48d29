"""The largest and smallest numbers of every row, of numbers that come a tile at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class Extremes:
    """Running ranks: the ``k`` largest and smallest of each row, and the mean of all.

    Of equal numbers the one that came first ranks first, in both directions.

    Args:
        k: how many of each.
        n_rows: number of rows.
        counted: which of the numbers of a row count [n], or None for all.
        dtype: of the numbers.
        device: of the numbers.
    """

    def __init__(
        self,
        k: int,
        n_rows: int,
        counted: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._k, self._counted = k, None if counted is None else counted.to(device)
        self._sum = torch.zeros(n_rows, dtype=torch.float64, device=device)
        self._n = torch.zeros(n_rows, dtype=torch.long, device=device)
        # Of the negated numbers the largest are the smallest.
        shape = 2, n_rows, k
        self._best = torch.full(shape, -torch.inf, dtype=dtype, device=device)
        self._where = torch.full(shape, -1, dtype=torch.long, device=device)

    def add(self, rows: slice, columns: slice, values: Tensor) -> None:
        """Add a tile [rows, columns]; the columns of a row come in their order."""
        names = torch.arange(columns.start, columns.stop, device=values.device)
        if self._counted is not None:
            real = self._counted[columns]
            if not bool(real.all()):
                values, names = values[:, real], names[real]
        if not values.numel():
            return
        self._sum[rows] += values.sum(-1).double()
        self._n[rows] += values.shape[1]
        for best, where, signed in zip(self._best, self._where, (values, -values), strict=True):
            _merge(best[rows], where[rows], signed, names, self._k)

    def mean(self) -> Tensor:
        """The mean of each row's numbers that count, in float64."""
        return self._sum / self._n

    def largest(self) -> tuple[Tensor, Tensor]:
        """The largest numbers [rows, k], the largest first, and their columns."""
        return self._best[0], self._where[0]

    def smallest(self) -> tuple[Tensor, Tensor]:
        """The smallest numbers [rows, k], the smallest first, and their columns."""
        return -self._best[1], self._where[1]


def _merge(best: Tensor, where: Tensor, values: Tensor, names: Tensor, k: int) -> None:
    """Merge new numbers into the best so far, in place, where they are any better."""
    rows = (values.amax(-1) > best[:, -1]).nonzero()[:, 0]
    if not len(rows):
        return
    some = len(rows) < len(values)
    found, place = _best_of(values[rows] if some else values, k)
    old, names_of_old = (best[rows], where[rows]) if some else (best, where)
    # Older ones stand first, and the sort is stable: of equal numbers the first stays first.
    both, order = torch.cat((old, found), 1).sort(dim=1, descending=True, stable=True)
    both_names = torch.cat((names_of_old, names[place]), 1).gather(1, order)
    best[rows], where[rows] = both[:, :k], both_names[:, :k]


def _best_of(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, of equal ones those that come first."""
    found, place = values.topk(min(k, values.shape[1]), dim=1)
    tied = ((values >= found[:, -1:]).sum(1) > found.shape[1]).nonzero()[:, 0]
    if len(tied):  # which of them topk takes is not said
        ranked = values[tied].sort(dim=1, descending=True, stable=True)
        found[tied], place[tied] = (each[:, : found.shape[1]] for each in ranked)
    place, _ = place.sort(1)
    found, order = values.gather(1, place).sort(dim=1, descending=True, stable=True)
    return found, place.gather(1, order)
