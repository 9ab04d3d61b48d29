"""What the command line prints, as rich renderables: coloured in a terminal, plain in a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from dla_hooks.results.by_entry import mixed
from dla_hooks.results.data import ResultData
from dla_hooks.results.ranking import Shown, both_ends, in_order, strongest
from dla_hooks.results.text import as_text, lines
from dla_hooks.results.wording import closing, headline, printable, question, said_by_model

if TYPE_CHECKING:
    from dla_hooks.cli.options import Question
    from dla_hooks.demo import Example

_UP, _DOWN, _FAINT = "blue", "red", "bright_black"

_OWN = {
    "top": "the model's own top token, or label",
    "next": "the token that comes next in the text",
    "runner-up": "the model's second token",
}

_TASKS = {
    "indirect_object": "Who is given something: the name that was said once, not the one said "
    "twice.",
    "landmark": "A fact: the city of a landmark.",
    "agreement": "Singular or plural: the verb agrees with its subject, not with the nearer noun.",
    "induction": "Repetition: what followed this word before follows again.",
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


def demo_opening(model: Any) -> RenderableType:
    """What is going to be shown."""
    config = model.config
    return Text(
        f"A small GPT-2 ({config.n_layer} layers of {config.n_head} heads) is asked for the next "
        "word. Every row below is what one part of it wrote into the residual stream, read as "
        "logit of the answer minus logit of another token: + speaks for the answer, - against. "
        "All rows and a bias sum to the model's own difference; the gap says how exactly.\n"
    )


def demo_example(
    task: str,
    prompt: str,
    whole: ResultData,
    *others: ResultData,
) -> RenderableType:
    """One prompt: one unit's rows in the order of the stream, next to the others' strongest."""
    rows = in_order(whole)
    columns = [_lines(rows, half=6, title=whole.words.title.lower())]
    for other in others:
        shown = strongest(other, len(rows.rows) - 2)
        columns.append(_lines(shown, half=6, title=f"strongest {other.words.title.lower()}"))
    # Columns, and no table: where the terminal is narrow they go below each other, uncut.
    side_by_side = Columns(columns, padding=(0, 3))
    return Group(
        Text(_TASKS.get(task, task), "bold"),
        Text(prompt, "italic"),
        Text(question(whole)),
        "",
        Padding(side_by_side, (0, 0, 0, 2)),
        "",
        *[Text(line, _FAINT) for line in closing(whole)],
        "",
    )


def demo_closing(example: Example, unit: str) -> RenderableType:
    """The same from Python."""
    return Group(
        Text("In Python:", "bold"),
        Text(
            f"""
    from dla_hooks import demo, direct_logit_attribution

    model, tokenizer = demo.load()
    result = direct_logit_attribution(
        model,
        {_literal(example.prompt)},
        {_literal(example.answer)},
        {_literal(example.incorrect)},
        unit="{unit}",
        tokenizer=tokenizer,
    )
    result.top(3)
""",
            no_wrap=True,
            overflow="ignore",
        ),
    )


def _lines(shown: Shown, half: int, title: str = "") -> Text:
    """Label, number and bar under each other; a table would cut what does not fit."""
    text = Text(no_wrap=True, overflow="ignore")
    if title:
        text.append(f"{title}\n", "bold")
    for line in lines(shown, half):
        colour = _FAINT if line.value is None else _DOWN if line.value < 0 else _UP
        text.append(line.start).append(line.end.rstrip(), colour).append("\n")
    text.rstrip()
    return text


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
