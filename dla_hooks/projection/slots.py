"""The numbers of the experts that each entry goes to: a few slots for each, and who is in them.

An entry goes to few of many experts. What is kept is as small as what was computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.projection.ledger import FixedRows


class Slots:
    """For each of some sublayers and entries k slots: an expert's number, its weight, its vote.

    Args:
        sizes: how many slots each sublayer has.
        n_entries: number of entries.
        dtype: of weights and votes.
    """

    def __init__(self, sizes: list[int], n_entries: int, dtype: torch.dtype) -> None:
        starts = torch.tensor([0, *sizes], device="cpu").cumsum(0).tolist()
        self._at = [slice(*ends) for ends in zip(starts[:-1], starts[1:], strict=True)]
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
