"""What the command line prints, as rich renderables: coloured in a terminal, plain in a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from dla_hooks.results.by_entry import mixed
from dla_hooks.results.data import ResultData
from dla_hooks.results.ranking import Shown, both_ends
from dla_hooks.results.text import as_text, lines
from dla_hooks.results.wording import closing, headline, printable, said_by_model

if TYPE_CHECKING:
    from dla_hooks.cli.options import Question

_UP, _DOWN, _FAINT = "blue", "red", "bright_black"

_OWN = {
    "top": "the model's own top token, or label",
    "next": "the token that comes next in the text",
    "runner-up": "the model's second token",
}


def asked(question: Question) -> str:
    """A line about the answer where nobody typed it; "" where somebody did."""
    word = question.answer or "top"
    if word not in _OWN:
        return ""
    left_out = "no --answer was given: " if question.answer is None else ""
    return f"{left_out}the answer is {_OWN[word]}"


def attribution(result: ResultData, top: int, about: str = "") -> RenderableType:
    """The ``top`` rows at both ends, and the sum that they are held to.

    Args:
        result: any; of different answers, a line for each.
        top: how many rows.
        about: a line about the question, or "".
    """
    said = [Text(about, _FAINT)] if about else []
    if mixed(result):
        return Group(*said, Text(as_text(result), no_wrap=True, overflow="ignore"))
    sum_line, gap_line = closing(result)
    return Group(
        *said,
        Text(headline(result, with_model=False), "bold"),
        Text(printable(f"{result.model} · {result.words.sentence}"), _FAINT),
        "",
        _lines(both_ends(result, top), half=14),
        "",
        Text(sum_line),
        Text(gap_line, _FAINT),
        *(Text(line) for line in said_by_model(result)),
    )


def _lines(shown: Shown, half: int) -> Text:
    """Label, number and bar under each other; a table would cut what does not fit."""
    text = Text(no_wrap=True, overflow="ignore")
    for line in lines(shown, half):
        colour = _FAINT if line.value is None else _DOWN if line.value < 0 else _UP
        text.append(line.start).append(line.end.rstrip(), colour).append("\n")
    text.rstrip()
    return text
