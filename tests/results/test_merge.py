"""Summaries of parts of a data set, merged, are the summary of the whole."""

from __future__ import annotations

import functools
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from units import UNIT_NAMES
from zoo import build

from dla_hooks import (
    ArgumentTypeError,
    CheckpointError,
    DirectLogitAttribution,
    InputError,
    Summary,
    TokenError,
    attribute_many,
    load,
    summarize,
)

ROWS = 3


def one(values, unit="component", **fields):
    """The result of one prompt: rows, then bias and logit."""
    numbers = torch.tensor(values, dtype=torch.float64)
    labels = fields.pop("labels", [f"row{i}" for i in range(len(values) - 2)])
    return DirectLogitAttribution(
        numbers[:-2, None], labels, unit, numbers[-2:-1], numbers[-1:], 0.0, **fields
    )


def merged(parts):
    return functools.reduce(Summary.merge, parts, Summary.empty())


def close(found, expected, scale=1.0):
    """Numbers that differ by rounding only, beside what the samples are as large as."""
    for name in ("mean", "standard_error", "bias", "logit", "logit_standard_error"):
        pair = [torch.as_tensor(getattr(s, name), dtype=torch.float64) for s in (found, expected)]
        tolerance = 1e-12 * scale
        torch.testing.assert_close(*pair, rtol=1e-12, atol=tolerance, equal_nan=True, msg=name)
    for name in ("n", "n_failed", "labels", "unit", "difference", "model", "softcap", "rows"):
        assert getattr(found, name) == getattr(expected, name), name


samples = st.lists(
    st.one_of(
        st.lists(st.floats(-1e6, 1e6), min_size=ROWS + 2, max_size=ROWS + 2),
        st.just("failed"),
    ),
    min_size=1,
    max_size=30,
)


def results_of(values):
    return [TokenError("no") if value == "failed" else one(value) for value in values]


def part_of(values):
    failed = values.count("failed")
    return Summary.empty(failed) if failed == len(values) else summarize(results_of(values))


@settings(max_examples=150, deadline=None)
@given(samples, st.data())
def test_any_split_in_any_order_gives_the_same(values, data):
    whole = part_of(values)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=6)))
    edges = [0, *cuts, len(values)]
    parts = [part_of(values[a:b]) for a, b in itertools.pairwise(edges)]
    order = data.draw(st.permutations(parts))
    numbers = [abs(x) for value in values if value != "failed" for x in value]
    scale = max(numbers, default=1.0) or 1.0
    close(merged(order), whole, scale)


@settings(max_examples=100, deadline=None)
@given(samples, samples, samples)
def test_merging_is_associative_and_empty_is_its_identity(a, b, c):
    a, b, c = part_of(a), part_of(b), part_of(c)
    scale = max((float(x.mean.abs().max()) for x in (a, b, c) if x.n), default=1.0) or 1.0
    scale += max((float(x.squares.max()) for x in (a, b, c) if x.n), default=0.0) ** 0.5
    close(a.merge(b).merge(c), a.merge(b.merge(c)), scale)
    for same in (a.merge(Summary.empty()), Summary.empty().merge(a)):
        close(same, a, scale)


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_shards_of_a_sweep_are_the_sweep(unit, tmp_path):
    model = build("gpt2", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 60, (n,), generator=generator) for n in (5, 9, 2, 7, 7, 3)]
    options = {"unit": unit, "pos": None, "progress": False}
    results = list(attribute_many(model, [*prompts[:1], [], *prompts[1:]], 5, 7, **options))
    whole = summarize(results)
    shards = [
        load(summarize(results[start:stop]).save(tmp_path / f"{start}.safetensors"))
        for start, stop in ((0, 2), (2, 5), (5, 7))
    ]
    close(merged(shards), whole, float(whole.mean.abs().max()))
    assert repr(merged(shards)) == repr(whole)
    assert merged(shards).words == whole.words


def test_spreads_are_those_of_all_samples():
    values = torch.randn(50, ROWS + 2, dtype=torch.float64, generator=torch.Generator()) + 1e3
    parts = [summarize([one(row)]) for row in values.tolist()]
    found = merged(parts)
    torch.testing.assert_close(found.mean, values.mean(0)[:-2], rtol=1e-12, atol=0)
    error = values.std(0) / math.sqrt(50)
    torch.testing.assert_close(found.standard_error, error[:-2], rtol=1e-9, atol=0)
    assert found.logit_standard_error == pytest.approx(float(error[-1]), rel=1e-9)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_an_infinite_sample_gives_the_same_in_every_order(order):
    values = [[math.inf, 1.0, math.inf, 0, 0], [1.0, 2.0, -math.inf, 0, 0], [2.0, 3.0, 1.0, 0, 0]]
    parts = [summarize([one(values[i])]) for i in order]
    found = merged(parts)
    assert found.mean[:2].tolist() == [math.inf, 2.0]
    assert math.isnan(found.mean[2])
    assert math.isnan(found.standard_error[0])
    assert float(found.standard_error[1]) == pytest.approx(1 / math.sqrt(3))
    at_once = summarize([one(values[i]) for i in order])
    close(found, at_once)


