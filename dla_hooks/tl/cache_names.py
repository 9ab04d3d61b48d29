"""The fewest activations that a cache needs for a unit, by the names of their hook points."""

from __future__ import annotations

from typing import Any

from dla_hooks.backends import backend_of
from dla_hooks.modules.hooks import Place
from dla_hooks.residual.stream import Stream
from dla_hooks.units import DEFAULT_UNIT, read_units
from dla_hooks.verification.recognise import stream_of


def cache_names(model: Any, unit: Any = DEFAULT_UNIT) -> list[str]:
    """The fewest activations that a cache needs for a unit, as a ``names_filter``.

    >>> _, cache = model.run_with_cache(tokens, names_filter=cache_names(model, "head"))
    ...                                                              # doctest: +SKIP
    >>> direct_logit_attribution(model, cache=cache, answer_tokens=" Paris", unit="head")
    ...                                                              # doctest: +SKIP

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        unit: a unit, or several, as for :func:`direct_logit_attribution`.

    Raises:
        InputError: for a model that keeps no caches, or another unit.
    """
    units, _ = read_units(unit)
    backend_of(model).check_cacheable()
    stream = stream_of(model)
    places = [place for one in units.values() for place in one.places(stream)]
    names = [_name_of(stream, place) for place in places]
    if hasattr(stream.final_norm.module, "hook_scale"):  # a model may have no final norm
        names.append(f"{stream.final_norm.name}.hook_scale")
    return list(dict.fromkeys(names))


def _name_of(stream: Stream, place: Place) -> str:
    """The hook point under which a cache holds what is seen at a place."""
    if place == stream.last:
        return f"{stream.blocks[-1].name}.hook_resid_post"
    if place.before:  # a block's input
        return f"{place.name}.hook_resid_pre"
    return f"{place.name}.hook_scale" if hasattr(place.module, "hook_scale") else place.name
