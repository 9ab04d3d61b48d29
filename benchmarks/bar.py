"""The parts of every bar: its options, and the measured figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.timing import Spread

Say = Callable[[str], None]


class Skipped(Exception):
    """A case that cannot be measured here, with the reason."""


@dataclass(frozen=True)
class Options:
    """The options of a case: its own sizes, or a user's.

    Attributes:
        say: called with a line on each step.
        repeats: rounds of timing.
        model: a named model.
        tokens: prompt lengths; cases of one length take the first.
        also: further sizes (model, tokens) of a case that has them.
    """

    say: Say
    repeats: int
    model: str
    tokens: Sequence[int]
    also: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Measured:
    """One figure and its bar.

    Attributes:
        case: a description of the case.
        value: the figure, a ratio; with its quartiles where it was taken many times.
        limit: the bar, or None for a figure that stands beside the others only.
        at_least: whether the figure must reach the limit; otherwise it must not exceed it.
        detail: the figures behind a ratio, in words.
    """

    case: str
    value: Spread
    limit: float | None
    at_least: bool = False
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        if self.limit is None:
            return None
        reached = self.value.median
        return reached >= self.limit if self.at_least else reached <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        named = asdict(self)
        return {"case": named.pop("case"), "ratio": named.pop("value"), **named, "met": self.met}


def once(value: float) -> Spread:
    """A figure that was measured once."""
    return Spread(None, value, None)
