"""Sums of rows: any split in any order has the numbers of one pass."""

from __future__ import annotations

import functools
import random

import pytest
import torch

import dla_hooks
from dla_hooks import Attributor, CheckpointError, InputError, Summary, load, summarize_rows
from dla_hooks.engines.question import Question
from dla_hooks.engines.sums import RowSums

NOUNS = ("dog", "key", "car", "dog near the car", "key behind the dog", "car near the keys")


def rows_of(columns):
    names = list(columns)
    return [dict(zip(names, line, strict=True)) for line in zip(*columns.values(), strict=True)]


@pytest.fixture(scope="module")
def rows():
    prompts, number, pair = [], [], []
    for index, noun in enumerate(NOUNS * 4):
        for plural in (False, True):
            first = noun.split()
            first[0] += "s" * plural
            prompts.append(f"The {' '.join(first)}")
            number.append("plural" if plural else "singular")
            pair.append(f"{noun} {index}")
    columns = {"prompt": prompts, "number": number, "pair": pair, "half": ["l", "r", "r"] * 16}
    columns["prompt"][7] = ""
    made = Attributor(dla_hooks.demo.path(), unit="head", answer=" are", incorrect=" is")
    return rows_of(made(columns))


def by_hand(rows):
    """Mean and standard error of rows, in float64, by their definition."""
    values = torch.tensor([row["attribution"] for row in rows], dtype=torch.float64)
    return values.mean(0), values.std(0) / len(values) ** 0.5


def assert_is(summary, mean, error, atol=1e-12):
    torch.testing.assert_close(summary.mean, mean, rtol=0, atol=atol)
    torch.testing.assert_close(summary.standard_error, error, rtol=0, atol=atol)


@pytest.mark.parametrize("seed", range(4))
def test_any_split_in_any_order_has_the_numbers_of_one_pass(rows, seed):
    rng = random.Random(seed)
    order = rng.sample(rows, len(rows))
    parts = [RowSums(Question()) for _ in range(rng.randint(2, 9))]
    for row in order:
        rng.choice(parts).add({name: [value] for name, value in row.items()})
    whole = RowSums(Question())
    for part in rng.sample(parts, len(parts)):
        whole.merge(part)
    summary = whole.summaries()[None]
    good = [row for row in rows if not row["error"]]
    assert (summary.n, summary.n_failed) == (len(good), 1)
    assert_is(summary, *by_hand(good))
    for rows_at_once in (rows, order):
        assert_is(summarize_rows(rows_at_once), summary.mean, summary.standard_error)
    halves = [summarize_rows([*rows[:1], *rng.sample(rows[1:], 20)]) for _ in range(2)]
    merged = functools.reduce(Summary.merge, halves, Summary.empty())
    assert merged.n + merged.n_failed == 42


def test_groups_are_those_of_their_rows(rows):
    found = summarize_rows(iter(rows), by="half")
    assert found.keys() == {"l", "r"}
    for name, summary in found.items():
        own = [row for row in rows if row["half"] == name and not row["error"]]
        assert_is(summary, *by_hand(own))
    assert sum(summary.n_failed for summary in found.values()) == 1


def test_contrast_is_of_paired_differences(rows, tmp_path):
    asked = {"contrast": ("number", "plural", "singular"), "pair": "pair"}
    found = summarize_rows(random.Random(3).sample(rows, len(rows)), **asked)
    sides = {
        side: {row["pair"]: row for row in rows if row["number"] == side and not row["error"]}
        for side in ("plural", "singular")
    }
    both = [name for name in sides["plural"] if name in sides["singular"]]
    differences = [
        {
            "attribution": [
                a - b
                for a, b in zip(
                    sides["plural"][name]["attribution"],
                    sides["singular"][name]["attribution"],
                    strict=True,
                )
            ]
        }
        for name in both
    ]
    assert_is(found, *by_hand(differences))
    assert (found.n, found.n_failed) == (23, 1)
    assert found.contrast == "plural - singular (number)"
    assert repr(found).startswith("paired: plural - singular (number)\n")
    again = load(found.save(tmp_path / "found.safetensors"))
    assert again.contrast == found.contrast
    assert found.merge(again).n == 46
    with pytest.raises(InputError, match="no difference of two prompts"):
        found.merge(summarize_rows(rows))
    assert "23 pairs, plural - singular (number)" in found.plot().to_svg()


def test_pairs_that_are_not_whole_are_refused(rows):
    asked = {"contrast": ("number", "plural", "singular"), "pair": "pair"}
    with pytest.raises(InputError, match="1 rows have no partner; the first is 'plural' of pair"):
        summarize_rows(rows[1:], **asked)
    with pytest.raises(InputError, match="holds 'plural' twice"):
        summarize_rows([*rows[1:2], *rows[1:2]], **asked)
    with pytest.raises(InputError, match="is of two groups"):
        summarize_rows(rows, by="number", **asked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "kind"}, "no column 'kind'"),
        ({"by": 3}, "by must be the name of a column"),
        ({"pair": "pair"}, "contrast and pair go together"),
        ({"contrast": ("number", "a"), "pair": "pair"}, "contrast must be"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(rows, options, said):
    with pytest.raises(InputError, match=said):
        summarize_rows(rows, **options)


def test_rows_of_two_models_units_or_conventions_are_refused_by_name(rows):
    prompts = {"prompt": ["The dog"]}
    make = functools.partial(Attributor, dla_hooks.demo.path(), answer=" are")
    for options, said in (
        ({"unit": "layer"}, "rows cannot be averaged: .*unit is 'layer'|have 25 numbers"),
        ({"unit": "head"}, "number is a logit, where the first's is a difference"),
        ({"unit": "head", "incorrect": " is", "center_unembed": True}, "center_unembed is True"),
    ):
        other = rows_of(make(**options)(prompts))
        with pytest.raises(InputError, match=said):
            summarize_rows([*rows, *other])
    good = [row for row in rows[1:] if not row["error"]]
    with pytest.raises(InputError, match="no row says what those with about ="):
        summarize_rows(good)
    with pytest.raises(InputError, match="which no Attributor wrote"):
        summarize_rows([{**rows[0], "about": "hand-made rows"}])


def test_holders_of_rows_give_the_same(rows, tmp_path):
    expected = summarize_rows(rows)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "rows").mkdir()
    parquet.write_table(table.slice(0, 20), tmp_path / "rows/a.parquet")
    parquet.write_table(table.slice(20), tmp_path / "rows/b.parquet")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for given in (table, tmp_path / "rows", str(tmp_path / "rows/"), columns):
        found = summarize_rows(given)
        assert (found.n, found.n_failed) == (expected.n, expected.n_failed)
        assert_is(found, expected.mean, expected.standard_error)
    with pytest.raises(CheckpointError, match="there is no "):
        summarize_rows(tmp_path / "nothing")
    (tmp_path / "rows/c.parquet").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be read"):
        summarize_rows(tmp_path / "rows")


@pytest.mark.parametrize("given", [3, [1], "", [{"prompt": "a"}], {"prompt": ["a"]}])
def test_what_holds_no_rows_is_refused(given):
    with pytest.raises((InputError, CheckpointError)):
        summarize_rows(given)
    with pytest.raises(InputError, match="there are no rows"):
        summarize_rows([])
