"""Small numbers of ours onto a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def onto(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a copy to a GPU is put behind the work that it has still to do.

    A plain ``to`` waits until the GPU has done all of it. Numbers that leave pageable memory are
    staged before this returns, so they may change afterwards.
    """
    return numbers.to(device, non_blocking=device.type == "cuda")
