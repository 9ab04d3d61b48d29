"""From two measured runs to their comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.measure.claims import Outcome
from dla_hooks.measure.one_prompt import results
from dla_hooks.projection.strongest import strongest
from dla_hooks.questions.two_ways import OWN, TwoWays, own_half, two_ways
from dla_hooks.residual.stream import Stream
from dla_hooks.results.comparison import (
    FIRST,
    READ,
    SECOND,
    WRITTEN,
    Comparison,
    words_of_difference,
)
from dla_hooks.results.ranked import RankedAttribution, Result
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.seen import Seen
from dla_hooks.sources.base import Source
from dla_hooks.targets.pair import PairTarget
from dla_hooks.units.base import RankedSplit, Unit
from dla_hooks.units.plan import Measurement


@dataclass(frozen=True)
class Run:
    """One of the two runs, measured.

    Attributes:
        stream: the located model.
        source: what it was run on.
        tokenizer: for names.
        entries: of its own target.
        target: its own and the other's.
        found: the scalars of both.
        outcome: of the check.
        seen: what the model's own logits say, where it was run for them.
    """

    stream: Stream
    source: Source
    tokenizer: Any
    entries: Entries
    target: PairTarget
    found: Measurement
    outcome: Outcome
    seen: Seen | None = None

    @property
    def scale_N(self) -> Tensor:
        """The final norm's scale at each entry of the own target."""
        return self.found.reading.scale_N[OWN]


def comparison_of(key: str, unit: Unit, first: Run, second: Run) -> Comparison:
    """The comparison of one unit.

    Args:
        key: of the unit.
        unit: with the caller's own options.
        first: the run that is subtracted from.
        second: the other.
    """
    words, top = unit.words, getattr(unit, "top", None)
    one, other = _ways(key, words, first, second), _ways(key, words, second, first)
    ranked = one.left_WN is not None or top is not None
    if ranked:
        one, other = _ranked_rows(one, words), _ranked_rows(other, words)
    results_of = [
        _result(key, run, _kept(way, words, top, run.entries) if ranked else None)
        for run, way in ((first, one), (second, other))
    ]
    if not ranked:
        rows = _of_both(one.rows, other.rows)
        labels = [row.label for row in rows]
        one, other = (way.only(words, labels) for way in (one, other))
        one = dataclasses.replace(one, rows=rows)
    difference = _difference(one, other.on(one.own_CN.device))
    part = _kept(difference, words, top, first.entries) if ranked else None
    made = _as_result(difference, part, words, first.entries, *results_of)
    if part is None:
        return Comparison(made, results_of[0], results_of[1])
    written_RN, like = difference.beside[WRITTEN], made.attribution
    means = None if part.row_sums_RB is None else _means(written_RN, first.entries).to(like)
    beyond = first.entries.unfold(_beyond(difference, part).to(like))
    return Comparison(made, results_of[0], results_of[1], means, beyond)


def _ways(key: str, words: Words, run: Run, other: Run) -> TwoWays:
    return two_ways(run.found, run.found.splits[key], words, other.scale_N, run.target.factor)


def _result(key: str, run: Run, split: RankedSplit | None) -> Result:
    """One run's own attribution; of a ranked unit its strongest rows."""
    half = own_half(run.found, run.target.own, run.entries)
    own = half.splits[key]
    if split is not None:
        dtype = own.values_CN.dtype
        own = dataclasses.replace(split, **_cast(split, dtype))
    single = dataclasses.replace(half, splits={key: own})
    outcome, observed = run.outcome, run.outcome.observed
    if observed is not None:
        outcome = dataclasses.replace(outcome, observed=run.target.seen_by_own(observed))
    return results(single, outcome, run.source, run.tokenizer, run.seen)[key]


def _difference(one: TwoWays, other: TwoWays) -> TwoWays:
    """First minus second; both halves of it, and the two, stand beside each row.

    What is left is first its difference, then what of that was written.
    """

    def halves(
        mine: Tensor, as_theirs: Tensor, theirs: Tensor, as_mine: Tensor
    ) -> tuple[Tensor, Tensor]:
        written = (mine - as_mine + as_theirs - theirs) / 2
        return written, (mine - as_theirs + as_mine - theirs) / 2

    written, read = halves(one.own_CN, one.other_CN, other.own_CN, other.other_CN)
    beside = {name: own - other.beside[name] for name, own in one.beside.items()}
    beside |= {WRITTEN: written, READ: read, FIRST: one.own_CN, SECOND: other.own_CN}
    left_WN = None
    if one.left_WN is not None and other.left_WN is not None:
        written_N, _ = halves(*one.left_WN, *other.left_WN)
        left_WN = torch.stack((one.left_WN[0] - other.left_WN[0], written_N))
    return dataclasses.replace(
        one,
        own_CN=one.own_CN - other.own_CN,
        there_CN=one.there_CN | other.there_CN,
        beside=beside,
        left_WN=left_WN,
    )


def _beyond(difference: TwoWays, part: RankedSplit) -> Tensor:
    """What was written by the rows that are not kept, and by no row at all [2, N]."""
    assert difference.left_WN is not None
    rest_N = difference.beside[WRITTEN].sum(0) - part.beside[WRITTEN].sum(0)
    return torch.stack((rest_N, difference.left_WN[1]))


