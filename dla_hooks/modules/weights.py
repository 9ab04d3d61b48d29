"""A module's parameters, also while they are offloaded.

accelerate keeps the parameters of an offloaded module on the meta device. Their values are in a
store (memory, or files) on the module's hook, and are loaded only while the module runs. Shape and
dtype are read from the parameter itself. Values are read in slices, or from a mapped file, so that
only the needed ones come into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dla_hooks.errors import InputError

_TILE_ELEMENTS = 2**18
"""Number of weight entries read at once when a few rows are selected (1 MiB)."""


def described(module: nn.Module, name: str) -> Tensor | None:
    """A parameter with its shape and dtype. No values are read; they may be elsewhere.

    Args:
        module: the module that has it.
        name: its name there.

    Returns:
        The parameter, maybe on the meta device, or None where the module has no such parameter.

    Raises:
        InputError: when it is on the meta device, and accelerate has no store for its values.
    """
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        return None
    if parameter.is_meta:
        _find(module, name)
    return parameter


def stored(module: nn.Module, name: str) -> Tensor | None:
    """A parameter's values, or None where the module has no such parameter.

    Offloaded values are moved to the device that the module runs on. On a CPU that is a view of
    the file, if the file has the model's dtype.

    Raises:
        InputError: see :func:`described`.
    """
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        return None
    if not parameter.is_meta:  # nearly always
        return parameter.detach()
    values = _values(module, name)
    return None if values is None else values.whole()


def made_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors in a tensor: itself, or those it wraps (codes and their scales)."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        inner = getattr(tensor, name)
        if isinstance(inner, Tensor):  # a sharded tensor also keeps a mesh of devices
            yield from made_of(inner)


def is_sharded(tensor: Any) -> TypeGuard[Tensor]:
    """True for a ``DTensor``, of which every process holds a part (FSDP2, tensor parallelism)."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return not plain and isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Give a module its whole parameters within a ``with`` block, where they are sharded.

    Every process must come here, since each hands its part to all others. The forward pass that
    transformers' tensor parallelism puts on a module is left out meanwhile: it shards its input.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for part in module.modules():
            sharded = {n: p for n, p in part._parameters.items() if is_sharded(p)}
            for name, parameter in sharded.items():
                whole = nn.Parameter(_whole(parameter), requires_grad=parameter.requires_grad)
                kept.append((part._parameters, name, parameter))
                part._parameters[name] = whole
            if sharded and "forward" in vars(part):
                kept.append((vars(part), "forward", vars(part).pop("forward")))
        yield
    finally:
        for where, name, value in kept:
            where[name] = value


def whole_activation(x: Tensor) -> Tensor:
    """An activation of which every process may hold a part only, as a plain tensor."""
    return _whole(x) if is_sharded(x) else x


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.detach().full_tensor()
    return found


def selected(module: nn.Module, name: str, ids: Tensor, axis: int = 0) -> Tensor | None:
    """Read a few of a parameter's rows, and no other part of a file.

    Args:
        module: the module that has it.
        name: its name there.
        ids: which rows [n], on any device.
        axis: the axis of the parameter that they lie along.

    Returns:
        The rows [n, ...] (for axis 1, columns [..., n]) where the module runs, or None where it
        has no such parameter.

    Raises:
        InputError: see :func:`described`.
    """
    values = _values(module, name)
    return None if values is None else values.select(ids, axis)


def tiles(module: nn.Module, name: str, count: int, axis: int = 0) -> Iterator[Tensor]:
    """Yield the first ``count`` rows of a parameter, a few at a time; nothing if it is missing.

    Raises:
        InputError: see :func:`described`.
    """
    values = _values(module, name)
    if values is not None:
        step = values.rows_at_once(axis)
        for start in range(0, count, step):
            yield values.cut(slice(start, min(start + step, count)), axis)


def misfits(model: nn.Module) -> list[tuple[str, list[int], list[int]]]:
    """List offloaded parameters whose stored values have another shape.

    Each entry is the name, the stored shape, and the parameter's shape. accelerate itself notices
    only when it loads the values. Only the headers of the files are read.
    """
    found = []
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            owner, _, name = path.rpartition(".")
            kept, _ = _open(*_find(model.get_submodule(owner), name))
            shape = list(kept.shape if isinstance(kept, Tensor) else kept.get_shape())
            if shape != list(parameter.shape):
                found.append((path, shape, list(parameter.shape)))
    return found


