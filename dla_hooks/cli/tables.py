"""Files of prompts: jsonl, csv, or either from the standard input."""

from __future__ import annotations

import csv
import difflib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dla_hooks.cli.words import as_pos
from dla_hooks.errors import InputError

COLUMNS = ("prompt", "answer", "incorrect", "position")
"""What a line may hold; others are left alone."""


@dataclass(frozen=True)
class Table:
    """Prompts, and what is asked of each.

    Attributes:
        prompts: the texts.
        answers: of each, or None where the file has no such column.
        incorrect: likewise.
        positions: likewise: an int, or a list of ints.
    """

    prompts: list[str]
    answers: list[Any] | None
    incorrect: list[Any] | None
    positions: list[Any] | None


def read(path: Path) -> Table:
    """Read a file of prompts.

    Args:
        path: ends in ``.jsonl`` or ``.csv``; ``-`` is the standard input, in which lines that
            begin with a brace are JSON.

    Raises:
        InputError: for a file that cannot be read, and a line that lacks what others have.
    """
    if path == Path("-"):
        text, name = sys.stdin.read(), "stdin"
        kind = ".jsonl" if text.lstrip().startswith("{") else ".csv"
    else:
        name, kind = str(path), path.suffix.lower()
        if kind not in (".jsonl", ".csv"):
            raise InputError(f"{name} must end in .jsonl or .csv, or be '-' for stdin")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name} cannot be read: {error}") from None
    lines = _of_json(text, name) if kind == ".jsonl" else _of_csv(text, name)
    if not lines:
        raise InputError(f"{name} holds no prompt")
    columns = {column: _column(lines, column, name) for column in COLUMNS}
    prompts = columns["prompt"]
    if prompts is None:
        raise InputError(
            f"{name} has no column 'prompt'; it has {', '.join(map(repr, lines[0][1])) or 'none'}"
        )
    _check_names(lines, name)
    for (number, _), prompt in zip(lines, prompts, strict=True):
        if not isinstance(prompt, str):
            raise InputError(f"{name}, line {number}: the prompt must be text, got {prompt!r:.60}")
    positions = columns["position"]
    if positions is not None:
        positions = [
            _position(value, name, number)
            for (number, _), value in zip(lines, positions, strict=True)
        ]
    return Table(prompts, columns["answer"], columns["incorrect"], positions)


def _check_names(lines: list[tuple[int, dict[str, Any]]], name: str) -> None:
    """Refuse a column that is not read, where it is a known one but for a slip.

    Raises:
        InputError: it names both.
    """
    names = dict.fromkeys(column for _, line in lines for column in line)
    missing = [column for column in COLUMNS if column not in names]
    for column in names:
        meant = difflib.get_close_matches(column.strip().lower(), missing, 1, 0.9)
        if meant and column not in COLUMNS:
            raise InputError(
                f"{name} has a column {column!r}, which would not be read; call it {meant[0]!r} "
                "if it is that, and otherwise something less alike"
            )


def _of_json(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            read = json.loads(line)
        except ValueError as error:
            raise InputError(f"{name}, line {number} is no JSON: {error}") from None
        if not isinstance(read, dict):
            raise InputError(f'{name}, line {number} must be an object such as {{"prompt": …}}')
        found.append((number, {key: value for key, value in read.items() if value is not None}))
    return found


def _of_csv(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found = []
    try:
        for line in reader:
            if None in line or None in line.values():
                raise InputError(
                    f"{name}, line {reader.line_num} has another number of cells than the header"
                )
            found.append((reader.line_num, {key: value for key, value in line.items() if value}))
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num} is no CSV: {error}") from None
    return found


def _column(lines: list[tuple[int, dict[str, Any]]], column: str, name: str) -> list[Any] | None:
    """The values of a column, which every line has or none."""
    missing = [number for number, line in lines if column not in line]
    if len(missing) == len(lines):
        return None
    if missing:
        raise InputError(f"{name}, line {missing[0]} has no {column!r}, and other lines have one")
    return [line[column] for _, line in lines]


def _position(value: Any, name: str, number: int) -> Any:
    """An int, or a list of ints, as it is or as ``--pos`` takes it."""
    if isinstance(value, str):
        try:
            value = as_pos(value.strip())
        except typer.BadParameter:
            value = None
    ints = value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ints):
        raise InputError(
            f"{name}, line {number}: a position is an int, or several as in 1,3 or [1, 3]"
        )
    return value
