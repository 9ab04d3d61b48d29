"""Which numbers of a result are drawn: its entries, chosen and put into lines.

A line is one entry, or with ``pos="mean"`` all entries of one prompt and answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dla_hooks.errors import ArgumentTypeError, InputError, PositionError
from dla_hooks.results.data import EntryData, located
from dla_hooks.results.parts import counted
from dla_hooks.results.table import entries
from dla_hooks.results.wording import ids_only, printable, prompt, quoted

MEAN = "mean"
MIXED = "\0each its own"
"""In place of the answer of a line of entries that have several."""
_TAIL = 28


@dataclass(frozen=True)
class Line:
    """Entries that are drawn as one.

    Attributes:
        flats: their flat indices.
        row: the prompt that they belong to.
        position: the position, or None for several, or where it is not known.
        token: the text of the token there, or None.
        answer: its text, or None where it is not known.
        incorrect: the same of the incorrect token.
    """

    flats: tuple[int, ...]
    row: int
    position: int | None
    token: str | None
    answer: str | None
    incorrect: str | None


def lines_of(data: EntryData, prompt: Any, pos: Any, answer: Any) -> list[Line]:
    """The entries that are asked for, as lines.

    Args:
        data: any.
        prompt: the number of a row of the batch, or None for all.
        pos: a position of the prompt, or several, a slice, None for all, or ``"mean"``.
        answer: the text of one of several answers, or None for all.

    Raises:
        InputError: when there is none, or the result does not say its positions.
        PositionError: (an IndexError) for a prompt or a position that is not there.
        ArgumentTypeError: when an argument has no meaning.
    """
    found = [Line((flat,), *entry.values()) for flat, entry in entries(data)]
    if prompt is not None:
        n_prompts = len(data.tokens) or 1
        row = counted(prompt, n_prompts, "the batch", "rows")
        found = [line for line in found if line.row == row]
    if answer is not None:
        answers = list(dict.fromkeys(line.answer for line in found))
        if answer not in answers:
            raise InputError(f"answer is {answer!r:.80}, and the answers are {answers!r:.200}")
        found = [line for line in found if line.answer == answer]
    if not found:
        raise InputError(
            "there is nothing to draw: the prompt has no number at a selected position"
        )
    if pos is None:
        return found
    if isinstance(pos, str):
        if pos != MEAN:
            raise ArgumentTypeError(f"pos must be a position, several, or 'mean'; got {pos!r:.80}")
        return _by_prompt(found)
    if not located(data):
        raise InputError("this result does not say its positions; leave pos out")
    wanted = {row: _wanted(pos, len(tokens)) for row, tokens in enumerate(data.tokens)}
    at = [line for line in found if line.position in wanted[line.row]]
    if not at:
        there = sorted({line.position for line in found if line.position is not None})
        raise PositionError(
            f"pos={pos!r:.80} is none of the positions of this result: {_listed(there)}"
        )
    return at


def _by_prompt(found: Sequence[Line]) -> list[Line]:
    """One line for each prompt; for each of its answers, where a position has several."""
    places = [(line.row, line.position) for line in found]
    one_each = len(set(places)) == len(places)
    groups: dict[tuple[int, str | None, str | None], list[Line]] = {}
    for line in found:
        own = (None, None) if one_each else (line.answer, line.incorrect)
        groups.setdefault((line.row, *own), []).append(line)
    lines = []
    for several in groups.values():
        pairs = {(line.answer, line.incorrect) for line in several}
        answer, incorrect = pairs.pop() if len(pairs) == 1 else (MIXED, None)
        flats = tuple(line.flats[0] for line in several)
        lines.append(Line(flats, several[0].row, None, None, answer, incorrect))
    return lines


def _wanted(pos: Any, n: int) -> set[int]:
    """The positions of a prompt of ``n`` tokens that are asked for."""
    if isinstance(pos, slice):
        return set(range(n)[pos])
    several = list(pos) if isinstance(pos, Iterable) else [pos]
    found = set()
    for one in several:
        if isinstance(one, bool) or not hasattr(one, "__index__"):
            raise ArgumentTypeError(f"a position must be an int, got {one!r:.80}")
        number = one.__index__()
        found.add(number if number >= 0 else n + number)
    return found


def _listed(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers[:12])) + (", …" if len(numbers) > 12 else "")


def asked(data: EntryData, lines: Sequence[Line]) -> str:
    """Which logit, or difference, lines are about; where they differ, that each has its own."""
    found = dict.fromkeys(_question(data, line) for line in lines)
    return next(iter(found)) if len(found) == 1 else "each its own answer"


def along_a_prompt(lines: Sequence[Line]) -> bool:
    """Whether lines are positions of one prompt, each once."""
    places = {line.position for line in lines}
    return (
        len({line.row for line in lines}) == 1 and None not in places and len(places) == len(lines)
    )


def check_lens(data: EntryData, lines: Sequence[Line]) -> None:
    """Refuse what has no layers from below to above, or no tokens from left to right.

    Raises:
        InputError: for rows that are no running sums; for several prompts or answers, or means.
    """
    if not data.words.cumulative:
        raise InputError(
            f"kind='lens' draws running sums, and the rows of unit {data.unit!r} are none; take a "
            "unit whose rows are"
        )
    if not along_a_prompt(lines):
        raise InputError(
            "kind='lens' draws positions of one prompt, with one answer each; choose with "
            "prompt=, answer= and pos="
        )


def _question(data: EntryData, line: Line) -> str:
    if line.answer is None:
        return "a logit"
    if line.answer == MIXED:
        return "each its own answer"
    wrong = "" if line.incorrect is None else f" - {quoted(data, line.incorrect)}"
    return quoted(data, line.answer) + wrong


def names_of(data: EntryData, lines: Sequence[Line]) -> list[str]:
    """What each line is called beside a picture: its token or its prompt, and its answer."""
    several = len({line.row for line in lines}) > 1
    own_answer = len({_question(data, line) for line in lines}) > 1
    one_place = own_answer and len({(line.row, line.position) for line in lines}) == 1
    names = []
    for line in lines:
        name = "" if one_place else _place(data, line, several)
        if own_answer:
            name = f"{name} → {_question(data, line)}" if name else _question(data, line)
        names.append(printable(name or f"entry {line.flats[0]}"))
    return names


def _place(data: EntryData, line: Line, several: bool) -> str:
    if several:
        tokens = data.tokens[line.row]
        end = len(tokens) if line.position is None else line.position + 1
        text = (" " if ids_only(data) else "").join(tokens[:end])
        return f"{line.row} {text if len(text) <= _TAIL else '…' + text[-_TAIL:]!s}"
    if line.position is not None and line.token is not None:
        return f"{line.position} {quoted(data, line.token)}"
    return ""


def where(data: EntryData, lines: Sequence[Line], width: int = 64) -> str:
    """Where lines stand: at which position, or how many, of which prompt, or how many prompts."""
    if not located(data):
        return ""
    rows = list(dict.fromkeys(line.row for line in lines))
    spots = {(line.row, line.position) for line in lines}
    last = all(line.position == len(data.tokens[line.row]) - 1 for line in lines)
    positions = {line.position for line in lines}
    one = positions.pop() if len(positions) == 1 else None
    spot = "the last token" if last else f"token {one}"
    if len(rows) > 1:
        of = f"{len(rows)} prompts"
        return f"at {spot} of each of {of}" if last or one is not None else of
    text = prompt(data, rows[0], width)
    if one is None:
        return f"at {len(spots)} positions of {text}" if len(spots) > 1 else f"of {text}"
    if not last and lines[0].token is not None:
        spot += f" ({quoted(data, lines[0].token)})"
    return f"at {spot} of {text}"
