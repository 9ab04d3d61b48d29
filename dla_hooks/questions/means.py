"""The mean of what parts write, over the real tokens of some prompts, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dla_hooks.calibration.named_parts import NamedPart
from dla_hooks.errors import HookError
from dla_hooks.inputs.entries import one_target
from dla_hooks.inputs.positions import select
from dla_hooks.modules.experts import ExpertsCall, ExpertsTap
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.projection.tiles import View
from dla_hooks.questions.ablation import Part
from dla_hooks.sources.base import Source


class Means:
    """The sums of some parts over the real tokens of one prompt or batch, while it runs.

    No activation outlives the module that made it: each part keeps one vector.

    Args:
        parts: the parts.
        source: the run.
    """

    def __init__(self, parts: Sequence[Part], source: Source) -> None:
        every = select(None, source.prompt.mask)
        entries = one_target(
            every.rows, every.cols, every.valid, source.prompt.shape, True, every.mask
        )
        self.view, self._n = View(entries), len(entries)
        self._parts, self._sums = parts, dict[str, Tensor]()

    def taps(self, view: View) -> list[Tap]:
        """What to watch while the positions in view are run."""
        return [self._tap(part, view) for part in self._parts]

    def finish(self) -> dict[str, Tensor]:
        """The mean of each part [width], by its label."""
        return {label: sum_M / self._n for label, sum_M in self._sums.items()}

    def _tap(self, part: Part, view: View) -> Tap:
        if isinstance(part, NamedPart) and part.experts is not None:
            if part.experts.side_by_side:
                return Tap(part.place, self._see_side_by_side(part, view))
            tap = ExpertsTap(part.place, lambda call: self._ask(tap, part, call, view))
            return tap

        def see(call: Call) -> None:
            self._add(part.label, view.take(part.seen(call)))

        return Tap(part.place, see)

    def _see_side_by_side(self, part: NamedPart, view: View) -> Callable[[Call], None]:
        experts = part.experts
        assert experts is not None

        def see(call: Call) -> None:
            self._add(
                part.label, view.take(call.left.unflatten(0, (experts.n, -1))[experts.number])
            )

        return see

    def _ask(self, tap: ExpertsTap, part: NamedPart, call: Call, view: View) -> None:
        """Ask the expert for the positions that go to it, times their routing weights."""
        seen = ExpertsCall.read(call.args, call.kwargs)
        assert part.experts is not None
        if seen is None:
            raise HookError(f"{part.place.name} was called otherwise than in a short run")
        number, k = part.experts.number, seen.index.shape[-1]
        index_TK = view.take(seen.index.reshape(-1, k))
        entry_P, slot_P = (index_TK == number).nonzero().unbind(-1)
        if not len(entry_P):
            self._add(part.label, call.left.new_zeros(0, call.left.shape[-1]))
            return
        hidden_PD = view.take(seen.hidden).index_select(0, entry_P)
        with tap.as_it_ran():
            out_PM = seen.again(
                part.place.module, hidden_PD, index_TK[entry_P, slot_P], part.experts.slots
            )
        weights_P = view.take(seen.weights.reshape(-1, k))[entry_P, slot_P]
        self._add(part.label, out_PM * weights_P[:, None].to(out_PM))

    def _add(self, label: str, values_TM: Tensor) -> None:
        wide = torch.promote_types(values_TM.dtype, torch.float32)
        sum_M = values_TM.sum(0, dtype=wide)
        old = self._sums.get(label)
        self._sums[label] = sum_M if old is None else old.to(sum_M.device) + sum_M


def means_of(parts: Sequence[Part], source: Source) -> dict[str, Tensor]:
    """Run the model once; the mean of each part [width], by its label."""
    means = Means(parts, source)
    source.show(means.view, means.taps, None)
    return means.finish()
