"""Reading points: a place of the stream, and the norm after it.

    logit_t = cap( k * (W_U[t] . P(N(x)) + b_t) ),   N(x) = gamma * (x - centre(x)) / s + beta

with P the (rare) linear modules between the norm and the unembedding. With s frozen at its actual
value this is ``x . d / s + bias``. A reading point measures s and the projections of the whole
stream. The parts of the stream are measured separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from dla_hooks.inputs.entries import Entries
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.norms import Norm
from dla_hooks.modules.user_hooks import FINAL_HOOK, LOGIT_HOOK, is_hooked
from dla_hooks.projection.hook_writes import HookWrites
from dla_hooks.projection.kernels import frozen_scales, project, project_squares
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.logit_hooks import LogitHooks, hooks_logits
from dla_hooks.projection.one_column import AtOnce, OneColumn, both
from dla_hooks.projection.output_hooks import OutputHooks, Outputs
from dla_hooks.projection.readout import Readout
from dla_hooks.projection.tiles import View


@dataclass(frozen=True)
class ReadingPoint:
    """A place of the stream, with the norm that reads it.

    Attributes:
        stream: the stream that is read: the final norm's input.
        norm_place: the norm after it, or None where the stream is read without one.
        norm: that norm's constants.
        dtype: of all contractions.
        unembed: the module that makes logits of what is read, or None.
        rounds: whether the stream is added up in 16 bits. Its size, by which rounding is judged, is
            then measured.
        outputs: the modules whose output holds what comes behind the stream.
    """

    stream: Place
    norm_place: Place | None
    norm: Norm | None
    dtype: torch.dtype
    unembed: nn.Module | None = None
    rounds: bool = False
    outputs: Outputs = field(default_factory=Outputs)


@dataclass(frozen=True)
class Reading:
    """The numbers measured at a reading point.

    Attributes:
        scale_N: the norm's scale at every entry; ones where there is no norm.
        total_RN: x . d / s for each readout: what the whole stream contributes.
        bias_RN: what each readout has besides.
        hooks_RN: what the caller's hooks add behind the stream, at the norm's output and at the
            logits; by the label of its row.
        misfit: the largest part of the norm's output that its form leaves unexplained.
        size_N: the root of the sum of (x * d / s)^2 over the channels, in which roundings of the
            channels add up; None where it was not asked for.
    """

    scale_N: Tensor
    total_RN: Tensor
    bias_RN: Tensor
    misfit: float
    hooks_RN: Mapping[str, Tensor] = field(default_factory=dict)
    size_N: Tensor | None = None

    @cached_property
    def _value_RN(self) -> Tensor:
        return sum(self.hooks_RN.values(), self.total_RN + self.bias_RN)

    @cached_property
    def total_N(self) -> Tensor:
        """Contribution of the whole stream to the attributed number [N]."""
        return self.total_RN[0]

    @cached_property
    def bias_N(self) -> Tensor:
        """Part of the attributed number that does not come from the stream [N]."""
        return self.bias_RN[0]

    @cached_property
    def _values(self) -> Sequence[Tensor]:
        return self._value_RN.unbind()

    @cached_property
    def whole_N(self) -> Tensor:
        """Contribution of the whole stream and of hooks behind it to the attributed number [N]."""
        return sum((added_RN[0] for added_RN in self.hooks_RN.values()), self.total_N)

    def value_N(self, readout: int = 0) -> Tensor:
        """x . d / s + bias [N], and what hooks add: the logit (or difference) before any cap."""
        return self._values[readout]


class PointRecorder:
    """Records one reading point in one run.

    Args:
        point: where the stream is read.
        readouts: the readings; the first is the one that is attributed.
        entries: what is read.
        by_itself: whether the stream is shown at its own place. Otherwise it is read, where it is
            the norm's input, when the norm has run.
    """

    def __init__(
        self,
        point: ReadingPoint,
        readouts: Sequence[Readout],
        entries: Entries,
        by_itself: bool = True,
    ) -> None:
        self._point, self._readouts, self._entries = point, readouts, entries
        place = point.norm_place
        self._with_norm = not by_itself and place is not None and point.stream == place.entered
        # The scale comes first: it is read where the norm is, and all else is divided by it there.
        # The size comes last.
        self._rows = FixedRows(1 + len(readouts) + point.rounds, len(entries), point.dtype)
        self._misfits: list[Tensor] = []
        self._behind: HookWrites | None = None
        if place is not None and is_hooked(place):
            read = [(place, one.behind()) for one in readouts if one.behind is not None]
            self._behind = HookWrites(read, len(entries), point.dtype)
        self._logits: LogitHooks | None = None
        if point.unembed is not None and hooks_logits(point.unembed):
            self._logits = LogitHooks(point.unembed, readouts, entries, point.dtype)
        self._outputs: OutputHooks | None = None
        outputs = point.outputs.hooked()
        if outputs:
            self._outputs = OutputHooks(outputs, readouts, entries, point.dtype)

    @property
    def needs_all_logits(self) -> bool:
        """Whether the model's logits are needed at every entry: hooks of the caller's add there."""
        return self._logits is not None or self._outputs is not None

    def taps(self, view: View) -> list[Tap]:
        """Return the taps for a run of the entries in view."""
        place, norm = self._point.norm_place, self._point.norm

        def see_stream(call: Call) -> None:
            see(call.activation)

        def see(x: Tensor) -> None:
            for number, readout in enumerate(self._readouts, start=1):
                project(x, view, readout.directions, self._rows.row(number, x.device))
            if self._point.rounds:
                size_N = self._rows.row(-1, x.device)
                project_squares(x, view, self._readouts[0].directions, size_N)

        at_once: AtOnce | None = None
        norm_at_once: AtOnce | None = None
        one, directions = OneColumn.of(view), self._readouts[0].directions
        stream, taps = self._point.stream, list[Tap]()
        if one is not None and len(self._readouts) == 1 and not self._point.rounds:
            entered = stream.before or self._with_norm
            at_once = one.project(directions, self._rows, 1, entered=entered)
        if one is not None and norm is not None:
            norm_at_once = one.scale(norm, directions, self._rows, self._misfits)
        if self._with_norm:
            norm_at_once = both(norm_at_once, at_once)
        else:
            taps.append(Tap(stream, see_stream, at_once=at_once))
        if self._logits is not None:
            taps += self._logits.taps(view)
        if self._behind is not None:
            taps += self._behind.taps(view)
        if self._outputs is not None:
            taps += self._outputs.taps(view)
        if place is None or norm is None:
            return taps

        def see_norm(call: Call) -> None:
            x, y = call.entered, call.left
            if self._with_norm:
                see(x)
            self._misfits += frozen_scales(norm, x, y, view, self._rows.row(0, x.device))

        def see_scale(scale: Tensor) -> None:
            self._rows.row(0, scale.device).copy_(view.take(scale)[:, 0])

        return [*taps, Tap(place.ahead, see_norm, see_scale, at_once=norm_at_once)]

    def again(self) -> bool:
        """Make ready for another run; False where hooks of the caller's are looked at."""
        self._misfits.clear()
        beside = (self._behind, self._logits, self._outputs)
        return all(one is None for one in beside) and self._rows.again()

    def finish(self) -> Reading:
        """Return the reading after a run."""
        rows = self._rows.gathered()
        scale_N, total_RN = rows[0], rows[1 : 1 + len(self._readouts)]
        if self._point.norm_place is None:
            scale_N.fill_(1)
        of_target = (self._entries.of_target(one.bias_K.to(rows.device)) for one in self._readouts)
        biases = [bias_N.expand_as(scale_N) for bias_N in of_target]
        bias_RN = torch.stack(biases)  # a copy: a result is its caller's to write to
        hooks = dict[str, Tensor]()
        if self._behind is not None:
            hooks[FINAL_HOOK] = self._behind.finish(rows.device)
        if self._logits is not None:
            hooks[LOGIT_HOOK] = self._logits.finish(rows.device)
        outputs = {} if self._outputs is None else self._outputs.finish(rows.device)
        for label, added_RN in outputs.items():
            hooks[label] = added_RN + hooks.get(label, 0)
        misfit = norms.largest(self._misfits)
        size_N = rows[-1].sqrt() / scale_N if self._point.rounds else None
        return Reading(scale_N, total_RN / scale_N, bias_RN, misfit, hooks, size_N)
