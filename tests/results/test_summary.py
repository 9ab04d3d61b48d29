"""Means over prompts with standard errors, against numpy-like formulas over all samples at once."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from units import UNIT_NAMES
from zoo import build, tiny_tokenizer

from dla_hooks import (
    DirectLogitAttribution,
    InputError,
    Summary,
    TokenError,
    attribute_many,
    direct_logit_attribution,
    summarize,
)

LENGTHS = (5, 9, 2, 7, 7, 3)


@pytest.fixture(scope="module")
def model():
    return build("gpt2", attn="sdpa")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (n,), generator=generator) for n in LENGTHS]


def made(values: list[float], label: str = "row", unit: str = "component", **fields):
    attribution = torch.tensor(values)[:, None]
    labels = [f"{label}{i}" for i in range(len(values))]
    rest = torch.zeros(1)
    return DirectLogitAttribution(attribution, labels, unit, rest, rest, 0.0, **fields)


@pytest.mark.parametrize("pos", [-1, None])
@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_mean_and_standard_error_are_those_of_one_sample_per_prompt(model, prompts, unit, pos):
    options = {"unit": unit, "pos": pos}
    summary = summarize(attribute_many(model, prompts, 5, 7, max_tokens=20, **options))
    alone = [direct_logit_attribution(model, prompt, 5, 7, **options) for prompt in prompts]
    samples = torch.stack([result.attribution.flatten(1).mean(1) for result in alone])
    torch.testing.assert_close(summary.mean, samples.mean(0), rtol=0, atol=1e-5)
    error = samples.std(0) / math.sqrt(len(prompts))
    torch.testing.assert_close(summary.standard_error, error, rtol=0, atol=1e-5)
    assert (summary.n, summary.n_failed, summary.unit) == (len(prompts), 0, unit)
    assert summary.labels == alone[0].labels
    logits = torch.stack([result.logit.mean() for result in alone])
    assert summary.logit == pytest.approx(float(logits.mean()), abs=1e-5)
    standard_error = float(logits.std() / math.sqrt(6))
    assert summary.logit_standard_error == pytest.approx(standard_error, abs=1e-5)
    whole = summary.mean[-1] if summary.words.cumulative else summary.mean.sum()
    assert float(whole) + summary.bias == pytest.approx(summary.logit)


@pytest.mark.parametrize("pos", [-1, None, slice(-3, None)])
def test_a_padded_batch_is_as_many_samples_as_it_has_prompts(model, prompts, pos):
    width = max(LENGTHS)
    ids, mask = torch.zeros(6, width, dtype=torch.long), torch.zeros(6, width)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    batch = direct_logit_attribution(model, ids, 5, pos=pos, attention_mask=mask)
    at_once = summarize([batch])
    one_by_one = summarize(attribute_many(model, prompts, 5, pos=pos))
    assert at_once.n == one_by_one.n == 6
    torch.testing.assert_close(at_once.mean, one_by_one.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(at_once.standard_error, one_by_one.standard_error, rtol=0, atol=1e-5)


def test_small_spreads_on_large_numbers_are_not_lost():
    values = [1e9 + step for step in (0.0, 1.0, 2.0, 3.0)]
    summary = summarize(
        DirectLogitAttribution(
            torch.tensor([[v]], dtype=torch.float64),
            ["x"],
            "head",
            torch.zeros(1),
            torch.zeros(1),
            0,
        )
        for v in values
    )
    assert float(summary.mean[0]) == 1e9 + 1.5
    assert float(summary.standard_error[0]) == pytest.approx(math.sqrt(5 / 3 / 4), rel=1e-9)


def test_one_sample_has_no_standard_error():
    summary = summarize([made([1.0, -2.0])])
    assert summary.mean.tolist() == [1.0, -2.0]
    assert summary.standard_error.isnan().all()
    text = repr(summary)
    assert "nan" not in text
    assert "±" not in text
    assert text.startswith("mean of logits over 1 prompt\n")


def test_it_takes_a_stream_and_keeps_no_result():
    alive = []

    def stream():
        for step in range(5):
            assert sum(one() is not None for one in alive) <= 1
            result = made([float(step)])
            alive.append(weakref.ref(result))
            yield result
            del result

    assert summarize(stream()).mean.tolist() == [2.0]


def test_errors_are_counted(model, prompts):
    summary = summarize(attribute_many(model, [*prompts, [], [63]], 5))
    assert (summary.n, summary.n_failed) == (6, 2)
    assert "6 prompts (2 more failed)" in repr(summary)
    whole = summarize(attribute_many(model, prompts, 5))
    torch.testing.assert_close(summary.mean, whole.mean)


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([], "none was given"),
        ([TokenError("no such token"), TokenError("another")], "all 2 prompts failed, .*no such"),
        ([made([1.0]), made([1.0], unit="head")], r"unit is 'head', .* 'component' \(result 1\)"),
        ([made([1.0]), made([1.0], label="other")], r"\('other0' for 'row0'\)"),
        ([made([1.0]), made([1.0, 2.0])], "2 rows for 1"),
        ([made([1.0]), made([1.0], incorrect=["x"])], "is a difference of two logits"),
        ([made([1.0]), "text"], "got str at index 1"),
        ([None], "NoneType"),
    ],
)
def test_what_cannot_be_summarized(results, said):
    with pytest.raises(InputError, match=said):
        summarize(results)


@pytest.mark.parametrize("one", [made([1.0]), TokenError("no"), 5])
def test_one_result_is_no_list_of_results(one):
    with pytest.raises(InputError, match=r"got one .* summarize\(\[result\]\)"):
        summarize(one)


def test_prompts_without_any_position_are_no_samples(model, prompts):
    nothing = direct_logit_attribution(model, prompts[2], 5, pos=slice(4, None))
    with pytest.raises(InputError, match="no position is selected"):
        summarize([nothing])
    summary = summarize(attribute_many(model, prompts, 5, pos=slice(4, None)))
    assert summary.n == 4  # those of more than four tokens


def test_top_and_bottom():
    summary = summarize([made([1.0, -5.0, 0.0]), made([3.0, -7.0, 1.0])])
    assert summary.top(2) == [("row0", 2.0), ("row2", 0.5)]
    assert summary.bottom(1) == [("row1", -6.0)]
    with pytest.raises(InputError, match="not negative, got -1"):
        summary.top(-1)


def test_a_dataframe_has_a_line_per_row(model, prompts):
    pytest.importorskip("pandas")
    summary = summarize(attribute_many(model, prompts, 5, unit="head"))
    frame = summary.to_dataframe()
    row_columns = ["label", "kind", "layer", "sub", "head"]
    assert list(frame.columns) == [*row_columns, "mean", "standard_error", "n"]
    assert len(frame) == len(summary.labels)
    line = frame[frame.label == "L1H2"]
    row = summary.labels.index("L1H2")
    assert line["mean"].item() == pytest.approx(float(summary.mean[row]))
    assert line["standard_error"].item() == pytest.approx(float(summary.standard_error[row]))
    assert (line["layer"].item(), line["head"].item(), line["n"].item()) == (1, 2, 6)


def test_it_reads_like_a_result(model, prompts):
    text = repr(summarize(attribute_many(model, prompts, 5, 7, tokenizer=tiny_tokenizer())))
    head, unit, *table, end = text.splitlines()
    assert head == "mean of logit differences over 6 prompts · GPT2LMHeadModel (gpt2)"
    assert unit.startswith("components: ")
    assert unit.endswith("(± standard error)")
    assert len(table) == 8
    assert all(" ± " in line and "│" in line for line in table)
    assert end.endswith("the mean logit difference")
    capped = summarize(attribute_many(build("gemma2"), prompts, 5, unit="head"))
    assert "the mean logit before the cap of 5" in repr(capped)
    assert "remainder" in repr(capped)
    assert isinstance(capped, Summary)


def test_results_of_several_models_name_none():
    both = summarize([made([1.0], model="A"), made([2.0], model="B"), made([3.0], model="B")])
    assert both.model == ""
    assert summarize([made([1.0], model="A"), made([2.0], model="A")]).model == "A"
