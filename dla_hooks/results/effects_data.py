"""The fields of effects; the views take this class, and nothing above it.

What they mean stands at :class:`dla_hooks.Effects`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results.data import entry_mean
from dla_hooks.results.result import DirectLogitAttribution

NUMBERS = ("direct", "own", "downstream", "read", "total")
"""The columns of numbers, in their order."""


class Effect(NamedTuple):
    """What taking one part out does, each [*batch_and_pos].

    Attributes:
        direct: its own row in the clean run.
        own: what its row lost.
        downstream: what all other rows lost.
        read: what the final norm's scale changes.
        total: clean less ablated logit: the last three together.
    """

    direct: Tensor
    own: Tensor
    downstream: Tensor
    read: Tensor
    total: Tensor


@dataclass(repr=False, eq=False)
class EffectsData:
    """Numbers of ablations, without any view.

    Raises:
        InputError: when the shapes do not fit each other.
    """

    labels: list[str]
    unit: str
    ablation: str
    clean: DirectLogitAttribution
    direct: Tensor  # [part, *batch_and_pos]
    own: Tensor  # [part, *batch_and_pos]
    read: Tensor  # [part, *batch_and_pos]
    total: Tensor  # [part, *batch_and_pos]
    row_labels: list[str]
    by_row: Tensor  # [part, row, *batch_and_pos]
    gap: float
    unit_labels: list[str] | None = None
    by_unit: Tensor | None = None  # [part, row of the unit, *batch_and_pos]

    def __post_init__(self) -> None:
        shape = (len(self.labels), *self.clean.shape)
        for name in ("direct", "own", "read", "total"):
            own = getattr(self, name).shape
            if own != shape:
                raise InputError(
                    f"{name} has shape {list(own)}; there are {len(self.labels)} labels and the "
                    f"entries {list(self.clean.shape)}"
                )
        for rows, numbers in ((self.row_labels, self.by_row), (self.unit_labels, self.by_unit)):
            due = None if rows is None else (shape[0], len(rows), *shape[1:])
            if numbers is not None and numbers.shape != due:
                raise InputError(f"rows have shape {list(numbers.shape)}, and not {due}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes of the entries: ``[batch]`` or ``[batch, pos']``."""
        return tuple(self.clean.shape)

    @property
    def downstream(self) -> Tensor:
        """What all other rows lost [part, *batch_and_pos]."""
        return self.by_row.sum(1)

    def effect(self, number: int) -> Effect:
        """The numbers of one part."""
        return Effect(*(getattr(self, name)[number] for name in NUMBERS))

    def means(self) -> list[dict[str, float]]:
        """The numbers of each part, as means over batch and positions, padding left out."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return [
            {name: entry_mean(own[number]) for name, own in numbers.items()}
            for number in range(len(self.labels))
        ]
