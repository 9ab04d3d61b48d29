"""An encoder's output that stands for what it reads, in any form that holds its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from dla_hooks.errors import InputError

ENCODED = "encoder_outputs"
"""The argument that an encoder's output is given as, where the encoder has run before."""


class Vectors(BaseModelOutput):
    """An encoder's output that has its vectors, and no mask, router's logits or loss."""

    def __getattr__(self, name: str) -> None:
        if not name.endswith(("_mask", "_logits", "_probs", "_loss")):
            raise AttributeError(name)


def vectors_of(value: Any) -> Tensor | None:
    """The vectors that an encoder's output holds, or None."""
    if isinstance(value, Mapping):
        value = value.get("last_hidden_state", next(iter(value.values()), None))
    elif isinstance(value, Sequence) and value:
        value = value[0]
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def encoder_output(value: Any) -> Any:
    """An encoder's output as models read it, from its vectors alone, a tuple or a mapping.

    Raises:
        InputError: where it holds no vectors [batch, position, width].
    """
    vectors = vectors_of(value)
    if vectors is None or vectors.ndim != 3 or not vectors.numel():
        shape = "" if vectors is None else f" with vectors of shape {list(vectors.shape)}"
        raise InputError(
            f"{ENCODED} must hold the encoder's vectors [batch, position, width], as the model's "
            f"encoder returns them; got {type(value).__name__}{shape}"
        )
    # Some models read it by name, and some by number: this class has both.
    return value if isinstance(value, ModelOutput) else Vectors(last_hidden_state=vectors)
