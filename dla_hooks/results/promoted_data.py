"""The fields of promoted tokens; the views take this class, and nothing above it.

What they mean stands at :class:`dla_hooks.PromotedTokens`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError
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
    positions: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.long, device="cpu")
    )
    tokens: list[list[str]] = field(default_factory=list)
    model: str = ""
    softcap: float | None = None
    words: Words = NO_WORDS

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

    @property
    def shape(self) -> torch.Size:
        """The axes of the entries: ``[batch]`` or ``[batch, pos']``."""
        return self.mean.shape[1:]

    @property
    def k(self) -> int:
        """How many tokens are listed each way."""
        return self.up.shape[-1]


def checked_count(k: Any) -> int:
    """A number of tokens.

    Raises:
        InputError: when ``k`` is no int, or negative.
    """
    count = operator.index(k) if hasattr(k, "__index__") and not isinstance(k, bool) else -1
    if count < 0:
        raise InputError(f"k must be an int that is not negative, got {k!r}")
    return count
