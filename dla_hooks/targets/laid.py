"""Answers laid over the selected positions."""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.errors import ShapeMismatchError
from dla_hooks.inputs.answers import over_positions
from dla_hooks.targets.token_sets import TokenSets


def numbered(sets: TokenSets, selected: tuple[int, ...]) -> Tensor:
    """The number of the set (or of the row of several) for each position; it broadcasts.

    Args:
        sets: as they were given.
        selected: the shape of the selected positions.

    Raises:
        ShapeMismatchError: when they do not broadcast; it names both shapes.
    """
    shape = sets.shape[:-1] if sets.several else sets.shape
    index = torch.arange(shape.numel(), device="cpu").reshape(shape)
    laid = over_positions(index, selected)
    if sets.several and laid.ndim and laid.shape[0] not in (1, selected[0]):
        raise ShapeMismatchError(
            f"Each has {laid.shape[0]} lines for {selected[0]} prompts; give one line for each "
            "prompt, or one for all"
        )
    return laid
