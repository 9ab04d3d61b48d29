"""``dla-hooks compare``."""

from __future__ import annotations

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
    UnitOption,
)
from dla_hooks.cli.running import running
from dla_hooks.cli.terminal import show
from dla_hooks.cli.words import as_pos


@examples(
    "dla-hooks compare demo 'The keys near the cabinet' \\",
    "    --other-prompt 'The key near the cabinet' \\",
    "    --answer ' are' --incorrect ' is'",
    "dla-hooks compare demo 'The dogs' --other demo \\",
    "    --answer ' are' --unit head",
)
def compare(
    model: Model,
    prompt: PromptArgument,
    question: Question,
    run: Run,
    files: Files,
    loading: Loading,
    other: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The second run's model; by default the same.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    other_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT",
            help="The second run's prompt; by default the same.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    other_pos: Annotated[
        str | None,
        typer.Option(
            metavar="POS",
            help="The second run's positions, where its tokens stand elsewhere.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    unit: UnitOption = UNIT,
) -> None:
    """Split the difference of two runs' logits: by what was written, and how it is read."""
    where = question.where()
    elsewhere = None if other_pos is None else as_pos(other_pos, name="--other-pos")
    if other is None and other_prompt is None and other_pos is None:
        raise typer.BadParameter(
            "the second run is not said: give another model, or --other-prompt",
            param_hint="'--other'",
        )
    files.check()
    check = readable(prompt, question.said, where, run.prepend_bos)
    loaded, tokenizer = load(model, loading, check=check, also=() if other is None else (other,))
    second = None if other is None else load(other, loading, needs_tokenizer=False)[0]
    with running():
        result = dla_hooks.compare(
            loaded,
            second,
            prompt,
            **question.tokens(),
            other_input=other_prompt,
            other_pos=elsewhere,
            unit=unit.value,
            pos=where,
            tokenizer=tokenizer,
            prepend_bos=run.prepend_bos,
            chunk_size=run.chunk_size,
        )
    if not files.quiet:
        show(repr(result))
    files.write(result)
