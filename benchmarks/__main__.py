"""``python -m benchmarks``: the cost of attribution on your machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.bar import Options, Skipped
from benchmarks.bars import BARS
from benchmarks.contenders import COMPARED, OURS, PLAIN, split_missing
from benchmarks.models import DTYPES, MODELS, POSITIONS, UNITS, Setting
from benchmarks.options import (
    axis,
    check_case,
    check_devices,
    check_drawing,
    check_lengths,
    check_outputs,
    numbers,
)

app = typer.Typer(
    help="What attribution costs beside the forward pass that it needs, measured on your machine. "
    "Run 'table' first: three minutes, and the table that the README shows. 'compare' holds it "
    "against other ways to the same numbers, 'bars' against what the library wants to reach. "
    "Models have random weights and are made on the spot; nothing is downloaded.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# The README's cases, in its order.
_CASES = (
    ("component", "last"),
    ("layer", "last"),
    ("head", "last"),
    ("head", "all"),
    ("head", "next"),
)


def _listed(lines: Iterable[str]) -> str:
    """Lines of a help text that are shown as they stand."""
    return "\n".join(["\b", *(f"  {line}" for line in lines)])


_COMPARE = f"""Hold this library against other ways to the same numbers: proven equal, then timed.

Every axis takes several values, with commas between them. Peers that are not installed are left
out, by name. The contenders, each of which --contender takes by name:

{_listed(COMPARED)}

What --pos means:

{_listed(f"{name:<6}{says}" for name, says in POSITIONS.items())}
"""
_BARS = f"""Hold the library against what it wants to reach, case by case.

A full run takes an hour or more. The bars of 'chunks' and 'offload' mean the real sizes only: on
small models other things weigh more than what is held against the bar. The cases, each of which
--only takes by name:

{_listed(f"{name:<18}{case.says}" for name, case in BARS.items())}
"""


def _threads(wanted: int | None) -> int:
    import torch

    if wanted is not None:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


Model = Annotated[list[str], typer.Option("--model", help=f"Of {', '.join(MODELS)}.")]
Tokens = Annotated[list[str], typer.Option("--tokens", help="Length of the prompt.")]
Repeats = Annotated[int, typer.Option(min=1, help="Interleaved rounds of timing.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own choice else.")]
Json = Annotated[Path | None, typer.Option("--json", help="File all figures here.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown.")]


@app.command()
def table(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "gpt2-small",
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt.")] = 512,
    repeats: Repeats = 9,
    threads: Threads = None,
    markdown: Markdown = False,
    json_file: Json = None,
) -> None:
    """The README's table: this library over the plain forward pass, case by case."""
    from benchmarks import report
    from benchmarks.compare import measure

    (model,) = axis([model], MODELS, "model")
    check_lengths([model], [tokens])
    check_outputs(json_file)
    count = _threads(threads)
    settings = [Setting(model, tokens, unit=unit, pos=pos) for unit, pos in _CASES]
    lines = _or_exit(measure, settings, [OURS], repeats, report.say)
    head, rows = report.cost_rows(lines)
    title = f"{model}, {tokens:,} tokens, over model(ids, use_cache=False, logits_to_keep=1)"
    columns = ("case", "time ratio", "memory ratio") if markdown else ()
    report.show(title, head, rows, report.caption(count, repeats), columns)
    if json_file is not None:
        report.write_json(json_file, count, {"lines": [line.as_dict() for line in lines]})


