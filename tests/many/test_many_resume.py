"""A run over many prompts that keeps its results: what is finished is not done again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import safetensors
import torch
from many_prompts import assert_same, made, random_prompts
from safetensors.torch import load_file, save_file
from zoo import tiny_tokenizer

import dla_hooks
from dla_hooks import (
    CheckpointError,
    DLAError,
    InputError,
    attribute_many,
    direct_logit_attribution,
)


def test_stored_results_come_back_without_running_the_model(ran, model, tmp_path):
    tokenizer, prompts = tiny_tokenizer(), random_prompts(vocabulary=34)
    options = {"pos": None, "unit": "head", "tokenizer": tokenizer, "resume": tmp_path / "run"}
    first = list(attribute_many(model, prompts, 5, 7, window=3, **options))
    ran.clear()
    for window in (3, 2, 100):
        again = list(attribute_many(model, iter(prompts), 5, 7, window=window, **options))
        for one, other in zip(first, again, strict=True):
            assert_same(other, one, atol=0)
            assert (one.gap, one.logit_gap) == (other.gap, other.logit_gap)
    assert ran == []
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [*(f"00000000{a}-00000000{b}.safetensors" for a, b in ("02", "35", "67")),
                     "finished.json", "run.json"]  # fmt: skip
    assert json.loads((tmp_path / "run/run.json").read_text())["version"] == 1


@pytest.mark.parametrize("stop", ["close", "interrupt"])
def test_interrupted_run_resumes(ran, model, tmp_path, stop):
    prompts = random_prompts((6, 6, 5, 5) * 2)
    whole = list(attribute_many(model, prompts, 5))
    ran.clear()
    fail_at: list[tuple[int, int]] = []
    kept = {"resume": tmp_path, "tag": "stopped"}

    def interrupt(_, args, kwargs):
        if tuple(kwargs["input_ids"].shape) in fail_at:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt, with_kwargs=True)
    results = attribute_many(model, prompts, 5, window=4, max_tokens=12, **kept)
    ran.clear()  # less what a new run asks and tries
    for _ in range(3):
        next(results)
    if stop == "close":
        results.close()
        assert ran[-2:] == [(2, 6), (2, 5)]
    else:
        next(results)
        fail_at.append((2, 5))  # the second batch of the second window
        with pytest.raises(KeyboardInterrupt):
            next(results)
        fail_at.clear()
    done = 4 if stop == "close" else 6
    ran.clear()
    again = list(attribute_many(model, prompts, 5, window=4, max_tokens=12, **kept))
    handle.remove()
    assert sum(rows for rows, _ in ran) == 8 - done
    for one, other in zip(again, whole, strict=True):
        assert_same(one, other)
    assert not list(tmp_path.glob("*unfinished*"))


def test_prompts_that_failed_are_tried_again(ran, model, tmp_path):
    prompts = random_prompts((4, 5, 6, 7))

    def small_machine(_, args, kwargs):
        if kwargs["input_ids"].shape[1] > 5:
            raise torch.OutOfMemoryError("no")

    results = attribute_many(model, prompts, 5, resume=tmp_path)
    handle = model.register_forward_pre_hook(small_machine, with_kwargs=True)
    first = list(results)
    handle.remove()
    assert [isinstance(result, DLAError) for result in first] == [False, False, True, True]
    assert list(attribute_many(model, prompts, 5, resume=tmp_path))[3].tokens[0]
    ran.clear()
    again = list(attribute_many(model, prompts, 5, resume=tmp_path))
    assert ran == []
    for prompt, result in zip(prompts, again, strict=True):
        assert_same(result, direct_logit_attribution(model, prompt, 5))


def test_longer_list_resumes_after_shorter_one(ran, model, tmp_path):
    prompts = random_prompts()
    list(attribute_many(model, prompts[:5], 5, resume=tmp_path))
    ran.clear()
    assert len(list(attribute_many(model, prompts, 5, resume=tmp_path))) == 8
    assert sum(rows for rows, _ in ran) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": "head"}, "unit was 'component', now 'head'"),
        ({"pos": None}, "pos was '-1', now 'None'"),
        ({"center_unembed": True}, "center_unembed was False"),
        ({"check": False}, "check was True"),
        ({"model": "another seed"}, "weights was"),
        ({"model": "one number"}, "weights was"),
        ({"model": "config"}, "config was"),
        ({"model": "llama"}, "model was 'GPT2LMHeadModel"),
    ],
)
def test_the_folder_of_another_run_is_refused_at_the_call(tmp_path, change, said):
    usual = {"model": made("gpt2"), "prompts": random_prompts(), "answer_tokens": 5}
    list(attribute_many(**usual, resume=tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = change.get("model")
    if other is not None:
        change = {
            "model": made("llama" if other == "llama" else "gpt2", int(other == "another seed"))
        }
    if other == "one number":
        with torch.no_grad():
            change["model"].transformer.h[1].mlp.c_fc.weight[3, 7] += 1e-6
    if other == "config":
        change["model"].config.layer_norm_epsilon = 0.3
    with pytest.raises(InputError, match=said):
        attribute_many(**{**usual, **change}, resume=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # The same model in another place is the same model.
    assert len(list(attribute_many(**{**usual, "model": made("gpt2")}, resume=tmp_path))) == 8


class Dictionary:
    """A dictionary that computes in numpy, in tensors, or is a module."""

    def __init__(self, width, seed=0, threshold=0.0):
        self.threshold = threshold
        self.W = torch.randn(40, width, generator=torch.Generator().manual_seed(seed))

    def encode(self, x):
        f = x @ self.W.T
        return f * (f > self.threshold)

    def decode(self, f):
        return f @ self.W


class InArrays(Dictionary):
    def __init__(self, width, seed=0):
        super().__init__(width, seed)
        self.W = self.W.numpy()

    def encode(self, x):
        return (x @ torch.from_numpy(self.W).to(x).T).relu()

    def decode(self, f):
        return f @ torch.from_numpy(self.W).to(f)


class AsModule(torch.nn.Module):
    def __init__(self, width, seed=0):
        super().__init__()
        self.map = torch.nn.Linear(width, 40, bias=False)
        self.map.weight.data = Dictionary(width, seed).W

    def encode(self, x):
        return self.map(x).relu()

    def decode(self, f):
        return f @ self.map.weight


def as_folder(path, seed):
    path.mkdir(exist_ok=True)
    made = Dictionary(36, seed)
    W = made.W.contiguous()
    weights = {"W_enc": W.T.contiguous(), "W_dec": W, "b_enc": W[:, 0].clone()}
    save_file({**weights, "b_dec": torch.zeros(36)}, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text('{"architecture": "standard", "apply_b_dec_to_input": false}')
    return path


@pytest.mark.parametrize("kind", ["object", "threshold", "arrays", "module", "folder"])
def test_the_folder_of_other_dictionaries_is_refused(kind, tmp_path):
    def unit(seed):
        made = {
            "object": lambda: Dictionary(36, seed),
            "threshold": lambda: Dictionary(36, 0, threshold=0.1 * seed),
            "arrays": lambda: InArrays(36, seed),
            "module": lambda: AsModule(36, seed),
            "folder": lambda: as_folder(tmp_path / "sae", seed),
        }[kind]()
        return dla_hooks.Features({"1_mlp_out": made}, top=5)

    model, folder = made("gpt2"), tmp_path / "found"
    prompts = random_prompts()[:2]
    first = list(attribute_many(model, prompts, 5, unit=unit(0), resume=folder))
    kept = [unit(0), unit(0)]  # at other places in memory
    again = list(attribute_many(model, prompts, 5, unit=kept[1], resume=folder))
    assert [one.records() for one in again] == [one.records() for one in first]
    with pytest.raises(InputError, match="unit was"):
        attribute_many(model, prompts, 5, unit=unit(1), resume=folder)


@pytest.mark.parametrize("what", ["prompt", "answer", "incorrect", "bad prompt"])
def test_other_prompts_are_refused(model, tmp_path, what):
    prompts = random_prompts()
    answers, wrong = [5] * 8, [7] * 8
    list(attribute_many(model, prompts, answers, wrong, resume=tmp_path, window=4))
    if what == "prompt":
        prompts[5] = prompts[5].flip(0)
    elif what == "answer":
        answers[5] = 9
    elif what == "incorrect":
        wrong[5] = 9
    else:
        prompts[5] = []
    results = attribute_many(model, prompts, answers, wrong, resume=tmp_path, window=4)
    for _ in range(4):
        next(results)
    with pytest.raises(InputError, match="prompt 5 or its answer is not the one"):
        next(results)


@pytest.mark.parametrize("how", ["torn", "empty", "a bit", "another file"])
def test_a_damaged_file_is_noticed_and_may_be_deleted(ran, model, tmp_path, how):
    prompts = random_prompts()
    whole = list(attribute_many(model, prompts, 5, window=4, resume=tmp_path))
    shard = tmp_path / "000000004-000000007.safetensors"
    content = bytearray(shard.read_bytes())
    if how == "torn":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "a bit":
        content[-20] ^= 1
        shard.write_bytes(content)
    else:
        save_file(load_file(shard), shard)
    results = attribute_many(model, prompts, 5, window=4, resume=tmp_path)
    for _ in range(4):
        next(results)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged .*delete this file"):
        next(results)
    shard.unlink()
    ran.clear()
    again = list(attribute_many(model, prompts, 5, window=4, resume=tmp_path))
    assert sum(rows for rows, _ in ran) == 4
    for one, other in zip(again, whole, strict=True):
        assert_same(one, other)


def test_resume_folder_with_other_files_is_refused(model, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("")
    for name, content in {
        "torn": "{",
        "other": "[]",
        "newer": '{"format": "dla_hooks.many", "version": 2}',
        "no run": '{"format": "dla_hooks.many", "version": 1, "run": [1]}',
        "latin": '{"format": "é"}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content, encoding="latin-1")
    for name, error, said in (
        ("notes", InputError, "holds other files"),
        ("file", CheckpointError, "cannot be used"),
        ("torn", CheckpointError, "is damaged"),
        ("other", InputError, "not of a run"),
        ("newer", InputError, "newer dla_hooks"),
        ("no run", CheckpointError, r"'run' is no object, but \[1\]"),
        ("latin", CheckpointError, "is damaged: 'utf-8'"),
    ):
        with pytest.raises(error, match=said):
            attribute_many(model, random_prompts(), 5, resume=tmp_path / name)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.txt"]


def test_old_unfinished_files_are_removed(model, tmp_path):
    old, new = (tmp_path / f"000000000-00000000{end}.safetensors.7-ab.unfinished" for end in (3, 7))
    for path in (old, new):
        path.write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 60 * 60
    os.utime(old, (two_days_ago, two_days_ago))
    assert len(list(attribute_many(model, random_prompts(), 5, resume=tmp_path))) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000000000-000000007.safetensors",
        new.name,  # of another process, which may still be at it
        "finished.json",
        "run.json",
    ]


def test_two_processes_write_one_file_safely(model, tmp_path, monkeypatch):
    """The second begins and finishes while the first is writing."""
    prompts, names = random_prompts(), []
    replace = Path.replace

    def nested(unfinished, target):
        names.append(unfinished.name)
        if len(names) == 2:  # of the first the file of results, after run.json
            list(attribute_many(model, prompts, 5, resume=tmp_path))
        return replace(unfinished, target)

    monkeypatch.setattr(Path, "replace", nested)
    assert len(list(attribute_many(model, prompts, 5, resume=tmp_path))) == 8
    assert len(names) == len(set(names)) == 5  # run.json, and of each results and finished.json
    assert not list(tmp_path.glob("*.unfinished"))
    assert len(list(attribute_many(model, prompts, 5, resume=tmp_path))) == 8


def test_checksum_covers_header_of_results(model, tmp_path):
    list(attribute_many(model, random_prompts(), 5, resume=tmp_path))
    (shard,) = tmp_path.glob("*.safetensors")
    content = shard.read_bytes()
    assert content.count(b"0_attn_out") == 1
    shard.write_bytes(content.replace(b"0_attn_out", b"1_attn_out"))
    with pytest.raises(CheckpointError, match="does not hold what was written"):
        list(attribute_many(model, random_prompts(), 5, resume=tmp_path))


def test_each_file_is_read_once(ran, model, tmp_path, monkeypatch):
    prompts = random_prompts()
    whole = list(attribute_many(model, prompts, 5, window=4, resume=tmp_path))
    opened = []
    safe_open = safetensors.safe_open

    def counted(path, **options):
        opened.append(Path(path).name)
        return safe_open(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    for window in (1, 3):
        opened.clear()
        again = list(attribute_many(model, prompts, 5, window=window, resume=tmp_path))
        assert opened == ["000000000-000000003.safetensors", "000000004-000000007.safetensors"]
        for one, other in zip(again, whole, strict=True):
            assert_same(one, other, atol=0)


@pytest.mark.parametrize("resume", ["", 5, True, ["folder"], b""])
def test_resume_path_of_another_kind_is_refused(model, resume):
    with pytest.raises(InputError, match="resume must be the path of a folder"):
        attribute_many(model, random_prompts(), 5, resume=resume)


def test_resume_accepts_another_chunk_size(ran, model, tmp_path):
    prompts = random_prompts()
    first = list(attribute_many(model, prompts, 5, chunk_size=3, resume=tmp_path))
    ran.clear()
    again = list(attribute_many(model, prompts, 5, chunk_size=4, resume=tmp_path))
    assert ran == []
    for one, other in zip(first, again, strict=True):
        assert_same(one, other, atol=0)


def test_results_before_source_failure_are_stored(ran, model, tmp_path):
    prompts = random_prompts()

    def source():
        yield from prompts[:6]
        raise ConnectionError("the line is down")

    results = attribute_many(model, source(), 5, window=4, resume=tmp_path)
    found = [next(results) for _ in range(6)]
    with pytest.raises(ConnectionError, match="the line is down"):
        next(results)
    for prompt, result in zip(prompts[:6], found, strict=True):
        assert_same(result, direct_logit_attribution(model, prompt, 5))
    ran.clear()
    assert len(list(attribute_many(model, prompts, 5, window=4, resume=tmp_path))) == 8
    assert sum(rows for rows, _ in ran) == 2


def test_stored_sources_come_back_whatever_the_length_of_their_prompts(model, tmp_path):
    """A short prompt has fewer rows than places are kept for a long one."""
    prompts = [torch.arange(1, 3), torch.arange(1, 8), torch.arange(3, 6)]
    options = {"unit": dla_hooks.SourceTokens(top=20), "pos": None, "resume": tmp_path}
    found = list(attribute_many(model, prompts, 5, 7, **options))
    again = list(attribute_many(model, prompts, 5, 7, **options))
    for one, other in zip(found, again, strict=True):
        assert other.records() == one.records()
        assert len(other) == len(one)
