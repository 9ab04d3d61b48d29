"""The command's options, read and checked before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks.models import longest_prompt


def axis(values: list[str], allowed: Any, name: str) -> list[str]:
    """Read values given one by one or separated by commas."""
    found = [piece.strip() for value in values for piece in value.split(",") if piece.strip()]
    for value in found:
        if allowed is not None and value not in allowed:
            raise typer.BadParameter(
                f"{value!r} is none of {', '.join(allowed)}", param_hint=f"--{name}"
            )
    return list(dict.fromkeys(found))


def numbers(values: list[str], name: str) -> list[int]:
    """Read numbers above 0, in the same way."""
    found = axis(values, None, name)
    for value in found:
        if not value.isdecimal() or int(value) < 1:
            raise typer.BadParameter(f"{value!r} is no number above 0", param_hint=f"--{name}")
    return [int(value) for value in found]


def check_lengths(models: Sequence[str], tokens: Sequence[int]) -> None:
    """Refuse prompts that a model has no positions for."""
    for model in models:
        if max(tokens) > longest_prompt(model):
            raise typer.BadParameter(
                f"{model} takes at most {longest_prompt(model):,} tokens; for longer prompts take "
                "a llama",
                param_hint="--tokens",
            )


def check_case(name: str, model: str, tokens: Sequence[int], shortest: int) -> None:
    """Refuse prompts of a bar, its own or the user's, that it cannot be measured on."""
    lengths = ", ".join(f"{n:,}" for n in tokens)
    if max(tokens) > longest_prompt(model):
        raise typer.BadParameter(
            f"{name} measures prompts of {lengths} tokens and {model} takes at most "
            f"{longest_prompt(model):,}; give other lengths, or take a llama",
            param_hint="--tokens",
        )
    if min(tokens) < shortest:
        raise typer.BadParameter(
            f"{name} needs {shortest} tokens at least; got {lengths}", param_hint="--tokens"
        )


def check_devices(devices: list[str]) -> None:
    """Refuse devices that this torch does not reach."""
    import torch

    for device in devices:
        try:
            torch.zeros((), device=device)
        except (RuntimeError, AssertionError) as error:
            line = str(error).partition("\n")[0]
            raise typer.BadParameter(f"{device}: {line}", param_hint="--device") from None


def check_outputs(json_file: Path | None, png: Path | None = None) -> None:
    """Refuse files that cannot be written, before the measurement starts."""
    for option, path in (("--json", json_file), ("--png", png)):
        if path is None:
            continue
        if not path.parent.is_dir():
            raise typer.BadParameter(
                f"cannot write {path}: there is no folder {path.parent}", param_hint=option
            )
        if path.is_dir():
            raise typer.BadParameter(f"cannot write {path}: it is a folder", param_hint=option)
    if png is not None and png.suffix.lower() != ".png":
        raise typer.BadParameter(f"curves are drawn as .png; got {png}", param_hint="--png")


def check_drawing(png: Path) -> None:
    """Name the packages that a picture lacks, after all other checks have passed."""
    from benchmarks import report
    from dla_hooks import MissingExtraError
    from dla_hooks.results.chart import check_plot_path

    try:
        check_plot_path(png)
    except MissingExtraError as error:
        report.say(f"error: {error}")
        raise typer.Exit(1) from None
