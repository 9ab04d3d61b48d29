"""The numbers of the experts that each entry goes to: a few slots for each, and who is in them.

An entry goes to few of many experts. What is kept is as small as what was computed.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dla_hooks.projection.ledger import FixedRows, TopRows
from dla_hooks.projection.tiles import Tile


class Slots:
    """For each of some sublayers and entries k slots: an expert's number, its weight, its vote.

    Args:
        sizes: how many slots each sublayer has.
        n_entries: number of entries.
        dtype: of weights and votes.
    """

    def __init__(self, sizes: list[int], n_entries: int, dtype: torch.dtype) -> None:
        starts = list(itertools.accumulate(sizes, initial=0))
        self._at = [slice(*ends) for ends in itertools.pairwise(starts)]
        self._numbers = FixedRows(starts[-1], n_entries, torch.long)  # from one; zero is nobody
        self._weights = FixedRows(starts[-1], n_entries, dtype)
        self._votes = FixedRows(starts[-1], n_entries, dtype)

    def put(
        self,
        sublayer: int,
        entries: slice | Tensor,
        numbers_TK: Tensor,
        weights_TK: Tensor,
        votes_TK: Tensor,
    ) -> None:
        """Write what some entries' slots hold.

        Args:
            sublayer: which.
            entries: their places among all entries.
            numbers_TK: the experts; -1 for nobody.
            weights_TK: their weights.
            votes_TK: their votes.
        """
        at, device = self._at[sublayer], votes_TK.device
        pairs = (
            (self._numbers, numbers_TK + 1),
            (self._weights, weights_TK),
            (self._votes, votes_TK),
        )
        for rows, new_TK in pairs:
            held = rows.on(device)[at]
            held[:, entries] = new_TK.T.to(held)

    def gathered(self, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each sublayer the experts (-1 for nobody), weights and votes, each [k, N], once."""
        ledgers = (self._numbers, self._weights, self._votes)
        numbers, weights, votes = (rows.gathered(device) for rows in ledgers)
        return [(numbers[at] - 1, weights[at], votes[at]) for at in self._at]


class ExpertRows:
    """The rows of all experts with the weight and the vote of each: all, or the strongest.

    A row is its weight times its vote.

    Args:
        n_rows: how many there are.
        top: how many to keep at each entry; None keeps all.
        like_N: a number for each entry, of the dtype and on the device of all others.
    """

    def __init__(self, n_rows: int, top: int | None, like_N: Tensor) -> None:
        n = len(like_N)
        self._tile = Tile(
            None, slice(0, n), n, torch.zeros(1, dtype=torch.long, device="cpu"), None
        )
        self.top = None if top is None else TopRows(top, n_rows, n, like_N.dtype, n_beside=2)
        # Values, weights, votes.
        self.all = like_N.new_zeros((3, n_rows if top is None else 0, n))

    def add(self, rows_KN: Tensor, weights_KN: Tensor, votes_KN: Tensor) -> Tensor:
        """Keep some rows at all entries; their sum [N].

        Args:
            rows_KN: their numbers at each entry; -1 for no row.
            weights_KN: what their votes are multiplied by.
            votes_KN: divided by all scales.
        """
        weights_KN = weights_KN.to(votes_KN)
        rows_KN, weights_KN = once(rows_KN, weights_KN)
        values_KN = weights_KN * votes_KN
        if self.top is not None:
            self.top.add(values_KN, rows_KN, self._tile, (weights_KN, votes_KN))
            return values_KN.sum(0)
        where = (rows_KN >= 0).nonzero(as_tuple=True)
        place = rows_KN[where], where[1]
        for held_CN, new_KN in zip(self.all, (values_KN, weights_KN, votes_KN), strict=True):
            held_CN[place] = new_KN[where]
        return values_KN.sum(0)


def once(rows_KN: Tensor, weights_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that come twice for an entry, as one with the sum of the weights: the vote is one."""
    if len(rows_KN) == 1:
        return rows_KN, weights_KN
    sorted_KN = rows_KN.sort(0).values
    if not bool(((sorted_KN[1:] == sorted_KN[:-1]) & (sorted_KN[1:] >= 0)).any()):
        return rows_KN, weights_KN
    rows_KN, weights_KN = rows_KN.clone(), weights_KN.clone()
    for first, later in itertools.combinations(range(len(rows_KN)), 2):
        again_N = (rows_KN[first] == rows_KN[later]) & (rows_KN[later] >= 0)
        weights_KN[first] += weights_KN[later] * again_N
        weights_KN[later].masked_fill_(again_N, 0)
        rows_KN[later].masked_fill_(again_N, -1)
    return rows_KN, weights_KN
