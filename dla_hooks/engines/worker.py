"""A model in a worker: loaded from a folder on the device that the worker has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dla_hooks import checkpoint
from dla_hooks.errors import CheckpointError, InputError, MissingExtraError

_LOCAL_RANK = "LOCAL_RANK"  # of a process among those of its machine, as torchrun says it


@dataclass(frozen=True)
class Recipe:
    """How a worker loads its model; it can be sent to other processes.

    Attributes:
        source: a folder, or an id on the Hugging Face hub.
        dtype: one of :data:`dla_hooks.checkpoint.DTYPES`.
        device: as torch names it; None is the one that the worker has.
        device_map: see :func:`dla_hooks.checkpoint.load`; so are the next two.
        max_memory: of a map.
        trust_remote_code: whether code that comes with the checkpoint is run.
        adapter: the folder of a PEFT adapter that is put on, or None.
    """

    source: str
    dtype: str = "float32"
    device: str | None = None
    device_map: str | None = None
    max_memory: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in checkpoint.DTYPES:
            raise InputError(
                f"dtype must be one of {', '.join(checkpoint.DTYPES)}, got {self.dtype!r}"
            )
        if self.device is not None and self.device_map is not None:
            raise InputError(
                f"device={self.device!r} and device_map={self.device_map!r} both say where the "
                "weights go; give one of them"
            )
        checkpoint.find(self.source)
        if self.adapter is not None and not Path(self.adapter, "adapter_config.json").is_file():
            raise CheckpointError(
                f"there is no adapter in {self.adapter}: it has no adapter_config.json, as "
                "PeftModel.save_pretrained writes it"
            )

    @property
    def name(self) -> str:
        """A short name of what is loaded."""
        names = [self.source, *([] if self.adapter is None else [self.adapter])]
        return " with ".join(Path(one).name or one for one in names)

    def load(self, rank: int | None = None) -> tuple[Any, Any]:
        """The model, and its tokenizer or None.

        Args:
            rank: the worker's number on its machine, where the engine tells it.

        Raises:
            CheckpointError: when it cannot be read, or does not fit into the worker's memory.
            MissingExtraError: for an adapter without peft.
        """
        device = self.device
        if device is None and self.device_map is None:
            device = device_of_worker(rank)
        model, tokenizer = checkpoint.load(
            self.source,
            self.dtype,
            device,
            self.trust_remote_code,
            device_map=self.device_map,
            max_memory=self.max_memory,
        )
        return (model if self.adapter is None else _adapted(model, self.adapter)), tokenizer


def device_of_worker(rank: int | None = None) -> str:
    """The GPU that is this worker's, or the CPU where it has none.

    Args:
        rank: of the worker on its machine; None is what torchrun and accelerate say, or 0. Ray
            shows each actor its own GPUs only, so there it is 0.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    number = int(os.environ.get(_LOCAL_RANK, 0)) if rank is None else rank
    return f"cuda:{number % torch.cuda.device_count()}"


def _adapted(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtraError("adapter=", "peft") from None
    try:
        return PeftModel.from_pretrained(model, adapter).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"the adapter {adapter} cannot be put on: {first}") from error
