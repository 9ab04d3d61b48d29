"""Placement of a checkpoint's weights: on one device, or over several and the disk.

The second is done by transformers and accelerate (extra ``offload``). This module turns the request
into ``from_pretrained`` arguments and deletes the temporary folder with the model.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dla_hooks.errors import InputError, MissingExtraError

DEVICE_MAPS = ("auto", "disk")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
_SMALL = 2**16


class Placement:
    """A request for devices, checked before anything is loaded.

    Loading happens in a ``with`` block, which gives the arguments for ``from_pretrained``.

    Args:
        device: as torch names it; None is "cpu".
        device_map: instead of it: one of ``DEVICE_MAPS``.
        max_memory: with ``device_map``: a size as accelerate reads it ("4GiB", "500MB").

    Raises:
        InputError: for a request that cannot be read or met.
        MissingExtraError: for a ``device_map`` without accelerate.
    """

    def __init__(
        self, device: str | None, device_map: str | None, max_memory: str | None = None
    ) -> None:
        self._device_map = device_map
        self._folder: str | None = None
        if device_map is None:
            if max_memory is not None:
                raise InputError(
                    f"max_memory={max_memory!r} says how much a device_map may take, and there is "
                    "none; give device_map='auto' or 'disk' (on the command line --device-map)"
                )
            self._device = _usable(device or "cpu")
            return
        if device is not None:
            raise InputError(
                f"device={device!r} and device_map={device_map!r} both say where the weights go; "
                "give one of them"
            )
        if device_map not in DEVICE_MAPS:
            raise InputError(
                f"device_map must be one of {', '.join(DEVICE_MAPS)}, got {device_map!r}; with a "
                "map of your own load the model by from_pretrained"
            )
        installed = version("transformers")
        if int(installed.partition(".")[0]) < 5:
            raise InputError(
                f"device_map={device_map!r} needs transformers 5, which leaves weights where the "
                f"checkpoint has them; installed is {installed}. Upgrade it, or load the model and "
                "give it to accelerate's disk_offload yourself"
            )
        self._memory = _memory(device_map, max_memory)

    def __enter__(self) -> dict[str, Any]:
        if self._device_map is None:
            return {}
        # Only for weights that cannot be read from the checkpoint itself: those in other formats
        # than safetensors, and experts that are merged on loading.
        self._folder = tempfile.mkdtemp(prefix="dla_hooks_")
        places = {"": "disk"} if self._device_map == "disk" and not self._memory else "auto"
        return {
            "device_map": places,
            "max_memory": self._memory,
            "offload_folder": self._folder,
        }

    def __exit__(self, *_: Any) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, model: Any) -> Any:
        """Move the loaded model to its device; inside the ``with`` block.

        Raises:
            InputError: when it does not fit there.
        """
        if self._device_map is None:
            try:
                return model.to(self._device)
            except RuntimeError as error:  # that device is out of memory
                raise InputError(
                    f"the model cannot be put on {self._device}: {first_line(error)}"
                ) from error
        if self._folder is not None and any(Path(self._folder).iterdir()):
            weakref.finalize(model, shutil.rmtree, self._folder, ignore_errors=True)
            self._folder = None
        return model


def hand_back_freed_memory() -> None:
    """Have this process give freed memory back at once, where the C library is glibc.

    Weights from disk are loaded and freed one after another. In glibc's own pools the gaps that
    they leave add up to the size of the largest weight.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL)
    mallopt(_M_TRIM_THRESHOLD, _SMALL)


def first_line(error: BaseException) -> str:
    """The text of another package's error, in one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line or type(error).__name__


def _usable(device: str) -> Any:
    """Check that the device works before any weights are loaded, and return it."""
    import torch

    try:
        target = torch.device(device)
        torch.zeros((), dtype=torch.float32, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} cannot be used: {first_line(error)}") from None
    return target


def _memory(device_map: str, max_memory: str | None) -> dict[Any, int] | None:
    """The limit in bytes for the weights on each device; None leaves it to accelerate."""
    try:
        from accelerate.utils import convert_file_size_to_int, get_max_memory
    except ImportError:
        raise MissingExtraError(f"device_map={device_map!r}", "offload") from None
    if max_memory is None:
        return None
    try:
        size = int(convert_file_size_to_int(max_memory))
    except (ValueError, OverflowError, AttributeError):
        raise InputError(
            f"max_memory={max_memory!r} is no size; give a number with its unit, as in 4GiB or "
            "500MB"
        ) from None
    if device_map == "disk":
        return {"cpu": size}
    return {device: min(size, int(free)) for device, free in get_max_memory().items()}
