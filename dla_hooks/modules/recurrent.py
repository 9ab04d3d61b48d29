"""Models that keep their recurrent state on their modules, from one run to the next.

RecurrentGemma of transformers 4 does, and starts anew only where it is told to use a cache. A run
without one would go on from the prompt before, or fail on a batch of another size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_STATE = "recurrent_states"


@contextmanager
def from_the_start(model: nn.Module) -> Iterator[None]:
    """Run without any state of earlier runs in a ``with`` block; it is put back afterwards."""
    decoder = model._modules.get("model")
    if not hasattr(type(decoder), "_setup_cache"):
        yield
        return
    states: list[tuple[Any, Any]] = [
        (module, vars(module)[_STATE]) for module in model.modules() if _STATE in vars(module)
    ]
    for module, _ in states:
        module.recurrent_states = None
    try:
        yield
    finally:
        for module, state in states:
            module.recurrent_states = state