def test_neither_of_two_merged_summaries_changes():
    a, b = summarize([one([1.0, 2.0, 3.0, 0, 0])]), summarize([one([3.0, 2.0, 1.0, 0, 0])])
    before = repr(a), repr(b), a.mean.clone()
    a.merge(b)
    assert (repr(a), repr(b)) == before[:2]
    assert torch.equal(a.mean, before[2])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"unit": "head"}, "the second's unit is 'head', where the first has 'component'"),
        ({"labels": ["a", "b", "c"]}, r"the second's labels are not .* \('a' for 'row0'\)"),
        ({"incorrect": ["x"]}, "the second's number is a difference of two logits"),
    ],
)
def test_summaries_of_other_things_are_refused(other, said):
    a, b = (summarize([one([1.0, 2.0, 3.0, 0, 0], **fields)]) for fields in ({}, other))
    with pytest.raises(InputError, match=f"cannot be merged: {said}"):
        a.merge(b)


def test_what_is_no_summary_is_refused():
    summary = summarize([one([1.0, 0, 0])])
    for other in (None, 0, one([1.0, 0, 0]), [summary]):
        with pytest.raises(ArgumentTypeError, match="with another Summary only"):
            summary.merge(other)


def test_models_and_softcap_follow_the_rule_of_summarize():
    def part(model, softcap=None):
        return summarize([one([1.0, 0, 0], model=model, softcap=softcap)])

    assert part("A").merge(part("A")).model == "A"
    assert part("A").merge(part("B")).model == ""
    assert part("A").merge(part("B")).merge(part("B")).model == ""
    assert part("A", 30.0).merge(part("A")).softcap == 30.0
    assert part("A").merge(Summary.empty(2)).model == "A"


def test_prompts_that_all_failed_are_counted():
    empty = Summary.empty(3)
    assert repr(empty) == "mean of logits over 0 prompts (3 failed)"
    assert empty.merge(Summary.empty(2)).n_failed == 5
    whole = empty.merge(summarize([one([1.0, 0, 0]), TokenError("no")]))
    assert (whole.n, whole.n_failed) == (1, 4)
    assert empty.records() == []


class TestFiles:
    def test_a_saved_summary_comes_back_whole(self, tmp_path):
        summary = summarize([one([1.0, 2, 3, 4, 5]), one([2.0, 2, 9, 0, 1]), TokenError("no")])
        for loaded in (Summary.load(summary.save(tmp_path / "s")), load(str(tmp_path / "s"))):
            close(loaded, summary)
            assert torch.equal(loaded.squares, summary.squares)
            assert repr(loaded) == repr(summary)

    def test_the_empty_summary_is_saved_too(self, tmp_path):
        loaded = load(Summary.empty(4).save(tmp_path / "s"))
        assert (loaded.n, loaded.n_failed, loaded.labels) == (0, 4, [])

    def test_the_file_is_plain_safetensors_with_json(self, tmp_path):
        from safetensors import safe_open

        path = summarize([one([1.0, 2, 3])]).save(tmp_path / "s")
        assert set(load_file(path)) == {"mean", "standard_error", "squares"}
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        assert (header["format"], header["version"]) == ("dla_hooks.summary", "2")
        assert json.loads(header["summary"])["n"] == 1

    @pytest.mark.parametrize(
        ("version", "summary", "error", "said"),
        [
            ("3", "{}", InputError, "newer dla_hooks"),
            ("²", "{}", CheckpointError, "version is no number"),
            ("2", "{}", CheckpointError, "damaged"),
            ("2", "no", CheckpointError, "damaged"),
            ("2", '{"labels": ["a", "b"], "unit": "u"}', CheckpointError, "damaged"),
        ],
    )
    def test_a_file_that_cannot_be_read_says_why(self, tmp_path, version, summary, error, said):
        header = {"format": "dla_hooks.summary", "version": version, "summary": summary}
        save_file({"mean": torch.zeros(1)}, tmp_path / "s", metadata=header)
        for read in (Summary.load, load):
            with pytest.raises(error, match=said):
                read(tmp_path / "s")


BY_HAND = {"unit": "component", "n_failed": 0, "bias": 0.0, "logit": 3.0}


class TestByHand:
    def test_spreads_are_read_off_the_errors(self):
        known = summarize([one([1.0, 0, 1.0]), one([5.0, 0, 5.0]), one([3.0, 0, 3.0])])
        by_hand = Summary(
            labels=known.labels,
            mean=known.mean,
            standard_error=known.standard_error,
            n=3,
            logit_standard_error=known.logit_standard_error,
            **BY_HAND,
        )
        close(by_hand.merge(known), known.merge(known))

    def test_numbers_that_are_not_one_for_each_row_are_refused(self):
        numbers = torch.zeros(2)
        for fields in (
            {"labels": ["a"], "mean": numbers, "standard_error": numbers},
            {"labels": ["a", "b"], "mean": numbers, "standard_error": numbers[:1]},
            {"labels": ["a", "b"], "mean": numbers, "standard_error": numbers, "squares": numbers},
        ):
            with pytest.raises(InputError, match="2 labels|1 labels|squares has 2"):
                Summary(n=1, logit_standard_error=0.0, **BY_HAND, **fields)
