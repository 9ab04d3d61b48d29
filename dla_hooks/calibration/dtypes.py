"""The dtypes that a made-up run shows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dla_hooks.residual.stream import coarsest


@dataclass(frozen=True)
class Dtypes:
    """The dtypes that were seen in a made-up run.

    Attributes:
        stream: of what enters the blocks and the final norm.
        writes: of what the writes put out.
        read: of the final norm's output, the unembedding and the logits.
    """

    stream: set[torch.dtype] = field(default_factory=set)
    writes: set[torch.dtype] = field(default_factory=set)
    read: set[torch.dtype] = field(default_factory=set)

    def rounding(self) -> float:
        """The rounding of the coarsest dtype in which the blocks are added up."""
        return float(torch.finfo(coarsest(self.stream | self.writes)).eps)
