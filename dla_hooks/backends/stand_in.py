"""A module that stands where a model's final norm would, for models that were made without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dla_hooks.modules.outputs import tensor_in, with_tensor


class StandIn:
    """An identity that runs on what the last block returns, during runs of ours and no others.

    Args:
        block: the last block.
        name: its path.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self.module, self.name, self._block = nn.Identity().eval(), name, block

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run it behind the block; the block has no hook of ours before and after."""
        handle = self._block.register_forward_hook(self._behind)
        try:
            yield
        finally:
            handle.remove()

    def _behind(self, block: nn.Module, given: Any, output: Any) -> Any:
        stream = tensor_in(output)
        if stream is None:
            return None
        left = self.module(stream)
        return None if left is stream else with_tensor(output, left)


def switched_off(model: Any, path: str) -> bool:
    """Whether a model has a place for a module, and None in it."""
    holder, _, name = path.rpartition(".")
    found = model
    for part in filter(None, holder.split(".")):
        found = getattr(found, part, None)
    return found is not None and hasattr(found, name) and getattr(found, name) is None
