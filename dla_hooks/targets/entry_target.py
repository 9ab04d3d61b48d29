"""Readings of the stream with a direction of their own at each entry, made from an earlier run.

What a head looks for in a token depends on the other token: the direction is not known before the
model has run. A first run shows it, with the number that the model itself makes of it; the second
is an ordinary run, and is held against that number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.linear_readers import Reader
from dla_hooks.errors import PositionError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.targets.stream_target import StreamTarget


class EntryTarget(StreamTarget):
    """One direction for each entry, and what the model was seen to compute of it.

    Args:
        reader: the stream up to where it is read, and the norm between the two.
        entries: the entries, each with a target of its own, in order.
        v_NM: directions [N, d_model], which read the norm's output.
        bias_N: what the readings have besides [N].
        known_N: what they should be [N].
        names: what is read, in words: one, or one for each entry.
    """

    def __init__(
        self,
        reader: Reader,
        entries: Entries,
        v_NM: Tensor,
        bias_N: Tensor,
        known_N: Tensor,
        names: list[str],
    ) -> None:
        super().__init__(reader.stream, reader.norm, v_NM, None, names[0], bias_N)
        self.witness, self.known_N = None, known_N
        self._entries, self._names = entries, names

    def align(
        self, selection: Selection, prompt_shape: tuple[int, int], batched: bool = True
    ) -> Entries:
        """The entries that it was made for."""
        return self._entries

    def names(self, entries: Any, tokenizer: Any) -> tuple[list[str], list[str] | None]:
        """What is read."""
        return self._names, None


def columns_of(position: int, selection: Selection) -> Tensor:
    """The column of one position, counted among real tokens, in every row of the batch.

    Raises:
        PositionError: for a row that has no such token.
    """
    found = []
    for row, real in enumerate(selection.mask):
        columns = real.nonzero()[:, 0]
        if not -len(columns) <= position < len(columns):
            raise PositionError(
                f"position {position} is out of range: row {row} of the input has {len(columns)} "
                f"tokens, so positions go from {-len(columns)} to {len(columns) - 1}"
            )
        found.append(columns[position])
    return torch.stack(found)
