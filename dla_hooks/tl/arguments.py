"""Arguments that several methods of the TransformerLens-shaped face take: flags, BOS, token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError, TokenError
from dla_hooks.inputs.plain import check_dense


def check_flag(value: Any, name: str) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {type(value).__name__}: {value!r:.80}")


def check_bos(prepend_bos: Any) -> None:
    """Refuse what is neither True, False nor None."""
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise InputError(
            "prepend_bos must be True, False, or None for cfg.default_prepend_bos; got "
            f"{type(prepend_bos).__name__}: {prepend_bos!r:.80}"
        )


def read_ids(value: Any, name: str, vocabulary: int) -> Tensor:
    """Token ids of any shape, on the CPU.

    Args:
        value: an int, a list, an array or a tensor.
        name: the argument's, for messages.
        vocabulary: how many tokens there are.

    Raises:
        InputError: for what holds no ids.
        TokenError: for an id outside the vocabulary.
    """
    check_dense(value, name)
    try:
        ids = torch.as_tensor(value, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} must hold token ids, got {type(value).__name__}: {value!r:.80}"
        ) from error
    if ids.numel() == 0:
        return ids.long()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"{name} must hold integer token ids, got {ids.dtype}: {value!r:.80}")
    ids = ids.long()
    bad = ids[(ids < 0) | (ids >= vocabulary)]
    if bad.numel():
        raise TokenError(
            f"{name} holds token id {int(bad[0])}, which is outside the vocabulary "
            f"(0 to {vocabulary - 1})"
        )
    return ids


def one_row(ids: Tensor, name: str) -> Tensor:
    """Ids [pos] or [1, pos] as [pos].

    Raises:
        ShapeMismatchError: for several rows.
    """
    if ids.ndim > 1 and ids.numel() != ids.shape[-1]:
        raise ShapeMismatchError(
            f"{name} must be one row of tokens, [pos] or [1, pos]; got {list(ids.shape)}"
        )
    return ids.reshape(-1)


def is_int(value: Any) -> bool:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
