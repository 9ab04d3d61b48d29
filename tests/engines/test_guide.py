"""The examples of docs/sweeps.md, each run as a file of its own, as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dla_hooks
from dla_hooks import Attributor, demo, load_summary, summarize_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PAGE = (Path(__file__).parents[2] / "docs/sweeps.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def run(name, folder, *launcher, changes=(), **environment):
    text = EXAMPLES[name]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}_example.py").write_text(text)
    own = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"), **environment}
    done = subprocess.run(
        [sys.executable, *launcher, f"{name}_example.py"],
        cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, check=False,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def here(prompts, **options):
    return summarize_rows(Attributor(demo.path(), **options)({"prompt": prompts}))


def assert_is(found, expected):
    assert (found.n, found.labels) == (expected.n, expected.labels)
    assert (found.mean - expected.mean).abs().max() < 1e-5


def test_page_has_an_example_for_every_engine():
    assert list(EXAMPLES) == ["ray", "checkpoint", "datasets", "accelerate", "shards"]


def test_ray_example_runs(cluster, tmp_path):
    run("ray", tmp_path, changes=[("/tmp/sweep", str(tmp_path))], RAY_ADDRESS=cluster)
    prompts = [f"The {noun}s near the car" for noun in ["dog", "key"] * 50]
    expected = here(prompts, unit="head", answer=" are", incorrect=" is")
    assert_is(load_summary(tmp_path / "found"), expected)
    assert_is(dla_hooks.load(tmp_path / "summary.safetensors"), expected)


def test_checkpoint_example_runs_and_goes_on(cluster, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "prompts").mkdir()
    prompts = [f"The {noun}s near the car" for noun in ["dog", "key"] * 50]
    table = pyarrow.table({"id": range(100), "prompt": prompts})
    pq.write_table(table, tmp_path / "prompts/a.parquet")
    changes = [("/tmp/sweep", str(tmp_path))]
    run("checkpoint", tmp_path, changes=changes, RAY_ADDRESS=cluster)
    assert_is(load_summary(tmp_path / "found"), here(prompts, answer=" are"))
    before = sorted(path.name for path in (tmp_path / "found").iterdir())
    run("checkpoint", tmp_path, changes=changes, RAY_ADDRESS=cluster)  # nothing is left to do
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == before


def test_datasets_example_runs_in_two_processes(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    said = run("datasets", tmp_path)
    assert said.count("mean of logit differences over 100 prompts") == 2
    prompts = ["The dogs near the car", "The key"] * 50
    expected = here(prompts, unit="head", answer=" are", incorrect=" is")
    assert_is(load_summary(tmp_path / "found"), expected)


def test_accelerate_example_runs_in_two_processes(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    # On CPUs `accelerate launch` starts one process, and torchrun as many as it is told.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = run("accelerate", tmp_path, *torchrun)
    assert said.count("mean of logits over 100 prompts") == 1
    found = sorted(tmp_path.glob("found-*.parquet"))
    assert len(found) == 2
    assert_is(load_summary(*found), here(["The dogs near the car"] * 100, answer=" are"))


def test_job_array_example_runs_as_two_jobs(tmp_path):
    for job in "01":
        run("shards", tmp_path, SLURM_ARRAY_TASK_ID=job, SLURM_ARRAY_TASK_COUNT="2")
    found = load_summary(tmp_path / "runs/agreement")
    prompts = ["The keys", "The dog", "The cars"]
    assert_is(found, here(prompts, unit="head", answer=" are", incorrect=" is"))
