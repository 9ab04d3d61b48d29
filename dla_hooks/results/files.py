"""Files of ours: safetensors with a header that says what they are, and text.

The header holds ``format``, ``version``, and as JSON whatever is no tensor.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dla_hooks.errors import CheckpointError, InputError
from dla_hooks.results.schema import unpack

_T = TypeVar("_T")

RESULT, RANKED, SUMMARY = "dla_hooks.result", "dla_hooks.ranked", "dla_hooks.summary"
PROMOTED, COMPARISON = "dla_hooks.promoted", "dla_hooks.comparison"
EFFECTS = "dla_hooks.effects"
_NEWEST = {RESULT: 3, RANKED: 2, SUMMARY: 2, PROMOTED: 1, COMPARISON: 1, EFFECTS: 1}
_CALLED = {
    RESULT: "saved attribution",
    RANKED: "saved ranked attribution",
    SUMMARY: "saved summary",
    PROMOTED: "saved list of promoted tokens",
    COMPARISON: "saved comparison",
    EFFECTS: "saved table of effects",
}
_CONTENT = {
    RESULT: "result",
    RANKED: "result",
    SUMMARY: "summary",
    PROMOTED: "result",
    COMPARISON: "result",
    EFFECTS: "result",
}  # the header's entry for what is no tensor


def write(path: Any, form: str, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Path:
    """Write one file of the newest version.

    Args:
        path: a string or a path.
        form: :data:`RESULT`, :data:`RANKED`, :data:`SUMMARY`, :data:`PROMOTED`,
            :data:`COMPARISON` or :data:`EFFECTS`.
        tensors: of any device.
        plain: what JSON can hold.

    Raises:
        InputError: for what is no path.
        CheckpointError: when it cannot be written there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    place = checked(path)
    header = {"format": form, "version": str(_NEWEST[form]), _CONTENT[form]: json.dumps(plain)}
    # Copies: safetensors refuses tensors that share memory.
    own = {name: _copy(tensor) for name, tensor in tensors.items()}
    try:
        str(place).encode()
        save_file(own, str(place), metadata=header)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{place} cannot be written: {error}") from None
    return place


def read(path: Any, kinds: Mapping[str, Callable[..., _T]]) -> _T:
    """Read one file, and make of it what it holds.

    Args:
        path: a string or a path.
        kinds: what the file may hold, each with the class to make of it.

    Raises:
        InputError: for what is no path, a file that holds something else, or a newer version.
        CheckpointError: when there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = checked(path)
    try:
        str(path).encode()  # older versions of safetensors panic
        # Older versions of safetensors read to the caller's default device.
        with torch.device("cpu"), safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a saved result: {error}") from None
    form = header.get("format", "")
    if form not in kinds:
        wanted = " or ".join(_CALLED[kind] for kind in kinds)
        why = f"its header does not say {' or '.join(kinds)}"
        if form in _CALLED:
            why = f"it is a {_CALLED[form]}, which dla_hooks.load reads"
        raise InputError(f"{path} is no {wanted} ({why})")
    _check_version(path, form, header.get("version", ""))
    try:
        return kinds[form](**unpack(tensors, json.loads(header[_CONTENT[form]])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def write_text(path: Any, text: str) -> Path:
    """Write text as UTF-8, as it is. Half a surrogate pair becomes its escape.

    Raises:
        InputError: for what is no path, or when the file cannot be written.
    """
    place = checked(path)
    try:
        with place.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
    except (OSError, ValueError) as error:  # a ValueError: no file can have such a name
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {place}: {why}") from None
    return place


def checked(path: Any) -> Path:
    """The path of a file.

    Raises:
        InputError: for what is neither a string nor a path.
    """
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str) or not path:
        raise InputError(f"path must be the path of a file, a string or a Path; got {path!r:.80}")
    return Path(path)


def _check_version(path: Path, form: str, version: str) -> None:
    if not re.fullmatch("[0-9]{1,9}", version):
        raise CheckpointError(f"{path} is damaged: its version is no number, but {version!r:.80}")
    if int(version) > _NEWEST[form]:
        raise InputError(
            f"{path} was written by a newer dla_hooks (format {version}, this one "
            f"reads up to {_NEWEST[form]}); upgrade to read it"
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
