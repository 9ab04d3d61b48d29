"""A result as a picture: which entries, which rows, and which kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dla_hooks.errors import InputError
from dla_hooks.results.data import EntryData
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots import kinds
from dla_hooks.results.plots.heading import heading, not_drawn
from dla_hooks.results.plots.lines import (
    MEAN,
    Line,
    along_a_prompt,
    check_lens,
    lines_of,
    names_of,
)
from dla_hooks.results.plots.numbers import Numbers, no_means, numbers_of
from dla_hooks.results.plots.tokens import strip
from dla_hooks.results.plots.wish import Wish, check
from dla_hooks.results.wording import of_what

_MOST_BARS, _FEW_BARS = 100, 30
_MOST_LINES, _MOST_CELLS = 200, 6_000
"""Positions of a table, and cells of a lens, that are drawn where nobody asks for more."""


def plot(data: EntryData, wish: Wish) -> Picture:
    """Draw a result.

    Raises:
        InputError: when there is nothing to draw, or an argument has a value without meaning.
    """
    check(data, wish)
    lines, mean, note = _chosen(data, wish)
    if wish.kind == "strip":
        return strip(data, lines, wish, heading(data, lines, mean, note, wish))
    kind = _kind(data, lines, mean, wish)
    if kind == "lens":
        check_lens(data, lines)
    elif kind != "table" and len(lines) > 1 and not mean:
        lines = _last(lines, kind)
    if wish.pos is None and not mean:
        lines, note = _fitting(data, lines, kind, note)
    numbers = numbers_of(data, lines)
    if mean:
        if bool(numbers.values.isnan().any()) and data.keeps_some:
            raise no_means(data)
        numbers = numbers.mean("error" if wish.prompt == MEAN else "deviation")
    if isinstance(wish.rows, Sequence):
        numbers = numbers.named(wish.rows, data.unit)
    head = heading(data, lines, mean, note, wish)
    look = kinds.Look(
        head[0], head[1], wish.width, wish.height,
        of_what(data), _by_size(data, kind, wish),
    )  # fmt: skip
    return _drawn(data, numbers, kind, look, wish, lines)


def _drawn(
    data: EntryData,
    numbers: Numbers,
    kind: str,
    look: kinds.Look,
    wish: Wish,
    lines: Sequence[Line],
) -> Picture:
    words, n = data.words, None
    if wish.rows is not None and not isinstance(wish.rows, Sequence):
        n = int(wish.rows)
    if kind == "table":
        return kinds.table(numbers, words, look, names_of(data, lines), n)
    if kind == "heatmap":
        if any(kinds.has_square(row) for row in numbers.rows):
            extra = not_drawn(data, numbers)
            look = kinds.Look(**{**vars(look), "subtitle": [*look.subtitle, *extra]})
            return kinds.grid(numbers if n is None else numbers.strongest(n), words, look)
        kind = "bars"
    if kind in ("bars", "waterfall"):
        if n is None and wish.rows is None and (data.keeps_some or len(numbers.rows) > _MOST_BARS):
            n = _FEW_BARS
        if kind == "waterfall" and words.cumulative:
            raise InputError(
                f"the rows of unit {data.unit!r} are running sums already; draw kind='line', or "
                "take a unit whose rows sum to the logit"
            )
    if n is not None:
        numbers = numbers.strongest(n)
    if kind == "lens":
        return kinds.lens(numbers, look, names_of(data, lines))
    draw = {"bars": kinds.bars, "waterfall": kinds.waterfall, "line": kinds.line}[kind]
    return draw(numbers, words, look)


def _chosen(data: EntryData, wish: Wish) -> tuple[list[Line], bool, str]:
    """The lines that are drawn, whether as their mean, and a note on what is left out."""
    prompt = None if wish.prompt == MEAN else wish.prompt
    pos, note = wish.pos, ""
    lines = lines_of(data, prompt, pos, wish.answer)
    rows = list(dict.fromkeys(line.row for line in lines))
    if wish.prompt == MEAN:
        if len(lines) != len(rows):
            raise InputError(
                "prompt='mean' averages one number of each prompt; choose it with pos= (a "
                "position or 'mean'), and answer= where there are several"
            )
        return lines, True, f"mean over {len(rows)} prompts"
    if len(rows) > 1 and len(lines) > len(rows):
        lines = [line for line in lines if line.row == rows[0]]
        note = f"prompt {rows[0]} of {len(rows)}; prompt=… draws others"
    if pos == MEAN:
        if len(lines) > 1:
            return lines, False, "each a mean over its positions"
        flats = lines[0].flats
        note = f"mean over {len(flats)} positions"
        if data.keeps_some:  # a row's spread is not known
            return lines, False, note
        return [replace(lines[0], flats=(flat,)) for flat in flats], True, note
    return lines, False, note


def _kind(data: EntryData, lines: Sequence[Line], mean: bool, wish: Wish) -> str:
    if len(lines) > 1 and not mean and wish.kind in (None, "heatmap"):
        sums = data.words.cumulative and wish.kind is None
        return "lens" if sums and along_a_prompt(lines) else "table"
    return wish.kind or data.words.chart


def _fitting(data: EntryData, lines: list[Line], kind: str, note: str) -> tuple[list[Line], str]:
    """The last positions of a prompt with too many for one picture, which is then said."""
    most = {"table": _MOST_LINES, "lens": _MOST_CELLS // max(1, len(data.rows))}.get(kind)
    if most is None or len(lines) <= most or not along_a_prompt(lines):
        return lines, note
    said = f"the last {most} of {len(lines)} positions; pos=… draws others"
    return lines[-most:], said


def _last(lines: Sequence[Line], kind: str) -> list[Line]:
    """The last of several positions, of one prompt and one answer.

    Raises:
        InputError: for several prompts or answers.
    """
    if len({line.row for line in lines}) > 1:
        raise InputError(
            f"kind={kind!r} draws one prompt; choose it with prompt=0, …, or prompt='mean'"
        )
    if len({line.position for line in lines}) < len(lines):
        answers = list(dict.fromkeys(line.answer for line in lines))
        raise InputError(
            f"kind={kind!r} draws one answer; choose it with answer=, of {answers!r:.200}"
        )
    return [lines[-1]]


def _by_size(data: EntryData, kind: str, wish: Wish) -> bool:
    if wish.sort is not None:
        return wish.sort == "size"
    return kind == "bars" and data.keeps_some
