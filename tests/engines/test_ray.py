"""Ray Data: the numbers of one process, whatever is split, killed or taken up again."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import pytest
import ray_jobs
import torch
from ray_jobs import OPTIONS, Killed, rows

import dla_hooks
from dla_hooks import Attributor, CheckpointError, InputError, load_summary, summarize_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NUMBERS = ("attribution", "bias", "logit", "gap", "error")


def mapped(given, kind=Attributor, n_actors=2, **options):
    import ray.data

    made = ray.data.from_items(given, override_num_blocks=5)
    return made.map_batches(
        kind,
        fn_constructor_kwargs={**OPTIONS, **options},
        batch_size=40,
        compute=ray.data.ActorPoolStrategy(size=n_actors),
    )


@pytest.fixture(scope="module")
def given():
    return rows(200)


@pytest.fixture(scope="module")
def expected(given):
    """The same rows by one object in this process, by id, and their summary."""
    found = Attributor(**OPTIONS)({name: [row[name] for row in given] for name in given[0]})
    by_id = {
        i: {name: found[name][place] for name in NUMBERS} for place, i in enumerate(found["id"])
    }
    return by_id, summarize_rows(found)


def assert_rows(found, by_id):
    """Every row once, with its numbers."""
    counts = collections.Counter(row["id"] for row in found)
    assert counts == dict.fromkeys(by_id, 1)
    for row in found:
        other = by_id[row["id"]]
        assert row["error"] == other["error"]
        for name in ("attribution", "bias", "logit"):
            pair = [torch.tensor(one[name], dtype=torch.float64) for one in (row, other)]
            torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-5, equal_nan=True)


def assert_summaries(found, expected, atol=1e-12):
    assert (found.n, found.n_failed, found.labels) == (
        expected.n,
        expected.n_failed,
        expected.labels,
    )
    for name in ("mean", "standard_error"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=0, atol=atol, msg=name
        )
    assert abs(found.logit - expected.logit) <= atol


def test_rows_have_the_numbers_of_one_process_and_sums_those_of_the_rows(
    cluster, given, expected, tmp_path
):
    import ray.data

    by_id, summary = expected
    made = mapped(given).materialize()
    found = made.take_all()
    assert_rows(found, by_id)
    here = summarize_rows(found)
    assert_summaries(here, summary, atol=1e-5)  # other batches are padded otherwise
    assert_summaries(summarize_rows(made), here)
    assert_summaries(summarize_rows(made.random_shuffle(seed=1)), here)
    groups = summarize_rows(made, by="group")
    of_rows = summarize_rows(found, by="group")
    assert groups.keys() == of_rows.keys() == {"a", "b"}
    for name, group in groups.items():
        assert_summaries(group, of_rows[name])
    asked = {"contrast": ("group", "a", "b"), "pair": "pair"}
    assert_summaries(summarize_rows(made.repartition(3), **asked), summarize_rows(found, **asked))

    made.write_parquet(str(tmp_path / "rows"))
    assert_summaries(summarize_rows(tmp_path / "rows"), here)
    assert_summaries(load_summary(tmp_path / "rows"), here)
    assert_summaries(summarize_rows(ray.data.read_parquet(str(tmp_path / "rows"))), here)


def test_same_batches_have_the_very_same_numbers(cluster, given):
    import ray.data

    made = ray.data.from_items(given[:40], override_num_blocks=1).map_batches(
        Attributor,
        fn_constructor_kwargs=OPTIONS,
        batch_size=40,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = {row["id"]: row for row in made.take_all()}
    model, tokenizer = dla_hooks.demo.load()
    results = dla_hooks.attribute_many(
        model, [row["prompt"] for row in given[:40]], " are", " is", unit="head",
        tokenizer=tokenizer,
    )  # fmt: skip
    for i, result in enumerate(results):
        if isinstance(result, dla_hooks.DLAError):
            assert str(result) in found[i]["error"]
            continue
        assert list(found[i]["attribution"]) == result.attribution[:, 0].tolist()
        assert found[i]["logit"] == result.logit.item()
        assert found[i]["gap"] == result.gap


def test_killed_actor_loses_no_row_and_repeats_none(cluster, given, expected, tmp_path):
    by_id, _ = expected
    made = mapped(given, Killed, n_actors=1, folder=str(tmp_path), at=90).materialize()
    assert (tmp_path / "killed").exists()
    assert_rows(made.take_all(), by_id)


def test_killed_driver_goes_on_from_its_checkpoint(cluster, given, expected, tmp_path):
    import pyarrow
    import pyarrow.parquet

    by_id, _ = expected
    source = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), source, row_group_size=20)
    command = [sys.executable, ray_jobs.__file__, cluster, str(source), str(tmp_path)]
    first = subprocess.run([*command, "kill"], capture_output=True, text=True, check=False)
    assert first.returncode == -9, first.stderr[-2000:]
    done = ran(tmp_path)
    assert 0 < len(done) < len(given)
    second = subprocess.run([*command, "on"], capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-3000:]
    found = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    assert_rows(found, by_id)
    assert_summaries(summarize_rows(tmp_path / "out"), summarize_rows(found))
    assert len(ran(tmp_path)) < 2 * len(given)  # what was stored was not run again


def ran(folder: Path) -> list[int]:
    return [int(one) for path in folder.glob("ran-*") for one in path.read_text().split()]


def test_bad_input_is_named_before_the_sweep_and_in_it(cluster, given):
    import ray.data

    rows_of_ids = ray.data.from_items([{"id": i, "prompt": i} for i in range(4)])
    attributor = Attributor(**OPTIONS)
    attributor.check(ray.data.from_items(given).schema())
    with pytest.raises(InputError, match="'prompt' must hold texts, and is int64"):
        attributor.check(rows_of_ids.schema())
    with pytest.raises(InputError, match="no column 'prompt'"):
        attributor.check(rows_of_ids.drop_columns(["prompt"]).schema())
    with pytest.raises(CheckpointError, match="there is no folder /nowhere/model"):
        Attributor("/nowhere/model", answer=" are")
    made = rows_of_ids.map_batches(
        Attributor, fn_constructor_kwargs=OPTIONS, compute=ray.data.ActorPoolStrategy(size=1)
    )
    failed = made.take_all()
    assert all("a prompt must be a string" in row["error"] for row in failed)
    with pytest.raises(InputError, match="all 4 failed, the first with"):
        summarize_rows(failed)
    with pytest.raises(InputError, match="no column 'attribution'"):
        summarize_rows(rows_of_ids)
