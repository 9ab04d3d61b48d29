"""How the token embeddings enter the stream: what a hook of the caller's writes to them becomes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import Call, Tap, tapped
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream

_known: Remembered[Entering] = Remembered()


class Entering(NamedTuple):
    """How the token embeddings enter the stream.

    Attributes:
        is_linear: whether the stream's beginning is a sum with them as one of the terms; False
            where a norm or a projection stands between.
        factor: what they are multiplied by there, [] or [d_model]; None is one.
    """

    is_linear: bool
    factor: Tensor | None = None


def embeddings_enter(stream: Stream) -> Entering:
    """Measure how the token embeddings enter the stream, once per model.

    The embeddings of a few tokens are replaced: by zeros, by +-1, and by noise. The first two show
    the factor of every channel. The third shows whether that is all there is.
    """
    return _known.of(stream.model, stream.version, lambda: _measure(stream.whole))


def _measure(stream: Stream) -> Entering:
    prompt = short_prompt(stream, batch=3, length=2)
    prompt.input_ids.copy_(prompt.input_ids[:1, :1].expand_as(prompt.input_ids))
    generator = torch.Generator("cpu").manual_seed(6)
    noise = torch.randn(stream.d_model, generator=generator, dtype=torch.float64, device="cpu")
    noise = noise.to(torch.bfloat16).double()
    signs = noise.sign()
    given = torch.stack((torch.zeros_like(noise), signs, noise))[:, None]
    fits, seen = list[bool](), list[Tensor]()

    def replaced(x: Tensor) -> Tensor:
        fits.append(tuple(x.shape) == (3, 2, stream.d_model))
        return given.expand(x.shape).to(x, copy=True) if fits[-1] else x

    def keep(call: Call) -> None:
        seen.append(call.activation.detach().double().cpu()[:, -1])

    edit = Edit(stream.embedding.module, replaced)
    with tapped([Tap(stream.beginning, keep)]), edited([edit]):
        stream.backend.run_synthetic(prompt, None)
    if fits != [True] or seen[0].shape != (3, stream.d_model):
        return Entering(False)
    of_signs, of_noise = seen[0][1:] - seen[0][:1]
    factor = of_signs * signs
    size = seen[0].abs().amax()  # what both are differences of
    rounding = 1e-5 + 4 * torch.finfo(stream.stream_dtype).eps
    if not bool(((of_noise - factor * noise).abs() <= rounding * (size + of_noise.abs())).all()):
        return Entering(False)
    if bool((factor - 1).abs().max() <= rounding * (1 + size)):
        return Entering(True)
    return Entering(True, factor.to(stream.work_dtype))
