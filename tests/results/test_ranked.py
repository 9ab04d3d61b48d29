"""Results that keep the strongest of many rows, made by hand."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
from mapping_zoo import build_any, example_ids_any

import dla_hooks
from dla_hooks import ArgumentTypeError, InputError, LabelError, RankedAttribution, summarize
from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.schema import row_columns, rows_from

WORDS = Words(
    "neuron",
    "Neurons",
    "neurons: what each wrote",
    index="neuron",
    remainder="remainder",
    remainder_is="what no neuron wrote",
    beside=("activation",),
)
ROWS = RowRuns([Run("L0N{}", "neuron", 0, 0, n=40), Run("L1N{}", "neuron", 1, 0, n=30)])


def made(seed=0, shape=(2, 3), top=4, means=True, **fields):
    """A result with all its numbers at hand: the result, and the values of all rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    values = normal(len(ROWS), *shape)
    index = values.abs().topk(top, dim=0).indices
    kept = values.gather(0, index)
    remainder, bias = normal(*shape), normal(*shape)
    result = RankedAttribution(
        attribution=kept,
        index=index,
        rows=ROWS,
        unit="neuron",
        rest=values.sum(0) - kept.sum(0),
        remainder=remainder,
        bias=bias,
        logit=values.sum(0) + remainder + bias,
        gap=1e-9,
        words=WORDS,
        prompt_means=values.reshape(len(ROWS), shape[0], -1).mean(-1) if means else None,
        positions=torch.arange(shape[-1]).expand(shape) if len(shape) > 1 else torch.full(shape, 2),
        tokens=[["The", " cat", " sat"]] * shape[0],
        answer=[" on"],
        model="a model",
        beside={"activation": 10 * kept},
        **fields,
    )
    return result, values


@pytest.mark.parametrize("seed", [0, 1])
class TestNumbers:
    def test_all_parts_make_up_the_logit(self, seed):
        result, _ = made(seed)
        torch.testing.assert_close(result.total() + result.bias, result.logit)

    def test_means_rank_all_rows(self, seed):
        result, values = made(seed)
        means = values.mean((1, 2))
        torch.testing.assert_close(result.mean_rows, means)
        best = int(means.argmax())
        assert result.top(1) == [(ROWS[best].label, pytest.approx(float(means[best])))]
        assert result.bottom(70)[-1][0] == ROWS[best].label

    def test_a_row_by_its_label_is_nan_where_it_is_not_kept(self, seed):
        result, values = made(seed)
        for number in (0, 39, 40, 69):
            found, there = result[ROWS[number].label], (result.index == number).any(0)
            torch.testing.assert_close(found[there], values[number][there])
            assert found[~there].isnan().all()
        assert {row.label for row, _ in result} == {
            ROWS[number].label for number in result.index.unique().tolist()
        }
        assert len(result) == len(list(result))

    def test_one_prompt_keeps_its_own_means_and_one_position_none(self, seed):
        result, values = made(seed)
        second = result.prompt(1)
        torch.testing.assert_close(second.mean_rows, values[:, 1].mean(-1))
        torch.testing.assert_close(second.total() + second.bias, second.logit)
        last = result.position(-1)
        assert last.mean_rows is None
        with pytest.raises(InputError, match="no means over its 2 entries"):
            last.top(1)
        one = last.prompt(0)
        best = int(values[:, 0, -1].abs().argmax())
        assert ROWS[best].label in {one.top(1)[0][0], one.bottom(1)[0][0]}

    def test_records_sum_to_the_logit_at_every_entry(self, seed):
        result, _ = made(seed)
        lines = result.records()
        assert list(lines[0]) == [
            *("label", "kind", "layer", "sub", "neuron", "row", "position", "token", "answer"),
            *("incorrect", "attribution", "activation"),
        ]
        for row in range(2):
            for position in range(3):
                own = [x for x in lines if (x["row"], x["position"]) == (row, position)]
                assert [x["label"] for x in own[-2:]] == ["rest", "remainder"]
                assert own[-1]["layer"] is None
                total = sum(x["attribution"] for x in own)
                whole = float((result.logit - result.bias)[row, position])
                assert total == pytest.approx(whole, abs=1e-9)
                assert all(x["activation"] == 10 * x["attribution"] for x in own[:-2])
        assert next(csv.DictReader(io.StringIO(result.to_csv())))["label"] == lines[0]["label"]

    @pytest.mark.parametrize("means", [True, False])
    def test_views_sum_to_the_whole(self, seed, means):
        result, _ = made(seed, means=means)
        shown = result.row_means()
        total = sum(value for _, value in shown.rows) + shown.beyond
        assert total == pytest.approx(float(result.total().mean()))
        text = repr(result)
        assert "more rows, together" in text
        assert "what no neuron wrote" in text
        assert len(text.splitlines()) <= 25
        assert "more rows, together" in result._repr_html_()
        pytest.importorskip("altair")
        bars = json.dumps(result.to_altair().to_dict())
        assert "remainder" in bars
        assert " more" in bars