def _as_result(
    difference: TwoWays,
    part: RankedSplit | None,
    words: Words,
    entries: Entries,
    first: Result,
    second: Result,
) -> Result:
    """The difference as a result: what both runs share is the first's."""
    dtype = torch.promote_types(first.attribution.dtype, second.attribution.dtype)
    names = dict.fromkeys((first.model, second.model))
    common: dict[str, Any] = {
        "bias": (first.bias.double() - second.bias.to(first.bias.device).double()).to(dtype),
        "logit": (first.logit.double() - second.logit.to(first.logit.device).double()).to(dtype),
        "gap": first.gap + second.gap,
        "logit_gap": first.logit_gap + second.logit_gap,
        "model": " and ".join(names),
        "words": words_of_difference(words),
        "softcap": first.softcap if first.softcap is not None else second.softcap,
    }
    if isinstance(first, RankedAttribution):
        assert part is not None
        beside = {name: entries.unfold(own.to(dtype)) for name, own in part.beside.items()}
        means = None if part.row_sums_RB is None else _means(difference.own_CN, entries).to(dtype)
        return dataclasses.replace(
            first,
            attribution=entries.unfold(part.values_KN.to(dtype)),
            index=entries.unfold(part.index_KN, padding=-1),
            rest=entries.unfold(part.rest_N.to(dtype)),
            remainder=entries.unfold(part.remainder_N.to(dtype)),
            rows=part.rows,
            prompt_means=means,
            beside=beside,
            **common,
        )
    beside = {name: entries.unfold(own.to(dtype)) for name, own in difference.beside.items()}
    return dataclasses.replace(
        first,
        attribution=entries.unfold(difference.own_CN.to(dtype)),
        labels=[row.label for row in difference.rows],
        rows=list(difference.rows),
        beside=beside,
        **common,
    )


def _of_both(first: Sequence[Row], second: Sequence[Row]) -> Sequence[Row]:
    """All rows in the order of the first; one of the second alone stands behind the one before."""
    labels = [row.label for row in first]
    if labels == [row.label for row in second]:
        return first
    rows, at = list(first), 0
    for row in second:
        if row.label in labels:
            at = labels.index(row.label) + 1
        else:
            rows.insert(at, row)
            labels.insert(at, row.label)
            at += 1
    return rows


def _ranked_rows(way: TwoWays, words: Words) -> TwoWays:
    """The rows of the unit alone: what hooks wrote is in the remainder of a ranked unit."""
    if way.left_WN is not None:
        return way
    is_own = [row.label != words.remainder and row.kind != "hook" for row in way.rows]
    kept = torch.tensor(is_own, device=way.own_CN.device)
    beside = {name: own[kept] for name, own in way.beside.items()}
    there_CN = way.there_CN[kept]
    if beside:  # where an expert was not chosen, all of its numbers are 0
        there_CN = torch.stack([own != 0 for own in beside.values()]).any(0)
    return TwoWays(
        [row for row, own in zip(way.rows, is_own, strict=True) if own],
        way.own_CN[kept],
        way.other_CN[kept],
        there_CN,
        beside,
        torch.stack([numbers[~kept].sum(0) for numbers in (way.own_CN, way.other_CN)]),
    )


def _kept(way: TwoWays, words: Words, top: int | None, entries: Entries) -> RankedSplit:
    """The strongest rows of each entry; the rest is the sum of all others."""
    assert way.left_WN is not None
    n_rows = len(way.rows)
    k = n_rows if top is None else min(top, n_rows)
    kept_KN = strongest(way.own_CN.T, k, way.there_CN.T).T
    there_KN = way.there_CN.gather(0, kept_KN)
    values_KN = way.own_CN.gather(0, kept_KN)
    sums_RB = None if words.sources else _sums(way.own_CN, entries)
    return RankedSplit(
        rows=way.rows,
        values_KN=values_KN,
        index_KN=kept_KN.masked_fill(~there_KN, -1),
        rest_N=way.own_CN.sum(0) - values_KN.sum(0),
        remainder_N=way.left_WN[0],
        row_sums_RB=sums_RB,
        beside={name: own.gather(0, kept_KN) for name, own in way.beside.items()},
    )


def _sums(values_RN: Tensor, entries: Entries) -> Tensor:
    """Each row's sum over the entries of each prompt [R, B]."""
    found = values_RN.new_zeros(len(values_RN), entries.prompt_shape[0])
    return found.index_add_(1, entries.rows.to(values_RN.device), values_RN)


def _means(values_RN: Tensor, entries: Entries) -> Tensor:
    n_B = entries.rows.bincount(minlength=entries.prompt_shape[0]).to(values_RN.device)
    return _sums(values_RN, entries) / n_B


def _cast(split: RankedSplit, dtype: torch.dtype) -> dict[str, Any]:
    """The numbers of a ranked split in another dtype."""
    sums_RB = split.row_sums_RB
    return {
        "values_KN": split.values_KN.to(dtype),
        "rest_N": split.rest_N.to(dtype),
        "remainder_N": split.remainder_N.to(dtype),
        "row_sums_RB": None if sums_RB is None else sums_RB.to(dtype),
        "beside": {name: own.to(dtype) for name, own in split.beside.items()},
    }
