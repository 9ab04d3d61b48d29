"""What a model and a prompt are known by in another process."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.batches import Item
from dla_hooks.kinds import Kind
from dla_hooks.weights import stored

_PIECE = 2**20  # entries summed at once: their wide copies are a few MiB
# Where a model came from and what it runs on do not change its numbers.
_INCIDENTAL = {"_name_or_path", "transformers_version", "device", "n_devices"}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of_config(kind: Kind) -> str:
    """A digest of the model's configuration."""
    config: Any = getattr(kind.model, "config", None)
    if config is None:
        config = kind.model.cfg
    fields = getattr(config, "to_diff_dict", config.to_dict)()
    kept = {str(key): value for key, value in fields.items() if key not in _INCIDENTAL}
    return _digest(json.dumps(kept, sort_keys=True, default=_name_of).encode())


def of_weights(kind: Kind) -> str:
    """A digest of every weight, the same on any device, in any process.

    The entries' bits are summed as whole numbers, so that the order of summation leaves no trace.
    All weights are read once, a piece at a time.
    """
    whole = hashlib.sha256()
    for path, module in kind.modules():
        for name in _saved(module):
            values = stored(module, name)
            if values is not None:
                form = f"{path}.{name} {values.dtype} {list(values.shape)} {_bits(values)}\n"
                whole.update(form.encode())
    return whole.hexdigest()[:32]


def of_item(item: Item) -> bytes:
    """A digest of one prompt and its answers: 16 bytes."""
    wrong = None if item.incorrect is None else item.incorrect.tolist()
    parts = [item.ids.tolist(), item.correct.tolist(), wrong]
    return bytes.fromhex(_digest(json.dumps(parts).encode()))


def _saved(module: nn.Module) -> list[str]:
    """The names of a module's own weights: what a checkpoint would hold of it."""
    buffers = set(module._buffers) - module._non_persistent_buffers_set
    return [*module._parameters, *sorted(buffers)]


def _bits(values: Tensor) -> int:
    """The sum of the entries' bit patterns."""
    flat = values.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    words = flat.view(_WORDS[flat.element_size()])
    sums = [piece.sum(dtype=torch.int64) for piece in words.split(_PIECE)]
    return int(torch.stack(sums).sum()) if sums else 0


def _name_of(value: Any) -> str:
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
