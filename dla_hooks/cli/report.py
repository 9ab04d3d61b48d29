"""``dla-hooks report``: a prompt as one html file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import dla_hooks
from dla_hooks.cli.options import (
    ChunkSize,
    Device,
    DeviceMapOption,
    Dtype,
    DtypeOption,
    MaxMemory,
    Model,
    TrustRemoteCode,
    Unit,
    parse_pos,
)
from dla_hooks.errors import InputError, TokenizerMissingError
from dla_hooks.units import unit_names


def add_to(
    app: typer.Typer, load: Callable[..., Any], say: Callable[[str], None], wait: Callable[..., Any]
) -> None:
    """Add the command.

    Args:
        app: the command line.
        load: the model and the tokenizer, from the shared options.
        say: prints one line for people.
        wait: a context that shows that something runs.
    """

    @app.command()
    def report(
        model: Model,
        prompts: Annotated[
            list[str],
            typer.Argument(
                metavar="PROMPT…",
                help="One prompt, or several: each is a page of the file.",
                show_default=False,
            ),
        ],
        answer: Annotated[
            list[str] | None,
            typer.Option(
                help="The token whose logit is attributed, with its leading space: ' Paris'. Once, "
                "or once for each prompt; by default the model's own top token.",
                show_default=False,
            ),
        ] = None,
        incorrect: Annotated[
            list[str] | None,
            typer.Option(
                help="Attribute the answer's logit minus this token's.", show_default=False
            ),
        ] = None,
        output: Annotated[
            Path, typer.Option("--output", "-o", metavar="FILE", help="The html file to write.")
        ] = Path("report.html"),
        unit: Annotated[
            list[Unit] | None,
            typer.Option(
                metavar="UNIT",
                help="What to show, by itself or several times; by default all that the model has: "
                f"{', '.join(unit_names())}.",
                show_default=False,
            ),
        ] = None,
        pos: Annotated[
            str, typer.Option(help="Positions that can be chosen: an int, a slice, or 'all'.")
        ] = "all",
        promoted: Annotated[
            int | None,
            typer.Option(
                metavar="K",
                min=0,
                help="How many tokens that heads promote to list; 6, or 0 with --unit.",
                show_default=False,
            ),
        ] = None,
        title: Annotated[
            str | None, typer.Option(help="Of the window.", show_default=False)
        ] = None,
        dtype: DtypeOption = Dtype.float32,
        device: Device = None,
        device_map: DeviceMapOption = None,
        max_memory: MaxMemory = None,
        prepend_bos: Annotated[
            bool | None,
            typer.Option(
                "--prepend-bos/--no-prepend-bos",
                help="Put a BOS token first, or none; by default as the tokenizer does.",
                show_default=False,
            ),
        ] = None,
        chunk_size: ChunkSize = None,
        trust_remote_code: TrustRemoteCode = False,
    ) -> None:
        """Write a page to look at: who wrote a logit, in one html file that needs no network."""
        where = parse_pos(pos)
        if not output.parent.is_dir():
            raise InputError(f"cannot write {output}: there is no folder {output.parent}")
        answers = _of_each(answer, len(prompts), "--answer") if answer else [None]
        wrong = _of_each(incorrect, len(prompts), "--incorrect") if incorrect else None
        loaded, tokenizer = load(
            model, dtype, device, trust_remote_code, device_map=device_map, max_memory=max_memory
        )
        if tokenizer is None:
            raise TokenizerMissingError(
                f"{model} has no tokenizer, which the prompt and the answer are read with; save "
                "one into the folder with tokenizer.save_pretrained(folder)"
            )
        with wait("running the model"):
            made = dla_hooks.report(
                loaded,
                prompts[0] if len(prompts) == 1 else prompts,
                answers[0] if len(answers) == 1 else answers,
                wrong[0] if wrong and len(wrong) == 1 else wrong,
                units=[one.value for one in unit] if unit else None,
                pos=where,
                promoted=promoted,
                title=title,
                tokenizer=tokenizer,
                prepend_bos=prepend_bos,
                chunk_size=chunk_size,
            )
            made.save(output)
        pages = f", {len(made)} pages" if len(made) > 1 else ""
        say(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MB{pages}); open it in a browser")


def _of_each(given: list[str], n: int, option: str) -> list[str]:
    """One for all prompts, or one for each."""
    if len(given) not in (1, n):
        prompts = f"{n} prompt{'s' * (n > 1)}"
        raise InputError(
            f"{option} is given {len(given)} times for {prompts}; give it once, or once for each"
        )
    return given
