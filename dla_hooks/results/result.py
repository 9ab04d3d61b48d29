"""The result of a call, and what can be done with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dla_hooks.errors import CheckpointError, InputError, MissingExtraError
from dla_hooks.results.data import ranked

if TYPE_CHECKING:
    import altair
    import pandas

_FORMAT = "dla_hooks.result"
_VERSION = 1
_TENSORS = ("attribution", "bias", "logit", "positions")


@dataclass(repr=False, eq=False)
class DirectLogitAttribution:
    """Who wrote a logit, or a difference of logits.

    For the units whose rows are parts (``component``, ``head``),
    ``attribution.sum(0) + bias == logit``; for ``layer``, whose rows are running sums,
    ``attribution[-1] + bias == logit``; each to within ``gap``.

    Attributes:
        attribution: [component, *batch_and_pos], aligned with ``labels``; NaN at padding.
        labels: the name of each row.
        unit: ``component``, ``layer`` or ``head``.
        bias: what the logit has besides the stream [*batch_and_pos].
        logit: the logit (or difference), before any softcap [*batch_and_pos].
        gap: the largest difference between the parts' sum and the stream's own projection.
        logit_gap: the largest difference from the model's own logits where they were looked at;
            NaN when the call was not checked.
        positions: which token of its row each entry belongs to [*batch_and_pos]; -1 for padding.
        tokens: the tokens of each row, as text (ids as text where there was no tokenizer).
        answer: the answer's text; one for each entry, flattened, where they are not all the same.
        incorrect: the same for the incorrect tokens, or None.
        model: the model's class and type.
        softcap: the cap that the model puts on its logits, or None.
    """

    attribution: Tensor
    labels: list[str]
    unit: str
    bias: Tensor
    logit: Tensor
    gap: float
    logit_gap: float = float("nan")
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    tokens: list[list[str]] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    incorrect: list[str] | None = None
    model: str = ""
    softcap: float | None = None

    def mean(self) -> Tensor:
        """Each row's mean over batch and positions, padding left out [component]."""
        return self.attribution.reshape(len(self.labels), -1).nanmean(-1)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit up the most: ``(label, mean value)``, largest first.

        Args:
            k: how many; no more than there are rows.
        """
        return ranked(self.labels, self.mean(), k, largest=True)

    def bottom(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit down the most, most negative first."""
        return ranked(self.labels, self.mean(), k, largest=False)

    def to_dataframe(self) -> pandas.DataFrame:
        """One line per row, batch entry and position (extra ``pandas``).

        Returns:
            Columns ``label``, ``layer`` and ``head`` (where the label has them), ``row``,
            ``position``, ``token``, ``answer``, ``incorrect``, ``attribution``; padding is left
            out.

        Raises:
            MissingExtraError: when pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MissingExtraError("to_dataframe()", "pandas") from None
        return pandas.DataFrame(self.records())

    def records(self) -> list[dict[str, Any]]:
        """The lines of :meth:`to_dataframe`, as dictionaries."""
        from dla_hooks.results.table import records

        return records(self)

    def plot(self) -> altair.Chart:
        """A picture (extra ``plot``): a layer x head heatmap, bars of components, a line of layers.

        Returns:
            An Altair chart; it draws itself in a notebook, and ``chart.save("plot.png")`` writes
            png, svg, or html (with ``inline=True`` html that needs no network).

        Raises:
            MissingExtraError: when Altair is not installed.
        """
        from dla_hooks.results.chart import plot

        return plot(self)

    def save(self, path: str | Path) -> Path:
        """Write the result to one safetensors file, whose header holds the rest as JSON.

        Args:
            path: of the file to write; by custom it ends in ``.safetensors``.

        Raises:
            CheckpointError: when it cannot be written there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        rest = {k: v for k, v in self.__dict__.items() if k not in _TENSORS}
        header = {"format": _FORMAT, "version": str(_VERSION), "result": json.dumps(rest)}
        try:
            save_file(tensors, str(path), metadata=header)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from None
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> DirectLogitAttribution:
        """Read a result back.

        Raises:
            CheckpointError: when there is no such file, or it cannot be read.
            InputError: when the file holds something else, or comes from a newer version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as a saved result: {error}") from None
        if header.get("format") != _FORMAT:
            raise InputError(f"{path} is no saved attribution (its header does not say {_FORMAT})")
        version = header.get("version", "")
        if version.isdigit() and int(version) > _VERSION:
            raise InputError(
                f"{path} was written by a newer dla_hooks (format {version}, this one "
                f"reads up to {_VERSION}); upgrade to read it"
            )
        try:
            return cls(**tensors, **json.loads(header["result"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None

    def __repr__(self) -> str:
        from dla_hooks.results.text import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from dla_hooks.results.html import as_html

        return as_html(self)
