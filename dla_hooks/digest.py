"""A result in words and selected rows: what every view of it (text, html, plot, CLI) shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dla_hooks.result import DirectLogitAttribution

REMAINDER = "remainder"
UNITS = {
    "component": "components: embeddings, and what each sublayer wrote",
    "head": "heads: what each attention head wrote",
    "layer": "layers: the running sum of the components",
}


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


@dataclass(frozen=True)
class Line:
    """One line of a table in fixed width: the label and number, padded, then a bar or a note."""

    start: str
    end: str
    value: float | None = None


def lines(rows: Rows, half: int) -> list[Line]:
    """The rows as lines of text that stand under each other.

    Args:
        rows: what to show.
        half: characters of a full bar, to either side.
    """
    digits = decimals([rows.largest, rows.remainder or 0.0])
    shown = [(label, f"{value:+.{digits}f}", value) for label, value in rows.shown]
    last = None if rows.remainder is None else f"{rows.remainder:+.{digits}f}"
    width = max(len(label) for label, _, _ in [*shown, (REMAINDER if last else "", "", 0.0)])
    columns = max(len(number) for number in [*(number for _, number, _ in shown), last or ""])

    found = [
        Line(f"{label:<{width}}  {number:>{columns}}  ", bar(value, rows.largest, half), value)
        for label, number, value in shown
    ]
    if rows.left_out:
        found.insert(rows.gap_at, Line("", f"… {rows.left_out}"))
    if last:
        note = "(what no head wrote)" if half > 9 else "(no head)"
        found.append(Line(f"{REMAINDER:<{width}}  {last:>{columns}}  ", note))
    return found


def ranked_rows(
    result: DirectLogitAttribution,
) -> tuple[list[tuple[str, float]], float | None]:
    """Every row's label and mean in the order of the result, and the remainder apart."""
    rows = list(zip(result.labels, result.mean().tolist(), strict=True))
    remainder = next((value for label, value in rows if label == REMAINDER), None)
    return [row for row in rows if row[0] != REMAINDER], remainder


def question(result: DirectLogitAttribution) -> str:
    """Which logit, or difference: ``' Paris' - ' London'``."""
    if not result.answer:
        return "a logit"
    pairs = list(dict.fromkeys(zip(result.answer, result.incorrect or result.answer, strict=False)))
    first = quoted(result, pairs[0][0])
    if result.incorrect is not None:
        first += f" - {quoted(result, pairs[0][1])}"
    return first if len(pairs) == 1 else f"{first} and {len(pairs) - 1} more"


def place(result: DirectLogitAttribution, width: int = 60) -> str:
    """Where it was read, and what the numbers are means over.

    Args:
        result: any.
        width: characters of the prompt, elided in the middle beyond that.
    """
    valid, row_of = real_entries(result)
    n = int(valid.sum())
    if not _located(result) or n == 0:
        return f"mean over {n} entries" if n > 1 else ""
    spots, owners = result.positions[valid].tolist(), row_of[valid].tolist()
    n_rows = len(set(owners))
    lengths = [len(result.tokens[row]) for row in owners]
    text = prompt(result, owners[0], width)

    if all(spot == length - 1 for spot, length in zip(spots, lengths, strict=True)):
        spot = "the last token"
    else:
        spot = f"token {spots[0]}"
        if n_rows == 1:
            spot += f" ({quoted(result, result.tokens[owners[0]][spots[0]])})"
    n_spots = len(set(zip(owners, spots, strict=True)))
    one_each = n == n_rows and (spot == "the last token" or len(set(spots)) == 1)
    if n_rows > 1:
        if one_each:
            return f"mean over {n} prompts, at {spot} of each (first: {text})"
        return f"mean over {n} entries of {n_rows} prompts (first: {text})"
    if n_spots == 1:
        return f"at {spot} of {text}" if n == 1 else f"mean over {n} answers, at {spot} of {text}"
    over = f"all {n_spots}" if n_spots == lengths[0] else str(n_spots)
    if n == n_spots:
        return f"mean over {over} positions of {text}"
    return f"mean over {n} entries, {over} positions of {text}"


