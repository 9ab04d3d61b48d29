"""What commands take: values that are one of a few, shared options, and what is checked first."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dla_hooks.errors import InputError
from dla_hooks.units import DEFAULT_UNIT, unit_names

Unit = StrEnum("Unit", [(name, name) for name in unit_names()])  # type: ignore[misc]
"""What ``--unit`` takes: the names of the units."""
UNIT = Unit(DEFAULT_UNIT if DEFAULT_UNIT in unit_names() else unit_names()[0])
"""What ``--unit`` is by default."""


_INT = re.compile(r"\s*[-+]?[0-9]+\s*")
_SLICE = re.compile(r"\s*([-+]?[0-9]+)?\s*(:\s*([-+]?[0-9]+)?\s*){1,2}")


class Dtype(StrEnum):
    """What ``--dtype`` takes: :data:`dla_hooks.checkpoint.DTYPES`."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


class DeviceMap(StrEnum):
    """What ``--device-map`` takes: :data:`dla_hooks.placement.DEVICE_MAPS`."""

    auto = "auto"
    disk = "disk"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a Hugging Face hub id, or 'demo' for the small model that is included.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        metavar="DTYPE",
        help="Precision to load the weights in: float32, float64, bfloat16, float16, or auto, "
        "the checkpoint's own.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.", show_default="cpu")
]
DeviceMapOption = Annotated[
    DeviceMap | None,
    typer.Option(
        metavar="MAP",
        help="For models that do not fit: auto spreads the weights over GPUs, memory and disk; "
        "disk leaves them on disk and reads them as they are needed. Instead of a device.",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="With --device-map: the most that the weights may take of memory and of each GPU, "
        "as in 4GiB or 500MB. With disk: of memory, nothing by default.",
        show_default=False,
    ),
]
UnitOption = Annotated[
    Unit,
    typer.Option(metavar="UNIT", help=f"What to split it into: {', '.join(unit_names())}."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", metavar="", help="Run Python code that comes with the model."
    ),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Run the prompt so many tokens at a time, which needs less memory; by itself it is "
        "done for very long prompts.",
        show_default=False,
    ),
]


def parse_pos(text: str) -> int | slice | None:
    """What ``--pos`` says, as ``pos=`` takes it."""
    if text == "all":
        return None
    if _INT.fullmatch(text):
        return int(text)
    if _SLICE.fullmatch(text):
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    raise typer.BadParameter(
        f"{text!r} is none of: an int, 'all', a slice like 2:5", param_hint="'--pos'"
    )


def check_outputs(json: Path | None, csv: Path | None, plot: Path | None) -> None:
    """Refuse what cannot be written before a model is loaded for it."""
    for path in (json, csv, plot):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if plot is not None:
        from dla_hooks.results.picture import check_path

        check_path(plot)
