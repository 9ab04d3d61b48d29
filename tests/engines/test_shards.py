"""Jobs that share a sweep without an engine, and the summary of what they have left."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
from many_prompts import assert_same, made, random_prompts

from dla_hooks import (
    CheckpointError,
    DLAError,
    InputError,
    attribute_many,
    load_summary,
    summarize,
)

PROMPTS = [*random_prompts((5, 9, 2, 7, 7, 3, 1, 9, 4, 4, 6)), torch.zeros(0, dtype=torch.long)]


@pytest.fixture(scope="module")
def model():
    return made("llama", 1)


def job(model, i, n, folder=None, prompts=PROMPTS, **options):
    return attribute_many(
        model, prompts, 5, 7, unit="head", resume=folder, shard=(i, n), window=2, **options
    )


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_jobs_have_each_prompt_once_with_its_numbers(model, n):
    whole = list(attribute_many(model, PROMPTS, 5, 7, unit="head"))
    found = [list(job(model, i, n)) for i in range(n)]
    assert [len(one) for one in found] == [len(range(i, 12, n)) for i in range(n)]
    for i, results in enumerate(found):
        for result, expected in zip(results, whole[i::n], strict=True):
            if isinstance(expected, DLAError):
                assert str(result) == str(expected)
                assert result.prompt_index == 11
            else:
                assert_same(result, expected)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2])
def test_summary_of_jobs_is_that_of_one_pass(model, tmp_path, order):
    of_job = {i: list(job(model, i, 3, tmp_path)) for i in order}
    in_order = [of_job[k % 3][k // 3] for k in range(12)]
    expected = summarize(in_order)
    found = load_summary(tmp_path)
    assert (found.n, found.n_failed) == (11, 1)
    for name in ("mean", "standard_error"):
        pair = (getattr(one, name) for one in (found, expected))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
    assert abs(found.logit - expected.logit) <= 1e-12
    again = load_summary(*(tmp_path / f"shard-{i}-of-3" for i in order))
    torch.testing.assert_close(again.mean, found.mean, rtol=0, atol=1e-12)
    saved = found.save(tmp_path / "one.safetensors")
    assert load_summary(saved).n == 11


def test_stopped_job_goes_on_and_is_named_until_it_ended(model, tmp_path):
    list(job(model, 0, 2, tmp_path))
    with pytest.raises(InputError, match=r"lacks 1 of 2 jobs \(shard-1-of-2\)"):
        load_summary(tmp_path)
    stopped = job(model, 1, 2, tmp_path)
    next(stopped)
    stopped.close()
    with pytest.raises(InputError, match="shard-1-of-2 did not come to its end"):
        load_summary(tmp_path)
    assert load_summary(tmp_path, partial=True).n == 8
    list(job(model, 1, 2, tmp_path))
    assert load_summary(tmp_path).n == 11
    # A longer list of prompts is a run that goes on.
    more = job(model, 1, 2, tmp_path, prompts=[*PROMPTS, *random_prompts((3, 3, 3, 3, 3))])
    list(itertools.islice(more, 7))
    more.close()
    with pytest.raises(InputError, match="did not come to its end"):
        load_summary(tmp_path)


def test_lost_results_are_missed(model, tmp_path):
    list(job(model, 0, 1, tmp_path))
    next((tmp_path / "shard-0-of-1").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="holds 9 results, and it had 12 prompts of which 1"):
        load_summary(tmp_path)


def test_folder_without_shards_and_without_results(model, tmp_path):
    list(attribute_many(model, PROMPTS, 5, resume=tmp_path / "whole"))
    assert load_summary(tmp_path / "whole").n == 11
    list(attribute_many(model, PROMPTS[-1:], 5, resume=tmp_path / "failed"))
    assert load_summary(tmp_path / "whole", tmp_path / "failed").n_failed == 2
    with pytest.raises(InputError, match="all 1 prompts failed"):
        load_summary(tmp_path / "failed")


def test_mixed_models_and_options_are_named(model, tmp_path):
    run = functools.partial(attribute_many, prompts=PROMPTS[:2], answer_tokens=5)
    list(run(model, resume=tmp_path / "a"))
    list(run(made("gpt2"), resume=tmp_path / "b"))
    list(run(model, resume=tmp_path / "c", unit="head"))
    with pytest.raises(InputError, match=r"a and .*b are not of one sweep: model is 'Llama.*GPT2"):
        load_summary(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match="unit is 'component' and 'head'"):
        load_summary(tmp_path / "a", tmp_path / "c")


def test_folders_that_are_none_are_named(model, tmp_path):
    for folder, error, said in (
        ("nothing", CheckpointError, "there is no"),
        ("empty", InputError, "holds neither the results of attribute_many nor an Attributor"),
        ("two", InputError, "holds sweeps of 2 and of 3 jobs"),
        ("torn", CheckpointError, "run.json is damaged"),
    ):
        if folder != "nothing":
            (tmp_path / folder).mkdir()
        if folder == "two":
            (tmp_path / "two/shard-0-of-2").mkdir()
            (tmp_path / "two/shard-0-of-3").mkdir()
        if folder == "torn":
            (tmp_path / "torn/run.json").write_text("{")
        with pytest.raises(error, match=said):
            load_summary(tmp_path / folder)
    with pytest.raises(InputError, match="give the folders"):
        load_summary()


@pytest.mark.parametrize("shard", [1, (0,), (2, 2), (-1, 2), (0, 0), (0.0, 2), (True, 2), "01"])
def test_shards_that_are_none_are_refused(model, shard):
    with pytest.raises(InputError, match=r"shard must be \(i, n\)"):
        attribute_many(model, PROMPTS, 5, shard=shard)


def test_job_of_another_number_is_refused_in_the_folder_of_one(model, tmp_path):
    list(job(model, 0, 2, tmp_path))
    stamp = json.loads((tmp_path / "shard-0-of-2/run.json").read_text())["run"]
    assert stamp["shard"] == [0, 2]
    (tmp_path / "shard-0-of-2").rename(tmp_path / "shard-1-of-2")
    with pytest.raises(InputError, match="shard was"):
        job(model, 1, 2, tmp_path)
