"""Whether a model scales its logits ahead of the unembedding (T5) or behind it (Cohere)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.modules.hooks import Place, Tap, tapped
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream

_known: Remembered[float] = Remembered()


def scale_behind(stream: Stream) -> float:
    """The factor of the logits that the model puts behind its unembedding.

    What hooks add at the unembedding's output is multiplied by it, and by nothing else.

    Args:
        stream: the located model, with its scales.

    Raises:
        UnsupportedModelError: for a model that does not run on made-up tokens.
    """
    if stream.logit_scale == 1:
        return 1.0
    version = stream.backend.state.version
    measure = partial(_measured, stream)
    return _known.of(stream.model, version, measure, stream.architecture)


def _measured(stream: Stream) -> float:
    seen: list[Tensor] = []
    place = Place(stream.unembed, "the unembedding")
    with tapped([Tap(place, lambda call: seen.append(call.left[0, -1].double().cpu()))]):
        logits = stream.backend.run_synthetic(short_prompt(stream), None)[0, -1].double().cpu()
    out = seen[0][: len(logits)]
    if stream.softcap is not None:
        logits = stream.softcap * torch.atanh(logits / stream.softcap)
    if stream.logit_bias is not None:
        logits = logits - stream.logit_scale * stream.logit_bias.double().cpu()[: len(logits)]
    usable = torch.isfinite(out) & torch.isfinite(logits)
    factor = float(out[usable] @ logits[usable] / out[usable].square().sum())
    return 1.0 if abs(factor - 1) < abs(factor - stream.logit_scale) else stream.logit_scale
