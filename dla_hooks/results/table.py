"""A result as plain data: lines for a table, and a dictionary for JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dla_hooks._version import __version__
from dla_hooks.errors import MissingExtraError
from dla_hooks.results.data import EntryData, ResultData, located, names_of_entries, real_entries
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.schema import as_json, pack

if TYPE_CHECKING:
    import pandas

_FORMAT = "dla_hooks.attribution"
_VERSION = 1
_OF_ENTRY = ("row", "position", "token", "answer", "incorrect")


def row_columns(words: Words) -> tuple[str, ...]:
    """The columns that say which row a line is about."""
    own = ("label", "kind", "layer", "sub", words.index or "head")
    return (*own, "source") if words.sources else own


def columns(words: Words) -> tuple[str, ...]:
    """The columns of :func:`records`, in their order."""
    token = ("source_token",) if words.sources else ()
    return (*row_columns(words), *token, *_OF_ENTRY, "attribution", *words.beside)


def describe(row: Row, words: Words) -> dict[str, Any]:
    """One row's :func:`row_columns`, None where it has no such number."""
    values = (row.label, row.kind, row.layer, row.sub, row.index, row.source)
    return dict(zip(row_columns(words), values, strict=False))


def records(data: ResultData) -> list[dict[str, Any]]:
    """One dictionary per row of the result and entry of the batch, padding left out.

    Returns:
        Keys are :func:`columns`: those of the row, ``row`` of the batch, ``position`` and
        ``token`` there, ``answer`` and ``incorrect`` as text (None where unknown), and
        ``attribution``, and whatever the unit puts beside it.
    """
    found = entries(data)
    numbers = numbers_of(data)
    lines = []
    for place, row in enumerate(data.rows):
        own = describe(row, data.words)
        for flat, entry in found:
            of_row = {name: values[place][flat] for name, values in numbers.items()}
            lines.append({**own, **entry, **of_row})
    return lines


def numbers_of(data: EntryData) -> dict[str, list[list[float]]]:
    """The attribution and what stands beside it, each [row or place][flat entry]."""
    numbers = {"attribution": data.attribution, **data.beside}
    flat = data.shape.numel()
    return {name: each.reshape(len(each), flat).tolist() for name, each in numbers.items()}


def frame(lines: list[dict[str, Any]], columns: tuple[str, ...]) -> pandas.DataFrame:
    """Lines as a data frame.

    Raises:
        MissingExtraError: when pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise MissingExtraError("to_dataframe()", "pandas") from None
    return pandas.DataFrame(lines, columns=list(columns))


def as_dict(data: EntryData) -> dict[str, Any]:
    """Everything in a result, as what JSON can hold: NaN is None, tensors are nested lists.

    ``attribution`` is [row][*batch_and_pos], aligned with ``labels`` and the lists in ``rows``; of
    a result that keeps the strongest of many rows, ``labels`` is as ``attribution`` is.
    """
    tensors, plain = pack(data)
    if "index" in tensors:
        plain = {"labels": _labels(data.rows, tensors["index"].tolist()), **plain}
    about = {"format": _FORMAT, "version": _VERSION, "dla_hooks": __version__}
    return {name: as_json(value) for name, value in {**about, **plain, **tensors}.items()}


def _labels(rows: Sequence[Row], index: Any) -> Any:
    """The label of each of nested row numbers; None where there is none."""
    if isinstance(index, list):
        return [_labels(rows, own) for own in index]
    return rows[index].label if index >= 0 else None


def json_text(named: Mapping[str, Any]) -> str:
    """What JSON can hold as the text of a file."""
    fields = (  # one line per field, which indent=1 would make one per number
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in named.items()
    )
    return "{\n" + ",\n".join(fields) + "\n}\n"


def csv_text(lines: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Lines as the text of a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def entries(data: EntryData) -> list[tuple[int, dict[str, Any]]]:
    """Each entry that is no padding: its flat index, and what its lines have in common."""
    valid, row_of = real_entries(data)
    answers = names_of_entries(data, data.answer)
    incorrects = names_of_entries(data, data.incorrect)
    rows = row_of.flatten().tolist()
    positions = data.positions.flatten().tolist() if located(data) else None
    found = []
    for flat, real in enumerate(valid.flatten().tolist()):
        if real:
            row = rows[flat]
            position = None if positions is None else positions[flat]
            token = None if position is None else data.tokens[row][position]
            values = (row, position, token, answers[flat], incorrects[flat])
            found.append((flat, dict(zip(_OF_ENTRY, values, strict=True))))
    return found