def test_files_hold_everything(tmp_path):
    result, _ = made()
    for read in (dla_hooks.load, RankedAttribution.load):
        back = read(result.save(tmp_path / "ranked.safetensors"))
        assert type(back) is RankedAttribution
        assert back.rows == result.rows
        assert back.words == result.words
        assert back.to_json() == result.to_json()
    data = json.loads(result.to_json())
    assert data["labels"][0][0][0] == ROWS[int(result.index[0, 0, 0])].label


def test_files_hold_rows_that_are_a_list(tmp_path):
    """Units may give their rows one by one; nothing else in the file names them."""
    runs, _ = made()
    result = replace(runs, rows=list(runs.rows))
    back = dla_hooks.load(result.save(tmp_path / "ranked.safetensors"))
    assert list(back.rows) == list(result.rows)
    assert back.to_json() == result.to_json()


@pytest.mark.parametrize(
    "unit",
    [
        *(dla_hooks.Neurons(top=4), dla_hooks.Experts(top=4), dla_hooks.Experts()),
        *(dla_hooks.SourceTokens(top=4), dla_hooks.SourceTokens(sum="heads")),
    ],
    ids=repr,
)
def test_results_of_every_unit_are_read_back(unit, tmp_path):
    model = build_any("qwen2_moe")  # has them all
    ids = example_ids_any(model)
    result = dla_hooks.direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=None)
    back = dla_hooks.load(result.save(tmp_path / "found.safetensors"))
    assert json.loads(back.to_json()) == json.loads(result.to_json())
    assert back.records() == result.records()
    label = result.records()[0]["label"]
    torch.testing.assert_close(back[label], result[label], rtol=0, atol=0, equal_nan=True)


def test_summaries_average_every_row():
    results, values = zip(*[made(seed, shape=(1, 3)) for seed in range(4)], strict=True)
    summary = summarize(results)
    assert summary.labels[:2] == ["L0N0", "L0N1"]
    assert summary.labels[-1] == "remainder"
    means = torch.stack([v.mean((1, 2)) for v in values])
    torch.testing.assert_close(summary.mean[:-1], means.mean(0))
    torch.testing.assert_close(summary.standard_error[:-1], means.std(0) / 2)
    assert float(summary.mean.sum()) + summary.bias == pytest.approx(summary.logit)
    with pytest.raises(InputError, match="do not mean the same"):
        summarize([made(means=False)[0]])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_is_summarized_as_its_prompts_are(seed):
    batch, _ = made(seed)
    together, apart = summarize([batch]), summarize([batch.prompt(0), batch.prompt(1)])
    assert together.n == 2
    torch.testing.assert_close(together.mean, apart.mean)
    torch.testing.assert_close(together.standard_error, apart.standard_error)


def test_columns_of_rows_are_those_that_are_filled():
    """Versions before sources cannot read a column of them."""
    head, source = Row("L0H1", "head", 0, 0, 1), Row("L0H1<0", "head", 0, 0, 1, source=0)
    assert "source" not in row_columns([head])
    for rows in ([head], [head, source]):
        assert rows_from([row.label for row in rows], row_columns(rows)) == rows


@pytest.mark.parametrize("label", ["L0N40", "L2N0", "L0N", "L0N07", "L1N-1", "rest", ""])
def test_an_unknown_label_names_those_like_it(label):
    result, _ = made()
    assert label not in result
    with pytest.raises(LabelError, match="near it are"):
        result[label]
    with pytest.raises(ArgumentTypeError, match="a string like 'L0N0'"):
        result[3]


def test_padding_is_left_out():
    result, values = made(shape=(2, 3))
    for name in ("attribution", "rest", "remainder", "bias", "logit"):
        getattr(result, name)[..., 0, 0] = torch.nan
    result.index[:, 0, 0] = -1
    result.positions = result.positions.clone()
    result.positions[0, 0] = -1
    result.prompt_means[:, 0] = values[:, 0, 1:].mean(-1)
    five = torch.cat((values[:, 0, 1:], values[:, 1]), 1)
    torch.testing.assert_close(result.mean_rows, five.mean(1))
    assert {(x["row"], x["position"]) for x in result.records()} >= {(0, 1), (1, 0)}
    assert not [x for x in result.records() if (x["row"], x["position"]) == (0, 0)]


def test_numbers_that_do_not_fit_are_refused():
    result, _ = made()
    with pytest.raises(InputError, match="one row number for each value"):
        RankedAttribution(**{**vars(result), "index": result.index[:2]})


def test_runs_of_rows_are_a_sequence():
    single = RowRuns([Run("3_mlp_out[b_dec]", "b_dec", 3), Run("L3F{}@mlp", "feature", 3, 0, n=9)])
    assert [row.label for row in single[:3]] == ["3_mlp_out[b_dec]", "L3F0@mlp", "L3F1@mlp"]
    assert (single[-1].index, len(single), len(list(single))) == (8, 10, 10)
    assert [single.number_of(row.label) for row in single] == list(range(10))
    sources = RowRuns([Run(f"L0H{5}<" + "{}", "head", 0, 0, 5, 4, of_sources=True)])
    assert (sources[3].label, sources[3].index, sources[3].source) == ("L0H5<3", 5, 3)
    with pytest.raises(IndexError):
        single[10]
