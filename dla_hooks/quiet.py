"""Other packages kept quiet for the length of a call, and everything as found when it ends.

Loading a model imports optional packages (torchao, bitsandbytes) that log what they lack, and
transformers shows bars. Nobody asked for either; problems in loading are raised as errors.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what this thread logs, up to errors, and transformers' bars.

    What other threads log is seen as ever. The bars are one switch for the process: it is off while
    any call is under way.
    """
    _import()
    muted = _Others()
    handlers = _handlers()
    for handler in handlers:
        handler.addFilter(muted)
    _bars.off()
    try:
        yield
    finally:
        _bars.as_found()
        for handler in handlers:
            handler.removeFilter(muted)


def _import() -> None:
    """Import what puts handlers of its own on."""
    if {"torch", "transformers"} <= sys.modules.keys():
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, in a bare notebook
        import torch  # noqa: F401
        import transformers.utils.logging  # noqa: F401


class _Others(logging.Filter):
    """Lets pass what other threads than its maker's log."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return threading.get_ident() != self._thread or record.levelno >= logging.CRITICAL


def _handlers() -> list[logging.Handler]:
    """Every handler that a record may reach, the one of last resort among them."""
    known = [logging.root, *logging.root.manager.loggerDict.copy().values()]
    found = {each: None for one in known for each in getattr(one, "handlers", ())}
    if logging.lastResort is not None:
        found[logging.lastResort] = None
    return [*found]


class _Bars:
    """The switch of transformers' and the hub's bars, which the last of several calls puts back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._shown = self._hidden_by_hub = False

    def off(self) -> None:
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled
        from transformers.utils import logging as switch

        with self._lock:
            if self._calls == 0:
                self._shown = switch.is_progress_bar_enabled()
                self._hidden_by_hub = are_progress_bars_disabled()
                switch.disable_progress_bar()
            self._calls += 1

    def as_found(self) -> None:
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers.utils import logging as switch

        with self._lock:
            self._calls -= 1
            if self._calls == 0 and self._shown:
                switch.enable_progress_bar()
                if self._hidden_by_hub:
                    disable_progress_bars()


_bars = _Bars()