@app.command(help=_COMPARE)
def compare(
    model: Model = ["gpt2-small"],  # noqa: B006
    tokens: Tokens = ["512"],  # noqa: B006
    batch: Annotated[list[str], typer.Option(help="Number of prompts.")] = ["1"],  # noqa: B006
    unit: Annotated[list[str], typer.Option(help=f"Of {', '.join(UNITS)}.")] = ["head"],  # noqa: B006
    pos: Annotated[list[str], typer.Option(help=f"Of {', '.join(POSITIONS)}.")] = ["all"],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help=f"Of {', '.join(DTYPES)}.")] = ["float32"],  # noqa: B006
    device: Annotated[list[str], typer.Option(help="As torch names it.")] = ["cpu"],  # noqa: B006
    contender: Annotated[
        list[str] | None, typer.Option(help="Only these, by name; the plain pass is always there.")
    ] = None,
    repeats: Repeats = 7,
    threads: Threads = None,
    memory: Annotated[bool, typer.Option(help="Measure peaks too.")] = True,
    markdown: Markdown = False,
    json_file: Json = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Draw curves over prompt length here.")
    ] = None,
) -> None:
    from benchmarks import report
    from benchmarks.compare import grid, measure

    axes: dict[str, list[Any]] = {
        "model": axis(model, MODELS, "model"),
        "dtype": axis(dtype, DTYPES, "dtype"),
        "device": axis(device, None, "device"),
        "batch": numbers(batch, "batch"),
        "unit": axis(unit, UNITS, "unit"),
        "pos": axis(pos, POSITIONS, "pos"),
        "tokens": numbers(tokens, "tokens"),
    }
    check_lengths(axes["model"], axes["tokens"])
    check_devices(axes["device"])
    check_outputs(json_file, png)
    if png is not None and len(axes["tokens"]) < 2:
        raise typer.BadParameter(
            "curves need two prompt lengths or more: --tokens 128,512", param_hint="--png"
        )
    for name in contender or []:
        if name not in COMPARED:
            raise typer.BadParameter(
                f"{name!r} is none of: {'; '.join(COMPARED)}", param_hint="--contender"
            )
    if png is not None:
        check_drawing(png)
    count = _threads(threads)
    names, skipped = split_missing([PLAIN, *(contender or COMPARED)])
    for name, reason in skipped.items():
        report.say(f"left out: {name}. {reason}")
    lines = _or_exit(measure, grid(**axes), names, repeats, report.say, memory)
    under = report.caption(count, repeats)
    brief = ("contender", "time ratio", "peak over weights, MB", "memory ratio")
    for setting in dict.fromkeys(line.setting for line in lines):
        head, rows = report.compared_rows([line for line in lines if line.setting == setting])
        report.show(setting.named(), head, rows, under, brief if markdown else ())
    if json_file is not None:
        body = {"skipped": skipped, "lines": [line.as_dict() for line in lines]}
        report.write_json(json_file, count, body)
    if png is not None:
        from benchmarks import curves

        curves.draw(lines, under, png)


@app.command(help=_BARS)
def bars(
    only: Annotated[list[str] | None, typer.Option(help="Only these cases, by name.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hold the bars on another model than theirs.")
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="At other prompt lengths than theirs; cases of one length take the first."
        ),
    ] = None,
    repeats: Repeats = 9,
    threads: Threads = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a bar is missed.")] = False,
    json_file: Json = None,
) -> None:
    from benchmarks import report

    cases = axis(only or list(BARS), BARS, "only")
    lengths = numbers(tokens or [], "tokens")
    if model is not None:
        axis([model], MODELS, "model")
    options: dict[str, Options] = {}
    for name in cases:
        case = BARS[name]
        also = () if model or lengths else case.also
        size = model or case.model, lengths or case.tokens
        options[name] = Options(report.say, repeats, *size, also)
        check_case(name, options[name].model, options[name].tokens, case.shortest)
    check_outputs(json_file)
    count = _threads(threads)
    filed: list[dict[str, Any]] = []
    missed = False
    for name in cases:
        try:
            found = _or_exit(BARS[name].measure, options[name])
        except Skipped as reason:
            report.out().print(f"{name}: skipped, {reason}", markup=False, soft_wrap=True)
            filed.append({"bar": name, "skipped": str(reason)})
            continue
        report.show_bars(name, found, report.caption(count, repeats))
        for one in found:
            missed = missed or one.met is False
            filed.append({"bar": name, **one.as_dict()})
        if json_file is not None:  # after each, since the next may take long
            report.write_json(json_file, count, {"bars": filed})
    if json_file is not None:
        report.write_json(json_file, count, {"bars": filed})
    if strict and missed:
        raise typer.Exit(1)


def _or_exit(work: Any, *arguments: Any) -> Any:
    """Turn a disagreement into one line and an exit code. Wrong numbers are never timed."""
    from benchmarks import report
    from benchmarks.agree import Disagreement

    try:
        return work(*arguments)
    except Disagreement as error:
        report.say(f"error: {error}")
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
