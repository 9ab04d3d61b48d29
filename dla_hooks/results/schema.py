"""The form of a result's fields in files: one rule for every format.

The dataclass says which fields there are. A tensor stays a tensor, rows become columns beside the
labels, words a dictionary; the rest is what JSON can hold as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.seen import Seen

_BESIDE = "beside."
_LATER = ("generated", "generated_ids", "reading", "contrast")
"""Fields that older versions do not know: they are written only where they say something."""
_SEEN = "seen."
_ROW_COLUMNS = tuple(field.name for field in fields(Row) if field.name != "label")


def pack(data: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fields of a result or a summary: tensors by name, and the rest as JSON can hold it."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for field in fields(data):
        value = getattr(data, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif value is None and field.name in _LATER:
            continue
        elif field.name == "beside":
            tensors |= {f"{_BESIDE}{name}": own for name, own in value.items()}
        elif field.name == "seen":
            if value is not None:
                own = {one.name: getattr(value, one.name) for one in fields(value)}
                plain["seen_names"] = own.pop("names")
                tensors |= {f"{_SEEN}{name}": tensor for name, tensor in own.items()}
        elif field.name == "rows" and value is not None:
            plain["rows"] = row_columns(value if hasattr(data, "labels") else _runs(value))
        else:
            plain[field.name] = words_as_json(value) if isinstance(value, Words) else value
    return tensors, plain


def words_as_json(words: Words) -> dict[str, Any]:
    """Words as a dictionary that JSON can hold."""
    return {**asdict(words), "beside": list(words.beside)}


def unpack(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    """The other way round: the arguments to make a result or a summary of.

    Raises:
        KeyError, TypeError, ValueError: for what :func:`pack` does not make.
    """
    given: dict[str, Any] = {**tensors, **plain}
    beside = {name: given.pop(name) for name in tensors if name.startswith(_BESIDE)}
    if beside:
        given["beside"] = {name.removeprefix(_BESIDE): own for name, own in beside.items()}
    seen = {name: given.pop(name) for name in tensors if name.startswith(_SEEN)}
    names = given.pop("seen_names", {})
    if seen:
        own = {name.removeprefix(_SEEN): tensor for name, tensor in seen.items()}
        given["seen"] = Seen(**own, names=names)
    if given.get("rows") is not None:
        given["rows"] = rows_from(given.get("labels"), given["rows"])
    if "words" in given:
        given["words"] = Words(**given["words"])
    return given


def pack_within(name: str, data: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """:func:`pack` of a result that is a field of another one."""
    tensors, plain = pack(data)
    return {f"{name}.{field}": tensor for field, tensor in tensors.items()}, {name: plain}


def unpack_within(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The other way round: takes the field out of what is given."""
    start = f"{name}."
    tensors = {key: given.pop(key) for key in list(given) if key.startswith(start)}
    own = {key.removeprefix(start): tensor for key, tensor in tensors.items()}
    return unpack(own, given.pop(name))


def row_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows as columns ``kind``, ``layer``, ``sub``, ``index``, aligned with their labels.

    Of runs of rows, the columns of the runs.
    """
    if isinstance(rows, RowRuns):
        return {
            field.name: [getattr(run, field.name) for run in rows.runs] for field in fields(Run)
        }
    reads = any(row.source is not None for row in rows)  # a column that older versions do not know
    names = [name for name in _ROW_COLUMNS if name != "source" or reads]
    return {name: [getattr(row, name) for row in rows] for name in names}


def _runs(rows: Sequence[Row]) -> RowRuns:
    """Rows whose labels stand nowhere else, with these."""
    if isinstance(rows, RowRuns):
        return rows
    return RowRuns(Run(row.label, row.kind, row.layer, row.sub, row.index) for row in rows)


def rows_from(labels: Sequence[str] | None, columns: dict[str, list[Any]]) -> Sequence[Row]:
    """The other way round.

    Args:
        labels: one for each row, which runs of rows do not read.
        columns: of the rows or runs.

    Raises:
        TypeError, ValueError: for columns that are none of :func:`row_columns`.
    """
    if labels is None or "label" in columns:
        lines = zip(*columns.values(), strict=True)
        return RowRuns(Run(**dict(zip(columns, line, strict=True))) for line in lines)
    lines = zip(labels, *columns.values(), strict=True)
    return [Row(label, **dict(zip(columns, line, strict=True))) for label, *line in lines]


def as_json(value: Any) -> Any:
    """Tensors as nested lists, and None for what JSON has no number for."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
