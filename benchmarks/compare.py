"""For each setting: check agreement, time all contenders interleaved, measure their peaks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.agree import Agreement, prove, prove_on
from benchmarks.bar import Say
from benchmarks.contenders import CONTENDERS, PLAIN, Bench
from benchmarks.memory import measurable, peak_of
from benchmarks.models import Setting
from benchmarks.timing import Spread, interleaved, ratios

_peak = functools.cache(peak_of)


@dataclass(frozen=True)
class Line:
    """The cost of one contender in one setting.

    Attributes:
        setting: the setting.
        contender: its name.
        seconds: of one call.
        ratio: over the plain forward pass of the same round.
        peak: bytes above the weights, or None where that cannot be measured.
        plain_peak: the plain forward pass' own.
        gap: its difference from this library's numbers, over the logits' spread.
        rounds: every time that was taken, in seconds.
    """

    setting: Setting
    contender: str
    seconds: Spread
    ratio: Spread
    peak: int | None
    plain_peak: int | None
    gap: float
    rounds: list[float]

    @property
    def memory_ratio(self) -> float | None:
        """Peak over the plain forward pass' peak."""
        if self.peak is None or not self.plain_peak:
            return None
        return self.peak / self.plain_peak

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the units in the names."""
        return {
            "setting": dataclasses.asdict(self.setting),
            "contender": self.contender,
            "seconds": dataclasses.asdict(self.seconds),
            "rounds_seconds": self.rounds,
            "time_ratio": dataclasses.asdict(self.ratio),
            "peak_bytes": self.peak,
            "plain_peak_bytes": self.plain_peak,
            "memory_ratio": self.memory_ratio,
            "gap_over_spread": self.gap,
        }


def grid(**axes: Iterable[Any]) -> list[Setting]:
    """Every combination of the axes' values."""
    names = list(axes)
    return [
        Setting(**dict(zip(names, values, strict=True)))
        for values in itertools.product(*axes.values())
    ]


def measure(
    settings: list[Setting], names: list[str], repeats: int, say: Say, memory: bool = True
) -> list[Line]:
    """Measure contenders in settings.

    Args:
        settings: the settings. Neighbours with the same weights share their models.
        names: the contenders; the plain forward pass is always among them.
        repeats: rounds of timing.
        say: called with a line on each step.
        memory: whether to measure peaks too.

    Raises:
        Disagreement: when two contenders give different numbers; that setting is not timed.
    """
    names = [PLAIN, *(name for name in names if name != PLAIN)]
    lines: list[Line] = []
    for (model, dtype, device), group in itertools.groupby(
        settings, key=lambda setting: (setting.model, setting.dtype, setting.device)
    ):
        bench = Bench(Setting(model, dtype=dtype, device=device))
        for setting in group:
            lines += _one(bench, setting, names, repeats, say, memory)
    return lines


def _one(
    bench: Bench, setting: Setting, names: list[str], repeats: int, say: Say, memory: bool
) -> list[Line]:
    say(f"{setting.named()}: do all agree?")
    if setting.dtype in ("float32", "float64"):
        proof = prove_on(bench, names, setting)
    else:
        proof = prove(names, setting)
    gaps: dict[str, Agreement] = {agreement.other: agreement for agreement in proof}
    say(f"{setting.named()}: timing {len(names)} contenders, {repeats} rounds")
    calls = {name: bench.call(name, setting) for name in names}
    seconds = interleaved(calls, repeats, setting.device)
    over = ratios(seconds, PLAIN)
    peaks: dict[str, int] = {}
    if memory and measurable(setting.device):
        for name in names:
            if not CONTENDERS[name].attributes:  # measured once for all units and positions
                peaks[name] = _peak(name, dataclasses.replace(setting, unit="head", pos="all"))
                continue
            say(f"{setting.named()}: peak memory of {name}, in a process of its own")
            peaks[name] = _peak(name, setting)
    return [
        Line(
            setting=setting,
            contender=name,
            seconds=Spread.of(seconds[name]),
            ratio=Spread.of(over[name]),
            peak=peaks.get(name),
            plain_peak=peaks.get(PLAIN),
            gap=gaps[name].gap,
            rounds=seconds[name],
        )
        for name in names
    ]
