"""``dla-hooks generate``."""

from __future__ import annotations

from typing import Annotated, Any

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
    PrependBos,
    PromptArgument,
    UnitOption,
)
from dla_hooks.cli.terminal import show
from dla_hooks.errors import InputError

_SAMPLING = "Sampling"


@examples(
    "dla-hooks generate demo 'The keys near the cabinet' \\",
    "    --max-new-tokens 4",
    "dla-hooks generate demo 'The keys near the cabinet' \\",
    "    --max-new-tokens 4 --against runner-up \\",
    "    --sample --seed 1 --temperature 0.7",
)
def generate(
    model: Model,
    prompt: PromptArgument,
    files: Files,
    loading: Loading,
    unit: UnitOption = UNIT,
    max_new_tokens: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="The most new tokens.", rich_help_panel=QUESTION),
    ] = 20,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Attribute each logit minus this token's, or minus that of the 'runner-up'.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End once the new text holds this; may be given several times.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens.", rich_help_panel=_SAMPLING)
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="Of the draw.", rich_help_panel=_SAMPLING),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help="Draw among the K most likely.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Draw among the likeliest that hold P.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of the random numbers.", rich_help_panel=_SAMPLING),
    ] = None,
    prepend_bos: PrependBos = None,
) -> None:
    """Let a model write, and attribute the logit of each token as it comes."""
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = {name: value for name, value in options.items() if value is not None}
    given = [f"--{name.replace('_', '-')}" for name in options]
    given += ["--seed"] if seed is not None else []
    if given and not sample:
        raise InputError(f"{given[0]} goes with --sample: without it the likeliest token is taken")
    files.check()
    asked = None if against == "runner-up" else against
    loaded, tokenizer = load(model, loading, check=readable(prompt, (asked,), -1, prepend_bos))
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    result = dla_hooks.attribute_generation(
        loaded,
        prompt,
        max_new_tokens=max_new_tokens,
        unit=unit.value,
        against=against,
        stop=stop or None,
        do_sample=sample,
        tokenizer=tokenizer,
        prepend_bos=prepend_bos,
        **options,
    )
    if not files.quiet:
        show(f"{prompt}{''.join(result.generated[0])}\n")
        show(repr(result))
    files.write(result)
