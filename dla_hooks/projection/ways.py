"""The way from a module inside of a sublayer to the stream: linear maps, norms and factors.

A direction in the stream is pulled back through all of them. The scales of norms are frozen at what
they are in the run, and divided out after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.norms import Norm
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.hook_writes import HookWrites
from dla_hooks.projection.kernels import frozen_scales
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View


@dataclass(frozen=True)
class Step:
    """One step on the way.

    Attributes:
        pull_back: directions behind it as directions ahead of it; a norm's without its scale.
        place: its module; None for a factor.
        norm: its constants, if it is a norm.
        constant: what it adds by itself [width]: a bias; None is nothing.
    """

    pull_back: Callable[[Tensor], Tensor]
    place: Place | None = None
    norm: Norm | None = None
    constant: Tensor | None = None


class Way:
    """The steps from a module to the stream, in order.

    Args:
        steps: the steps.
        in_stream: the directions behind the last.

    Attributes:
        steps: the same.
        directions: ahead of each step, and behind the last.
    """

    def __init__(self, steps: Sequence[Step], in_stream: Directions) -> None:
        self.steps, found = tuple(steps), [in_stream]
        for step in reversed(self.steps):
            found.append(found[-1].then(step.pull_back))
        self.directions = found[::-1]

    def norms_from(self, start: int) -> list[int]:
        """Which of the steps from one on are norms."""
        return [n for n in range(start, len(self.steps)) if self.steps[n].norm is not None]


class NormScales:
    """Records the scales of the norms on some ways.

    Args:
        ways: the ways.
        n_entries: number of entries.
        dtype: of the scales.

    Attributes:
        misfits: by the norm's name what its form leaves unexplained of its output.
    """

    def __init__(self, ways: Sequence[Way], n_entries: int, dtype: torch.dtype) -> None:
        self._norms = [(w, n) for w, way in enumerate(ways) for n in way.norms_from(0)]
        self._ways, self.misfits = ways, dict[str, list[Tensor]]()
        self._rows = FixedRows(len(self._norms), n_entries, dtype)
        self._found: Tensor | None = None

    def taps(self, view: View) -> list[Tap]:
        """A tap on every norm."""
        return [
            self._tap(row, self._ways[w].steps[n], view) for row, (w, n) in enumerate(self._norms)
        ]

    def finish(self, device: torch.device) -> None:
        """All scales, after the run."""
        self._found = self._rows.gathered(device)

    def divide(self, numbers: Tensor, way: int, start: int) -> Tensor:
        """Numbers [..., N] that stand ahead of a step, through all norms from there on."""
        assert self._found is not None
        for row, (w, n) in enumerate(self._norms):
            if w == way and n >= start:
                numbers = numbers / self._found[row]
        return numbers

    def ahead(self, behind_N: Tensor, way: int, start: int) -> Tensor:
        """What numbers ahead of a step are divided by, where those in the stream are by another."""
        assert self._found is not None
        for row, (w, n) in enumerate(self._norms):
            if w == way and n >= start:
                behind_N = behind_N * self._found[row]
        return behind_N

    def _tap(self, row: int, step: Step, view: View) -> Tap:
        place, norm = step.place, step.norm
        assert place is not None
        assert norm is not None

        def see(call: Call) -> None:
            x, y = call.entered, call.left
            misfits = frozen_scales(norm, x, y, view, self._rows.row(row, x.device))
            self.misfits.setdefault(place.name, []).extend(misfits)

        def see_scale(scale: Tensor) -> None:
            self._rows.row(row, scale.device).copy_(view.take(scale)[:, 0])

        return Tap(place.ahead, see, see_scale)

    def largest_misfits(self) -> list[tuple[str, float]]:
        """The largest misfit of each norm, by its name."""
        return [(name, norms.largest(found)) for name, found in self.misfits.items()]


class WayHooks:
    """Records what the caller's hooks write on the ways of some sublayers.

    Args:
        ways: each with the places on it, and the number of the step that follows each.
        scales: of the norms on the same ways.
        n_entries: number of entries.
        dtype: of the numbers.
    """

    def __init__(
        self,
        ways: Sequence[tuple[Way, Sequence[tuple[Place, int]]]],
        scales: NormScales,
        n_entries: int,
        dtype: torch.dtype,
    ) -> None:
        self._scales = scales
        self._on: dict[int, tuple[HookWrites, list[int]]] = {}
        for number, (way, places) in enumerate(ways):
            hooked = [(place, after) for place, after in places if is_hooked(place)]
            if hooked:
                writes = [(place, way.directions[after]) for place, after in hooked]
                after_each = [after for _, after in hooked]
                self._on[number] = HookWrites(writes, n_entries, dtype), after_each

    def taps(self, view: View) -> list[Tap]:
        """Two taps for each place with hooks."""
        return [tap for writes, _ in self._on.values() for tap in writes.taps(view)]

    def finish(self, device: torch.device) -> dict[int, Tensor]:
        """What they wrote [N], by the number of the way, if it has any; all scales are known."""
        found = {}
        for number, (writes, after) in self._on.items():
            rows = zip(writes.finish(device), after, strict=True)
            divided = [self._scales.divide(row_N, number, start) for row_N, start in rows]
            found[number] = torch.stack(divided).sum(0)
        return found
