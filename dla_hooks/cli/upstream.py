"""``dla-hooks upstream``."""

from __future__ import annotations

import re
from typing import Annotated

import typer

import dla_hooks
from dla_hooks.cli.files import Files
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load, readable
from dla_hooks.cli.options import (
    QUESTION,
    UNIT,
    Loading,
    Model,
    PromptArgument,
    Question,
    Run,
    Top,
    UnitOption,
)
from dla_hooks.cli.running import running
from dla_hooks.cli.terminal import out

_ROW = re.compile(r"L[0-9]+(\.[0-9]+)?H[0-9]+<[0-9]+")


@examples(
    "dla-hooks upstream demo 'The keys near the cabinet' \\",
    "    --part 'L3H3<1' --answer ' are' --incorrect ' is'",
)
def upstream(
    model: Model,
    prompt: PromptArgument,
    question: Question,
    run: Run,
    files: Files,
    loading: Loading,
    part: Annotated[
        list[str],
        typer.Option(
            metavar="ROW",
            help="A head and the token that it takes from: 'L9H6<5'. Given several times, each is "
            "read by the head of the one before.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ],
    unit: UnitOption = UNIT,
    top: Top = 10,
) -> None:
    """Split what a head took from one token by who wrote what the head read there."""
    where = question.where()
    for label in part:
        if not _ROW.fullmatch(label):
            raise typer.BadParameter(
                f"{label!r} names no head with the position that it reads, as 'L9H6<5' does",
                param_hint="'--part'",
            )
    files.check()
    check = readable(prompt, question.said, where, run.prepend_bos)
    loaded, tokenizer = load(model, loading, check=check)
    with running():
        result = dla_hooks.upstream(
            loaded,
            prompt,
            **question.tokens(),
            part=part,
            unit=unit.value,
            pos=where,
            tokenizer=tokenizer,
            prepend_bos=run.prepend_bos,
            chunk_size=run.chunk_size,
        )

    from dla_hooks.cli import views

    if not files.quiet:
        out().print(views.attribution(result, top, views.asked(question)), crop=False)
    files.write(result)
