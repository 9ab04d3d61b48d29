"""Fingerprints of a model and a prompt, the same in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dla_hooks.backends import Backend
from dla_hooks.many.batches import Item
from dla_hooks.many.questions import as_plain
from dla_hooks.modules.weights import made_of, stored

_PIECE = 2**14  # entries summed at once: with their keys they stay in a CPU's cache
_PIECES_AT_ONCE = 2**8  # elsewhere: their wide copies are 32 MiB
# Fields that do not change a model's numbers: its origin, and the software it runs on.
_INCIDENTAL = {
    *("_name_or_path", "transformers_version", "device", "n_devices"),
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"),
}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_ODD = 0x9E3779B97F4A7C15  # to the power of a piece's number: what its sum is multiplied by
_DEPTH = 4  # how far tensors are looked for in what hangs on a weight


def of_config(backend: Backend) -> str:
    """A digest of the model's configuration."""
    config: Any = getattr(backend.model, "config", None)
    if config is None:
        config = backend.model.cfg
    fields = getattr(config, "to_diff_dict", config.to_dict)()
    kept = {str(key): value for key, value in fields.items() if key not in _INCIDENTAL}
    return _digest(_as_json(kept).encode())


def of_adapters(backend: Backend) -> str:
    """A digest of the PEFT adapters' settings, which change a model but no weight."""
    configs: Any = getattr(backend.model, "peft_config", None) or {}
    kept: dict[str, Any] = {
        f"config {name}": {
            key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL
        }
        for name, config in configs.items()
    }
    for path, module in backend.modules():
        if hasattr(module, "_disable_adapters"):
            named = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
            kept[path] = {name: getattr(module, name, None) for name in named}
    return _digest(_as_json(kept).encode())


def of_weights(backend: Backend) -> str:
    """A digest of every weight, the same on any device, in any process.

    Tensors attached to a weight are included, such as the scales of its codes. The entries' bits
    are summed as whole numbers, each times a key of its place. So the order of summation does not
    matter, and the order of the entries does. All weights are read once, a piece at a time.
    """
    whole = hashlib.sha256()
    keys = _Keys()
    for path, module in backend.modules():
        for name in _saved(module):
            values = stored(module, name)
            if values is not None:
                parts = {name: values, **_hung_on(module, name)}
                for form in _forms(f"{path}.{name}", parts, keys):
                    whole.update(f"{form}\n".encode())
    return whole.hexdigest()[:32]


def of_unit(unit: Any) -> str:
    """A unit with its options: of objects and folders among them what they hold.

    Their own words for themselves may name a place in memory, and a folder's path says nothing of
    what is in it.
    """
    options = {} if isinstance(unit, str) else vars(unit)
    held = {name for name, value in options.items() if isinstance(value, Mapping) and value}
    if not held:
        return unit if isinstance(unit, str) else repr(unit)
    words = {
        name: {place: _of_made(made) for place, made in value.items()} if name in held else value
        for name, value in options.items()
    }
    inside = ", ".join(f"{name}={value!r}" for name, value in words.items())
    return f"{type(unit).__name__}({inside})"


def _of_made(made: Any) -> str:
    """A digest of a folder's files, or of what an object holds."""
    whole, keys = hashlib.sha256(), _Keys()
    if isinstance(made, (str, Path)):
        for file in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            whole.update(f"{file.relative_to(made)}\n".encode())
            with file.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
        return whole.hexdigest()[:32]
    whole.update(type(made).__qualname__.encode())
    parts = dict(made.named_modules()) if isinstance(made, nn.Module) else {"": made}
    for path, part in parts.items():
        values = (
            {} if not isinstance(part, nn.Module) else {n: stored(part, n) for n in _saved(part)}
        )
        values |= {n: v for n, v in getattr(part, "__dict__", {}).items() if not n.startswith("_")}
        for form in _forms(path, dict(sorted(values.items())), keys):
            whole.update(f"{form}\n".encode())
    return whole.hexdigest()[:32]


