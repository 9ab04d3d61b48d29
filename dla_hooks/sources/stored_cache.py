"""Activations from a stored ``ActivationCache`` instead of a run.

The taps are the same. Each is shown what the cache holds under its name, or what follows from
other entries: the stream before a block is the one after the block before, the last stream is the
sum of all that was written, attention's write is the difference of the streams around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.errors import CacheEntryError, InputError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.norms import frozen_scale
from dla_hooks.modules.vjp import dtype_of, past_hooks
from dla_hooks.projection.kernels import tiles
from dla_hooks.projection.tiles import View
from dla_hooks.residual.gains import times
from dla_hooks.residual.stream import Block, Stream, coarsest
from dla_hooks.sources.base import Source

_NORMS = ("ln1", "ln2")
"""The norms before a block's attention and its MLP, as TransformerLens names them."""


def check_cache(model: Any, cache: Any) -> None:
    """Refuse what is no cache, or another model's.

    Raises:
        InputError: naming what was given.
    """
    if not all(hasattr(cache, name) for name in ("cache_dict", "has_batch_dim", "model")):
        raise InputError(
            f"cache must be an ActivationCache, as model.run_with_cache(...) returns it, got "
            f"{type(cache).__name__}"
        )
    if cache.model is not model:
        raise InputError(
            "the cache was made by another model object than the one given; pass the model that "
            "made it (cache.model)"
        )


