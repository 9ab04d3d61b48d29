"""Two rows of a made-up run: one as it is, and one that is disturbed."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(shape: torch.Size) -> Tensor:
    """Factors around one, the same in every run [*shape], in float64 on the CPU."""
    generator = torch.Generator().manual_seed(7)
    return 0.75 + 0.5 * torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64)


def as_first_row(x: Tensor) -> Tensor:
    """The same, with the first row in the place of both."""
    if x.numel() % (2 * x.shape[-1]):
        return x  # shared by the rows
    by_row = x.reshape(2, -1, x.shape[-1])
    return by_row[:1].expand_as(by_row).contiguous().view(x.shape)
