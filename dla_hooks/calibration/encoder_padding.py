"""Measures whether padding of what an encoder reads leaves the decoder's logits as they are.

Position tables count it, and some models count positions by the pad token's own id. So it is
measured with what stands under the mask: the pad token, or others.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dla_hooks.backends.readouts import n_embedded
from dla_hooks.backends.two_sequences import encoder_embedding
from dla_hooks.calibration.invariance import alike, has_hole
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.inputs.extras import MASK
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.inputs.two_sequences import IDS
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream

_known: Remembered[bool] = Remembered()
_LEFT, _RIGHT, _MIDDLE = "on the left", "on the right", "in its middle"
_AHEAD = {_LEFT: 0, _RIGHT: 4, _MIDDLE: 2}
"""How many of four made-up tokens stand ahead of the padding."""


def check_encoder_padding(stream: Stream, prompt: Prompt) -> None:
    """Refuse padding of an encoder's tokens that would change the logits of a row.

    Args:
        stream: the located model.
        prompt: with what the encoder reads.

    Raises:
        UnsupportedModelError: naming the side.
    """
    ids, mask = ((prompt.encoder or {}).get(name) for name in (IDS, MASK))
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return
    real = mask.bool()
    found = {_LEFT: real[:, 0], _RIGHT: real[:, -1], _MIDDLE: ~has_hole(real)}
    pad = stream.backend.number("pad_token_id")
    fill = pad if isinstance(pad, int) and bool((ids[~real] == pad).all()) else None
    for where, whole in found.items():
        measure = partial(_is_ignored, stream, where, fill)
        key = where, fill
        if bool(whole.all()) or _known.of(stream.model, stream.version, measure, key):
            continue
        raise UnsupportedModelError(
            f"{stream.backend.name} gives other logits when what its encoder reads is padded "
            f"{where} than without: position tables count the padding. Pad the other side, or run "
            "inputs of different lengths one at a time"
        )


def _is_ignored(stream: Stream, where: str, fill: int | None) -> bool:
    """Run some made-up tokens with padding and without.

    Args:
        stream: the located model.
        where: the padding stands.
        fill: the token under the mask; None is any other.
    """
    n_tokens = n_embedded(encoder_embedding(stream.backend.root)) or stream.backend.n_tokens()
    made_up = short_prompt(stream, length=4)
    alone = made_up.input_ids % n_tokens
    under = torch.full((1, 2), int(alone[0, 1]) if fill is None else fill, device="cpu")
    ahead = _AHEAD[where]
    padded = torch.cat((alone[:, :ahead], under, alone[:, ahead:]), 1)
    real = torch.ones_like(padded)
    real[:, ahead : ahead + 2] = 0
    given = (alone, torch.ones_like(alone)), (padded, real)
    with torch.no_grad():
        one, other = (
            stream.backend.run_synthetic(
                Prompt(made_up.input_ids, made_up.mask, encoder={IDS: ids, MASK: mask}), None
            ).double()
            for ids, mask in given
        )
    return alike(stream, one, other)
