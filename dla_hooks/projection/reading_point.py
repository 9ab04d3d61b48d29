"""Where the stream is read: what the final norm saw."""

from __future__ import annotations

from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.projection.kernels import frozen_scales, project
from dla_hooks.projection.ledger import Scalars
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Readout


class FinalStream:
    """What the final norm saw: its scale at every site, and the whole stream's projections.

    Args:
        stream: the located model.
        entries: where to look.
        readouts: the directions to project on; the first is the one that is attributed.

    Attributes:
        scale_N: the final norm's scale, once the model has run.
        total_RN: x . d for each readout, not yet divided by it.
    """

    scale_N: Tensor
    total_RN: Tensor

    def __init__(self, stream: Stream, entries: Entries, readouts: list[Readout]) -> None:
        self._entries = entries
        self._readouts = readouts
        # The scale comes first: it is read where the norm is, and all else divided by it there.
        self._scalars = Scalars(1 + len(readouts), len(entries), stream.work_dtype)
        self._misfits: list[Tensor] = []
        self.taps = [
            Tap(stream.last, self._see_stream),
            Tap(stream.final_norm, self._see_norm, self._see_scale),
        ]

    def finish(self) -> None:
        """Bring everything together after a run."""
        rows = self._scalars.gathered()
        self.scale_N, self.total_RN = rows[0], rows[1:]

    @property
    def misfit(self) -> float:
        """The largest part of the norm's output that its form leaves unexplained."""
        return norms.largest(self._misfits)

    def total_N(self) -> Tensor:
        """x . d / s [N]: what the whole stream contributes to the logit (or difference)."""
        return self.total_RN[0] / self.scale_N

    def bias_N(self, which: int = 0) -> Tensor:
        """What the logit (or difference) has besides the stream [N]."""
        bias_K = self._readouts[which].bias_K.to(self.scale_N.device)
        return bias_K[self._entries.target_on(bias_K.device)]

    def logits_N(self, which: int = 0) -> Tensor:
        """x . d / s + bias [N]: the logit (or difference) before any cap."""
        return self.total_RN[which] / self.scale_N + self.bias_N(which)

    def _see_stream(self, call: Call) -> None:
        x = call.activation
        totals = self._scalars.on(x.device)[1:]
        for readout, total_N in zip(self._readouts, totals, strict=True):
            project(x, self._entries, readout.directions, total_N)

    def _see_scale(self, scale: Tensor) -> None:
        self._scalars.on(scale.device)[0].copy_(self._entries.take(scale)[:, 0])

    def _see_norm(self, call: Call) -> None:
        x, y = call.entered, call.left
        scale_N = self._scalars.on(x.device)[0]
        self._misfits += frozen_scales(self._readouts[0].norm, x, y, self._entries, scale_N)
