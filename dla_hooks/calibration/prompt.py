"""The short synthetic prompt that measurements run on."""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.inputs.prompts import Prompt
from dla_hooks.residual.stream import Stream

_N_VECTORS = 3


def short_prompt(stream: Stream, batch: int = 1, length: int = 4) -> Prompt:
    """Make a prompt of a few tokens spread over the vocabulary, the same ones each time.

    None is a BOS, an EOS or the pad token: models read these in ways of their own.
    """
    length = min(length, stream.position_limit or length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = stream.backend.n_tokens()
    ids = torch.randint(vocabulary, (batch, length), generator=generator, device="cpu")
    special = _special(stream)
    for _ in range(len(special)):
        ids = torch.where(torch.isin(ids, special), (ids + 1) % vocabulary, ids)
    return Prompt(ids, torch.ones_like(ids, dtype=torch.bool), made_up_vectors(stream, batch))


def made_up_vectors(stream: Stream, batch: int) -> dict[str, Tensor]:
    """Vectors [batch, n, d_model] for cross-attention to read, each row the same, if it needs any.

    They are given by the name of the forward's argument.
    """
    argument = stream.architecture.reads
    if argument is None:
        return {}
    generator = torch.Generator().manual_seed(9)
    shape = (1, _N_VECTORS, stream.d_model)
    vectors = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return {argument: vectors.expand(batch, -1, -1).to(stream.dtype)}


def _special(stream: Stream) -> Tensor:
    """The ids [n] that the model's config has a name for."""
    named = (stream.backend.number(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    several = (one if isinstance(one, (list, tuple)) else [one] for one in named)
    found = {token for tokens in several for token in tokens if isinstance(token, int)}
    return torch.tensor(sorted(found), dtype=torch.long, device="cpu")
