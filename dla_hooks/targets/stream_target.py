"""Readings of the stream that are no logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.modules.hooks import Place
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.reading_point import ReadingPoint
from dla_hooks.projection.readout import Readout
from dla_hooks.residual.stream import Stream, coarsest
from dla_hooks.targets.base import Target, Witness
from dla_hooks.tolerance import is_coarse


class StreamTarget(Target):
    """A linear reading of the stream, checked by what the model itself makes of it.

    Args:
        stream: the located model's stream, up to the reading point.
        norm: the norm behind it, or None.
        v_KM: directions [n, d_model], which read the norm's output.
        witness: what the model computes, apart; None is the norm's own output.
        name: what is read, for results.
        bias_K: what the reading has besides [n]; None is nothing.
    """

    reads_logits = False

    def __init__(
        self,
        stream: Stream,
        norm: Place | None,
        v_KM: Tensor,
        witness: Witness | None,
        name: str,
        bias_K: Tensor | None = None,
    ) -> None:
        self.stream, self.witness, self.reading = stream, witness, name
        dtype = stream.work_dtype
        rounds = is_coarse(coarsest((stream.stream_dtype, stream.write_dtype)))
        v_KM = v_KM.to(dtype)
        d_KM, bias = v_KM, v_KM.new_zeros(len(v_KM)) if bias_K is None else bias_K.to(v_KM)
        constants = None if norm is None else norm_at(stream, norm)
        behind = Directions.held(v_KM)
        if norm is not None and constants is not None:
            d_KM = constants.pull_back(v_KM)
            bias = bias + v_KM @ constants.beta.to(v_KM)
            if witness is None:
                self.witness = Witness(norm, lambda call: call.left, behind)
        self.point = ReadingPoint(stream.last, norm, constants, dtype, rounds=rounds)
        self.readouts = [Readout(Directions.held(d_KM), bias, lambda: behind)]

    def names(self, entries: Any, tokenizer: Any) -> tuple[list[str], list[str] | None]:
        """What is read."""
        return [self.reading or type(self).__name__], None
