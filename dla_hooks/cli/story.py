"""A prompt of the demonstration: the heads that carry its answer, what they read, who is missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

import dla_hooks
from dla_hooks.results.text import bar
from dla_hooks.results.wording import closing, question

if TYPE_CHECKING:
    from dla_hooks.demo.stories import Story
    from dla_hooks.results.effects import Effects
    from dla_hooks.results.result import DirectLogitAttribution

_SHOWN = 4
_UP, _DOWN, _FAINT = "blue", "red", "bright_black"


@dataclass(frozen=True)
class Carrier:
    """A head, and what there is to say of it, in logits.

    Attributes:
        label: its name.
        wrote: its row.
        token: the token that it took most from.
        position: where that token stands.
        took: how much.
        lost: the logit of the run less the logit of a run without it.
    """

    label: str
    wrote: float
    token: str
    position: int
    took: float
    lost: float


@dataclass(frozen=True)
class Measured:
    """The numbers of a story.

    Attributes:
        heads: the attribution to heads.
        effects: what taking the strongest heads out does.
        carriers: the strongest heads, the largest row first.
        written: what all heads wrote.
    """

    heads: DirectLogitAttribution
    effects: Effects
    carriers: list[Carrier]
    written: float


def measure(model: Any, tokenizer: Any, story: Story) -> Measured:
    """One run for what heads wrote and read, and one without each of the strongest."""
    example = story.example
    asked = (model, example.prompt, example.answer, example.incorrect)
    found = dla_hooks.direct_logit_attribution(
        *asked, unit=("head", dla_hooks.SourceTokens(top=None)), tokenizer=tokenizer
    )
    heads, sources = found["head"], found["source"]
    rows = {row.label: (row, float(value)) for row, value in heads if row.kind == "head"}
    strongest = sorted(rows, key=lambda label: -abs(rows[label][1]))[:_SHOWN]
    effects = dla_hooks.effects(*asked, parts=strongest, tokenizer=tokenizer)
    took = [(row, float(value)) for row, value in sources if row.source is not None]
    carriers = []
    for label in strongest:
        head, wrote = rows[label]
        place = (head.layer, head.sub, head.index)
        own = [(row, value) for row, value in took if (row.layer, row.sub, row.index) == place]
        most, part = max(own, key=lambda pair: abs(pair[1]))
        assert most.source is not None
        token = heads.tokens[0][most.source]
        lost = float(effects[label].total)
        carriers.append(Carrier(label, wrote, token, most.source, part, lost))
    return Measured(heads, effects, carriers, sum(value for _, value in rows.values()))


def opening(model: Any) -> RenderableType:
    """What is going to be shown."""
    config = model.config
    return Text(
        f"A small GPT-2 ({config.n_layer} layers of {config.n_head} heads) is asked for the next "
        "word. Every row is what one part of it wrote, read as logit of the answer minus logit of "
        "another token: + speaks for the answer, - against. Beside a head stand the token from "
        "which it took most, and what the difference loses when the head is taken out.\n"
    )


def as_text(story: Story, found: Measured) -> RenderableType:
    """One prompt: who wrote its answer, from which token, and whether they would be missed."""
    first, logit = found.carriers[0], float(found.heads.logit)
    more = len(found.heads) - 1 - len(found.carriers)
    others = found.written - sum(one.wrote for one in found.carriers)
    rest = float(found.heads["remainder"])
    largest = max(abs(value) for value in (first.wrote, others, rest))
    text = Text(no_wrap=True, overflow="ignore")
    text.append(f"  {'head':<14}{'wrote':>7}{'':21}{'took most from':<22}{'lost without':>13}\n")
    for one in found.carriers:
        _row(text, one.label, one.wrote, largest)
        token = f"{one.token!r} ({one.position})"
        source = f"{token:<15} {one.took:+.2f}"
        text.append(f"  {source:<22}{one.lost:>+13.2f}\n")
    for name, value in ((f"{more} more heads", others), ("no head", rest)):
        _row(text, name, value, largest)
        text.append("\n")
    return Group(
        Text(story.title, "bold"),
        Text(story.example.prompt, "italic"),
        Text(question(found.heads)),
        "",
        text,
        Text(
            f"{first.label} reads {first.token!r}, {story.role}. All heads wrote "
            f"{found.written:+.1f} and all else {logit - found.written:+.1f}, together "
            f"{logit:+.1f}; without {first.label} {logit - first.lost:+.1f} is left."
        ),
        "",
        *[Text(line, _FAINT) for line in closing(found.heads)],
        "",
    )


def ending(story: Story) -> RenderableType:
    """The same from Python."""
    example = story.example
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
        unit="head",
        tokenizer=tokenizer,
    )
    result.top(3)
""",
            no_wrap=True,
            overflow="ignore",
        ),
    )


def _row(text: Text, name: str, value: float, largest: float) -> None:
    text.append(f"  {name:<14}{value:>+7.2f}  ")
    text.append(f"{bar(value, largest, 8)}", _DOWN if value < 0 else _UP)


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
