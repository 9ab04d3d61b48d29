"""Refuse tensors and strings that nothing here can read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, TokenError


def check_dense(value: Any, name: str) -> None:
    """Refuse a tensor whose values do not lie in memory one by one; let anything else pass.

    Args:
        value: what was given.
        name: of the argument, for the message.

    Raises:
        InputError: for a sparse, nested, masked, quantised or meta tensor.
    """
    if isinstance(value, Tensor):
        kind = _kind(value)
        if kind:
            instead = "to_dense() makes one" if kind == "sparse" else "its values cannot be read"
            raise InputError(f"{name} must be a plain tensor, got a {kind} one; {instead}")


def _kind(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_meta:
        return "meta"
    return "masked" if isinstance(tensor, torch.masked.MaskedTensor) else ""


def check_text(text: str, name: str) -> None:
    """Refuse a string with half of a character: tokenizers cannot read it.

    Args:
        text: the string.
        name: of the argument, for the message.

    Raises:
        TokenError: naming the first lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenError(
            f"{name} holds a lone surrogate ({text[error.start]!r} at {error.start}), which is "
            "half of a character; decode the text with errors='replace'"
        ) from None
