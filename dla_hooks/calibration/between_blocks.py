"""What a model multiplies its stream by between two blocks: RWKV halves it, and BLT doubles it."""

from __future__ import annotations

import torch
from torch import Tensor


def factor_between(left: Tensor, read: Tensor, tolerance: float) -> Tensor | None:
    """The factor between what a block puts out and what reads the stream next.

    Args:
        left: the block's output in each row of a made-up run [row, d_model], float64.
        read: the stream as it is read next.
        tolerance: how far, relative to the latter, the two may be from a factor.

    Returns:
        A factor [] or [d_model]. None is one, or no factor at all: what hooks write there then
        does not add up, and is refused.

    >>> left = torch.tensor([[0.0, 0.0], [1.0, -1.0], [3.0, 2.0]])
    >>> factor_between(left, left / 2, 1e-9)
    tensor(0.5000)
    """
    left, read = left - left[0], read - read[0]
    if torch.equal(left, read):
        return None
    size = left.square().sum(0)
    factor = torch.where(size > 0, (left * read).sum(0) / size, torch.ones_like(size))
    off = float((read - factor * left).norm() / (read.norm() + 1e-30))
    if off > tolerance:
        return None
    first = factor[0]
    if not bool(((factor - first).abs() <= tolerance * first.abs()).all()):
        return factor
    return None if first == 1 else first
