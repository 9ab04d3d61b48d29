"""Ledgers of what heads read: a row for each head and source, or for sums of heads.

Axes: H head, T entry of a tile, S source, R row of the unit, N entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.onto import onto
from dla_hooks.projection.attention_reads import Reads
from dla_hooks.projection.ledger import FixedRows, Top, TopRows
from dla_hooks.projection.tiles import Tile

_FINISH_ELEMENTS = 2**20


class ReadLedger:
    """The strongest of what heads read.

    A row that a position does not read (its weights are zero) is no row of that position.

    Args:
        k: rows to keep per entry; None keeps all.
        n_runs: runs of rows, one for each head or layer.
        n_sources: rows in each.
        n_entries: number of entries.
        dtype: of the numbers.
        by_layer: whether the heads of a call are summed to one run.
    """

    def __init__(
        self,
        k: int | None,
        n_runs: int,
        n_sources: int,
        n_entries: int,
        dtype: torch.dtype,
        by_layer: bool,
    ) -> None:
        self._n_sources, self._by_layer = n_sources, by_layer
        n_rows = n_runs * n_sources
        self._top = TopRows(k, n_rows, n_entries, dtype, n_beside=1, of_rows=False)

    def add(self, reads: Reads, run: int, numbers_S: Tensor) -> None:
        """Add what some entries read.

        Args:
            reads: of real tokens only.
            run: the number of the first head's run.
            numbers_S: each source's number in a run.
        """
        values_HTS, weights_HTS = reads.values_HTS, reads.weights_HTS
        if self._by_layer:
            values_HTS = values_HTS.sum(0, keepdim=True)
            weights_HTS = weights_HTS.mean(0, keepdim=True)
        n_runs = len(values_HTS)
        runs_H = torch.arange(run, run + n_runs, device=numbers_S.device)
        rows_R = (runs_H[:, None] * self._n_sources + numbers_S).flatten()
        # By entry, so that the strongest are looked for among neighbours.
        values_TR, weights_TR = (x.transpose(0, 1).flatten(1) for x in (values_HTS, weights_HTS))
        rows_TR = torch.where(weights_TR != 0, rows_R, -1)
        self._top.add(values_TR.T, rows_TR.T, reads.tile, beside=(weights_TR.T,))

    def merge(self, other: ReadLedger, scale_N: Tensor, entries: Entries) -> None:
        """Add what another one has kept, divided by a scale; 0 where nothing was seen."""
        top = other._top.gathered(_or_one(scale_N), entries)
        every = slice(0, len(entries))
        tile = Tile(None, every, len(entries), entries.target[:0], None)
        self._top.add(top.values_KN, top.index_KN, tile, beside=top.beside)

    def gathered(self, scale_N: Tensor, entries: Entries) -> Top:
        """The kept rows, on one device, divided by the final scale."""
        return self._top.gathered(scale_N, entries)


class SourceLedger(ReadLedger):
    """The strongest sources, through all heads together.

    Args:
        k: rows to keep per entry; None keeps all.
        n_sources: number of rows.
        n_entries: number of entries.
        dtype: of the numbers.
        n_heads: how many heads there are, over which weights are averaged.

    Attributes:
        n_heads: the same; it may be set before the rows are gathered.
    """

    def __init__(
        self, k: int | None, n_sources: int, n_entries: int, dtype: torch.dtype, n_heads: int
    ) -> None:
        self._k, self.n_heads, self._n_sources = k, n_heads, n_sources
        self._values = FixedRows(n_sources, n_entries, dtype)
        self._weights = FixedRows(n_sources, n_entries, dtype)
        self._dtype = dtype

    def add(self, reads: Reads, run: int, numbers_S: Tensor) -> None:
        """Add what some entries read; see :meth:`ReadLedger.add`."""
        device = numbers_S.device
        for rows, x_HTS in ((self._values, reads.values_HTS), (self._weights, reads.weights_HTS)):
            held_RN, index = rows.on(device), reads.tile.index
            entries = (
                torch.arange(index.start, index.stop, device=device)
                if isinstance(index, slice)
                else index
            )
            held_RN[numbers_S[:, None], entries] += x_HTS.sum(0).T

    def merge(self, other: ReadLedger, scale_N: Tensor, entries: Entries) -> None:
        """Add what another one has summed, divided by a scale; 0 where nothing was seen."""
        assert isinstance(other, SourceLedger)
        device = scale_N.device
        self._values.on(device).add_(other._values.gathered(device) / _or_one(scale_N))
        self._weights.on(device).add_(other._weights.gathered(device))

    def gathered(self, scale_N: Tensor, entries: Entries) -> Top:
        """The strongest rows, on one device, divided by the final scale."""
        device = scale_N.device
        values_RN, weights_RN = self._values.gathered(device), self._weights.gathered(device)
        n_rows, n_entries = values_RN.shape
        top = TopRows(self._k, n_rows, n_entries, self._dtype, n_beside=1, of_rows=False)
        numbers_R = torch.arange(n_rows, device=device)
        step = max(1, _FINISH_ELEMENTS // max(1, n_rows))
        for start in range(0, n_entries, step):
            index = slice(start, min(start + step, n_entries))
            weights_RT = weights_RN[:, index]
            rows_RT = torch.where(weights_RT != 0, numbers_R[:, None], -1)
            tile = Tile(None, index, index.stop - start, entries.target[:0], None)
            top.add(values_RN[:, index], rows_RT, tile, beside=(weights_RT / max(1, self.n_heads),))
        return top.gathered(scale_N, entries)


def of_tokens(reads: Reads, numbers: Tensor) -> tuple[Reads, Tensor, Tensor | None]:
    """Leave out what is no real token: padding, and positions that the model puts before a prompt.

    Args:
        reads: what some entries read.
        numbers: each column's number among the real tokens, or -1 [batch or 1, column].

    Returns:
        What they read of real tokens, these tokens' numbers, and what all else gave [T], if any.
    """
    n_sources = reads.values_HTS.shape[-1]
    numbers_S = numbers[reads.row if len(numbers) > 1 else 0]
    numbers_S = numbers_S[max(reads.first, 0) : reads.first + n_sources]
    real_S = torch.cat((numbers_S.new_full((max(-reads.first, 0),), -1), numbers_S)) >= 0
    if bool(real_S.all()):
        return reads, numbers_S, None
    kept = onto(real_S.nonzero()[:, 0], reads.values_HTS.device)  # a GPU would wait for a mask
    found = replace(
        reads,
        values_HTS=reads.values_HTS.index_select(-1, kept),
        weights_HTS=reads.weights_HTS.index_select(-1, kept),
    )
    off_T = (reads.values_HTS.sum(-1) - found.values_HTS.sum(-1)).sum(0)
    return found, numbers_S[numbers_S >= 0], off_T


def joined(tops: Sequence[Top], starts: Sequence[int], k: int | None) -> Top:
    """The strongest rows of several ledgers.

    Args:
        tops: what each has kept.
        starts: the number of the first row of each, among the rows of all.
        k: rows to keep per entry; None keeps all.
    """
    if len(tops) == 1 and starts[0] == 0:
        return tops[0]
    pairs = list(zip(tops, starts, strict=True))
    values_KN = torch.cat([top.values_KN for top in tops])
    index_KN = torch.cat([torch.where(t.index_KN < 0, -1, t.index_KN + s) for t, s in pairs])
    # The places of entries with fewer rows hold 0, and go last.
    size_KN = values_KN.abs().masked_fill(index_KN < 0, -1)
    order_KN = torch.argsort(size_KN, dim=0, descending=True, stable=True)[:k]
    beside = tuple(
        torch.cat(each).gather(0, order_KN)
        for each in zip(*(top.beside for top in tops), strict=True)
    )
    sum_N = torch.stack([top.sum_N for top in tops]).sum(0)
    return Top(values_KN.gather(0, order_KN), index_KN.gather(0, order_KN), sum_N, None, beside)


def _or_one(scale_N: Tensor) -> Tensor:
    return torch.where(scale_N == 0, 1, scale_N)
