"""The way from inside of a sublayer to the stream: a post-norm, and hooks of the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.hooks import Place, Tap
from dla_hooks.modules.norms import Norm
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.tiles import View
from dla_hooks.projection.ways import NormScales, Step, Way, WayHooks


class WayOut:
    """What stands between a sublayer's last map and the stream.

    Args:
        in_stream: what the sublayer's write is projected on.
        modules: the outputs of these stand before the post-norm.
        post_norm: that norm, or None.
        norm: its constants.

    Attributes:
        in_stream: the same.
        post_norm: the same.
        norm: the same.
        way: the same as steps.
        places: every place on the way, with the number of the step that follows it.
    """

    def __init__(
        self,
        in_stream: Directions,
        modules: Sequence[Place],
        post_norm: Place | None = None,
        norm: Norm | None = None,
    ) -> None:
        self.in_stream, self.post_norm, self.norm = in_stream, post_norm, norm
        steps = [] if norm is None else [Step(norm.pull_back, post_norm, norm)]
        self.way = Way(steps, in_stream)
        found = {place.module: (place, 0) for place in modules}
        if post_norm is not None:
            found[post_norm.module] = post_norm, len(steps)
        self.places = list(found.values())

    @property
    def at_output(self) -> Directions:
        """What stands before the post-norm is projected on these."""
        return self.way.directions[0]

    @property
    def beta_M(self) -> Tensor | None:
        """What the post-norm adds, or None."""
        return None if self.norm is None or not bool(self.norm.beta.any()) else self.norm.beta


@dataclass(frozen=True)
class OnTheWay:
    """What one run had on the way.

    Attributes:
        scale_N: what all that stands before the post-norm is divided by: its scale times the final
            norm's.
        hooks_N: what the caller's hooks wrote, in logits; None without any.
        beta_N: what the post-norm added, in logits; None where it adds nothing.
    """

    scale_N: Tensor
    hooks_N: Tensor | None
    beta_N: Tensor | None


class WayRecorder:
    """What stands on the way in one run.

    Args:
        way: the way.
        n_entries: number of entries.
        dtype: of the numbers.
    """

    def __init__(self, way: WayOut, n_entries: int, dtype: torch.dtype) -> None:
        self._way = way
        self._scales = NormScales([way.way], n_entries, dtype)
        self._hooks = WayHooks([(way.way, way.places)], self._scales, n_entries, dtype)

    def taps(self, view: View) -> list[Tap]:
        """What to watch while the entries in view are run."""
        return [*self._hooks.taps(view), *self._scales.taps(view)]

    def finish(self, final_N: Tensor, entries: Entries) -> OnTheWay:
        """What the run had.

        Args:
            final_N: the final norm's scale.
            entries: all entries.
        """
        way, device = self._way, final_N.device
        self._scales.finish(device)
        scale_N = self._scales.ahead(final_N, way=0, start=0)
        written_N = self._hooks.finish(device).get(0)
        hooks_N = None if written_N is None else written_N / final_N
        beta_N = None
        if way.beta_M is not None:
            beta_K = way.in_stream.of_constant(way.beta_M).to(device)
            beta_N = entries.of_target(beta_K) / final_N
        return OnTheWay(scale_N, hooks_N, beta_N)

    def norms(self) -> list[tuple[str, float]]:
        """The post-norm, with what its form leaves unexplained."""
        return self._scales.largest_misfits()
