"""``dla-hooks list``. Without ``--door`` it needs no torch, so that the list comes at once."""

from __future__ import annotations

import json as json_text
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import dla_hooks
from dla_hooks.cli.files import STDOUT, Json, as_file, check_folder, said
from dla_hooks.cli.help import examples
from dla_hooks.cli.terminal import out
from dla_hooks.doors import DOORS
from dla_hooks.errors import InputError
from dla_hooks.residual.architecture import Architecture
from dla_hooks.residual.registry import refusal_for
from dla_hooks.units import units_of

_DOORS = {door.name: door for door in DOORS}


@examples(
    "dla-hooks list llama",
    "dla-hooks list --door classification qwen",
    "dla-hooks list --json - gemma",
)
def list_architectures(
    part: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="Only the types whose name holds this, in capitals or not.",
            show_default=False,
        ),
    ] = "",
    door: Annotated[
        str | None,
        typer.Option(
            metavar="DOOR",
            help=f"Only the types with this kind of model: {', '.join(_DOORS)}.",
            show_default=False,
        ),
    ] = None,
    json: Json = None,
) -> None:
    """List the model types that are known, and what is special about each."""
    if json is not None:
        check_folder(json)
    lines = _lines() if door is None else _behind(door, _lines())
    found = [line for line in lines if part.lower() in line["model_type"].lower()]
    if not found:
        behind = "" if door is None else f" behind {door}"
        raise InputError(
            f"no declared model type{behind} holds {part!r}; another is recognised where it has a "
            "known shape: dla-hooks verify MODEL says so"
        )
    if json != STDOUT:
        out().print(_table(found, whole=not part, door=door))
    if json is not None:
        text = json_text.dumps(found, ensure_ascii=False, indent=1) + "\n"
        if json == STDOUT:
            as_file().write(text)
        else:
            json.write_text(text, encoding="utf-8")
            said(json)


def _behind(name: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of types that have a class behind a door which is not refused; with its name.

    transformers' own tables are asked, so that this takes as long as importing it.
    """
    door = _DOORS.get(name)
    if door is None:
        raise InputError(f"--door must be one of {', '.join(_DOORS)}, got {name!r}")
    classes = door.classes()
    return [
        {**line, "class": classes[line["model_type"]][0]}
        for line in lines
        if line["model_type"] in classes and refusal_for(line["model_type"], name) is None
    ]


def _lines() -> list[dict[str, Any]]:
    """One record per model type, in alphabetical order."""
    known = dla_hooks.architectures()
    by_type = {name: architecture for architecture in known for name in architecture.model_types}
    return [
        {
            "model_type": name,
            "units": [*units_of(by_type[name])],
            "special": _special(by_type[name]),
        }
        for name in sorted(by_type)
    ]


def _table(found: list[dict[str, Any]], whole: bool, door: str | None) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model type", no_wrap=True)
    table.add_column("units", no_wrap=True)
    table.add_column("besides blocks, norm and unembedding", overflow="fold")
    for line in found:
        table.add_row(line["model_type"], " ".join(line["units"]), "; ".join(line["special"]))
    if not whole:
        return table
    end = "Other types are recognised where they have one of these shapes and verify."
    if door is not None:
        end += " What became of each type of transformers: docs/architectures.md."
    return Group(table, "", Text(end))


def _special(architecture: Architecture) -> list[str]:
    """What a declaration says beyond the places that every one names."""
    writes = architecture.writes
    found = []
    if any(write.post_norm for write in writes):
        found.append("a norm after each sublayer")
    if architecture.positions:
        found.append("learned positions")
    if architecture.position_limit:
        found.append(f"prompts up to {architecture.position_limit}")
    if architecture.after_norm:
        found.append("a projection after the final norm")
    return found
