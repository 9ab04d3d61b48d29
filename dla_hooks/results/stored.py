"""What is written and read back: results and summaries as files, JSON and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self, overload

from torch import Tensor

from dla_hooks.results import files
from dla_hooks.results.schema import pack
from dla_hooks.results.table import csv_text, json_text


class Stored:
    """A dataclass that one safetensors file holds.

    Attributes:
        form: the kind of its file, one of :mod:`dla_hooks.results.files`.
    """

    form: ClassVar[str]

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, whose header holds the rest as JSON.

        Args:
            path: of the file to write; by custom it ends in ``.safetensors``.

        Raises:
            InputError: for what is no path.
            CheckpointError: when it cannot be written there.
        """
        return files.write(path, self.form, *self._packed())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read it back; files of earlier versions, too.

        Raises:
            CheckpointError: when there is no such file, or it cannot be read.
            InputError: when the file holds something else, or comes from a newer version.
        """
        return files.read(path, {cls.form: cls.from_file})

    @classmethod
    def from_file(cls, **fields: Any) -> Self:
        """Make one of the fields of its file."""
        return cls(**fields)

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What its file holds: tensors by name, and the rest as JSON can hold it."""
        return pack(self)


class Exported(Stored):
    """A result that is text, too: JSON with everything, CSV with the lines of a table."""

    def records(self) -> list[dict[str, Any]]:
        """The lines of :meth:`to_dataframe`, as dictionaries."""
        raise NotImplementedError(f"{type(self).__name__} must say its lines")

    @overload
    def to_json(self, path: None = None) -> str: ...
    @overload
    def to_json(self, path: str | Path) -> Path: ...
    def to_json(self, path: str | Path | None = None) -> str | Path:
        """Everything in the result as JSON; what is no number there is null.

        Args:
            path: of a file to write, or None for the text itself.

        Returns:
            The text, or the path of the file.

        Raises:
            InputError: when the file cannot be written.
        """
        text = json_text(self._as_dict())
        return text if path is None else files.write_text(path, text)

    @overload
    def to_csv(self, path: None = None) -> str: ...
    @overload
    def to_csv(self, path: str | Path) -> Path: ...
    def to_csv(self, path: str | Path | None = None) -> str | Path:
        """The lines of :meth:`to_dataframe` as CSV; needs no pandas.

        Args:
            path: of a file to write, or None for the text itself.

        Returns:
            The text, or the path of the file.

        Raises:
            InputError: when the file cannot be written.
        """
        text = csv_text(self.records(), self._columns())
        return text if path is None else files.write_text(path, text)

    def __bool__(self) -> bool:
        return True  # a result without rows is still a result

    def _columns(self) -> tuple[str, ...]:
        raise NotImplementedError(f"{type(self).__name__} must name its columns")

    def _as_dict(self) -> dict[str, Any]:
        """Everything in the result, as what JSON can hold."""
        raise NotImplementedError(f"{type(self).__name__} must say itself as a dictionary")
