"""The way from inside of a sublayer to the stream: a post-norm, and hooks of the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.norms import Norm
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.hook_writes import HookWrites
from dla_hooks.projection.kernels import frozen_scales
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View


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
        at_output: what stands before the post-norm is projected on these.
        places: every place on the way, with what is projected on there.
    """

    def __init__(
        self,
        in_stream: Directions,
        modules: Sequence[Place],
        post_norm: Place | None = None,
        norm: Norm | None = None,
    ) -> None:
        self.in_stream, self.post_norm, self.norm = in_stream, post_norm, norm
        self.at_output = in_stream if norm is None else in_stream.then(norm.pull_back)
        found = {place.module: (place, self.at_output) for place in modules}
        if post_norm is not None:
            found[post_norm.module] = post_norm, in_stream
        self.places = list(found.values())

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
        self._scale = FixedRows(1, n_entries, dtype)
        self._misfits = list[Tensor]()
        hooked = [(place, d) for place, d in way.places if is_hooked(place)]
        self._hooks = HookWrites(hooked, n_entries, dtype) if hooked else None

    def taps(self, view: View) -> list[Tap]:
        """What to watch while the entries in view are run."""
        taps = [] if self._hooks is None else self._hooks.taps(view)
        place, norm = self._way.post_norm, self._way.norm
        if place is None or norm is None:
            return taps

        def see(call: Call) -> None:
            x, y = call.entered, call.left
            self._misfits += frozen_scales(norm, x, y, view, self._scale.row(0, x.device))

        def see_scale(scale: Tensor) -> None:
            self._scale.row(0, scale.device).copy_(view.take(scale)[:, 0])

        return [*taps, Tap(place.ahead, see, see_scale)]

    def finish(self, final_N: Tensor, entries: Entries) -> OnTheWay:
        """What the run had.

        Args:
            final_N: the final norm's scale.
            entries: all entries.
        """
        way, device = self._way, final_N.device
        scale_N = final_N
        if way.norm is not None:
            scale_N = final_N * self._scale.gathered(device)[0]
        hooks_N = beta_N = None
        if self._hooks is not None:
            pairs = zip(self._hooks.places, self._hooks.finish(device), strict=True)
            each = [w / (final_N if p == way.post_norm else scale_N) for (p, _), w in pairs]
            hooks_N = torch.stack(each).sum(0)
        if way.beta_M is not None:
            beta_K = way.in_stream.of_constant(way.beta_M).to(device)
            beta_N = entries.of_target(beta_K) / final_N
        return OnTheWay(scale_N, hooks_N, beta_N)

    def norms(self) -> list[tuple[str, float]]:
        """The post-norm, with what its form leaves unexplained."""
        place = self._way.post_norm
        return [] if place is None else [(place.name, norms.largest(self._misfits))]
