"""Token ids in the forms that callers have them in: tensors, arrays, lists, lists of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError


def is_array(value: Any) -> bool:
    """Whether a value holds numbers: a tensor, an array, or a list or tuple."""
    return isinstance(value, (Tensor, list, tuple)) or hasattr(value, "__array__")


def as_tensor(value: Any, name: str, what: str = "one tensor") -> Tensor:
    """Numbers as a tensor.

    Args:
        value: a tensor, an array, or a (nested) list or tuple of numbers.
        name: of the argument, for messages.
        what: the numbers are, for messages.

    Raises:
        InputError: for what does not become one tensor.
    """
    try:
        if isinstance(value, (list, tuple)) and any(hasattr(one, "__array__") for one in value):
            return torch.stack([as_tensor(one, name, what) for one in value])
        # `torch.as_tensor` would warn of an array that cannot be written to.
        found = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name} cannot be read as {what}: {error}") from None
    return found.detach()


def as_ids(value: Any, attention_mask: Any, name: str = "input") -> tuple[Tensor, Any]:
    """Token ids as a tensor [pos] or [batch, pos], with their mask.

    Args:
        value: a tensor, an array, a list or tuple of ids, or a list of such rows. Rows of
            different lengths are padded on the left.
        attention_mask: the caller's. For rows of different lengths it is made, and what is given
            must be rows of ones, as a tokenizer returns them.
        name: of the argument, for messages.

    Raises:
        InputError: for what cannot be read as ids.
        ShapeMismatchError: for a mask of other lengths.
    """
    if not isinstance(value, (list, tuple)) or not any(map(is_array, value)):
        return as_tensor(value, name, "token ids"), attention_mask
    rows = [as_tensor(row, f"row {i} of {name}", "token ids") for i, row in enumerate(value)]
    for i, row in enumerate(rows):
        if row.ndim != 1:
            raise InputError(
                f"row {i} of {name} must be a list of token ids, got shape {list(row.shape)}; "
                "give ids [pos] or [batch, pos]"
            )
        if not len(row):
            raise InputError(f"row {i} of {name} is empty: there is no position to attribute")
        check_integers(row)
    lengths = [len(row) for row in rows]
    if len(set(lengths)) == 1:
        return torch.stack(rows), attention_mask
    if attention_mask is not None:
        _check_ones(attention_mask, lengths)
    return pad_left(rows)


def check_integers(ids: Tensor) -> None:
    """Refuse floats and bools.

    Raises:
        InputError: naming their dtype.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, got a tensor of {ids.dtype}")


def pad_left(rows: Sequence[Tensor], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Lay rows of ids [pos] side by side, right ends aligned.

    Returns:
        Ids [batch, pos], and a mask of that shape that is True at the real ones.
    """
    return _padded(rows, filler, on_left=True)


def pad_right(rows: Sequence[Tensor], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Lay rows of ids [pos] side by side, left ends aligned; see :func:`pad_left`."""
    return _padded(rows, filler, on_left=False)


def _padded(rows: Sequence[Tensor], filler: int, *, on_left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler, dtype=torch.long, device="cpu")
    mask = torch.zeros(len(rows), width, dtype=torch.bool, device="cpu")
    for row, own in enumerate(rows):
        place = slice(width - len(own), width) if on_left else slice(len(own))
        ids[row, place] = own
        mask[row, place] = True
    return ids, mask


def _check_ones(attention_mask: Any, lengths: list[int]) -> None:
    given = [as_tensor(row, "attention_mask") for row in attention_mask]
    if [row.numel() for row in given] != lengths or not all(
        bool((row == 1).all()) for row in given
    ):
        raise ShapeMismatchError(
            f"the rows of input have {lengths} tokens and are padded for you, but attention_mask "
            "is not one 1 for each of them; leave it out"
        )
