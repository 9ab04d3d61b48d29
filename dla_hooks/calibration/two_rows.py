"""Rows of a made-up run: the first is as it is, the others are disturbed."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(shape: torch.Size) -> Tensor:
    """Factors around one, the same in every run [*shape], in float64 on the CPU."""
    generator = torch.Generator().manual_seed(7)
    return 0.75 + 0.5 * torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64)


def as_first_row(x: Tensor, rows: int = 2) -> Tensor:
    """An activation with the first row in the place of each; one that rows share stays as it is.

    Args:
        x: [row, ..., d], or with the rows behind each other in its first axis.
        rows: of the run.
    """
    if x.numel() % (rows * x.shape[-1]):
        return x
    by_row = x.reshape(rows, -1, x.shape[-1])
    return by_row[:1].expand_as(by_row).contiguous().view(x.shape)
