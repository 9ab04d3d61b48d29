"""How far the numbers of a call may be off, by dtype: what rounding may explain, and no more.

A call's own check (:mod:`dla_hooks.measure.completeness`), that of the stacks and that of every
norm take their tolerance from here. What is measured of a model once
(:mod:`dla_hooks.calibration`) says beside each measurement how exact it has to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = torch.finfo(torch.float32).tiny
"""A miss of this size is rounding: smaller numbers have fewer digits. Attention weights may be."""


def tolerance(dtype: torch.dtype, n_writes: int) -> tuple[float, float]:
    """Allowed gaps over the logits' spread: (parts against stream, stream against logits).

    In float64 the parts are exact to 1e-9, but transformers computes norms, softmax and rotary
    tables in float32, so its logits are good to 1e-5 only. In the 16-bit types each of the
    ``n_writes`` additions rounds the stream, and independent roundings add up as a square root.
    """
    if dtype == torch.float64:
        return 1e-9, 1e-5
    if dtype == torch.float32:
        return 1e-4, 1e-4
    rounding = torch.finfo(dtype).eps * max(1, n_writes) ** 0.5
    return rounding, rounding


_OF_SIZE = 1.2
"""Of one rounding of the stream for each addition: clean models of 2 to 24 layers reach 0.8."""


def of_stream(dtype: torch.dtype, n_additions: int, size_N: Tensor) -> Tensor:
    """What rounding alone may do, in 16 bits, to the sum of a stream's parts at each entry [N].

    Every addition rounds each channel of the stream, in proportion to its value and independently
    of all others, so that the roundings add up as their squares do.

    Args:
        dtype: in which the stream is added up.
        n_additions: how often it is rounded.
        size_N: the root of the sum of (x * d / s)^2 over the channels at each entry.
    """
    allowed: float = _OF_SIZE * torch.finfo(dtype).eps * n_additions**0.5
    return size_N * allowed


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether a dtype has 16 bits or fewer."""
    return torch.finfo(dtype).eps > 1e-6


def misfit_tolerance(dtype: torch.dtype) -> float:
    """How much of a norm's output rounding may leave unexplained, for a model in ``dtype``."""
    return 4 * torch.finfo(dtype).eps + 1e-5


def length_of(x_RM: Tensor) -> Tensor:
    """The length of vectors [R], also where its square is no number other than 0."""
    most_R = x_RM.abs().amax(-1).clamp(min=torch.finfo(x_RM.dtype).tiny)
    found: Tensor = most_R * (x_RM / most_R[:, None]).norm(dim=-1)
    return found
