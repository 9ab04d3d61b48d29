"""The strongest rows of each entry, of a unit that has too many to rank tokens for all.

A row is as strong as its vector is large behind the final norm, its gain included. Each place of
the unit offers its own strongest rows, whose vectors are not built; of those that are kept, they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.stacks.final_norm import FinalNorm
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.row_vectors import RowVectors


class Offer(NamedTuple):
    """What one place has at some entries: C rows at each, of those that it has.

    Attributes:
        sizes_NC: of these rows' vectors behind the final norm; -1 where there is no row.
        index_NC: their numbers among the rows of the place.
        count_N: how many rows the place has there, [] for all entries or [N].
        sum_NM: what all its rows wrote, as it stands in the last stream.
        wrote: gives the vectors of some of these rows in the last stream [J, d_model], by the
            numbers of their entries [J] and columns [J].
    """

    sizes_NC: Tensor
    index_NC: Tensor
    count_N: Tensor
    sum_NM: Tensor
    wrote: Callable[[Tensor, Tensor], Tensor]


class Rows:
    """The rows of one place.

    Attributes:
        first: the number of its first row among all of the unit's.
        n_rows: how many it has.
        most: how many it has at one entry at most.
    """

    first: int
    n_rows: int
    most: int

    def hold(self) -> None:
        """Hold the rows against what they make up.

        Raises:
            DecompositionError: when they do not.
        """
        raise NotImplementedError(f"{type(self).__name__} must hold its rows")

    def offer(self, place: slice, top: int) -> Offer:
        """Its strongest rows at some entries.

        Args:
            place: the entries.
            top: how many are asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} must make its rows")


class StrongestVectors(RowVectors):
    """The strongest rows, the rest of them, and what belongs to no row.

    Args:
        kept: what to keep of the run.
        final: the final norm.
        places: of the unit, in order.
        rows: a record of every row.
        top: how many of each entry; None keeps all.

    Attributes:
        rows: the same.
    """

    rows: RowRuns

    def __init__(
        self,
        kept: Kept,
        final: FinalNorm,
        places: Sequence[Rows],
        rows: RowRuns,
        top: int | None,
    ) -> None:
        self._kept, self._final, self._places, self.rows = kept, final, places, rows
        most = sum(place.most for place in places)
        self._top = most if top is None else min(top, most)
        self._index_NK = torch.full((len(kept.entries), self._top), -1, device="cpu")
        self.labels = [*(f"#{place}" for place in range(1, self._top + 1)), "rest", "remainder"]

    def index(self) -> Tensor:
        """What the rows are [row, *batch_and_pos]; -1 for none, and at padding."""
        nothing = self._index_NK.new_full((len(self._index_NK), 2), -1)
        return self._kept.entries.unfold(torch.cat((self._index_NK, nothing), -1).T, padding=-1)

    @outside_autocast
    def hold(self) -> None:
        """Hold the rows of every place against what they make up.

        Raises:
            DecompositionError: when they do not.
        """
        for place in self._places:
            place.hold()

    def at(self, place: slice) -> Tensor:
        """The rows at some entries [row, entries, d_model]."""
        whole_NM = self._final.whole(place)
        device = whole_NM.device
        offers = [rows.offer(place, self._top) for rows in self._places]
        sizes_NC = torch.cat([offer.sizes_NC.to(device) for offer in offers], -1)
        index_NC = torch.cat(
            [
                (offer.index_NC + rows.first).to(device)
                for rows, offer in zip(self._places, offers, strict=True)
            ],
            -1,
        )
        sizes_NK, chosen_NK = sizes_NC.topk(self._top)
        index_NK = index_NC.gather(-1, chosen_NK).masked_fill(sizes_NK < 0, -1)
        self._index_NK[place] = index_NK.to(self._index_NK)
        wrote_NKM = whole_NM.new_zeros(*index_NK.shape, whole_NM.shape[-1])
        every_NM, start = torch.zeros_like(whole_NM), 0
        count_N = torch.zeros(len(every_NM), dtype=torch.long, device=device)
        for offer in offers:
            stop = start + offer.sizes_NC.shape[-1]
            here_NK = (chosen_NK >= start) & (chosen_NK < stop) & (index_NK >= 0)
            entries_J, columns_J = here_NK.nonzero()[:, 0], chosen_NK[here_NK] - start
            own = offer.sizes_NC.device
            wrote_NKM[here_NK] = offer.wrote(entries_J.to(own), columns_J.to(own)).to(wrote_NKM)
            every_NM += offer.sum_NM.to(every_NM)
            count_N += offer.count_N.to(device)
            start = stop
        wrote_KNM = wrote_NKM.transpose(0, 1)
        rest_NM = every_NM - wrote_KNM.sum(0)
        # Where every row is kept, the rest is nothing, and not its rounding.
        rest_NM *= (count_N > self._top)[:, None]
        read = self._final.read(torch.cat((wrote_KNM, rest_NM[None])), place)
        return torch.cat((read, (whole_NM - read.sum(0))[None]))
