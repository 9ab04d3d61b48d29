"""What made-up runs are given beside tokens, where a model needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.linear import input_width
from dla_hooks.modules.vjp import dtype_of

_N_VECTORS = 3


def with_vectors(prompt: Prompt, argument: str | None, unembed: Callable[[], nn.Module]) -> Prompt:
    """The prompt with vectors for cross-attention to read, the same ones each time.

    Args:
        prompt: made up.
        argument: of the forward; None leaves the prompt as it is.
        unembed: for the model's width and dtype.
    """
    if argument is None or argument in prompt.extras:
        return prompt
    generator = torch.Generator().manual_seed(9)
    head = unembed()
    shape = (len(prompt.input_ids), _N_VECTORS, input_width(head))
    vectors = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    vectors[1:] = vectors[:1].clone()  # rows of a batch are compared with each other
    return replace(prompt, extras={**prompt.extras, argument: vectors.to(dtype_of(head))})
