"""The cache of earlier tokens that a model of transformers hands on from chunk to chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dla_hooks.backends.readouts import entry
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.signature import Arguments

_CACHES = {
    "cache": ("cache",),
    "past_key_values": ("cache", "past_key_values"),
    "cache_params": ("cache", "cache_params"),
    "state": ("state",),
}
"""Arguments that take the cache of earlier tokens, and the output's names for the same cache.

transformers 5.24 renamed the second and the third to the first. Its outputs rename them in models
of other people's, too, whose arguments stay as they were.
"""

_EXACT_LAYERS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
"""Layers of transformers' caches that keep unchanged all that later tokens read."""


_OF_TWO = ("self_attention_cache", "cross_attention_cache")
"""What the cache of an encoder-decoder holds."""


def caches_in(output: Any, accepted: Arguments, name: str) -> dict[str, Any]:
    """The arguments for the next chunk.

    Args:
        output: of the model, for the chunk before.
        accepted: the arguments that its forward takes.
        name: of its class, for messages.

    Raises:
        UnsupportedModelError: where it hands on none, or one that is not known to be exact.
    """
    # The model makes the cache that suits it: sliding windows, states, whatever it needs.
    found: dict[str, Any] = {}
    for argument in (one for one in _CACHES if one in accepted):
        handed_on = (entry(output, one) for one in _CACHES[argument])
        cache = next((cache for cache in handed_on if cache is not None), None)
        if cache is not None:
            found[argument] = cache
    if not found:
        raise UnsupportedModelError(f"{name} hands on no cache of what it has read")
    unknown = {type(layer).__name__ for layer in _layers(found)} - _EXACT_LAYERS
    if unknown:
        raise UnsupportedModelError(
            f"its cache ({', '.join(sorted(unknown))}) is not known to be exact; sparse "
            "attention, for example, picks other tokens where scores tie"
        )
    return found


def _layers(caches: Mapping[str, Any]) -> Iterator[Any]:
    for cache in caches.values():
        for one in (cache, *(getattr(cache, name, None) for name in _OF_TWO)):
            yield from getattr(one, "layers", ())
