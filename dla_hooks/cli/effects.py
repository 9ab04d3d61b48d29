"""``dla-hooks effects``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import dla_hooks
from dla_hooks.cli.files import Files
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load, readable
from dla_hooks.cli.options import QUESTION, Loading, Model, PromptArgument, Question, Run
from dla_hooks.cli.running import running
from dla_hooks.cli.terminal import show


class EffectsUnit(StrEnum):
    """The units whose rows can be taken out by name alone."""

    component = "component"
    head = "head"
    neuron = "neuron"
    expert = "expert"


@examples(
    "dla-hooks effects demo 'The keys near the cabinet' \\",
    "    --answer ' are' --incorrect ' is' --parts 5",
    "dla-hooks effects demo 'The keys near the cabinet' \\",
    "    --answer ' are' --part L1H4 --part 2_mlp_out \\",
    "    --ablation mean",
)
def effects(
    model: Model,
    prompt: PromptArgument,
    question: Question,
    run: Run,
    files: Files,
    loading: Loading,
    unit: Annotated[
        EffectsUnit,
        typer.Option(
            metavar="UNIT",
            help=f"Whose rows are taken out: {', '.join(EffectsUnit)}.",
            rich_help_panel=QUESTION,
        ),
    ] = EffectsUnit.head,
    parts: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many, those with the largest direct effects.",
            show_default="10",
            rich_help_panel=QUESTION,
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="One part by its label, such as L1H4; may be given several times.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    ablation: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="What takes its place: zero, mean, or a number.",
            rich_help_panel=QUESTION,
        ),
    ] = "zero",
) -> None:
    """Take parts out one by one: what the logit really loses, beside their direct effects."""
    where = question.where()
    how = _as_ablation(ablation)
    if part and parts is not None:
        raise typer.BadParameter("parts are named, and so is --part", param_hint="'--parts'")
    files.check()
    check = readable(prompt, question.said, where, run.prepend_bos)
    loaded, tokenizer = load(model, loading, check=check)
    with running("taking parts out"):
        result = dla_hooks.effects(
            loaded,
            prompt,
            **question.tokens(),
            unit=unit.value,
            parts=part or parts or 10,
            ablation=how,
            pos=where,
            tokenizer=tokenizer,
            prepend_bos=run.prepend_bos,
            chunk_size=run.chunk_size,
        )
    if not files.quiet:
        show(repr(result))
    files.write(result)


def _as_ablation(text: str) -> str | float:
    if text in ("zero", "mean"):
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is none of: zero, mean, a number", param_hint="'--ablation'"
        ) from None
