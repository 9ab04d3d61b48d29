"""The files that a command writes, beside what it prints."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from dla_hooks.cli.options import OUTPUT
from dla_hooks.cli.terminal import err
from dla_hooks.errors import InputError

STDOUT = Path("-")
"""The standard output, where a file is asked for."""

Json = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write everything as JSON; '-' is stdout, and nothing else is printed there.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True)
class Files:
    """What is written of a result."""

    json: Json = None
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write one line per number; '-' is stdout.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also draw it: .html, .svg, .png or .pdf.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None

    @property
    def quiet(self) -> bool:
        """Whether stdout belongs to a file."""
        return STDOUT in (self.json, self.csv)

    def check(self) -> None:
        """Refuse what cannot be written, before a model is loaded for it.

        Raises:
            InputError: for a folder that is not there, a picture of no known kind, and two files
                that are one.
        """
        given = {"--json": self.json, "--csv": self.csv, "--plot": self.plot}
        paths = [path for path in given.values() if path is not None]
        for name, path in given.items():
            if path is not None:
                check_folder(path)
            if path is not None and paths.count(path) > 1:
                raise InputError(f"{name} {path}: two outputs cannot be one file")
        if self.plot is not None:
            from dla_hooks.results.picture import check_path

            check_path(self.plot)

    def write(self, result: Any) -> None:
        """Write a result; what was written is said on stderr."""
        for path, text in ((self.json, result.to_json), (self.csv, result.to_csv)):
            if path == STDOUT:
                as_file().write(text().rstrip("\n") + "\n")
            elif path is not None:
                said(text(path))
        if self.plot is not None:
            said(result.plot().save(self.plot))


def check_folder(path: Path) -> None:
    """Refuse a file whose folder is not there.

    Raises:
        InputError: it names both.
    """
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")


def as_file() -> TextIO:
    """The standard output as a file for other programs: in UTF-8, whatever a terminal has."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    return sys.stdout


def said(path: Path) -> None:
    """Say that a file was written."""
    err().print(f"wrote {path}", markup=False, soft_wrap=True)
