"""A result in words and selected rows: what every view of it (text, html, plot, CLI) shows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dla_hooks.results.ranking import _located, decimals, entry_mean, real_entries

if TYPE_CHECKING:
    from dla_hooks.results.result import DirectLogitAttribution

EMPTY = "no position is selected"
UNITS = {
    "component": "components: embeddings, and what each sublayer wrote",
    "head": "heads: what each attention head wrote",
    "layer": "layers: the running sum of the components",
}


def unit_sentence(result: DirectLogitAttribution) -> str:
    """What the rows of a result are, in a few words."""
    return UNITS.get(result.unit, result.unit)


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
