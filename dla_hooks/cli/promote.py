"""``dla-hooks promote``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import dla_hooks
from dla_hooks.cli.files import Files
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load, readable
from dla_hooks.cli.options import QUESTION, Loading, Model, Pos, PrependBos, PromptArgument
from dla_hooks.cli.terminal import progress, show
from dla_hooks.cli.words import as_pos


class PromoteUnit(StrEnum):
    """The units whose rows are vectors."""

    component = "component"
    layer = "layer"
    head = "head"
    neuron = "neuron"
    expert = "expert"


@examples(
    "dla-hooks promote demo 'The keys near the cabinet' \\",
    "    --unit head",
    "dla-hooks promote demo 'The keys near the cabinet' \\",
    "    --unit neuron -k 3 --csv -",
)
def promote(
    model: Model,
    prompt: PromptArgument,
    files: Files,
    loading: Loading,
    unit: Annotated[
        PromoteUnit,
        typer.Option(
            metavar="UNIT",
            help=f"Whose tokens: {', '.join(PromoteUnit)}.",
            rich_help_panel=QUESTION,
        ),
    ] = PromoteUnit.component,
    pos: Pos = None,
    k: Annotated[
        int,
        typer.Option(
            "--tokens",
            "-k",
            min=1,
            metavar="K",
            help="How many tokens each way.",
            rich_help_panel=QUESTION,
        ),
    ] = 10,
    prepend_bos: PrependBos = None,
) -> None:
    """Show the tokens that each part of a model pushes up and down, without any answer."""
    where = as_pos(pos)
    files.check()
    loaded, tokenizer = load(model, loading, check=readable(prompt, (), where, prepend_bos))
    with progress("running the model"):
        result = dla_hooks.promoted_tokens(
            loaded,
            prompt,
            unit=unit.value,
            pos=where,
            k=k,
            tokenizer=tokenizer,
            prepend_bos=prepend_bos,
        )
    if not files.quiet:
        show(repr(result))
    files.write(result)
