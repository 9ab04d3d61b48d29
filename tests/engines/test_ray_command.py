"""``dla-hooks many --engine ray``: the lines and the means of one process, in their order."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import dla_hooks
from dla_hooks.cli.app import app

NOUNS = ("dog", "key", "car", "dogs", "keys", "cars")


def call(*args):
    env = {"NO_COLOR": "1", "COLUMNS": "100"}
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env)


@pytest.fixture
def file(tmp_path):
    rows = [
        {
            "prompt": "" if i == 11 else f"The {NOUNS[i % 6]} near the {NOUNS[i % 5]}",
            "answer": " is" if i % 6 < 3 else " are",
            "incorrect": " are" if i % 6 < 3 else " is",
            "position": [-1, 0][i % 2],
        }
        for i in range(50)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lines_and_means_are_those_of_one_process_and_resume(cluster, file, tmp_path):
    here = call("many", "demo", file, "--unit", "head", "-o", tmp_path / "here")
    there = call(
        "many", "demo", file, "--unit", "head", "-o", tmp_path / "there", "--engine", "ray",
        "--workers", "2",
    )  # fmt: skip
    assert here.exit_code == there.exit_code == 0, there.output
    assert "prompt 11 failed: the prompt '' is empty" in there.output
    one, other = (lines_of(tmp_path / name / "results.jsonl") for name in ("here", "there"))
    assert [line["prompt_index"] for line in other] == list(range(50))
    for line, own in zip(one, other, strict=True):
        assert line.keys() == own.keys()
        assert line.get("answer") == own.get("answer")
        if "error" not in line:
            pair = (torch.tensor(each["attribution"]) for each in (line, own))
            torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-5)
    means = [dla_hooks.load(tmp_path / name / "summary.safetensors") for name in ("here", "there")]
    assert (means[1].n, means[1].n_failed) == (49, 1)
    torch.testing.assert_close(means[1].mean, means[0].mean, rtol=0, atol=1e-5)

    # A sweep that stopped: what a block has finished is read, and the rest is run.
    finished = tmp_path / "there" / "finished"
    blocks = sorted(path.name for path in finished.glob("block-*"))
    assert len(blocks) == 8
    kept = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    gone = next((finished / "block-14").glob("*.safetensors"))
    gone.unlink()
    for name in ("results.jsonl", "summary.safetensors"):
        (tmp_path / "there" / name).unlink()
    again = call(
        "many", "demo", file, "--unit", "head", "-o", tmp_path / "there", "--engine", "ray",
        "--workers", "1",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert lines_of(tmp_path / "there" / "results.jsonl") == other
    assert gone.exists()
    for path, time in kept.items():
        assert path == gone or path.stat().st_mtime_ns == time
    assert not list((tmp_path / "there").glob("*unfinished*"))

    for options, said in (
        (("--workers", "9"), "8 workers take one each"),
        (("--dtype", "float64"), "holds the results of another run"),
    ):
        refused = call(
            "many", "demo", file, "--unit", "head", "-o", tmp_path / "there", "--engine", "ray",
            *options,
        )  # fmt: skip
        assert refused.exit_code == 1
        assert said in " ".join(refused.output.split())
        assert lines_of(tmp_path / "there" / "results.jsonl") == other


def test_options_of_engines_are_refused_where_they_mean_nothing(file, tmp_path, monkeypatch):
    refused = call("many", "demo", file, "--workers", "2")
    assert refused.exit_code == 1
    assert "--workers goes with --engine ray" in refused.output
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    without = call("many", "demo", file, "--engine", "ray", "-o", tmp_path / "found.jsonl")
    assert without.exit_code == 1
    assert "--engine ray needs packages that are not installed" in " ".join(without.output.split())
    assert not list(tmp_path.glob("found*"))
