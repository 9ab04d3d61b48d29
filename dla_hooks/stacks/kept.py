"""Activations of the selected positions, kept whole because the caller asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dla_hooks.call import Inputs
from dla_hooks.inputs import positions
from dla_hooks.inputs.entries import Entries, one_target
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.projection.tiles import View
from dla_hooks.residual.stream import Block, HeadSite, Stream, WriteSite


@dataclass
class Kept:
    """A plan of what to keep, and after :meth:`run` the activations [*batch_and_pos, d].

    Attributes:
        inputs: the model and its prompt.
        entries: the selected positions.
    """

    inputs: Inputs
    entries: Entries
    _view: View
    _taps: list[Tap] = field(default_factory=list)
    _values: dict[Any, Tensor] = field(default_factory=dict)
    _norms: dict[Any, norms.Norm] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs, pos_slice: Any) -> Kept:
        """Nothing yet, at the positions of the reference's ``pos_slice``."""
        prompt = inputs.source.prompt
        chosen = positions.select(positions.parse(pos_slice, prompt.shape[1]), prompt.mask)
        entries = one_target(
            chosen.rows, chosen.cols, chosen.valid, prompt.shape, inputs.source.batched
        )
        return cls(inputs, entries, View(entries))

    @property
    def stream(self) -> Stream:
        """The located model."""
        return self.inputs.stream

    def __getitem__(self, key: Any) -> Tensor:
        return self._values[key]

    def run(self) -> Kept:
        """Run the model once, or read the cache."""
        self.inputs.source.show(self._view, lambda _: self._taps, None)
        return self

    def block_input(self, block: Block) -> Any:
        """Keep the stream before a block; for a key."""
        return self._keep(self.stream.input_of(block))

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
        return self._keep(place.entered)

    def norm(self, key: Any) -> norms.Norm:
        """The norm whose scale is kept under a key."""
        return self._norms[key]

    def scale(self, place: Place) -> Any:
        """Keep the scale that a norm divides by [*batch_and_pos, 1]."""
        key = (place.name, "scale")
        stream = self.stream
        with stream.backend.without_user_hooks():
            norm = norms.probe(place.module, stream.d_model, place.name, stream.work_dtype)
        self._norms[key] = norm

        def see(call: Call) -> None:
            both = call.entered, call.left
            rows = [self._view.take(t, slice(None)).to(stream.work_dtype) for t in both]
            scale_N, _ = norms.frozen_scale(norm, *rows)
            self._values[key] = self._unfold(scale_N[:, None])

        def on_scale(scale: Tensor) -> None:
            self._values[key] = self._unfold(self._view.take(scale, slice(None)))

        if not self._planned(key):
            self._taps.append(Tap(place, see, on_scale))
            self._values[key] = torch.empty(0)
        return key

    def _keep(self, place: Place, seen: Callable[[Call], Tensor] | None = None) -> Any:
        key = (place.name, place.before, place.use.nth)

        def see(call: Call) -> None:
            x = call.activation if seen is None else seen(call)
            self._values[key] = self._unfold(self._view.take(x, slice(None)).clone())

        if not self._planned(key):
            self._taps.append(Tap(place, see))
            self._values[key] = torch.empty(0)
        return key

    def _planned(self, key: Any) -> bool:
        return key in self._values

    def _unfold(self, rows_ND: Tensor) -> Tensor:
        return self.entries.unfold(rows_ND.T).movedim(0, -1)
