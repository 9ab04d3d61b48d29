"""The command line. It parses, calls the library, and prints.

Results go to stdout, everything else to stderr. torch and transformers are imported once a
command needs them, so that ``--help`` and mistyped options answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

import dla_hooks
from dla_hooks.cli import report as cli_report
from dla_hooks.cli.options import (
    UNIT,
    ChunkSize,
    Device,
    DeviceMap,
    DeviceMapOption,
    Dtype,
    DtypeOption,
    MaxMemory,
    Model,
    TrustRemoteCode,
    UnitOption,
    check_outputs,
    parse_pos,
)
from dla_hooks.errors import DLAError, TokenizerMissingError
from dla_hooks.units import unit_names


class _Commands(TyperGroup):
    """Commands whose expected failures are one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DLAError as error:
            line = " ".join(str(error).splitlines())
            message = Text.assemble(("error:", "bold red"), f" {line}")
            Console(stderr=True, highlight=False).print(message, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    name="dla-hooks",
    cls=_Commands,
    help="Direct Logit Attribution on Hugging Face causal language models: who wrote this logit?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        _out().print(f"dla-hooks {dla_hooks.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo() -> None:
    """Attribute a few prompts of the small model that is included. Needs no network."""
    from dla_hooks.cli import views as cli_views
    from dla_hooks.demo import examples

    units = [name for name in ("component", "head") if name in unit_names()]
    model, tokenizer = _load("demo")
    out = _out()
    out.print(cli_views.demo_opening(model))
    shown: set[str] = set()
    for example in examples():
        if example.task in shown:
            continue
        shown.add(example.task)
        results = [
            dla_hooks.direct_logit_attribution(
                model,
                example.prompt,
                example.answer,
                example.incorrect,
                unit=unit,
                tokenizer=tokenizer,
            )
            for unit in units
        ]
        out.print(cli_views.demo_example(example.task, example.prompt, *results), crop=False)
    out.print(cli_views.demo_closing(examples()[0], units[-1]), crop=False)


@app.command()
def attribute(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    answer: Annotated[
        str,
        typer.Option(
            help="The token whose logit is attributed, with its leading space: ' Paris'.",
            show_default=False,
        ),
    ],
    incorrect: Annotated[
        str | None,
        typer.Option(help="Attribute the answer's logit minus this token's.", show_default=False),
    ] = None,
    unit: UnitOption = UNIT,
    pos: Annotated[
        str, typer.Option(help="Position: an int, a slice like 2:5, or 'all' (shown as means).")
    ] = "-1",
    top: Annotated[
        int, typer.Option(min=1, metavar="K", help="How many rows to show at either end.")
    ] = 10,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write everything as JSON.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write one line per number.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw it: .html, .svg, .png or .pdf.")
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
    """Split a logit, or the difference of two, into what each part of a model wrote."""
    where = parse_pos(pos)
    check_outputs(json, csv, plot)
    loaded, tokenizer = _load(
        model, dtype, device, trust_remote_code, device_map=device_map, max_memory=max_memory
    )
    if tokenizer is None:
        raise TokenizerMissingError(
            f"{model} has no tokenizer, which the prompt and the answer are read with; save one "
            "into the folder with tokenizer.save_pretrained(folder)"
        )
    with _progress("running the model"):
        result = dla_hooks.direct_logit_attribution(
            loaded,
            prompt,
            answer,
            incorrect,
            unit=unit.value,
            pos=where,
            tokenizer=tokenizer,
            prepend_bos=prepend_bos,
            chunk_size=chunk_size,
        )
        if not result.attribution.numel():
            raise dla_hooks.InputError(f"--pos {pos} selects no position of this prompt")

    from dla_hooks.cli import views as cli_views

    _out().print(cli_views.attribution(result, top), crop=False)
    if json is not None:
        result.to_json(json)
    if csv is not None:
        result.to_csv(csv)
    if plot is not None:
        result.plot().save(plot)
    for path in (json, csv, plot):
        if path is not None:
            _err().print(f"wrote {path}", markup=False, soft_wrap=True)


@app.command()
def verify(
    model: Model,
    dtype: DtypeOption = Dtype.float32,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Verify, block by block, that a model is a sum of writes. Exits with 1 if it is not."""
    loaded, _ = _load(
        model,
        dtype,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        max_memory=max_memory,
        with_tokenizer=False,
    )
    with _progress("verifying"):
        report = dla_hooks.verify(loaded, show=False)

    _out().print(str(report), markup=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


@app.command("list")
def list_architectures() -> None:
    """List the model types that are known, and what is special about each."""
    from dla_hooks.cli import listing

    _out().print(listing.architectures(dla_hooks.architectures()))


cli_report.add_to(
    app,
    lambda *arguments, **options: _load(*arguments, **options),
    lambda line: _err().print(line, markup=False, soft_wrap=True),
    lambda what: _progress(what),
)


def main() -> None:
    """The console script ``dla-hooks``."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without block characters shows question marks instead of a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


def _out() -> Console:
    return Console(highlight=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)


def _progress(what: str) -> Any:
    """A spinner on stderr, where that is a terminal."""
    return _err().status(Text(f"{what} …"))


def _load(
    model: str,
    dtype: Dtype = Dtype.float32,
    device: str | None = None,
    trust_remote_code: bool = False,
    *,
    device_map: DeviceMap | None = None,
    max_memory: str | None = None,
    with_tokenizer: bool = True,
) -> tuple[Any, Any]:
    with _progress(f"loading {model}"):
        from dla_hooks import checkpoint, placement

        if device_map is not None:
            placement.hand_back_freed_memory()  # the process is ours
        source: str | Path = model
        if model == "demo":
            from dla_hooks.demo import path

            source = path()
        loaded = checkpoint.load_model(
            source,
            dtype.value,
            device,
            trust_remote_code,
            device_map=None if device_map is None else device_map.value,
            max_memory=max_memory,
        )
        if not with_tokenizer:
            return loaded, None
        return loaded, checkpoint.load_tokenizer(source, trust_remote_code)
