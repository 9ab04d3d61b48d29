"""Activations of the selected positions, kept whole because the caller asks for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.call import Inputs
from dla_hooks.inputs import positions
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import ONLY_USE, Tap, Use, tapped
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
    _taps: list[Tap] = field(default_factory=list)
    _values: dict[Any, Tensor] = field(default_factory=dict)
    _norms: dict[Any, norms.Norm] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs, pos_slice: Any) -> Kept:
        """Nothing yet, at the positions of the reference's ``pos_slice``."""
        prompt = inputs.prompt
        chosen = positions.select(positions.parse(pos_slice, prompt.shape[1]), prompt.mask)
        none = torch.zeros_like(chosen.cols)
        entries = Entries(chosen.rows, chosen.cols, none, chosen.valid, prompt.shape)
        entries.batched = inputs.replay is None or inputs.replay.batched
        return cls(inputs, entries)

    @property
    def stream(self) -> Stream:
        """The located model."""
        return self.inputs.stream

    def __getitem__(self, key: Any) -> Tensor:
        return self._values[key]

    def run(self) -> Kept:
        """Run the model once, or read the cache."""
        inputs = self.inputs
        if inputs.replay is not None:
            inputs.replay.play(self._taps)
            return self
        with tapped(self._taps):
            inputs.stream.backend.forward(inputs.prompt, None)
        return self

    def block_input(self, block: Block) -> Any:
        """Keep the stream before a block; for a key."""
        if block.layer == 0 and self.stream.start is not None:
            name = self.stream.architecture.start or ""
            return self._keep(self.stream.start, name, ONLY_USE, before=False)
        return self._keep(block.module, block.name, block.use, before=True)

    def last_stream(self) -> Any:
        """Keep what the final norm reads."""
        stream = self.stream
        runs = stream.final_norm_runs
        use = Use(runs - 1, runs)
        return self._keep(stream.final_norm, stream.final_norm_name, use, before=True)

    def positions(self) -> Any:
        """Keep what positions add to the stream."""
        assert self.stream.positions is not None
        name = self.stream.architecture.positions or ""
        return self._keep(self.stream.positions, name, ONLY_USE, before=False)

    def write(self, write: WriteSite) -> Any:
        """Keep a write."""
        return self._keep(write.written_by, write.name, write.use, before=False)

    def heads(self, write: WriteSite, site: HeadSite) -> Any:
        """Keep z, its heads side by side."""
        return self._keep(site.proj, site.name, write.use, site=site)

    def neurons(self, module: nn.Module, name: str, use: Use) -> Any:
        """Keep the activations that enter a down projection."""
        return self._keep(module, name, use, before=True)

    def norm(self, key: Any) -> norms.Norm:
        """The norm whose scale is kept under a key."""
        return self._norms[key]

    def scale(self, module: nn.Module, name: str, use: Use) -> Any:
        """Keep the scale that a norm divides by [*batch_and_pos, 1]."""
        key = (name, "scale")
        stream = self.stream
        with stream.backend.without_user_hooks():
            norm = norms.probe(module, stream.d_model, name, stream.work_dtype)
        self._norms[key] = norm

        def see(x: Tensor, y: Tensor) -> None:
            rows = [self.entries.take(t, slice(None)).to(stream.work_dtype) for t in (x, y)]
            scale_N, _ = norms.frozen_scale(norm, *rows)
            self._values[key] = self._unfold(scale_N[:, None])

        def on_scale(scale: Tensor) -> None:
            self._values[key] = self._unfold(self.entries.take(scale, slice(None)))

        if not self._planned(key):
            self._taps.append(Tap(module, name, see, use=use, on_scale=on_scale))
            self._values[key] = torch.empty(0)
        return key

    def _keep(
        self,
        module: nn.Module,
        name: str,
        use: Use,
        *,
        before: bool = True,
        site: HeadSite | None = None,
    ) -> Any:
        key = (name, before, use.nth)

        def see(x: Tensor, y: Tensor) -> None:
            seen = site.z(x, y) if site is not None else x if before else y
            self._values[key] = self._unfold(self.entries.take(seen, slice(None)).clone())

        if not self._planned(key):
            self._taps.append(Tap(module, name, see, before and site is None, use))
            self._values[key] = torch.empty(0)
        return key

    def _planned(self, key: Any) -> bool:
        return key in self._values

    def _unfold(self, rows_ND: Tensor) -> Tensor:
        return self.entries.unfold(rows_ND.T).movedim(0, -1)
