"""The tokens of one prompt in the colours of one row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dla_hooks.errors import InputError
from dla_hooks.results import picture
from dla_hooks.results.data import EntryData, located
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots.lines import Line
from dla_hooks.results.plots.numbers import Numbers, numbers_of, unknown
from dla_hooks.results.plots.wish import Wish
from dla_hooks.results.wording import printable


def strip(
    data: EntryData, lines: Sequence[Line], wish: Wish, head: tuple[str, list[str]]
) -> Picture:
    """Each token with what one row wrote there; of rows that read tokens, with what they took.

    Raises:
        InputError: when the result does not know its tokens, or for several prompts or answers.
        LabelError: for a row that is not there.
    """
    if not located(data):
        raise InputError("this result does not say its tokens, which a strip shows")
    rows = {line.row for line in lines}
    if len(rows) > 1:
        raise InputError("kind='strip' draws one prompt; choose it with prompt=0, …")
    if len({line.position for line in lines}) < len(lines):
        answers = list(dict.fromkeys(line.answer for line in lines))
        raise InputError(
            f"kind='strip' draws one answer; choose it with answer=, of {answers!r:.200}"
        )
    tokens = data.tokens[rows.pop()]
    if data.words.sources:
        label, values, chosen = _sources(data, lines[-1], wish.row, len(tokens))
    else:
        label, values, chosen = _written(data, lines, wish.row, len(tokens))
    title = (
        head[0] if wish.title is not None else printable(f"{label}: {head[0].split(': ', 1)[-1]}")
    )
    return picture.strip(
        [printable(token) for token in tokens], values, chosen=chosen, title=title,
        subtitle=head[1], width=wish.width,
    )  # fmt: skip


def _written(
    data: EntryData, lines: Sequence[Line], row: str | None, n: int
) -> tuple[str, list[float], int | None]:
    numbers = numbers_of(data, lines)
    label, of_row = _row(data, numbers, row)
    values = [math.nan] * n
    for line, value in zip(lines, of_row, strict=True):
        if line.position is not None:
            values[line.position] = value
    return label, values, None


def _row(data: EntryData, numbers: Numbers, row: str | None) -> tuple[str, list[float]]:
    """One row by its label; the strongest by default. ``logit`` is the whole."""
    labels = [each.label for each in numbers.rows]
    if row == "logit":
        return row, numbers.logit.tolist()
    if row == data.words.remainder and numbers.remainder is not None:
        return row, numbers.remainder.tolist()
    if row is None:
        place = int(numbers.strength().argmax())
    elif row in labels:
        place = labels.index(row)
    else:
        raise unknown(data.unit, row, labels)
    return labels[place], numbers.values[place].tolist()


def _sources(
    data: EntryData, line: Line, head: str | None, n: int
) -> tuple[str, list[float], int | None]:
    """What the rows of one head, or of all, took from each token; those that are kept."""
    numbers = numbers_of(data, [line])
    values, found = [math.nan] * n, False
    for row, value in zip(numbers.rows, numbers.values[:, 0].tolist(), strict=True):
        if row.source is None or row.reads_encoder:
            continue
        if head is not None and row.label.split("<")[0] != head:
            continue
        found = True
        before = values[row.source]
        values[row.source] = value + (0.0 if math.isnan(before) else before)
    if not found:
        heads = list(dict.fromkeys(row.label.split("<")[0] for row in numbers.rows))
        raise unknown(data.unit, str(head), heads)
    kept = f" of {len(numbers.rows)} rows that are kept" if numbers.n_others else ""
    return f"{head or 'what heads took'}{kept}", values, line.position
