"""Peak memory on TransformerLens models, over their own plain forward pass (extra ``tl``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tl_models import has_hooked

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.tl,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc"),
]

KINDS = ("bridged", "hooked") if has_hooked() else ("bridged",)

# A process of its own for each figure: what one call leaves behind would hide in the next.
MEASURE = """
import pathlib, sys, tempfile, warnings
warnings.filterwarnings("ignore")
import torch
from transformers import GPT2Config, GPT2LMHeadModel
import tl_models
from dla_hooks import direct_logit_attribution

kind, case = sys.argv[1:]
torch.manual_seed(0)
raw = GPT2LMHeadModel(GPT2Config(n_layer=2, n_inner=3072, vocab_size=5000)).eval()
raw.config.architectures = ["GPT2LMHeadModel"]
model = getattr(tl_models, kind)(raw, pathlib.Path(tempfile.mkdtemp()))
del raw
ids = torch.randint(5000, (1, 512))

def call(ids):
    if case == "plain":
        with torch.no_grad():
            model(ids)
    else:
        direct_logit_attribution(model, ids, 5, unit="head", pos=None)

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

call(ids[:, :8])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = resident("VmRSS")
call(ids)
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_peak_over_plain_forward_pass_is_at_most_a_tenth(kind):
    allocator = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }

    def peak(case: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, kind, case],
            env={**os.environ, **allocator},
            cwd=Path(__file__).parents[1] / "helpers",
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout.split()[-1])

    assert peak("ours") <= 1.10 * peak("plain")