class StoredCache(Source):
    """A cache as the source of activations, in place of a forward pass.

    Args:
        cache: the ``ActivationCache``; never written to.
        stream: the located model.
        purpose: what reads it, for messages: the name of a unit, or several in a tuple; None is
            a stack.
        each_write: whether every write is needed by itself; otherwise all that a block added may
            be shown as its last write.
    """

    has_logits = of_a_run = False

    def __init__(self, cache: Any, stream: Stream, purpose: Any, each_write: bool = True) -> None:
        self._cache, self._stream = cache, stream
        self._purpose, self._each_write = purpose, each_write
        self.batched = bool(cache.has_batch_dim)
        self._block = {block.name: block for block in stream.blocks}
        self._writes = {write.name: write for write in stream.writes}
        self.prompt = self._prompt()

    def on(self, stream: Stream) -> StoredCache:
        """The same cache, read by what was measured of its model anew."""
        return StoredCache(self._cache, stream, self._purpose, self._each_write)

    def dtype(self) -> torch.dtype:
        """The coarsest dtype of its entries: a cache may have been converted to save memory."""
        found = {v.dtype for v in self._cache.cache_dict.values() if v.is_floating_point()}
        return max(found, key=lambda one: torch.finfo(one).eps, default=torch.float64)

    def missing(self, place: Place) -> CacheEntryError | None:
        """Why a place cannot be shown: its hook point was not kept, and follows from no other."""
        try:
            self._read(place)
        except CacheEntryError as error:
            return error
        return None

    def show(
        self,
        view: View,
        taps: Callable[[View], list[Tap]],
        columns: Tensor | None,
        until: Place | None = None,
        before: Callable[[View], list[Tap]] | None = None,
    ) -> None:
        """Show every tap its activation. A cache holds no logits.

        Raises:
            CacheEntryError: (a KeyError) for one that the cache does not hold; it names it.
        """
        self.play(taps(view))

    def play(self, taps: Iterable[Tap]) -> None:
        """Show some taps their activations; see :meth:`show`."""
        with torch.no_grad():
            for tap in taps:
                place = tap.place
                if tap.on_scale is not None and hasattr(place.module, "hook_scale"):
                    tap.on_scale(self._entry(f"{place.name}.hook_scale"))
                else:
                    tap.on_activation(Call.of(self._read(place)))

    def own_scale(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The scale that the final norm gives the last stream, as the entries have it."""
        stream, place = self._stream, self._stream.final_norm
        if not hasattr(place.module, "hook_scale"):  # a model may have no final norm
            return None
        x, norm = self._last(), norm_at(stream, place)
        dtype = dtype_of(place.module)
        scale_N = torch.empty(len(view), dtype=stream.work_dtype, device=x.device)
        rounding_N = torch.zeros_like(scale_N)
        terms = [] if self._keeps_last() else [self._write(name) for name in self._writes]
        eps = torch.finfo(coarsest((x.dtype, stream.stream_dtype))).eps * len(terms) ** 0.5
        with torch.no_grad(), stream.backend.without_user_hooks(), past_hooks(place.module):
            for x_TM, tile in tiles(x, view, stream.work_dtype):
                y_TM = place.module.forward(x_TM[None].to(dtype))[0].to(x_TM)
                scale_N[tile.index], _ = frozen_scale(norm, x_TM.to(dtype).to(x_TM), y_TM)
        for term in terms:  # large terms may cancel
            size_N = view.take(term.norm(dim=-1, keepdim=True))[:, 0].to(rounding_N)
            rounding_N = torch.maximum(rounding_N, size_N * eps)
        return scale_N, rounding_N / stream.d_model**0.5

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """A question mark for each token: a cache does not say which tokens it had."""
        batch, width = self.prompt.shape
        return [["?"] * width for _ in range(batch)]

    def _prompt(self) -> Prompt:
        """A prompt of the cache's shape."""
        # Any of these has the axes [batch, pos, ...], whatever else was kept.
        norm, last = self._stream.final_norm.name, self._stream.blocks[-1].name
        for name in (f"{norm}.hook_scale", f"{last}.hook_resid_post", *self._writes):
            if name in self._cache.cache_dict:
                ids = torch.zeros(self._entry(name).shape[:2], dtype=torch.long, device="cpu")
                return Prompt(ids, torch.ones_like(ids, dtype=torch.bool))
        raise self._missing(f"{norm}.hook_scale")

    def _read(self, place: Place) -> Tensor:
        name = place.name
        holder, _, norm = name.rpartition(".")
        if name == self._stream.final_norm.name or norm in _NORMS:
            if not place.before and hasattr(place.module, "hook_normalized"):
                return self._entry(f"{name}.hook_normalized")
            if norm not in _NORMS:
                return self._last()
            if norm == "ln1":
                return self._before(self._block[holder])
            return self._entry(f"{holder}.hook_resid_mid")
        if place.before and name in self._block:
            return self._before(self._block[name])
        if name in self._writes:
            return self._write(name)
        return self._entry(name)

    def _before(self, block: Block) -> Tensor:
        names = [f"{block.name}.hook_resid_pre"]
        if block.layer:
            names.append(f"{self._stream.blocks[block.layer - 1].name}.hook_resid_post")
        for name in names:
            if name in self._cache.cache_dict:
                return self._entry(name)
        if block.layer or "hook_embed" not in self._cache.cache_dict:
            raise self._missing(names[0])
        start = self._entry("hook_embed")
        if self._stream.positions is not None:
            positions = self._entry(self._stream.positions.name)
            start = start + times(positions, self._stream.positions_response)
        return start

    def _keeps_last(self) -> bool:
        return f"{self._stream.blocks[-1].name}.hook_resid_post" in self._cache.cache_dict

    def _last(self) -> Tensor:
        stream = self._stream
        name = f"{stream.blocks[-1].name}.hook_resid_post"
        if self._keeps_last():
            return self._entry(name)
        try:
            x = self._before(stream.blocks[0])
            for block in stream.blocks:
                x = times(x, block.gain)
                for write in block.writes:
                    x = x + times(self._write(write.name), write.response)
                if block.constant is not None:
                    x = x + block.constant.to(x)
        except CacheEntryError as error:
            raise CacheEntryError(f"{self._missing(name)}. Without it, {error}") from None
        return x

    def _write(self, name: str) -> Tensor:
        """A write, or what the streams around it say of it."""
        if name in self._cache.cache_dict:
            return self._entry(name)
        write = self._writes[name]
        block = self._stream.blocks[write.layer]
        if not self._each_write and mid_streams(self._stream)[block.layer] is None:
            # Only where the block ends is shown: all that it added may stand in its last write.
            added = self._after(block) - times(self._before(block), block.gain)
            return added if write is block.writes[-1] else torch.zeros_like(added)
        plain = block.gain is None and block.constant is None and len(block.writes) <= 2
        if not plain or any(other.response is not None for other in block.writes):
            raise self._missing(name)
        mid = f"{block.name}.hook_resid_mid"
        try:
            if len(block.writes) == 1:
                return self._after(block) - self._before(block)
            if mid not in self._cache.cache_dict:
                raise self._missing(name)
            if write is block.writes[0]:
                return self._entry(mid) - self._before(block)
            return self._after(block) - self._entry(mid)
        except CacheEntryError:
            raise self._missing(name) from None

    def _after(self, block: Block) -> Tensor:
        names = [f"{block.name}.hook_resid_post"]
        if block is not self._stream.blocks[-1]:
            names.append(f"{self._stream.blocks[block.layer + 1].name}.hook_resid_pre")
        for name in names:
            if name in self._cache.cache_dict:
                return self._entry(name)
        raise self._missing(names[0])

    def _entry(self, name: str) -> Tensor:
        if name not in self._cache.cache_dict:
            raise self._missing(name)
        value: Tensor = self._cache.cache_dict[name].detach()
        return value if self.batched else value[None]

    def _missing(self, name: str) -> CacheEntryError:
        if self._purpose is None:
            return CacheEntryError(
                f"the cache has no {name!r}, which this stack reads. Keep it: "
                "model.run_with_cache(tokens) without a names_filter, or with one that names it"
            )
        return CacheEntryError(
            f"the cache has no {name!r}, which unit={self._purpose!r} reads. Keep it: "
            "model.run_with_cache(tokens, names_filter="
            f"dla_hooks.cache_names(model, {self._purpose!r})), or no names_filter at all"
        )