def of_item(item: Item) -> bytes:
    """A digest of one prompt and its answers, as they were given: 16 bytes."""
    item = item.given or item
    wrong = None if item.incorrect is None else item.incorrect.tolist()
    parts: list[Any] = [item.ids.tolist(), item.correct.tolist(), wrong]
    if item.question is not None:
        parts.append(as_plain(item.question))
    if item.columns is not None:
        parts.append(list(item.columns))
    if item.extras:
        parts.append({name: _as_list(value) for name, value in sorted(item.extras.items())})
    return bytes.fromhex(_digest(json.dumps(parts).encode()))


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else repr(value)


def _saved(module: nn.Module) -> list[str]:
    """The names of a module's own weights, as in a checkpoint."""
    buffers = set(module._buffers) - module._non_persistent_buffers_set
    return [*module._parameters, *sorted(buffers)]


def _hung_on(module: nn.Module, name: str) -> dict[str, Any]:
    """Yield the tensors attached to a parameter, and objects that hold some."""
    parameter: Any = module._parameters.get(name)
    if parameter is None:
        return {}
    flatten = getattr(parameter, "__tensor_flatten__", None)
    inner = [] if flatten is None else flatten()[0]
    found = {key: value for key, value in vars(parameter).items() if key not in inner}
    # bitsandbytes moves the scales from the weight to the module when that first runs.
    state: Any = getattr(module, "state", None)
    if found.get("SCB", 0) is None:
        found["SCB"] = getattr(state, "SCB", None)
    return {
        key: value
        for key, value in sorted(found.items())
        if _holds_tensors(value)
        and not (isinstance(value, Tensor) and value.data_ptr() == parameter.data_ptr())
    }


def _fields(value: Any) -> dict[str, Any]:
    """The members of a small object, a list or a mapping; nothing for anything else."""
    if isinstance(value, Mapping):
        return {str(key): one for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(index): one for index, one in enumerate(value)}
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value):
        return {}  # of another module the weights are read where it stands
    return dict(getattr(value, "__dict__", {}))


def _holds_tensors(value: Any, depth: int = _DEPTH) -> bool:
    if isinstance(value, Tensor):
        return True
    return depth > 0 and any(_holds_tensors(one, depth - 1) for one in _fields(value).values())


def _forms(path: str, values: dict[str, Any], keys: _Keys, depth: int = _DEPTH) -> Iterator[str]:
    """A line for every tensor and number among some values and within them."""
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            flatten = getattr(value, "__tensor_flatten__", None)
            if flatten is not None:
                yield f"{path} {name} {type(value).__name__} {_as_json(flatten()[1])}"
            for tensor in made_of(value.detach()):
                yield f"{path} {name} {tensor.dtype} {list(tensor.shape)} {_bits(tensor, keys)}"
        elif isinstance(value, (bool, int, float, str, torch.dtype)):
            yield f"{path} {name} {value}"
        elif depth:
            fields = dict(sorted(_fields(value).items()))
            yield from _forms(f"{path} {name}", fields, keys, depth - 1)


class _Keys:
    """An odd number of 64 bits for each place in a piece, the same ones everywhere."""

    def __init__(self) -> None:
        noise = bytearray(hashlib.shake_256(b"dla_hooks").digest(8 * _PIECE))
        self._on = {torch.device("cpu"): torch.frombuffer(noise, dtype=torch.int64) | 1}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device)
        return self._on[device]


def _bits(values: Tensor, keys: _Keys) -> int:
    """The sum of the entries' bit patterns, each times a key of its place, modulo 2**64."""
    flat = values.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    # A key mixes a bit only into higher ones. The sign bit of eight bytes has none above it.
    words = flat.view(_WORDS[min(4, flat.element_size())])
    if not len(words):
        return 0
    table = keys.on(words.device)
    sums = []
    for piece in words.split(_PIECE if words.device.type == "cpu" else _PIECES_AT_ONCE * _PIECE):
        n_full = len(piece) // _PIECE * _PIECE
        sums.append((piece[:n_full].view(-1, _PIECE) * table).sum(1))
        if n_full < len(piece):
            sums.append((piece[n_full:] * table[: len(piece) - n_full]).sum()[None])
    found = torch.cat(sums).tolist()
    places = (pow(_ODD, place, 2**64) for place in range(len(found)))
    whole: int = sum(one * key for one, key in zip(found, places, strict=True))
    return whole % 2**64


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """Describe a value that JSON lacks, in words that are the same in every process."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, vars(value)]
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
