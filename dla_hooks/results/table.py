"""A result as plain data: lines for a table, and a dictionary for JSON."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

from dla_hooks._version import __version__
from dla_hooks.errors import MissingExtraError
from dla_hooks.results.data import ResultData, located, names_of_entries, real_entries
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.schema import as_json, pack

if TYPE_CHECKING:
    import pandas

_FORMAT = "dla_hooks.attribution"
_VERSION = 1
_OF_ENTRY = ("row", "position", "token", "answer", "incorrect")


def row_columns(words: Words) -> tuple[str, ...]:
    """The columns that say which row a line is about."""
    return ("label", "kind", "layer", "sub", words.index or "head")


def columns(words: Words) -> tuple[str, ...]:
    """The columns of :func:`records`, in their order."""
    return (*row_columns(words), *_OF_ENTRY, "attribution")


def describe(row: Row, words: Words) -> dict[str, Any]:
    """One row's :func:`row_columns`, None where it has no such number."""
    values = (row.label, row.kind, row.layer, row.sub, row.index)
    return dict(zip(row_columns(words), values, strict=True))


def records(data: ResultData) -> list[dict[str, Any]]:
    """One dictionary per row of the result and entry of the batch, padding left out.

    Returns:
        Keys are :func:`columns`: those of the row, ``row`` of the batch, ``position`` and
        ``token`` there, ``answer`` and ``incorrect`` as text (None where unknown), and
        ``attribution``.
    """
    entries = _entries(data)
    values = data.attribution.reshape(len(data.labels), data.shape.numel()).tolist()
    lines = []
    for row, row_of_values in zip(data.rows, values, strict=True):
        own = describe(row, data.words)
        for flat, entry in entries:
            lines.append({**own, **entry, "attribution": row_of_values[flat]})
    return lines


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


def as_dict(data: ResultData) -> dict[str, Any]:
    """Everything in a result, as what JSON can hold: NaN is None, tensors are nested lists.

    ``attribution`` is [row][*batch_and_pos], aligned with ``labels`` and the lists in ``rows``.
    """
    tensors, plain = pack(data)
    about = {"format": _FORMAT, "version": _VERSION, "dla_hooks": __version__}
    return {name: as_json(value) for name, value in {**about, **plain, **tensors}.items()}


def json_text(data: ResultData) -> str:
    """:func:`as_dict` as the text of a JSON file."""
    fields = (  # one line per field, which indent=1 would make one per number
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in as_dict(data).items()
    )
    return "{\n" + ",\n".join(fields) + "\n}\n"


def csv_text(data: ResultData) -> str:
    """:func:`records` as the text of a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns(data.words))
    writer.writeheader()
    writer.writerows(records(data))
    return text.getvalue()


def _entries(data: ResultData) -> list[tuple[int, dict[str, Any]]]:
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