def run_device(module: nn.Module) -> torch.device:
    """The device that a module runs on, also while its weights are offloaded."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    own: Iterable[nn.Parameter | None] = module._parameters.values()
    parameter = next((one for one in own if one is not None), None)
    if parameter is None:
        parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


@dataclass(frozen=True)
class _Values:
    """A parameter's stored values, with the dtype and device that the module runs with.

    Attributes:
        kept: a tensor, or safetensors' slice object for one in a file. Both can be sliced.
        shape: the parameter's.
        dtypes: the dtypes that they are converted to, in this order.
        device: the device that they are moved to.
    """

    kept: Any
    shape: torch.Size
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    def whole(self) -> Tensor:
        return self._ready(self.kept if isinstance(self.kept, Tensor) else self.kept[:])

    def cut(self, where: slice, axis: int = 0) -> Tensor:
        return self._ready(self.kept[(slice(None),) * axis + (where,)])

    def select(self, ids: Tensor, axis: int) -> Tensor:
        if isinstance(self.kept, Tensor):
            return self._ready(self.kept.index_select(axis, ids.to(self.kept.device)))
        # A file is read in cuts. Cuts without any of the rows are skipped.
        ids, step = ids.cpu(), self.rows_at_once(axis)
        shape = [*self.shape]
        shape[axis] = len(ids)
        rows = torch.empty(shape, dtype=self.dtypes[-1], device=self.device)
        cut_of = ids // step
        for number in cut_of.unique().tolist():
            start = number * step
            here = (cut_of == number).nonzero()[:, 0]
            cut = self.kept[(slice(None),) * axis + (slice(start, start + step),)]
            found = self._ready(cut.index_select(axis, ids[here] - start))
            rows.index_copy_(axis, here.to(self.device), found)
        return rows

    def rows_at_once(self, axis: int) -> int:
        return max(1, _TILE_ELEMENTS * self.shape[axis] // max(1, self.shape.numel()))

    def _ready(self, values: Tensor) -> Tensor:
        if values.dtype == self.dtypes[-1] and len(self.dtypes) == 1:
            return values if values.device == self.device else values.to(self.device)
        for dtype in self.dtypes:
            values = values.to(dtype)
        return values.to(self.device)


def _values(module: nn.Module, name: str) -> _Values | None:
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        return None
    if not parameter.is_meta:
        return _Values(
            parameter.detach(), parameter.shape, (parameter.dtype,), device=parameter.device
        )
    store, key = _find(module, name)
    kept, dtype = _open(store, key)
    # The same two conversions as in accelerate: to the dtype of its index, then to the parameter's.
    return _Values(kept, parameter.shape, (dtype, parameter.dtype), run_device(module))


def _find(module: nn.Module, name: str) -> tuple[Any, str]:
    """Find accelerate's store of a parameter's values, and their name in it."""
    for hook in _hooks(module):
        store = getattr(hook, "weights_map", None)
        if store is not None:
            key = name
            while hasattr(store, "prefix"):  # one module's part of a store for the whole model
                store, key = store.dataset, store.prefix + key
            return store, key
    raise InputError(
        f"{name} of {type(module).__name__} is on the meta device, and its values are in no store "
        "that accelerate keeps for that module; load the model with from_pretrained(folder), "
        "where it does not fit with device_map='auto' and offload_folder=, or offload it with "
        "accelerate's cpu_offload or disk_offload, without preload_module_classes"
    )


def _open(store: Any, key: str) -> tuple[Any, torch.dtype]:
    """Open the values of one name in a store, in memory or on disk, and name their dtype."""
    if key not in getattr(store, "state_dict", ()):
        entry = getattr(store, "index", {}).get(key)
        if entry is not None and entry.get("safetensors_file") is not None:
            with safe_open(entry["safetensors_file"], framework="pt") as file:
                kept = file.get_slice(entry.get("weight_name", key))
            dtype = entry.get("dtype")
            return kept, kept[:0].dtype if dtype is None else getattr(torch, dtype)
        if entry is not None:
            shape, dtype = torch.Size(entry["shape"]), getattr(torch, entry["dtype"])
            path = str(Path(store.save_folder) / f"{key}.dat")
            flat = torch.from_file(path, shared=False, size=shape.numel(), dtype=dtype)
            return flat.reshape(shape), dtype
    values: Tensor = store[key]
    return values, values.dtype


def _hooks(module: nn.Module) -> list[Any]:
    return _flat(getattr(module, "_hf_hook", None))


def _flat(hook: Any) -> list[Any]:
    if hook is None:
        return []
    inner = getattr(hook, "hooks", None)  # accelerate's hooks in a row, which may be nested
    return [hook] if inner is None else [h for each in inner for h in _flat(each)]


def in_memory(module: nn.Module) -> bool:
    """True if a module's weights are in memory, so that it can be read before the run.

    Within the run a module that is read by running it would show that to the taps inside of it.
    """
    # `parameters()` takes ten times as long for a module that has no others in it.
    weights: Iterable[Any] = module.parameters() if module._modules else module._parameters.values()
    return not any(weight is not None and weight.is_meta for weight in weights)
