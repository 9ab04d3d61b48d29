"""How far the numbers of a call may be off, by dtype: what rounding may explain, and no more.

A call's own check (:mod:`dla_hooks.measure.completeness`), that of the stacks and that of every
norm take their tolerance from here. What is measured of a model once
(:mod:`dla_hooks.calibration`) says beside each measurement how exact it has to be.
"""

from __future__ import annotations

import torch


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


def misfit_tolerance(dtype: torch.dtype) -> float:
    """How much of a norm's output rounding may leave unexplained, for a model in ``dtype``."""
    return 4 * torch.finfo(dtype).eps + 1e-5