def headline(result: DirectLogitAttribution, with_model: bool = True) -> str:
    """Which logit, where, and of which model: one line."""
    where = place(result)
    comma = "," if where.startswith("mean") else ""
    head = f"{question(result)}{comma} {where}".rstrip()
    return f"{head} · {result.model}" if result.model and with_model else head


def closing(result: DirectLogitAttribution) -> list[str]:
    """The sum that the rows are held to, and how well it holds: two lines."""
    checked = (
        "not checked against the model's logits"
        if math.isnan(result.logit_gap)
        else f"to the model's own logits {result.logit_gap:.1e}"
    )
    several = int(real_entries(result)[0].sum()) > 1
    return [sum_line(result, mean=several), f"gap {result.gap:.1e}, {checked}"]


def sum_line(result: DirectLogitAttribution, *, mean: bool) -> str:
    """The sum that the rows are held to.

    Args:
        result: any.
        mean: whether its numbers are means over several logits.
    """
    logit, bias = entry_mean(result.logit), entry_mean(result.bias)
    whole = result.attribution[-1] if result.unit == "layer" else result.attribution.sum(0)
    total = entry_mean(whole)
    digits = decimals([total, bias, logit])
    what = "the mean logit" if mean else "the logit"
    if result.incorrect is not None:
        what += " difference"
    if result.softcap is not None:
        what += f" before the cap of {result.softcap:g}"
    start = "last entry" if result.unit == "layer" else "sum"
    return f"{start} {total:+.{digits}f}  + bias {bias:+.{digits}f}  = {logit:+.{digits}f}, {what}"


def real_entries(result: DirectLogitAttribution) -> tuple[Tensor, Tensor]:
    """Which entries are no padding, and whose row each belongs to, both [*batch_and_pos].

    One prompt may have several entries at one position: one for each answer.
    """
    shape = result.attribution.shape[1:]
    valid = result.positions >= 0 if _located(result) else ~result.attribution.isnan().all(0)
    ones = valid.new_ones(shape).long()
    return valid, ones.cumsum(0) - 1 if len(result.tokens) > 1 else ones - 1


def prompt(result: DirectLogitAttribution, row: int, width: int) -> str:
    """One row's prompt, quoted, elided in the middle."""
    text = (" " if ids_only(result) else "").join(result.tokens[row])
    return repr(elided(text, width))


def elided(text: str, width: int) -> str:
    """The text, with its middle left out where it is longer than ``width``, between words."""
    if len(text) <= width:
        return text
    tail = width // 2
    start, end = text[: width - tail - 1], text[-tail:]
    return f"{start[: start.rfind(' ') + 1] or start}…{end[max(end.find(' '), 0) :]}"


def quoted(result: DirectLogitAttribution, token: str) -> str:
    """A token as it is named: in quotes, for its spaces, or by its id without a tokenizer."""
    return f"token {token}" if ids_only(result) else repr(token)


def ids_only(result: DirectLogitAttribution) -> bool:
    """Whether there was no tokenizer, so that the tokens' names are their ids."""
    names = [name for row in result.tokens for name in row]
    return bool(names) and all(name.isdecimal() for name in [*names, *result.answer])


def decimals(values: Sequence[float]) -> int:
    """How many decimals show four digits of the largest of them."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0:
        return 3
    return min(8, max(0, 3 - math.floor(math.log10(largest))))


def bar(value: float, largest: float, half: int) -> str:
    """A bar of ``2 * half + 1`` characters that grows from its middle to either side."""
    if not math.isfinite(value) or largest == 0:
        return f"{'│':^{2 * half + 1}}"
    steps = min(2 * half, round(2 * half * abs(value) / largest))  # half characters
    full, odd = divmod(steps, 2)
    if value < 0:
        return f"{'▐' * odd + '█' * full:>{half}}│{'':{half}}"
    return f"{'':{half}}│{'█' * full + '▌' * odd:<{half}}"


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
