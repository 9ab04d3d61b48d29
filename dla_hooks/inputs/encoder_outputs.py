"""An encoder's output that stands for what it reads, in any form that holds its vectors."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from dla_hooks.errors import InputError
from dla_hooks.modules.outputs import tensor_in

ENCODED = "encoder_outputs"
"""The argument that an encoder's output is given as, where the encoder has run before."""


class Vectors(BaseModelOutput):
    """An encoder's output that has its vectors, and no mask, router's logits or loss."""

    def __getattr__(self, name: str) -> None:
        if not name.endswith(("_mask", "_logits", "_probs", "_loss")):
            raise AttributeError(name)


def encoder_output(value: Any) -> Any:
    """An encoder's output as models read it, from its vectors alone, a tuple or a mapping.

    Raises:
        InputError: where it holds no vectors [batch, position, width].
    """
    vectors = tensor_in(value)
    if vectors is None or vectors.ndim != 3 or not vectors.numel():
        shape = "" if vectors is None else f" with vectors of shape {list(vectors.shape)}"
        raise InputError(
            f"{ENCODED} must hold the encoder's vectors [batch, position, width], as the model's "
            f"encoder returns them; got {type(value).__name__}{shape}"
        )
    # Some models read it by name, and some by number: this class has both.
    return value if isinstance(value, ModelOutput) else Vectors(last_hidden_state=vectors)
