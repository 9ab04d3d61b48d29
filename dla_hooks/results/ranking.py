"""Which rows of a result are shown, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dla_hooks.results.data import EntryData
from dla_hooks.results.rows import Row


@dataclass(frozen=True)
class Remainder:
    """The row that holds what is no row of the unit, and takes no part in the ranking.

    Attributes:
        label: of that row.
        value: its mean.
        holds: what it holds, in a few words; "" where the unit does not say.
        short: the same in two words.
    """

    label: str
    value: float
    holds: str
    short: str


@dataclass(frozen=True)
class Shown:
    """Some of a result's rows, each as its mean over batch and positions.

    Attributes:
        rows: (label, value); by value, or in the order of the stream for running sums.
        gap_at: how many of them stand before those left out.
        left_out: a line about those left out, or "".
        remainder: what is no row of the unit, or None.
        largest: the largest absolute value shown, which a bar's full length stands for.
    """

    rows: list[tuple[str, float]]
    gap_at: int
    left_out: str
    remainder: Remainder | None
    largest: float

    @property
    def decimals(self) -> int:
        """How many decimals show the rows and the remainder."""
        return decimals([self.largest, self.remainder.value if self.remainder else 0.0])


def strongest(data: EntryData, limit: int) -> Shown:
    """The rows with the largest absolute means; of running sums, evenly spaced ones.

    Args:
        data: any.
        limit: how many rows at most, a remainder not counted.
    """
    all_rows = drawn(data)
    rows = _named(all_rows)
    if data.words.cumulative:
        return _spaced(rows, limit)
    rows.sort(key=lambda row: _or(-1.0, abs(row[1])), reverse=True)
    return _by_value(rows[:limit], rows[limit:], all_rows)


def both_ends(data: EntryData, k: int) -> Shown:
    """The ``k`` largest and the ``k`` most negative rows; of running sums, evenly spaced ones."""
    all_rows = drawn(data)
    rows = _named(all_rows)
    if data.words.cumulative:
        return _spaced(rows, 2 * k)
    rows = _descending(rows)
    if len(rows) <= 2 * k:
        return _by_value(rows, [], all_rows)
    return _by_value(rows[:k] + rows[len(rows) - k :], rows[k : len(rows) - k], all_rows, k)


def in_order(data: EntryData) -> Shown:
    """Every row, in the order of the result."""
    all_rows = drawn(data)
    rows = _named(all_rows)
    most = largest(value for _, value in rows)
    note = _left_out([], all_rows, most)
    return Shown(rows, len(rows), note, all_rows.remainder, most)


@dataclass(frozen=True)
class Drawn:
    """All that a result can show of its rows.

    Attributes:
        rows: each with its mean, in the order of the result.
        remainder: what is no row of the unit, or None.
        n_beyond: how many more rows there are.
        beyond: what these hold together.
    """

    rows: list[tuple[Row, float]]
    remainder: Remainder | None
    n_beyond: int
    beyond: float


def drawn(data: EntryData) -> Drawn:
    """The rows with their means, the remainder apart."""
    rows, remainder, words = [], None, data.words
    means = data.row_means()
    for row, value in means.rows:
        if words.remainder and row.label == words.remainder:
            short = f"no {words.index}" if words.index else "the rest"
            remainder = Remainder(row.label, value, words.remainder_is, short)
        else:
            rows.append((row, value))
    return Drawn(rows, remainder, means.n_beyond, means.beyond)


def decimals(values: Sequence[float]) -> int:
    """How many decimals show four digits of the largest of them."""
    most = largest(values)
    if most == 0:
        return 3
    return min(8, max(0, 3 - math.floor(math.log10(most))))


def largest(values: Iterable[float]) -> float:
    """The largest absolute value among those that are finite; 0 where there is none."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _named(all_rows: Drawn) -> list[tuple[str, float]]:
    return [(row.label, value) for row, value in all_rows.rows]


def _or(otherwise: float, value: float) -> float:
    """A value to sort by: NaN has no order."""
    return otherwise if math.isnan(value) else value


def _descending(rows: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(rows, key=lambda row: _or(-math.inf, row[1]), reverse=True)


def _by_value(
    shown: list[tuple[str, float]],
    rest: list[tuple[str, float]],
    all_rows: Drawn,
    gap_at: int | None = None,
) -> Shown:
    shown = _descending(shown)
    most = largest(value for _, value in shown)
    note = _left_out(rest, all_rows, most)
    if gap_at is None:  # those left out are the weakest: they stand between the signs
        gap_at = sum(value > 0 for _, value in shown)
    return Shown(shown, gap_at, note, all_rows.remainder, most)


def _left_out(rest: list[tuple[str, float]], all_rows: Drawn, most: float) -> str:
    """A line about the rows that are not shown, with those beyond what the result can show."""
    n = len(rest) + all_rows.n_beyond
    if not n:
        return ""
    total = sum(value for _, value in rest) + all_rows.beyond
    return f"{n} more row{'s' * (n > 1)}, together {total:+.{decimals([most, total])}f}"


def _spaced(rows: list[tuple[str, float]], limit: int) -> Shown:
    step = max(1, math.ceil(len(rows) / max(limit, 1)))
    shown = rows[::-1][::step][::-1]  # counted from the end, which is the sum of everything
    note = f"one entry in {step} shown, of {len(rows)}" if step > 1 else ""
    return Shown(shown, len(shown), note, None, largest(value for _, value in shown))
