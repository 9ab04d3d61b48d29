"""What rounding alone may do to the sum of the parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dla_hooks.tolerance import is_coarse
from dla_hooks.units.plan import Measurement


def rounding_of(measurement: Measurement, spread: float | Tensor = 0.0) -> Tensor:
    """What rounding alone may do to the sum of the parts at each entry [N].

    Every addition rounds the sum so far, and independent roundings grow as a square root. It
    matters where large parts cancel, as the massive activations of large models do. In 16 bits
    it is looked at more closely: sums within the logits' spread are left to what is allowed of it.
    """
    parts = measurement.parts
    dtype = measurement.plan.stream.coarsest_dtype
    eps = torch.finfo(dtype).eps
    running_SN = parts.steps_SN.cumsum(0).abs_()
    if is_coarse(dtype) and (isinstance(spread, Tensor) or spread):
        beyond_N: Tensor = (running_SN - spread).clamp_(min=0).square_().sum(0).sqrt_()
        return beyond_N * eps
    largest_N: Tensor = running_SN.amax(0)
    return largest_N * (2 * eps * math.sqrt(len(parts.plan.rows)))
