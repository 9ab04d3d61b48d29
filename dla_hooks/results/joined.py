"""Results of neighbouring positions of the same prompts, as one result."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dla_hooks.results.data import EntryData, real_entries
from dla_hooks.results.ranked import RankedAttribution, Result
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.results.rows import Row
from dla_hooks.results.seen import Seen


def joined(pieces: Sequence[Result], n_tokens: int) -> Result:
    """Put the positions of some results side by side.

    Args:
        pieces: of one unit on one model, each [row, batch, pos'].
        n_tokens: of the longest row of the whole text, which rows may read.

    Returns:
        A result with the tokens and the names of the last piece: the whole has other ones.
    """
    one = pieces[-1]
    found = _ranked(pieces, n_tokens) if isinstance(one, RankedAttribution) else _dense(pieces)
    found.bias, found.logit, found.positions = (
        torch.cat([getattr(piece, name) for piece in pieces], -1)
        for name in ("bias", "logit", "positions")
    )
    found.gap = max((piece.gap for piece in pieces), key=_size)
    found.logit_gap = max((piece.logit_gap for piece in pieces), key=_size)
    found.target = None
    if any(piece.seen is not None for piece in pieces):
        found.seen = Seen.joined([piece.seen or Seen.nothing(piece.shape) for piece in pieces])
    return found


def _size(gap: float) -> float:
    """A gap to compare: NaN says that nothing was looked at."""
    return -1.0 if math.isnan(gap) else gap


def _dense(pieces: Sequence[Result]) -> Result:
    """A row that a piece lacks (what hooks wrote, where they wrote nothing) is 0 in it."""
    dense = [piece for piece in pieces if isinstance(piece, DirectLogitAttribution)]
    most = max(dense, key=lambda piece: len(piece.labels))
    rows = {row.label: row for piece in dense for row in piece.rows}
    order: list[Row] = [*most.rows, *(rows[k] for k in rows if k not in set(most.labels))]
    found = copy.copy(most)
    found.labels, found.rows = [row.label for row in order], order

    def laid_out(piece: DirectLogitAttribution, values: Tensor) -> Tensor:
        if piece.labels == found.labels:
            return values
        whole = torch.where(values[:1].isnan(), values[:1], 0).expand(len(order), *values.shape[1:])
        whole = whole.clone()
        whole[[found.labels.index(label) for label in piece.labels]] = values
        return whole

    found.attribution = torch.cat([laid_out(piece, piece.attribution) for piece in dense], -1)
    found.beside = {
        name: torch.cat([laid_out(piece, piece.beside[name]) for piece in dense], -1)
        for name in most.beside
    }
    return found


def _ranked(pieces: Sequence[Result], n_tokens: int) -> Result:
    ranked = [piece for piece in pieces if isinstance(piece, RankedAttribution)]
    found, n_places = copy.copy(ranked[-1]), max(len(piece.attribution) for piece in ranked)
    found.rows = _of_all_tokens(found.rows, n_tokens)

    def side_by_side(each: Sequence[Tensor], padding: float) -> Tensor:
        wide = [
            torch.cat((own, own.new_full((n_places - len(own), *own.shape[1:]), padding)))
            for own in each
        ]
        return torch.cat(wide, -1)

    found.index = side_by_side([_renumbered(piece, found.rows) for piece in ranked], -1)
    found.attribution = side_by_side([piece.attribution for piece in ranked], 0)
    found.beside = {
        name: side_by_side([piece.beside[name] for piece in ranked], 0) for name in found.beside
    }
    found.rest = torch.cat([piece.rest for piece in ranked], -1)
    found.remainder = torch.cat([piece.remainder for piece in ranked], -1)
    found.prompt_means = _means(ranked)
    return found


def _of_all_tokens(rows: Sequence[Row], n: int) -> Sequence[Row]:
    """The rows for a text of ``n`` tokens: those that read tokens are one for each."""
    if not isinstance(rows, RowRuns):
        return rows
    return RowRuns(replace(run, n=n) if run.of_sources else run for run in rows.runs)


def _renumbered(piece: RankedAttribution, rows: Sequence[Row]) -> Tensor:
    """The numbers of a piece's kept rows among the rows of the whole text."""
    if not isinstance(piece.rows, RowRuns) or not isinstance(rows, RowRuns) or rows == piece.rows:
        return piece.index
    device = piece.index.device
    old, new = (torch.tensor(of.starts, device=device) for of in (piece.rows, rows))
    run = (torch.searchsorted(old, piece.index.contiguous(), right=True) - 1).clamp(min=0)
    return torch.where(piece.index < 0, piece.index, piece.index + (new - old)[run])


def _means(pieces: Sequence[RankedAttribution]) -> Tensor | None:
    """Every row's mean over the entries of each prompt [row, batch]."""
    known = [(p.prompt_means, _n_entries(p)) for p in pieces if p.prompt_means is not None]
    if len(known) < len(pieces):
        return None
    sums_RB = torch.stack([means.nan_to_num() * n.to(means) for means, n in known]).sum(0)
    return sums_RB / torch.stack([n for _, n in known]).sum(0).to(sums_RB)


def _n_entries(piece: EntryData) -> Tensor:
    """How many entries each prompt has [batch]."""
    return real_entries(piece)[0].reshape(len(piece.tokens), -1).sum(-1)
