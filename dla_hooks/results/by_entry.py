"""Entries one by one: what a result shows where a mean over them would mean little."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dla_hooks.results.data import EntryData, names_of_entries, real_entries
from dla_hooks.results.plots.lines import asked, lines_of, names_of, where
from dla_hooks.results.plots.numbers import numbers_of
from dla_hooks.results.ranking import decimals
from dla_hooks.results.wording import printable


@dataclass(frozen=True)
class EntryLine:
    """One entry in a few words.

    Attributes:
        name: its token or its prompt, and its answer.
        logit: the logit, or difference.
        up: the row that pushes it up the most, with its value; None where none does.
        down: the same the other way.
    """

    name: str
    logit: float
    up: tuple[str, float] | None
    down: tuple[str, float] | None


def mixed(data: EntryData) -> bool:
    """Whether entries are about different answers, so that their mean means little."""
    if len(set(data.answer)) < 2 and len(set(data.incorrect or ())) < 2:
        return False
    pairs = zip(
        names_of_entries(data, data.answer), names_of_entries(data, data.incorrect), strict=True
    )
    real = real_entries(data)[0].flatten().tolist()
    return len({pair for pair, is_real in zip(pairs, real, strict=True) if is_real}) > 1


def entry_lines(data: EntryData, limit: int) -> tuple[list[EntryLine], int]:
    """The first entries, and how many there are."""
    lines = lines_of(data, None, None, None)
    shown = lines[:limit]
    numbers = numbers_of(data, shown)
    found = []
    for j, name in enumerate(names_of(data, shown)):
        values = numbers.values[:, j].tolist()
        known = [(value, i) for i, value in enumerate(values) if math.isfinite(value)]
        ends = []
        for sign, best in ((1, max(known, default=None)), (-1, min(known, default=None))):
            good = best is not None and sign * best[0] > 0
            ends.append((printable(numbers.labels[best[1]]), best[0]) if good and best else None)
        found.append(EntryLine(name, float(numbers.logit[j]), *ends))
    return found, len(lines)


def entry_headline(data: EntryData) -> str:
    """Which logits, where, and of which model: one line."""
    lines = lines_of(data, None, None, None)
    head = ", ".join(part for part in (asked(data, lines), where(data, lines, 60)) if part)
    return printable(f"{head} · {data.model}" if data.model else head)


def digits_of(lines: list[EntryLine]) -> int:
    """How many decimals show the numbers of some lines."""
    ends = [end[1] for line in lines for end in (line.up, line.down) if end is not None]
    return decimals([*(line.logit for line in lines), *ends])


def spreads(data: EntryData) -> dict[str, float]:
    """The standard error of each row's mean over prompts, by label; of one prompt none.

    Each prompt counts once, with one entry; of several entries of a prompt nothing is said.
    """
    n = len(data.tokens)
    if data.keeps_some or n < 2 or data.shape.numel() != n:
        return {}
    lines = lines_of(data, None, None, None)
    if len({line.row for line in lines}) != len(lines) or len(lines) < 2:
        return {}
    numbers = numbers_of(data, lines).mean("error")
    assert numbers.errors is not None
    return dict(zip(numbers.labels, numbers.errors[:, 0].tolist(), strict=True))
