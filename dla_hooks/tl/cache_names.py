"""The fewest activations that a cache needs for a unit."""

from __future__ import annotations

from typing import Any

from dla_hooks.backends import backend_of
from dla_hooks.errors import InputError
from dla_hooks.residual.stream import Stream
from dla_hooks.units import UNITS
from dla_hooks.verification.recognise import stream_of


def cache_names(model: Any, unit: str = "component") -> list[str]:
    """The fewest activations that a cache needs for a unit, as a ``names_filter``.

    >>> _, cache = model.run_with_cache(tokens, names_filter=cache_names(model, "head"))
    ...                                                              # doctest: +SKIP
    >>> direct_logit_attribution(model, cache=cache, answer_tokens=" Paris", unit="head")
    ...                                                              # doctest: +SKIP

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        unit: ``"component"``, ``"layer"`` or ``"head"``.

    Raises:
        InputError: for a model that keeps no caches, or another unit.
    """
    if unit not in UNITS:
        raise InputError(f"unit must be one of {tuple(UNITS)}, got {unit!r}")
    backend_of(model).check_cacheable()
    stream = stream_of(model)
    norm = _scale_name(stream)
    last = f"{stream.blocks[-1].name}.hook_resid_post"
    first = f"{stream.blocks[0].name}.hook_resid_pre"
    writes = [write.name for write in stream.writes]
    if unit == "head":
        heads = [write.heads for write in stream.writes if write.heads is not None]
        scales = [f"{site.post_norm_name}.hook_scale" for site in heads if site.post_norm]
        return [*(site.name for site in heads), *scales, last, *norm]
    if unit == "layer":
        return [first, *writes, *norm]
    embeds = [] if stream.positions is None else [stream.positions.name]
    return ["hook_embed", *embeds, *writes, *norm]


def _scale_name(stream: Stream) -> list[str]:
    """The final norm's scale; a model without a final norm has none."""
    return (
        [f"{stream.final_norm.name}.hook_scale"]
        if hasattr(stream.final_norm.module, "hook_scale")
        else []
    )
