"""The case of a report: its cost over the plain forward pass that it needs."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import dla_hooks
from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options, once
from benchmarks.contenders import PLAIN, Bench
from benchmarks.models import UNITS, Setting
from benchmarks.timing import Spread, interleaved, ratios

# The size that the bars were set for; any other is measured without a bar.
_SIZE = ("gpt2-small", 512)
_OF_RUN, _OF_PAGE = 1.3, 2.0


def measured(options: Options) -> list[Measured]:
    """A report in three units: time over a plain pass (1.3), and seconds to write it (2)."""
    found = []
    for tokens in options.tokens:
        setting = Setting(options.model, tokens, pos="all")
        bar = (options.model, tokens) == _SIZE
        bench = Bench(setting)
        answer, incorrect, _ = setting.answers()
        make = partial(
            dla_hooks.report,
            bench.model("hf"),
            setting.ids(),
            answer,
            incorrect,
            units=UNITS,
            promoted=0,
        )
        what = f"a report, {options.model}, {tokens:,} tokens, {', '.join(UNITS)}"
        options.say(f"timing {what}, {options.repeats} rounds")
        pair = {PLAIN: bench.call(PLAIN, setting), "report": make}
        seconds = interleaved(pair, options.repeats, warm_up=1)
        taken = {name: Spread.of(times).median * 1e3 for name, times in seconds.items()}
        detail = f"{taken['report']:,.0f} ms / {taken[PLAIN]:,.0f} ms"
        over = Spread.of(ratios(seconds, PLAIN)["report"])
        found.append(Measured(f"time, {what}", over, _OF_RUN if bar else None, detail=detail))
        written, size = _written(make())
        found.append(
            Measured(
                f"seconds to write {what}",
                once(written),
                _OF_PAGE if bar else None,
                detail=f"{size / 2**20:.1f} MB",
            )
        )
    return found


def _written(report: dla_hooks.Report) -> tuple[float, int]:
    """Seconds that a page takes to be written, and its size in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        start = time.perf_counter()
        report.save(path)
        taken, size = time.perf_counter() - start, path.stat().st_size
    if not size:
        raise Disagreement("the page is empty")
    return taken, size
