"""What is attributed: a linear reading of the stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.modules.norms import Norm
from dla_hooks.projection.directions import Directions


@dataclass(frozen=True)
class Targets:
    """The distinct things to attribute.

    Attributes:
        correct: ids [n_targets].
        incorrect: ids [n_targets], or None.
    """

    correct: Tensor
    incorrect: Tensor | None


@dataclass(frozen=True)
class Readout:
    """How the final norm's input is read, once per distinct target.

    Attributes:
        directions: in the stream, one per target [d_model].
        bias_K: what the logit has besides the stream [n_targets].
        norm: the final norm.
    """

    directions: Directions
    bias_K: Tensor
    norm: Norm

    @property
    def d_KM(self) -> Tensor:
        """All directions at once [n_targets, d_model]."""
        return self.directions.of(torch.arange(len(self.directions)))
