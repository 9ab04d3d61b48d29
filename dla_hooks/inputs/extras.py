"""What a mapping holds besides token ids and a mask: further arguments of the model's forward.

They belong to the prompt. The real run is given them, and made-up runs never are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError
from dla_hooks.inputs.forms import as_tensor

EMBEDS, MASK, POSITIONS = "inputs_embeds", "attention_mask", "position_ids"

_BY_COLUMN = {"token_type_ids", "mm_token_type_ids"}
"""Arguments of the shape [batch, pos]."""
OF_TEXT = frozenset({EMBEDS, MASK, POSITIONS, "token_type_ids"})
"""Arguments that say more of a text. All others bring something else: an image, a sound."""
_SET_HERE = (
    "says what the model returns, which is set here",
    (
        *("use_cache", "return_dict", "logits_to_keep", "num_logits_to_keep"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
    ),
)
_EARLIER = (
    "goes on from an earlier run, whose tokens no part would show; give the whole prompt",
    ("past_key_values", "past_key_value", "cache_params", "state", "cache", "cache_position"),
)
_LOSS = (
    "makes a loss, and no logit",
    ("labels", "shift_labels", "start_positions", "end_positions", "num_items_in_batch"),
)
NEVER = {name: reason for reason, names in (_SET_HERE, _EARLIER, _LOSS) for name in names}
"""Arguments that no prompt brings along, each with the reason."""


def split_mapping(input: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Token ids (None with ``inputs_embeds``), mask, and everything else in a mapping.

    Raises:
        InputError: for a mapping with neither ids nor embeddings, or with both; for arguments
            that no prompt brings along.
    """
    given = {str(name): value for name, value in input.items() if value is not None}
    for name in given:
        if name in NEVER:
            raise InputError(f"input holds {name}, which {NEVER[name]}; leave it out")
    ids = given.pop("input_ids", None)
    if ids is None and EMBEDS not in given:
        raise InputError(
            f"input is a mapping without 'input_ids' (or 'inputs_embeds'); it has {sorted(given)}"
        )
    if ids is not None and EMBEDS in given:
        raise InputError(
            "input holds both input_ids and inputs_embeds, which stands in for them; give one"
        )
    return ids, given.pop(MASK, None), given


def is_whole_mask(mask: Any) -> bool:
    """Whether a mask says for each pair of positions whether one reads the other."""
    return isinstance(mask, Mapping) or getattr(mask, "ndim", 0) == 4


def embeddings(value: Any) -> Tensor:
    """Embeddings [batch, pos, d].

    Raises:
        InputError: for any other form.
    """
    found = as_tensor(value, EMBEDS)
    if found.ndim == 2:
        found = found[None]
    if found.ndim != 3 or not found.is_floating_point():
        raise InputError(
            "inputs_embeds must hold floating-point vectors [batch, pos, d], got "
            f"{found.dtype} of shape {list(found.shape)}"
        )
    if found.numel() == 0:
        raise InputError("the prompt is empty: there is no position to attribute")
    return found


def sized(extras: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
    """Further arguments as tensors, where they hold numbers, of sizes that fit the prompt.

    Args:
        extras: by the names of the forward's arguments.
        mask: True at the real tokens [batch, pos].

    Raises:
        ShapeMismatchError: for one that does not fit.
    """
    found = {name: _tensors(value, name) for name, value in extras.items()}
    batch, width = shape = len(mask), mask.shape[1]
    for name in found.keys() & {*_BY_COLUMN, POSITIONS}:
        if isinstance(found[name], list):  # rows of different lengths, padded as the ids are
            found[name] = _padded(found[name], mask)
    for name, value in found.items():
        if name == MASK:
            for whole in value.values() if isinstance(value, Mapping) else [value]:
                _check_whole_mask(whole, shape)
        elif name == POSITIONS:
            if not isinstance(value, Tensor) or value.is_floating_point():
                raise InputError("position_ids must hold integers [batch, pos]")
            found[name] = value = value[None] if value.ndim == 1 else value
            if value.ndim not in (2, 3) or value.shape[-1] != width:
                _mismatch(name, value, f"[batch, pos] = {[batch, width]}")
            if value.shape[-2] not in (1, batch):
                _mismatch(name, value, f"[batch, pos] = {[batch, width]}")
        elif name in _BY_COLUMN:
            if isinstance(value, Tensor) and value.ndim == 1:
                found[name] = value = value[None]
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                _mismatch(name, value, f"[batch, pos] = {[batch, width]}")
    return found


def moved(value: Any, device: torch.device) -> Any:
    """The same on a device: a tensor, or all in a list, tuple or mapping."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(one, device) for one in value)
    if isinstance(value, Mapping):
        return {name: moved(one, device) for name, one in value.items()}
    return value


def described(extras: Mapping[str, Any]) -> str:
    """Names and shapes, for messages."""
    return ", ".join(
        f"{name} {list(value.shape)}" if isinstance(value, Tensor) else name
        for name, value in extras.items()
    )


def _tensors(value: Any, name: str) -> Any:
    """Numbers as tensors. Flags stay as they are, and lists of tensors of several sizes lists."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _tensors(one, name) for key, one in value.items()}
    if not isinstance(value, (list, tuple)) and not hasattr(value, "__array__"):
        return value
    try:
        return as_tensor(value, name)
    except InputError:
        return [_tensors(one, name) for one in value] if isinstance(value, list) else value


def _padded(rows: list[Any], mask: Tensor) -> Any:
    """Rows as long as the prompt's, laid where its real tokens are; others as they are."""
    real = mask.sum(-1).tolist()
    if not all(isinstance(row, Tensor) and row.ndim == 1 for row in rows):
        return rows
    if [len(row) for row in rows] != real:
        return rows
    found = torch.zeros(mask.shape, dtype=rows[0].dtype, device="cpu")
    found[mask] = torch.cat(rows)
    return found


def _check_whole_mask(mask: Any, shape: tuple[int, int]) -> None:
    batch, width = shape
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise InputError("a mapping of masks must hold masks [batch, 1, pos, pos] only")
    fits = mask.shape[0] in (1, batch) and tuple(mask.shape[2:]) == (width, width)
    if not fits:
        _mismatch(MASK, mask, f"[batch, 1, pos, pos] = {[batch, 1, width, width]}")
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise InputError(
            f"a mask with 4 axes is added to the attention scores, or is one of bools; "
            f"{mask.dtype} would add its ones. Give floats (0 and a large negative number) or bools"
        )


def _mismatch(name: str, value: Any, expected: str) -> None:
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ShapeMismatchError(f"{name} has shape {got}, where {expected} is expected")
