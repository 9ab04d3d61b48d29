"""Numbers as pictures of each kind. Headings are given; nothing here knows what a result is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dla_hooks.results import picture
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots.numbers import Numbers
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.wording import printable

_MOST_COLUMNS, _FEW_COLUMNS = 40, 24


@dataclass(frozen=True)
class Look:
    """What is the same for all kinds.

    Attributes:
        title: the heading.
        subtitle: lines below it.
        width: in pixels, or None.
        height: in pixels, or None.
        total: what the sum is called.
        by_size: whether rows stand by their value, and not in the order of the stream.
    """

    title: str
    subtitle: Sequence[str]
    width: float | None
    height: float | None
    total: str
    by_size: bool


def bars(numbers: Numbers, words: Words, look: Look) -> Picture:
    """A bar for each row of one line, then what is not drawn, the bias, and the whole."""
    values = numbers.values[:, 0].tolist()
    order = _order(values, look.by_size)
    names = [numbers.labels[i] for i in order]
    drawn = [values[i] for i in order]
    errors = None
    if numbers.errors is not None:
        spread = numbers.errors[:, 0].tolist()
        errors = [spread[i] for i in order]
    total = None
    if not words.cumulative:
        more = _more(numbers, words)
        names, drawn = names + [name for name, _ in more], drawn + [value for _, value in more]
        errors = errors and errors + [math.nan] * len(more)
        total = (look.total, float(numbers.logit[0]))
    return picture.bars(
        _printable(names), drawn, errors=errors, total=total, title=look.title,
        subtitle=look.subtitle, width=look.width, height=look.height,
    )  # fmt: skip


def waterfall(numbers: Numbers, words: Words, look: Look) -> Picture:
    """Each row of one line from the running sum of those before; at last the whole."""
    values = numbers.values[:, 0].tolist()
    order = _order(values, look.by_size)
    pairs = [(numbers.labels[i], values[i]) for i in order] + _more(numbers, words)
    return picture.waterfall(
        _printable([name for name, _ in pairs]), [value for _, value in pairs], total=look.total,
        title=look.title, subtitle=look.subtitle, width=look.width, height=look.height,
    )  # fmt: skip


def line(numbers: Numbers, words: Words, look: Look) -> Picture:
    """The rows of one line from left to right."""
    errors = None if numbers.errors is None else numbers.errors[:, 0].tolist()
    return picture.line(
        _printable(numbers.labels), numbers.values[:, 0].tolist(), errors=errors,
        y_title="sum up to here" if words.cumulative else "", title=look.title,
        subtitle=look.subtitle, width=look.width, height=look.height,
    )  # fmt: skip


def grid(numbers: Numbers, words: Words, look: Look) -> Picture:
    """Layer by index: a square for each row that has a number."""
    pairs = zip(numbers.rows, numbers.values[:, 0].tolist(), strict=True)
    cells = [(row, value) for row, value in pairs if has_square(row)]
    several = len({row.kind for row, _ in cells}) > 1
    lanes = list(dict.fromkeys(_lane(row, several) for row, _ in cells))
    indices = sorted({row.index for row, _ in cells if row.index is not None})
    line_of, column_of = ({name: i for i, name in enumerate(of)} for of in (lanes, indices))
    values = [[math.nan] * len(indices) for _ in lanes]
    names = [[""] * len(indices) for _ in lanes]
    for row, value in cells:
        assert row.index is not None
        place = line_of[_lane(row, several)], column_of[row.index]
        values[place[0]][place[1]] = value
        names[place[0]][place[1]] = printable(row.label)
    return picture.heatmap(
        _printable(lanes), [str(index) for index in indices], values, names=names,
        row_title="layer", column_title=words.index, square=True, title=look.title,
        subtitle=look.subtitle, width=look.width, height=look.height,
    )  # fmt: skip


def table(
    numbers: Numbers, words: Words, look: Look, names: Sequence[str], n_rows: int | None
) -> Picture:
    """Lines under each other, a column for each row, and what they sum to beside."""
    columns = numbers
    if n_rows is not None:
        columns = numbers.strongest(n_rows)
    elif len(numbers.rows) > _MOST_COLUMNS:
        columns = numbers.strongest(_FEW_COLUMNS)
    if look.by_size:
        columns = columns.of(columns.strength().argsort(descending=True).tolist())
    plain = []
    if not words.cumulative:
        if columns.n_others:
            plain.append((f"{columns.n_others} more", columns.others.tolist()))
        if columns.remainder is not None:
            plain.append((words.remainder, columns.remainder.tolist()))
        plain.append(("bias", columns.bias.tolist()))
    plain.append((look.total, columns.logit.tolist()))
    return picture.heatmap(
        names, _printable(columns.labels), columns.values.T.tolist(), plain=plain,
        title=look.title, subtitle=look.subtitle, width=look.width, height=look.height,
    )  # fmt: skip


def lens(numbers: Numbers, look: Look, names: Sequence[str]) -> Picture:
    """Running sums of one prompt: its tokens from left to right, layers from below, the logit."""
    labels = [look.total, *reversed(_printable(numbers.labels))]
    values = [numbers.logit.tolist(), *reversed(numbers.values.tolist())]
    return picture.heatmap(
        labels, names, values, title=look.title, subtitle=look.subtitle, width=look.width,
        height=look.height,
    )  # fmt: skip


def has_square(row: Row) -> bool:
    """Whether a row has a place in a grid of layer by index."""
    return row.index is not None and row.layer is not None and row.source is None


def _lane(row: Row, several: bool) -> str:
    """The name of a grid's line: the layer, with what tells apart several in one layer."""
    layer = "" if row.layer is None else str(row.layer)
    if row.sub:
        layer += f".{row.sub}"
    return f"{layer} {row.kind}".lstrip() if several else layer


def _order(values: Sequence[float], by_size: bool) -> list[int]:
    if not by_size:
        return list(range(len(values)))
    known = [-math.inf if math.isnan(value) else value for value in values]
    return sorted(range(len(values)), key=lambda i: known[i], reverse=True)


def _more(numbers: Numbers, words: Words) -> list[tuple[str, float]]:
    """What stands below the rows: those that are not drawn, the remainder and the bias."""
    more = []
    if numbers.n_others:
        more.append((f"{numbers.n_others} more", float(numbers.others[0])))
    if numbers.remainder is not None:
        more.append((words.remainder, float(numbers.remainder[0])))
    return [*more, ("bias", float(numbers.bias[0]))]


def _printable(names: Sequence[str]) -> list[str]:
    return [printable(name) for name in names]
