"""Made-up runs that go past the caller's wrappers.

A wrapper is like a hook: it may steer at some positions of the caller's prompt, or take nothing but
its shape. A made-up run calls what is in it instead, in its own thread only.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from dla_hooks.modules.user_hooks import is_foreign, is_wrapper

BLOCKS, EVERY, NONE = "wrappers of blocks", "every wrapper", "no wrapper"
"""What made-up runs go past, in the order in which it is tried."""

_lock = threading.RLock()


def every_wrapper(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Every wrapper of the caller's, each with the only module in it, which is the model's own."""
    found = {}
    for module in model.modules():
        if len(module._modules) == 1 and is_wrapper(module, model):
            inner = next(iter(module._modules.values()))
            if inner is not None and not is_foreign(inner, model):
                found[module] = inner
    return found


class _Past:
    """Stands for the ``forward`` of a wrapper while made-up runs go past it."""

    def __init__(self, wrapper: nn.Module, inner: nn.Module) -> None:
        self.own = vars(wrapper).get("forward")  # put on the module itself, or None
        self.forward, self.inner = wrapper.forward, inner
        self.threads: Counter[int] = Counter()  # that go past it, with how many runs each

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        past = threading.get_ident() in self.threads
        return (self.inner if past else self.forward)(*args, **kwargs)


@contextmanager
def past_wrappers(wrappers: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Run what is in some wrappers without these, in this thread only.

    Args:
        wrappers: each with the module in it that runs alone.
    """
    thread, standing = threading.get_ident(), list[tuple[dict[str, Any], _Past]]()
    with _lock:
        for wrapper, inner in wrappers.items():
            own = vars(wrapper)
            found = own.get("forward")
            past = found if isinstance(found, _Past) else _Past(wrapper, inner)
            past.threads[thread] += 1
            own["forward"] = past
            standing.append((own, past))
    try:
        yield
    finally:
        with _lock:
            for own, past in standing:
                past.threads[thread] -= 1
                if not past.threads[thread]:
                    del past.threads[thread]
                if not past.threads and own.get("forward") is past:
                    if past.own is None:
                        del own["forward"]
                    else:
                        own["forward"] = past.own
