"""Activations of the selected positions, kept whole because the caller asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.mid_terms import MidStream
from dla_hooks.call import Inputs
from dla_hooks.errors import DecompositionError
from dla_hooks.inputs import positions
from dla_hooks.inputs.entries import Entries, one_target
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.projection.logit_hooks import hooks_logits
from dla_hooks.projection.tiles import View
from dla_hooks.residual.gains import times
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.hooked import changed_behind
from dla_hooks.residual.stream import Block, Stream, WriteSite
from dla_hooks.tolerance import misfit_tolerance


@dataclass
class Kept:
    """A plan of what to keep, and after :meth:`run` the activations [*batch_and_pos, d].

    Attributes:
        inputs: the model and its prompt.
        entries: the selected positions.
        view: the same, as an activation is read at them.
        check: whether what is computed is to be held against what the model did.
        autocast: whether the model was run under the caller's autocast.
    """

    inputs: Inputs
    entries: Entries
    view: View
    check: bool = True
    autocast: bool = field(default=False, init=False)
    _taps: list[Tap] = field(default_factory=list)
    _rows: dict[Any, Tensor] = field(default_factory=dict)
    _norms: dict[Any, norms.Norm] = field(default_factory=dict)
    _misfits: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs, pos_slice: Any, check: bool = True) -> Kept:
        """Keep nothing yet, at the positions of the reference's ``pos_slice``."""
        source = inputs.source
        chosen = positions.select(pos_slice, source.prompt.mask)
        entries = one_target(
            chosen.rows, chosen.cols, chosen.valid, source.prompt.shape, source.batched
        )
        return cls(inputs, entries, View(entries), check)

    @property
    def stream(self) -> Stream:
        """The located model."""
        return self.inputs.stream

    @property
    def live(self) -> bool:
        """Whether the model runs; otherwise a stored cache is read."""
        return self.inputs.source.has_logits

    @property
    def changes_behind(self) -> bool:
        """Whether the caller may change what stands behind the last stream, in this run."""
        return self.live and (hooks_logits(self.stream.unembed) or changed_behind(self.stream))

    def __getitem__(self, key: Any) -> Tensor:
        """What was kept under a key [*batch_and_pos, d]; NaN where a row has no token."""
        return self.entries.unfold(self._rows[key].T).movedim(0, -1)

    def flat(self, key: Any) -> Tensor:
        """The same for all selected tokens in a row [N, d]."""
        return self._rows[key]

    def take(self, x: Tensor) -> Tensor:
        """The selected tokens' rows [N, d] of an activation [batch, pos, d]."""
        return self.view.take(x)

    def run(self, columns: Tensor | None = None) -> Tensor | None:
        """Run the model once, or read the cache.

        Args:
            columns: where the model's own logits are wanted; None where they are not.

        Returns:
            Logits [batch, n_columns, vocabulary], from a run; None where none are wanted.

        Raises:
            DecompositionError: when a norm did something else than its form says.
        """
        self.autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        wanted = columns
        if self.changes_behind:  # hooks there see what they would see
            columns = torch.arange(self.entries.prompt_shape[1], device="cpu")
        logits = self.inputs.source.show(self.view, lambda _: self._taps, columns)
        if self.check:
            self._hold_norms()
        if logits is None or wanted is None:
            return None
        return logits if wanted is columns else logits[:, wanted.to(logits.device)]

    def watch(self, taps: Sequence[Tap]) -> bool:
        """Put further taps on the same run; False if a cache does not hold what they look at."""
        if any(self.inputs.source.missing(tap.place) is not None for tap in taps):
            return False
        self._taps += taps
        return True

    def block_input(self, block: Block) -> Any:
        """Keep the stream before a block; for a key."""
        return self._keep(self.stream.input_of(block))

    def start(self) -> Any:
        """Keep the beginning of the stream, ahead of what the caller's hooks write there."""
        return self._keep(self.stream.beginning)

    def hook(self, place: Place) -> Any:
        """Keep what the caller's hooks write at a place."""
        ahead = self._keep(place.ahead)
        key = (place.name, "hook", place.before, place.first, place.use.nth)

        def see(call: Call) -> None:
            self._rows[key] = self.take(call.activation) - self._rows[ahead]

        self._taps.append(Tap(place, see))
        return key

    def to_mid(self, place: int, mid: MidStream) -> Callable[[Tensor], Tensor]:
        """Keep what a block adds ahead of its mid stream; for a function from its input to that."""
        stream = self.stream
        writes = [self.write(w) for w in stream.blocks[place].writes[: len(mid.responses)]]
        hooks = [(self.hook(one.place), factor) for one, factor in mid.hooks(stream, place)]

        def of(x: Tensor) -> Tensor:
            x = mid.of(x, [self[write] for write in writes])
            for key, factor in hooks:
                x = x + times(self[key], factor)
            return x

        return of

    def last_stream(self) -> Any:
        """Keep what the final norm reads."""
        return self._keep(self.stream.last)

    def positions(self) -> Any:
        """Keep what positions add to the stream."""
        assert self.stream.positions is not None
        return self._keep(self.stream.positions)

    def write(self, write: WriteSite) -> Any:
        """Keep a write."""
        return self._keep(write.place)

    def heads(self, site: HeadSite) -> Any:
        """Keep z, its heads side by side."""
        return self._keep(site.place, site.z)

    def neurons(self, place: Place) -> Any:
        """Keep the activations that enter a down projection."""
        return self._keep(place)

    def at(self, place: Place) -> Any:
        """Keep what is seen at a place."""
        return self._keep(place)

    def norm(self, key: Any) -> norms.Norm:
        """The norm whose scale is kept under a key."""
        return self._norms[key]

    def scale(self, place: Place) -> Any:
        """Keep the scale that a norm divides by [*batch_and_pos, 1]."""
        key = (place.name, "scale", place.use.nth)
        if key in self._rows:
            return key
        stream = self.stream
        with stream.backend.without_user_hooks():
            norm = norms.probe(place.module, stream.d_model, place.name, stream.work_dtype)
        self._norms[key] = norm

        def see(call: Call) -> None:
            x, y = (self.take(t).to(stream.work_dtype) for t in (call.entered, call.left))
            scale_N, self._misfits[key] = norms.frozen_scale(norm, x, y)
            self._rows[key] = scale_N[:, None]

        def on_scale(scale: Tensor) -> None:
            self._rows[key] = self.take(scale)

        self._taps.append(Tap(place, see, on_scale))
        self._rows[key] = torch.empty(0, dtype=torch.float32, device="cpu")
        return key

    def _keep(self, place: Place, seen: Callable[[Call], Tensor] | None = None) -> Any:
        key = (place.name, place.before, place.first, place.use.nth)

        def see(call: Call) -> None:
            x = call.activation if seen is None else seen(call)
            self._rows[key] = self.take(x).clone()

        if key not in self._rows:
            self._taps.append(Tap(place, see))
            self._rows[key] = torch.empty(0, dtype=torch.float32, device="cpu")
        return key

    def _hold_norms(self) -> None:
        for (name, *_), misfit in self._misfits.items():
            unexplained = norms.largest([misfit])
            if not unexplained <= misfit_tolerance(self.stream.product_dtype):
                raise DecompositionError(
                    f"{name} did something else than gamma * (x - centre) / s + beta at one of the "
                    f"positions: {unexplained:.1e} of its output is unexplained. A hook that "
                    "changes what it puts out does this. Use check=False to have the numbers anyway"
                )
