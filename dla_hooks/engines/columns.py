"""Columns of a batch, whatever the engine's form of it: read as plain values, and given back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dla_hooks.errors import InputError

READ = ("prompt", "input_ids", "attention_mask", "answer", "incorrect", "position")
"""The columns that an :class:`dla_hooks.Attributor` reads, by their names with us."""


@dataclass(frozen=True)
class Batch:
    """One batch of an engine.

    Attributes:
        given: a mapping of columns, a table of Arrow's or of pandas'.
    """

    given: Any

    @property
    def names(self) -> list[str]:
        """Of its columns."""
        if hasattr(self.given, "column_names"):
            return list(self.given.column_names)
        if isinstance(self.given, Mapping) or hasattr(self.given, "columns"):
            return list(self.given)
        raise InputError(
            "a batch must be a mapping of columns, or a table of Arrow's or pandas'; got "
            f"{type(self.given).__name__}: {self.given!r:.80}. With datasets say "
            "map(attributor, batched=True), with Ray map_batches"
        )

    def values(self, name: str) -> list[Any]:
        """A column as plain values; None where there is none."""
        column = self.given[name]
        if hasattr(column, "to_pylist"):
            return list(column.to_pylist())
        return [plain(value) for value in column]

    def with_columns(self, new: Mapping[str, Sequence[Any]], keep: Iterable[str]) -> Any:
        """The batch in its own form, with columns put to some of its own."""
        if hasattr(self.given, "append_column"):
            import pyarrow

            table = self.given.select(list(keep))
            for name, values in new.items():
                table = table.append_column(name, pyarrow.array(values))
            return table
        return {**{name: self.given[name] for name in keep}, **new}


def plain(value: Any) -> Any:
    """A cell as a str, an int or a list of ints; None where an engine wrote that it is empty."""
    if hasattr(value, "tolist"):  # numpy's and torch's
        value = value.tolist()
    if isinstance(value, float):
        # numpy has no int that is empty: a column with some comes as floats.
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def names_and_types(given: Any) -> dict[str, str]:
    """The columns of a data set before it is read, each with its type as text ("" if unknown).

    Args:
        given: names; a schema of Ray's or Arrow's; the features of a data set of ``datasets``.
    """
    types = getattr(given, "types", None)
    names = getattr(given, "names", None)
    if isinstance(given, Mapping):
        return {str(name): str(getattr(one, "dtype", one)) for name, one in given.items()}
    if names is not None and types is not None:
        return dict(zip(names, map(str, types), strict=True))
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(
            "columns must be names, a schema or features; got "
            f"{type(given).__name__}: {given!r:.80}"
        )
    return dict.fromkeys(map(str, given), "")
