"""The fields of promoted tokens; the views take this class, and nothing above it.

What they mean stands at :class:`dla_hooks.PromotedTokens`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results.data import no_positions
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.results.rows import NO_WORDS, Words, words_of

NUMBERS = ("up", "up_ids", "down", "down_ids", "mean")
"""The fields with an axis for the rows of the unit."""


@dataclass(repr=False, eq=False)
class PromotedData:
    """Ranked tokens with labels, without any view.

    Raises:
        InputError: when the shapes do not fit each other.
    """

    labels: list[str]
    unit: str
    up: Tensor
    up_ids: Tensor
    down: Tensor
    down_ids: Tensor
    mean: Tensor
    names: dict[int, str]
    n_tokens: int
    gap: float = float("nan")
    positions: Tensor = field(default_factory=no_positions)
    tokens: list[list[str]] = field(default_factory=list)
    model: str = ""
    softcap: float | None = None
    words: Words = NO_WORDS
    index: Tensor | None = None  # [row, *batch_and_pos]
    rows: RowRuns | None = None

    def __post_init__(self) -> None:
        self.names = {int(i): name for i, name in self.names.items()}  # files hold ids as text
        if self.words == NO_WORDS:
            self.words = words_of(self.unit)
        shape = self.up.shape
        for name in ("up_ids", "down", "down_ids"):
            other = getattr(self, name).shape
            if other != shape:
                raise InputError(f"{name} has shape {list(other)}, and up {list(shape)}")
        if not shape or shape[0] != len(self.labels) or self.mean.shape != shape[:-1]:
            raise InputError(
                f"up has shape {list(shape)} for {len(self.labels)} labels and a mean of shape "
                f"{list(self.mean.shape)}; they are [row, *batch_and_pos, k] and "
                "[row, *batch_and_pos]"
            )

        if (self.index is None) != (self.rows is None):
            raise InputError("index and rows go together: give both, or neither")
        if self.index is not None and self.index.shape != self.mean.shape:
            raise InputError(
                f"index has shape {list(self.index.shape)}, and mean {list(self.mean.shape)}; give "
                "one row number for each mean"
            )

    @property
    def shape(self) -> torch.Size:
        """The axes of the entries: ``[batch]`` or ``[batch, pos']``."""
        return self.mean.shape[1:]

    @property
    def k(self) -> int:
        """How many tokens are listed each way."""
        return self.up.shape[-1]

    def label_at(self, row: int, entry: int) -> str:
        """The label of a row at an entry, by their numbers: of what stands there."""
        if self.index is None or self.rows is None:
            return self.labels[row]
        number = int(self.index[row].flatten()[entry])
        return self.labels[row] if number < 0 else self.rows[number].label

    def kept_labels(self) -> list[str]:
        """The labels of rows that stand at some entries only."""
        if self.index is None or self.rows is None:
            return []
        return [self.rows[number].label for number in self.index[self.index >= 0].unique().tolist()]
