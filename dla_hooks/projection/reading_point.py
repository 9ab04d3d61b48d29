"""Reading points: a place of the stream, and the norm after it.

    logit_t = cap( k * (W_U[t] . P(N(x)) + b_t) ),   N(x) = gamma * (x - centre(x)) / s + beta

with P the (rare) linear modules between the norm and the unembedding. With s frozen at its actual
value this is ``x . d / s + bias``. A reading point measures s and the projections of the whole
stream. The parts of the stream are measured separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.norms import Norm
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.kernels import frozen_scales, project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View


@dataclass(frozen=True)
class ReadingPoint:
    """A place of the stream, with the norm that reads it.

    Attributes:
        stream: the stream that is read: the final norm's input.
        norm_place: the norm after it, or None where the stream is read without one.
        norm: that norm's constants.
        dtype: of all contractions.
    """

    stream: Place
    norm_place: Place | None
    norm: Norm | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Readout:
    """One linear reading at a reading point, for each distinct target.

    Attributes:
        directions: in the stream, one per target [d_model], the norm folded in.
        bias_K: the part of the reading that does not come from the stream [n_targets].
    """

    directions: Directions
    bias_K: Tensor

    @property
    def d_KM(self) -> Tensor:
        """All directions at once [n_targets, d_model]."""
        return self.directions.of(torch.arange(len(self.directions)))


@dataclass(frozen=True)
class Reading:
    """The numbers measured at a reading point.

    Attributes:
        scale_N: the norm's scale at every entry; ones where there is no norm.
        total_RN: x . d / s for each readout: the contribution of the whole stream.
        bias_RN: the rest of each readout.
        misfit: the largest part of the norm's output that its form leaves unexplained.
    """

    scale_N: Tensor
    total_RN: Tensor
    bias_RN: Tensor
    misfit: float

    @property
    def total_N(self) -> Tensor:
        """Contribution of the whole stream to the attributed number [N]."""
        return self.total_RN[0]

    @property
    def bias_N(self) -> Tensor:
        """Part of the attributed number that does not come from the stream [N]."""
        return self.bias_RN[0]

    def value_N(self, readout: int = 0) -> Tensor:
        """x . d / s + bias [N]: the logit (or difference) before any cap."""
        return self.total_RN[readout] + self.bias_RN[readout]


class PointRecorder:
    """Records one reading point in one run.

    Args:
        point: where the stream is read.
        readouts: the readings; the first is the one that is attributed.
        target_N: the target of every entry, on the CPU.
    """

    def __init__(self, point: ReadingPoint, readouts: Sequence[Readout], target_N: Tensor) -> None:
        self._point, self._readouts, self._target_N = point, readouts, target_N
        # Row 0 is the scale: it is read at the norm. The other rows are divided by it.
        self._rows = FixedRows(1 + len(readouts), len(target_N), point.dtype)
        self._misfits: list[Tensor] = []

    def taps(self, view: View) -> list[Tap]:
        """Return the taps for a run of the entries in view."""
        place, norm = self._point.norm_place, self._point.norm

        def see_stream(call: Call) -> None:
            x = call.activation
            for readout, out_N in zip(self._readouts, self._rows.on(x.device)[1:], strict=True):
                project(x, view, readout.directions, out_N)

        taps = [Tap(self._point.stream, see_stream)]
        if place is None or norm is None:
            return taps

        def see_norm(call: Call) -> None:
            x, y = call.entered, call.left
            self._misfits += frozen_scales(norm, x, y, view, self._rows.on(x.device)[0])

        def see_scale(scale: Tensor) -> None:
            self._rows.on(scale.device)[0].copy_(view.take(scale)[:, 0])

        return [*taps, Tap(place, see_norm, see_scale)]

    def finish(self) -> Reading:
        """Return the reading after a run."""
        rows = self._rows.gathered()
        scale_N, total_RN = rows[0], rows[1:]
        if self._point.norm_place is None:
            scale_N.fill_(1)
        target_N = self._target_N.to(rows.device)
        biases = [readout.bias_K.to(rows.device)[target_N] for readout in self._readouts]
        return Reading(
            scale_N, total_RN / scale_N, torch.stack(biases), norms.largest(self._misfits)
        )
