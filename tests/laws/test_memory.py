"""The memory of a call, over the plain forward pass: what is promised, with room for noise."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import contenders, memory
from benchmarks.contenders import CHUNKED, OURS, PLAIN, PLAIN_CHUNKED
from benchmarks.models import Setting, make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not memory.measurable(), reason="needs Linux' /proc"),
]

peak_of = functools.cache(memory.peak_of)
MODEL, TOKENS = "gpt2-mini", 1024


@pytest.mark.parametrize(
    ("unit", "pos"),
    [
        ("component", "last"),
        ("layer", "last"),
        ("head", "last"),
        ("head", "all"),
        ("head", "next"),  # 1.18 where the directions of all positions are kept at once
    ],
)
def test_peak_over_plain_forward_pass_is_at_most_a_tenth(unit, pos):
    plain = peak_of(PLAIN, Setting(MODEL, TOKENS))
    assert plain > 10e6  # of which a tenth is more than a process' own restlessness
    assert peak_of(OURS, Setting(MODEL, TOKENS, unit=unit, pos=pos)) <= 1.10 * plain


@pytest.mark.parametrize("pos", ["last", "all"])
def test_peak_in_chunks_equals_plain_loop_over_chunks(pos):
    setting = Setting("long-llama", 8192, pos=pos, chunk=512)
    ours = peak_of(CHUNKED, setting)
    assert ours <= 1.15 * peak_of(PLAIN_CHUNKED, Setting("long-llama", 8192, chunk=512))
    assert ours <= 0.75 * peak_of(PLAIN, Setting("long-llama", 8192))


def test_peak_of_model_on_disk_is_below_its_weights(tmp_path):
    pytest.importorskip("accelerate")
    model = make_model("llama-250m")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    job = {"job": "offload", "folder": str(tmp_path), "model": "llama-250m", "tokens": 128}
    assert memory.in_a_process({**job, "ours": True}) <= 0.6 * weights


@pytest.mark.tl
@pytest.mark.parametrize("name", ["bridge, full cache", "HookedTransformer, full cache"])
def test_peak_of_reference_is_many_times_larger(name):
    reason = contenders.missing(name)
    if reason is not None:
        pytest.skip(reason)
    setting = Setting(MODEL, TOKENS)
    assert peak_of(name, setting) >= 10 * peak_of(OURS, setting)


LONG_RUN = """
import sys
from benchmarks.contenders import OURS, Bench
from benchmarks.memory import resident
from benchmarks.models import Setting

setting = Setting("gpt2-mini", 128, unit=sys.argv[1], pos=sys.argv[2])
call = Bench(setting).call(OURS, setting)
for _ in range(10):
    call()
before = resident()
for _ in range(60):
    call()
print(resident() - before)
"""


@pytest.mark.parametrize(("unit", "pos"), [("head", "all"), ("component", "next")])
def test_memory_of_long_run_stays_flat(unit, pos):
    """One activation kept of each call would be 15 MB here."""
    done = subprocess.run(
        [sys.executable, "-c", LONG_RUN, unit, pos],
        env={**os.environ, **memory.ALLOCATOR, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) <= 4e6
