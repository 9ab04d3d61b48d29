"""One linear reading of the stream, for each distinct target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.projection.directions import Directions


@dataclass(frozen=True)
class Readout:
    """One linear reading at a reading point, for each distinct target.

    Attributes:
        directions: in the stream, one per target [d_model], the norm folded in.
        bias_K: what the reading has besides the stream [n_targets].
        behind: makes the directions behind the norm: those that read the norm's output.
        of_logits: picks the reading out of the unembedding's own output, for some entries: a
            function of that output at each entry [n, vocabulary] and the targets [n].
        scale: gives what the unembedding's output is multiplied by.
    """

    directions: Directions
    bias_K: Tensor
    behind: Callable[[], Directions] | None = None
    of_logits: Callable[[Tensor, Tensor], Tensor] | None = None
    scale: Callable[[], float] = lambda: 1.0

    @property
    def d_KM(self) -> Tensor:
        """All directions at once [n_targets, d_model]."""
        return self.directions.of(torch.arange(len(self.directions), device="cpu"))
