"""Mean and spread of many samples, without keeping them (Welford, Chan et al.)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Of ``n`` samples: any split of them, merged in any order, gives the same up to rounding.

    Attributes:
        n: how many samples.
        mean: [row], in float64.
        squares: the sum of squared deviations from the mean [row].
    """

    n: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, samples: Tensor) -> Moments:
        """Of samples [row, n] in float64, at least one."""
        mean = samples.mean(1)
        return cls(samples.shape[1], mean, (samples - mean[:, None]).square().sum(1))

    def merged(self, other: Moments) -> Moments:
        """Of the samples of both."""
        n = self.n + other.n
        step = other.mean - self.mean
        mean = self.mean + step * (other.n / n)
        # Infinity minus infinity has no value, where a sum of both would have one.
        plain = (self.mean * self.n + other.mean * other.n) / n
        mean = torch.where(step.isfinite(), mean, plain)
        squares = self.squares + other.squares + step.square() * (self.n * other.n / n)
        spread = torch.where(mean.isfinite(), squares, torch.nan)
        return Moments(n, mean, spread)

    def standard_error(self) -> Tensor:
        """Of the mean [row]; NaN for one sample."""
        if self.n <= 1:
            return torch.full_like(self.squares, torch.nan)
        return (self.squares / (self.n - 1) / self.n).sqrt()
