"""Interleaved runs in one process: whatever slows the machine slows all contenders alike.

Each round runs every contender once, starting with another one each time. What is reported is the
median over rounds of a contender's time over the plain forward pass of the same round, with the
quartiles beside it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles.

    Attributes:
        low, median, high: the 25th, 50th and 75th percentile; a figure that was taken one time has
            no quartiles, and is the median.
    """

    low: float | None
    median: float
    high: float | None

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The quartiles of some figures."""
        if len(values) < 2:
            return cls(None, values[0], None)
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def quartiles(self, digits: int = 2) -> str:
        """In words; a dash where there are none."""
        if self.low is None or self.high is None:
            return "-"
        return f"{self.low:.{digits}f} to {self.high:.{digits}f}"


def interleaved(
    calls: Mapping[str, Call], repeats: int, device: str = "cpu", warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call in every round.

    Args:
        calls: what to run, by name.
        repeats: rounds.
        device: what to wait for before the clock is read.
        warm_up: rounds that are not timed.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warm_up):
        for name in names:
            calls[name]()
    with _no_collections():
        for turn in range(repeats):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                _wait(device)
                start = time.perf_counter()
                out = calls[name]()
                _wait(device)
                seconds[name].append(time.perf_counter() - start)
                # Outside of the clock: caches hold themselves in circles, and pile up otherwise.
                del out
                gc.collect()
    return seconds


def ratios(seconds: Mapping[str, list[float]], over: str) -> dict[str, list[float]]:
    """Every call's time over one call's, round by round."""
    return {
        name: [mine / theirs for mine, theirs in zip(times, seconds[over], strict=True)]
        for name, times in seconds.items()
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@contextmanager
def _no_collections() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # what is there already need not be looked through after every call
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
