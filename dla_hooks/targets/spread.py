"""How far a model's logits are apart over its vocabulary: what all tolerances are relative to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GAP = 100
"""How many times further down than all other logits a mask is told from them."""
_KINDS_OF_MASKS = 4
_SAMPLE = 4096
_HANDFUL, _FEW_COLUMNS = 64, 16
"""Logits of each column, and columns, that Python looks at faster than tensor operations do."""


def spread_of(logits_BSV: Tensor) -> Tensor:
    """Largest less smallest logit over the vocabulary, masked tokens left out [batch, columns].

    The few numbers are compared as Python's own, which costs less than a tensor operation each.

    Args:
        logits_BSV: logits [batch, columns, vocabulary].

    Returns:
        A tensor on the CPU, in float64.
    """
    if logits_BSV.numel() == logits_BSV.shape[-1]:
        low, high = torch.aminmax(logits_BSV)
        low_N, high_N = [low.item()], [high.item()]
    else:  # apart: `aminmax` along an axis is ten times slower than both
        low_N, high_N = _listed(logits_BSV.amin(-1)), _listed(logits_BSV.amax(-1))
    spread_N = [high - low for low, high in zip(low_N, high_N, strict=True)]
    if not math.isfinite(sum(spread_N)):
        # Some models mask the end of their vocabulary with -inf. What is no number is masked, too.
        masked = ~torch.isfinite(logits_BSV)
        low_N = _listed(logits_BSV.masked_fill(masked, torch.inf).amin(-1))
        logits_BSV = logits_BSV.masked_fill(masked, -torch.inf)
        high_N = _listed(logits_BSV.amax(-1))
        spread_N = [high - low for low, high in zip(low_N, high_N, strict=True)]
    if not _handful_shows_no_mask(logits_BSV, high_N, spread_N):
        step = max(1, logits_BSV.shape[-1] // _SAMPLE)
        if not all(_lies_between(logits_BSV[..., ::step], high_N, spread_N)):  # hardly ever
            spread_N = _without_masks(logits_BSV.double(), low_N, high_N, spread_N)
    return torch.tensor(spread_N, dtype=torch.float64, device="cpu").view(logits_BSV.shape[:-1])


def _without_masks(
    logits_BSV: Tensor, low_N: list[float], high_N: list[float], spread_N: list[float]
) -> list[float]:
    """The spread of the logits that no large finite mask holds down.

    A mask shows as a gap: some logits lie far down, the others within a hundredth of that below the
    largest one, and none between.

    Args:
        logits_BSV: logits [batch, columns, vocabulary], in float64.
        low_N: the smallest of each column.
        high_N: the largest.
        spread_N: the one less the other.
    """
    shape = (*logits_BSV.shape[:-1], 1)
    low_N, spread_N = list(low_N), list(spread_N)
    for _ in range(_KINDS_OF_MASKS):
        whole_N = [high - low for low, high in zip(low_N, high_N, strict=True)]
        gaps = [not close for close in _lies_between(logits_BSV, high_N, whole_N)]
        if not any(gaps):
            break
        least_N = [high - whole / _GAP for high, whole in zip(high_N, whole_N, strict=True)]
        top_BSV = logits_BSV >= logits_BSV.new_tensor(least_N).view(shape)
        lowest_N = _listed(logits_BSV.masked_fill(~top_BSV, torch.inf).amin(-1))
        for n in (n for n, gap in enumerate(gaps) if gap):
            low_N[n] = lowest_N[n]
            # Few tokens may be left, and alike: then their own size says how finely they are
            # rounded.
            spread_N[n] = max(high_N[n] - low_N[n], abs(high_N[n]), abs(low_N[n]))
        gap_BS1 = torch.tensor(gaps, device=logits_BSV.device).view(shape)
        logits_BSV = logits_BSV.masked_fill(gap_BS1 & ~top_BSV, torch.inf)
    return spread_N


def _handful_shows_no_mask(logits_BSV: Tensor, high_N: list[float], spread_N: list[float]) -> bool:
    """Whether one of a handful of each column's logits lies where a mask would leave none."""
    if len(high_N) > _FEW_COLUMNS:
        return False
    step = max(1, logits_BSV.shape[-1] // _HANDFUL)
    samples = [some for columns in logits_BSV[..., ::step].tolist() for some in columns]
    return all(
        any(spread / _GAP < high - one < spread / 2 for one in some)
        for some, high, spread in zip(samples, high_N, spread_N, strict=True)
    )


def _lies_between(logits_BSV: Tensor, high_N: list[float], spread_N: list[float]) -> list[bool]:
    """Whether some logit lies between the largest ones and the lower half, for each column."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    middle_N = [
        high - spread * (1 / 2 + 1 / _GAP) / 2
        for high, spread in zip(high_N, spread_N, strict=True)
    ]
    middle_BS1 = torch.tensor(middle_N, dtype=dtype, device=logits_BSV.device)
    middle_BS1 = middle_BS1.view(*logits_BSV.shape[:-1], 1)
    nearest_N = _listed((logits_BSV.to(dtype) - middle_BS1).abs_().amin(-1))
    return [
        nearest < spread * (1 / 2 - 1 / _GAP) / 2 or spread <= 0
        for nearest, spread in zip(nearest_N, spread_N, strict=True)
    ]


def _listed(numbers: Tensor) -> list[float]:
    found: list[float] = numbers.reshape(-1).tolist()
    return found
