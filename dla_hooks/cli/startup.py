"""A process of the command line starts quickly: it is ours, and may be set up for one command.

Of three seconds from start to result, torch and transformers import for two. Python's collector of
cycles reads all that they make again and again, and once more at the end: a third of the time, for
nothing, since modules stay. And transformers imports torchao wherever it is installed, half a
second and lines of its log; it is left out unless a checkpoint is quantised with it.
"""

from __future__ import annotations

import atexit
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEEDS = "torchao"


class _Process:
    """What is known of this process."""

    ours = False


def claim() -> None:
    """Say that this process runs the command line and nothing else."""
    _Process.ours = True
    atexit.register(gc.freeze)  # what the system takes back as a whole need not be searched


@contextmanager
def quick_imports() -> Iterator[None]:
    """In a process of ours: import what stays, without searching it for cycles now or later."""
    if not _Process.ours:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_models(*sources: str) -> None:
    """In a process of ours: import transformers' models, without torchao where none needs it.

    Args:
        sources: every model that the process is going to load. One that is neither in a folder
            here nor in the local cache may need anything.
    """
    if not _Process.ours or "transformers.quantizers" in sys.modules or any(map(_needs, sources)):
        return
    import transformers.utils as utils
    from transformers.utils import import_utils

    name = "is_torchao_available"
    holders = [module for module in (utils, import_utils) if hasattr(module, name)]
    before = [getattr(module, name) for module in holders]
    try:
        for module in holders:
            setattr(module, name, _absent)
        import transformers.modeling_utils  # noqa: F401
    finally:
        for module, function in zip(holders, before, strict=True):
            setattr(module, name, function)


def _absent(*_: object) -> bool:
    return False


def _needs(source: str) -> bool:
    """Whether a checkpoint is quantised with torchao, or may be."""
    file = Path(source, "config.json").expanduser()
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            kept = try_to_load_from_cache(source, "config.json")
        except ValueError:  # no such name can be on the hub
            return True
        if not isinstance(kept, str):
            return True
        file = Path(kept)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # it is refused later, with the reason
    return _NEEDS in json.dumps(config)
