"""Rows that are too many to hold, as runs of rows that differ in one number only.

A large model has millions of neurons. Their records are made when they are looked at.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from dla_hooks.results.rows import Row, reads_encoder


@dataclass(frozen=True)
class Run:
    """Neighbouring rows that differ in their number only.

    Attributes:
        label: of every row, with ``{}`` where its number stands: ``L3N{}``. Without it the run is
            one row that has no number.
        kind: see :class:`Row`.
        layer: see :class:`Row`.
        sub: see :class:`Row`.
        index: of all rows, where their number is a source; otherwise None.
        n: how many rows, numbered from 0.
        of_sources: whether their number is the token that each reads; otherwise its ``index``.
    """

    label: str
    kind: str
    layer: int | None = None
    sub: int | None = None
    index: int | None = None
    n: int = 1
    of_sources: bool = False

    def row(self, number: int) -> Row:
        """The record of one of them."""
        if "{}" not in self.label:
            return Row(self.label, self.kind, self.layer, self.sub, self.index)
        label = self.label.replace("{}", str(number))
        if self.of_sources:
            return Row(label, self.kind, self.layer, self.sub, self.index, number)
        return Row(label, self.kind, self.layer, self.sub, number)

    def number_of(self, label: str) -> int | None:
        """Which of them has a label, or None."""
        before, there, after = self.label.partition("{}")
        if not there:
            return 0 if label == before else None
        number = label[len(before) : len(label) - len(after)]
        if not (number.isascii() and number.isdecimal() and int(number) < self.n):
            return None
        return int(number) if label == f"{before}{int(number)}{after}" else None


class RowRuns(Sequence[Row]):
    """A sequence of records, made on demand.

    Args:
        runs: in order.

    Attributes:
        runs: the same.
        starts: the number of the first row of each run.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = tuple(runs)
        *self.starts, self._n = itertools.accumulate((run.n for run in self.runs), initial=0)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(self._n))]
        if not -self._n <= number < self._n:
            raise IndexError(f"there are {self._n} rows, and none has the number {number}")
        number %= self._n
        run = bisect.bisect_right(self.starts, number) - 1
        return self.runs[run].row(number - self.starts[run])

    def __iter__(self) -> Iterator[Row]:
        return (run.row(number) for run in self.runs for number in range(run.n))

    def number_of(self, label: str) -> int | None:
        """The number of the row with a label, or None."""
        for start, run in zip(self.starts, self.runs, strict=True):
            number = run.number_of(label)
            if number is not None:
                return start + number
        return None

    def of_tokens(self, n: int) -> RowRuns:
        """Without the rows that read tokens which a prompt of ``n`` tokens does not have."""
        return RowRuns(
            replace(run, n=min(run.n, n)) if run.of_sources and not reads_encoder(run.kind) else run
            for run in self.runs
        )

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, RowRuns) and self.runs == other.runs

    def __hash__(self) -> int:
        return hash(self.runs)

    def __repr__(self) -> str:
        ends = ", ".join(self[i].label for i in (0, -1)) if self._n else ""
        return f"<{self._n} rows: {ends}>"
