"""Masks of batches without padding: one object for each shape, known by what it is."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_LARGEST = 2**16
"""Numbers in a mask that is kept."""


def whole_mask(batch: int, width: int) -> Tensor:
    """The mask of a batch without padding [batch, width]. Nobody writes to a mask."""
    return _kept(batch, width) if batch * width <= _LARGEST else _made(batch, width)


def is_whole(mask: Tensor) -> bool:
    """Whether a mask [batch, width] leaves nothing out."""
    return is_kept(mask) or bool(mask.all())


def is_kept(mask: Tensor) -> bool:
    """Whether a mask is one of those that :func:`whole_mask` keeps, which nobody need look at."""
    batch, width = mask.shape
    return batch * width <= _LARGEST and mask is _kept(batch, width)


def _made(batch: int, width: int) -> Tensor:
    return torch.ones(batch, width, dtype=torch.bool, device="cpu")


_kept = lru_cache(maxsize=256)(_made)
