"""The case of a sweep on Ray: two actors against one process with two threads."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options, Skipped, once
from benchmarks.memory import measurable, peak_during
from benchmarks.timing import Spread
from dla_hooks import Attributor, attribute_many, demo, summarize, summarize_rows

_PROMPTS, _ACTORS, _BATCH = 2000, 2, 250
_WORDS = ("The", "dogs", "near", "the", "car", "keys", "behind", "cabinet")
_OPTIONS: dict[str, Any] = {
    "checkpoint": str(demo.path()),
    "unit": "head",
    "answer": " are",
    "incorrect": " is",
}


class Timed(Attributor):
    """Says of each batch when it began and ended; the model is loaded and tried before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        super().__call__({"prompt": ["The dogs"] * 8})

    def __call__(self, batch: Any, rank: int | None = None) -> Any:
        began = time.time()
        found = super().__call__(batch, rank)
        n = len(found["error"])
        return {**found, "began": [began] * n, "ended": [time.time()] * n}


def measured(options: Options) -> list[Measured]:
    """A sweep on Ray: speed over one process (0.8), driver's memory."""
    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise Skipped("Ray is not installed: pip install dla-hooks[ray]") from None
    prompts = _prompts(_PROMPTS)
    model, tokenizer = demo.load()
    threads = torch.get_num_threads()
    torch.set_num_threads(_ACTORS)

    def alone() -> Any:
        found = attribute_many(
            model, prompts, " are", " is", unit="head", tokenizer=tokenizer, progress=False
        )
        return summarize(found)

    try:
        expected = alone()
        options.say(f"timing {_PROMPTS} prompts in one process, {options.repeats} rounds")
        seconds = [_seconds(alone) for _ in range(options.repeats)]
    finally:
        torch.set_num_threads(threads)
    with _cluster():
        options.say(f"{_PROMPTS} prompts on Ray, {options.repeats} rounds")
        sweeps = [_sweep(prompts) for _ in range(options.repeats)]
        found = sweeps[-1][1]
        gap = float((found.mean - expected.mean).abs().max())
        if found.n != expected.n or not gap <= 1e-5:
            raise Disagreement(f"the sweep on Ray and one process: means differ by {gap:.1e}")
        peaks = []
        if measurable():
            for n in (_PROMPTS, 4 * _PROMPTS):
                options.say(f"peak memory of the driver, {n} prompts")
                peaks.append(_peak(n))
    ratios = [alone / own for alone, (own, _) in zip(seconds, sweeps, strict=True)]
    speed = (
        _PROMPTS / Spread.of(seconds).median,
        _PROMPTS / Spread.of([s for s, _ in sweeps]).median,
    )
    lines = [
        Measured(
            f"prompts per second over attribute_many, demo model, {_PROMPTS} prompts, {_ACTORS} "
            "actors",
            Spread.of(ratios),
            0.8,
            at_least=True,
            detail=f"{speed[1]:,.0f} / {speed[0]:,.0f} prompts per second",
        )
    ]
    if peaks:
        lines.append(
            Measured(
                f"driver's memory, {4 * _PROMPTS} prompts over {_PROMPTS}",
                once(peaks[1] / peaks[0]),
                1.05,
                detail=f"{peaks[1] / 1e6:,.0f} MB / {peaks[0] / 1e6:,.0f} MB",
            )
        )
    return lines


def _prompts(n: int) -> list[str]:
    draw = random.Random(2)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(3, 20))) for _ in range(n)]


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _rows(prompts: list[str]) -> Any:
    import ray.data

    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    return ray.data.from_items(rows, override_num_blocks=len(rows) // _BATCH).map_batches(
        Timed,
        fn_constructor_kwargs=_OPTIONS,
        batch_size=_BATCH,
        compute=ray.data.ActorPoolStrategy(size=_ACTORS),
    )


def _sweep(prompts: list[str]) -> tuple[float, Any]:
    """Seconds from the first batch's begin to the last one's end, and the means."""
    rows = _rows(prompts).take_all()
    taken = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
    return taken, summarize_rows(rows)


def _peak(n: int) -> int:
    """The driver's memory at its highest while it reads the rows of a sweep, in all."""
    from benchmarks.memory import resident

    rows = _rows(_prompts(n))
    before = resident()
    return before + peak_during(lambda: summarize_rows(rows.iter_rows()))


@contextmanager
def _cluster() -> Iterator[None]:
    import logging
    import os

    import ray
    import ray.data

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=_ACTORS,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
