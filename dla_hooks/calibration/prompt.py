"""The short synthetic prompt that measurements run on."""

from __future__ import annotations

import torch

from dla_hooks.inputs.prompts import Prompt
from dla_hooks.residual.stream import Stream


def short_prompt(stream: Stream, batch: int = 1, length: int = 4) -> Prompt:
    """Make a prompt of a few tokens spread over the vocabulary, the same ones each time."""
    length = min(length, stream.position_limit or length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = stream.backend.n_tokens()
    ids = torch.randint(vocabulary, (batch, length), generator=generator, device="cpu")
    return Prompt(ids, torch.ones_like(ids, dtype=torch.bool))
