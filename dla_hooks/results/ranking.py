"""Which rows of a result are shown, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dla_hooks.results.result import DirectLogitAttribution

REMAINDER = "remainder"


@dataclass(frozen=True)
class Rows:
    """Some of a result's rows, each as its mean over batch and positions.

    Attributes:
        shown: (label, value); by value, or in the order of the stream for layers.
        gap_at: how many of the shown stand before those left out.
        left_out: a line about those left out, or "".
        remainder: what no head wrote, which is no head and takes no part in the ranking.
        largest: the largest absolute value shown, which a bar's full length stands for.
    """

    shown: list[tuple[str, float]]
    gap_at: int
    left_out: str
    remainder: float | None
    largest: float


def strongest(result: DirectLogitAttribution, limit: int) -> Rows:
    """The rows with the largest absolute means; for layers, evenly spaced ones.

    Args:
        result: any.
        limit: how many rows at most, a remainder not counted.
    """
    rows, remainder = ranked_rows(result)
    if result.unit == "layer":
        return _spaced(rows, limit)
    rows.sort(key=lambda row: abs(row[1]), reverse=True)
    return _by_value(rows[:limit], rows[limit:], remainder)


def both_ends(result: DirectLogitAttribution, k: int) -> Rows:
    """The ``k`` largest and the ``k`` most negative rows; for layers, evenly spaced ones."""
    rows, remainder = ranked_rows(result)
    if result.unit == "layer":
        return _spaced(rows, 2 * k)
    rows.sort(key=lambda row: row[1], reverse=True)
    if len(rows) <= 2 * k:
        return _by_value(rows, [], remainder)
    return _by_value(rows[:k] + rows[len(rows) - k :], rows[k : len(rows) - k], remainder, k)


def ranked_rows(
    result: DirectLogitAttribution,
) -> tuple[list[tuple[str, float]], float | None]:
    """Every row's label and mean in the order of the result, and the remainder apart."""
    rows = list(zip(result.labels, result.mean().tolist(), strict=True))
    remainder = next((value for label, value in rows if label == REMAINDER), None)
    return [row for row in rows if row[0] != REMAINDER], remainder


def real_entries(result: DirectLogitAttribution) -> tuple[Tensor, Tensor]:
    """Which entries are no padding, and whose row each belongs to, both [*batch_and_pos].

    One prompt may have several entries at one position: one for each answer.
    """
    shape = result.attribution.shape[1:]
    valid = result.positions >= 0 if _located(result) else ~result.attribution.isnan().all(0)
    ones = valid.new_ones(shape).long()
    return valid, ones.cumsum(0) - 1 if len(result.tokens) > 1 else ones - 1


def decimals(values: Sequence[float]) -> int:
    """How many decimals show four digits of the largest of them."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0:
        return 3
    return min(8, max(0, 3 - math.floor(math.log10(largest))))


def _located(result: DirectLogitAttribution) -> bool:
    """Whether the result says which tokens it is about (one made by hand need not)."""
    return bool(result.tokens) and result.positions.shape == result.attribution.shape[1:]


def entry_mean(values: Tensor) -> float:
    """The mean over batch and positions, padding left out."""
    return float(values.double().nanmean())


def _by_value(
    shown: list[tuple[str, float]],
    rest: list[tuple[str, float]],
    remainder: float | None,
    gap_at: int | None = None,
) -> Rows:
    shown = sorted(shown, key=lambda row: row[1], reverse=True)
    note = ""
    largest = max((abs(value) for _, value in shown), default=0.0)
    if rest:
        total = sum(value for _, value in rest)
        note = f"{len(rest)} more rows, together {total:+.{decimals([largest, total])}f}"
    if gap_at is None:  # those left out are the weakest: they stand between the signs
        gap_at = sum(value > 0 for _, value in shown)
    return Rows(shown, gap_at, note, remainder, largest)


def _spaced(rows: list[tuple[str, float]], limit: int) -> Rows:
    step = max(1, math.ceil(len(rows) / max(limit, 1)))
    shown = rows[::-1][::step][::-1]  # counted from the end, which is the sum of everything
    note = f"one entry in {step} shown, of {len(rows)}" if step > 1 else ""
    return Rows(shown, len(shown), note, None, max((abs(v) for _, v in shown), default=0.0))
