"""A result as plain data: lines for a table, and a dictionary for JSON."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dla_hooks.errors import InputError
from dla_hooks.results.ranking import real_entries

if TYPE_CHECKING:
    from dla_hooks.results.result import DirectLogitAttribution

_FORMAT = "dla_hooks.attribution"
_VERSION = 1
_COLUMNS = (
    "label",
    "layer",
    "head",
    "row",
    "position",
    "token",
    "answer",
    "incorrect",
    "attribution",
)
_HEAD = re.compile(r"L(\d+)(?:\.\d+)?H(\d+)")
_LAYER = re.compile(r"(\d+)_.+")


def records(result: DirectLogitAttribution) -> list[dict[str, Any]]:
    """One dictionary per row of the result and entry of the batch, padding left out.

    Returns:
        Keys ``label``, ``layer`` and ``head`` (ints, or None where the label has none), ``row``
        of the batch, ``position`` and ``token`` there, ``answer`` and ``incorrect`` as text (None
        where unknown), and ``attribution``.
    """
    entries = list(_entries(result))
    values = result.attribution.reshape(len(result.labels), -1).tolist()
    lines = []
    for label, row_of_values in zip(result.labels, values, strict=True):
        layer, head = layer_and_head(label)
        for index, entry in entries:
            place = {"label": label, "layer": layer, "head": head}
            lines.append({**place, **entry, "attribution": row_of_values[index]})
    return lines


def as_dict(result: DirectLogitAttribution) -> dict[str, Any]:
    """Everything in a result, as what JSON can hold: NaN is None, tensors are nested lists.

    ``attribution`` is [component][*batch_and_pos], aligned with ``labels``.
    """
    from dla_hooks import __version__

    return {
        "format": _FORMAT,
        "version": _VERSION,
        "dla_hooks": __version__,
        "model": result.model,
        "unit": result.unit,
        "answer": result.answer,
        "incorrect": result.incorrect,
        "tokens": result.tokens,
        "positions": result.positions.tolist(),
        "labels": result.labels,
        "attribution": _without_nan(result.attribution.tolist()),
        "bias": _without_nan(result.bias.tolist()),
        "logit": _without_nan(result.logit.tolist()),
        "softcap": result.softcap,
        "gap": _without_nan(result.gap),
        "logit_gap": _without_nan(result.logit_gap),
    }


def write_json(result: DirectLogitAttribution, path: Path) -> None:
    """Write :func:`as_dict` as a JSON file.

    Raises:
        InputError: when the file cannot be written.
    """
    fields = (  # one line per field, which indent=1 would make one per number
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in as_dict(result).items()
    )
    text = "{\n" + ",\n".join(fields) + "\n}\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def write_csv(result: DirectLogitAttribution, path: Path) -> None:
    """Write :func:`records` as a CSV file.

    Raises:
        InputError: when the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(records(result))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def _entries(result: DirectLogitAttribution) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each entry that is no padding: its flat index, and what its lines have in common."""
    valid, row_of = real_entries(result)
    shape = tuple(valid.shape)
    located = result.positions.shape == valid.shape and bool(result.tokens)
    for flat, where in enumerate(product(*map(range, shape))):
        if not bool(valid[where]):
            continue
        row = int(row_of[where])
        position = int(result.positions[where]) if located else None
        yield (
            flat,
            {
                "row": row,
                "position": position,
                "token": None if position is None else result.tokens[row][position],
                "answer": _own(result.answer, where, shape),
                "incorrect": _own(result.incorrect or [], where, shape),
            },
        )


def _own(names: list[str], where: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """The answer of one entry, by the rule that answers are laid over positions with.

    Args:
        names: the answers, flattened: one, one per batch row, per position, or per entry.
        where: index of the entry.
        shape: of all entries, [n] or [batch, pos].
    """
    if len(names) == 1:
        return names[0]
    if len(names) == math.prod(shape):
        flat = 0
        for index, size in zip(where, shape, strict=True):
            flat = flat * size + index
        return names[flat]
    # Rows come before positions: as many answers as both are taken to be one per row.
    for index, size in zip(where, shape, strict=True):
        if len(names) == size:
            return names[index]
    return None


def layer_and_head(label: str) -> tuple[int | None, int | None]:
    """The layer and the head that a row's label names, each None where it names none."""
    head = _HEAD.fullmatch(label)
    if head:
        return int(head[1]), int(head[2])
    layer = _LAYER.fullmatch(label)
    return (int(layer[1]), None) if layer else (None, None)


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value if math.isfinite(value) else None
