"""A result in words and selected rows: what every view of it (text, html, plot, CLI) shows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from dla_hooks.results.data import EntryData, entry_mean, located, real_entries
from dla_hooks.results.ranking import decimals

NO_ENTRY = "no position is selected"
NO_ROW = "there is no row"


def nothing_in(data: EntryData) -> str:
    """Why there is nothing to show: no entry, or no row. "" where there is something."""
    if data.attribution.numel():
        return ""
    return NO_ROW if data.shape.numel() else NO_ENTRY


def question(data: EntryData) -> str:
    """Which logit, or difference: ``' Paris' - ' London'``."""
    if not data.answer:
        return "a logit"
    pairs = list(dict.fromkeys(zip(data.answer, data.incorrect or data.answer, strict=False)))
    first = quoted(data, pairs[0][0])
    if data.incorrect is not None:
        first += f" - {quoted(data, pairs[0][1])}"
    return first if len(pairs) == 1 else f"{first} and {len(pairs) - 1} more"


def place(data: EntryData, width: int = 60) -> str:
    """Where it was read, and what the numbers are means over.

    Args:
        data: any.
        width: characters of the prompt, elided in the middle beyond that.
    """
    valid, row_of = real_entries(data)
    n = int(valid.sum())
    if not located(data) or n == 0:
        return f"mean over {n} entries" if n > 1 else ""
    spots, owners = data.positions[valid].tolist(), row_of[valid].tolist()
    n_rows = len(set(owners))
    lengths = [len(data.tokens[row]) for row in owners]
    text = prompt(data, owners[0], width)

    if all(spot == length - 1 for spot, length in zip(spots, lengths, strict=True)):
        spot = "the last token"
    else:
        spot = f"token {spots[0]}"
        if n_rows == 1:
            spot += f" ({quoted(data, data.tokens[owners[0]][spots[0]])})"
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


def headline(data: EntryData, with_model: bool = True) -> str:
    """Which logit, where, and of which model: one line."""
    where = place(data)
    comma = "," if where.startswith("mean") else ""
    head = f"{question(data)}{comma} {where}".rstrip()
    return printable(f"{head} · {data.model}" if data.model and with_model else head)


def closing(data: EntryData) -> list[str]:
    """The sum that the rows are held to, and how well it holds: two lines."""
    if data.reading is not None:
        own = "the stream's own number" if math.isnan(data.logit_gap) else "the model's own number"
        checked = f"to {own}"
    elif math.isnan(data.logit_gap):
        checked = "not checked against the model's logits"
    else:
        checked = "to the model's own logits"
    if not math.isnan(data.logit_gap):
        checked += f" {data.logit_gap:.1e}"
    several = int(real_entries(data)[0].sum()) > 1
    return [sum_line(data, mean=several), f"gap {data.gap:.1e}, {checked}"]


def said_by_model(data: EntryData) -> list[str]:
    """The rank and probability of the only answer, where the model's logits were looked at."""
    seen = data.seen
    if seen is None or seen.rank.numel() != 1 or int(seen.rank) < 1 or not data.answer:
        return []
    p = math.exp(float(seen.log_probability))
    line = f"answer {quoted(data, data.answer[0])}: rank {int(seen.rank)}, p {p:.2g}"
    if int(seen.rank) > 1 and len(seen.top_ids):
        text, most = seen.top()[0][0]
        line += f"; top {quoted(data, text)}, p {most:.2g}"
    return [line]


def sum_line(data: EntryData, *, mean: bool) -> str:
    """The sum that the rows are held to.

    Args:
        data: any.
        mean: whether its numbers are means over several logits.
    """
    logit, bias = entry_mean(data.logit), entry_mean(data.bias)
    total = entry_mean(data.total())
    digits = decimals([total, bias, logit])
    what = f"the {'mean ' * mean}{of_what(data)}"
    if data.softcap is not None:
        what += f" before the cap of {data.softcap:g}"
    if data.compared:
        what += ", first - second"
    start = "last entry" if data.words.cumulative else "sum"
    return f"{start} {total:+.{digits}f}  + bias {bias:+.{digits}f}  = {logit:+.{digits}f}, {what}"


def of_what(data: EntryData) -> str:
    """What a number is: a logit, a difference of two, or a value that was read."""
    if data.reading is not None:
        return "value"
    return "logit" if data.incorrect is None else "logit difference"


def prompt(data: EntryData, row: int, width: int) -> str:
    """One row's prompt, quoted, elided in the middle."""
    text = (" " if ids_only(data) else "").join(without_patches(data.tokens[row]))
    return repr(elided(text, width))


_PATCH = re.compile(r"<(image|video|audio) (?:[0-9]+: )?[0-9,]+>")
_SHORTENED = ("<image>", "<video>", "<audio>")


def without_patches(tokens: Sequence[str]) -> list[str]:
    """The tokens, with the patches of an image, or the frames of a sound, as one.

    >>> without_patches(["See", "<image 0,0>", "<image 0,1>", "."])
    ['See', '<image>', '.']
    """
    found = list[str]()
    for token in tokens:
        patch = _PATCH.fullmatch(token)
        name = f"<{patch[1]}>" if patch else token
        if not (patch and found and found[-1] == name):
            found.append(name)
    return found


def elided(text: str, width: int) -> str:
    """The text, with its middle left out where it is longer than ``width``, between words."""
    if len(text) <= width:
        return text
    tail = width // 2
    start, end = text[: width - tail - 1], text[-tail:]
    return f"{start[: start.rfind(' ') + 1] or start}…{end[max(end.find(' '), 0) :]}"


def printable(text: str) -> str:
    """The text, with half a surrogate pair as its escape: it has no form in UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def quoted(data: EntryData, token: str) -> str:
    """A token as it is named: in quotes, for its spaces, or by its id without a tokenizer."""
    if data.reading is not None and token in data.answer:
        return token  # no token, but what is read
    return f"token {token}" if ids_only(data) else repr(token)


def ids_only(data: EntryData) -> bool:
    """Whether there was no tokenizer, so that the tokens' names are their ids."""
    names = [name for row in data.tokens for name in row]
    return are_ids(names) and are_ids(data.answer, default=True)


def are_ids(names: Sequence[str], *, default: bool = False) -> bool:
    """Whether all names are ids, but for patches of images; the default for no name at all."""
    known = [name for name in names if not _PATCH.fullmatch(name) and name not in _SHORTENED]
    return all(name.isdecimal() for name in known) if known else default
