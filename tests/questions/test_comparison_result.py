"""What can be done with a comparison: cut, shown, stored, averaged."""

from __future__ import annotations

import functools
import json
import math
import sys

import pytest
import torch
from zoo import build, example_ids

import dla_hooks
from dla_hooks import Comparison, InputError, Summary, compare, load, summarize

HALVES = ["written", "read", "first", "second"]
UNITS = ["component", "layer", "head", dla_hooks.Neurons(top=5)]


@functools.cache
def models():
    return build("llama", 0), build("llama", 1)


def compared(unit="component", seed=0, **options):
    ids = example_ids("llama", seed=seed)
    return compare(*models(), ids, 5, 7, unit=unit, **options)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class TestViews:
    def test_fields_are_those_of_its_difference(self):
        found = compared(pos=None)
        for name in ("attribution", "bias", "logit", "rows", "unit", "gap", "logit_gap", "labels"):
            assert getattr(found, name) is getattr(found.difference, name) or (
                getattr(found, name) == getattr(found.difference, name)
            )
        assert found.gap == found.first.gap + found.second.gap
        same(found["embed"], found.attribution[0])
        assert "embed" in found
        assert "nothing" not in found
        assert len(found) == len(found.labels) == len(list(found))
        assert found.top(2) == found.difference.top(2)
        assert found.bottom(2) == found.difference.bottom(2)
        with pytest.raises(dla_hooks.LabelError, match="near it are"):
            found["embd"]

    @pytest.mark.parametrize("unit", UNITS)
    def test_records_are_the_units_with_both_halves_and_both_runs(self, unit):
        found = compared(unit, pos=None)
        lines, own = found.records(), found.first.records()
        assert list(lines[0]) == [*own[0], *HALVES]
        assert list(found.to_dataframe().columns) == [*found.first.to_dataframe().columns, *HALVES]
        total = sum(line["attribution"] for line in lines if line["position"] == 2)
        if unit != "layer":
            expected = (found.logit - found.bias)[:, 2].sum()
            assert math.isclose(total, float(expected), abs_tol=1e-9)
        for line in lines:
            assert math.isclose(line["attribution"], line["written"] + line["read"], abs_tol=1e-12)
            if line["first"] is not None:
                difference = line["first"] - line["second"]
                assert math.isclose(line["attribution"], difference, abs_tol=1e-12)

    def test_what_was_written_of_rest_and_remainder_completes_the_sum(self):
        """The written halves of a ranked unit sum to those of the components."""
        parts = compared(pos=None)
        for top in (1, 5, None):
            found = compared(dla_hooks.Neurons(top=top), pos=None)
            whole = found.written.sum(0) + found.beyond.sum(0)
            torch.testing.assert_close(whole, parts.written.sum(0), rtol=0, atol=1e-12)

    def test_columns_of_the_unit_stand_beside_the_halves(self):
        pair, ids = (build("mixtral", 0), build("mixtral", 1)), example_ids("mixtral")
        for top in (None, 3):
            found = compare(*pair, ids, 5, unit=dla_hooks.Experts(top=top))
            assert list(found.records()[0])[-7:] == ["attribution", "weight", "vote", *HALVES][-7:]

    def test_parts_of_it_are_comparisons(self):
        for unit in UNITS:
            found = compared(unit, pos=[1, 3, 5])
            one = found.prompt(-1)
            assert isinstance(one, Comparison)
            same(one.written, found.written[:, 1:])
            same(one.first.logit, found.first.logit[1:])
            there = found.position(1)
            same(there.read, found.read[..., 1])
            same(there.second.attribution, found.second.attribution[..., 1])
            both = found.prompt(0).position(2)
            same(both.attribution, found.attribution[:, :1, 2])
            if found.beyond is not None:
                same(both.beyond, found.beyond[:, :1, 2])
                same(one.written_means, found.written_means[:, 1:])
                assert there.written_means is None
            assert len(both.records()) == len(found.records()) / 6
        with pytest.raises(dla_hooks.PositionError):
            found.prompt(5)

    @pytest.mark.parametrize("unit", UNITS)
    @pytest.mark.parametrize("pos", [-1, None])
    def test_text_and_html_say_the_runs_and_the_rows(self, unit, pos):
        found = compared(unit, pos=pos)
        text, html = repr(found), found._repr_html_()
        strongest = max(found.difference.row_means().rows, key=lambda one: abs(one[1]))[0].label
        for shown in (text, html):
            assert "first - second" in shown
            assert strongest in shown or "layer" in str(unit)
            assert f"first {float(found.first.logit.nanmean()):+.3f}"[:9] in shown
        assert len(text.splitlines()) <= 26
        if not isinstance(unit, dla_hooks.Neurons):
            assert "written" in text

    def test_text_says_where_the_second_run_was_read_if_it_was_elsewhere(self):
        found = compare(
            models()[0],
            None,
            example_ids("llama", 1),
            5,
            other_input=example_ids("llama", 1, seed=2),
        )
        second = " ".join(found.second.tokens[0])
        assert second in repr(found)
        assert second in found._repr_html_()
        assert second not in repr(compared())

    @pytest.mark.parametrize("unit", UNITS)
    def test_a_picture_is_of_the_difference_and_needs_no_extra(self, unit, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "altair", None)
        found = compared(unit)
        drawn = found.plot()
        assert isinstance(drawn, dla_hooks.Picture)
        assert "first - second" in drawn.title
        assert "<svg" in drawn.save(tmp_path / "c.svg").read_text()
        assert drawn.title == found.difference.plot().title

    @pytest.mark.parametrize("unit", UNITS)
    def test_a_chart_is_titled_as_a_difference(self, unit):
        pytest.importorskip("altair")
        chart = compared(unit).to_altair().to_dict()
        assert "first - second" in chart["title"]["text"]

    def test_a_result_without_halves_is_refused(self):
        own = compared().first
        with pytest.raises(InputError, match="no 'written'"):
            Comparison(own, own, own)


class TestFiles:
    @pytest.mark.parametrize("unit", UNITS)
    def test_saved_comparisons_come_back(self, unit, tmp_path):
        found = compared(unit, pos=None)
        path = found.save(tmp_path / "one.safetensors")
        for back in (load(path), Comparison.load(path)):
            assert type(back) is Comparison
            for name in ("attribution", "written", "read", "bias", "logit"):
                same(getattr(back, name), getattr(found, name))
            same(back.first.attribution, found.first.attribution)
            same(back.second.attribution, found.second.attribution)
            assert repr(back) == repr(found)
            assert back.to_csv() == found.to_csv()
            assert json.loads(back.to_json()) == json.loads(found.to_json())
        with pytest.raises(InputError, match="saved comparison, which dla_hooks.load reads"):
            dla_hooks.DirectLogitAttribution.load(path)

    def test_json_holds_all_three(self):
        found = json.loads(compared().to_json())
        assert found["difference"]["labels"] == found["first"]["labels"]
        assert set(HALVES) <= {name.removeprefix("beside.") for name in found["difference"]}


class TestSummaries:
    @pytest.mark.parametrize("unit", UNITS)
    def test_means_and_errors_are_those_of_the_pairs(self, unit):
        every = [compared(unit, seed=seed, pos=[0, 3]) for seed in range(3)]
        found = summarize(every)
        assert found.n == 6
        assert found.compared
        for name, means in (("attribution", found.mean), *found.beside.items()):
            if name.endswith("_error"):
                continue
            error = found.standard_error if name == "attribution" else None
            error = found.beside.get(f"{name}_standard_error", error)
            for label in found.labels[:3] + found.labels[-1:]:
                samples = torch.tensor(
                    [sample_of(one, name, label, row) for one in every for row in (0, 1)],
                    dtype=torch.float64,
                )
                place = found.labels.index(label)
                torch.testing.assert_close(means[place], samples.mean())
                expected = samples.std() / math.sqrt(6)
                torch.testing.assert_close(error[place], expected)
        assert math.isclose(found.logit, float(torch.stack([c.logit for c in every]).mean()))

    def test_parts_of_a_data_set_merge_to_the_whole(self, tmp_path):
        every = [compared(seed=seed) for seed in range(4)]
        whole = summarize(every)
        merged = summarize(every[:1]).merge(summarize(every[1:])).merge(Summary.empty())
        again = load(merged.save(tmp_path / "summary.safetensors"))
        for found in (merged, again):
            assert found.compared
            for name in ("mean", "standard_error"):
                torch.testing.assert_close(getattr(found, name), getattr(whole, name))
            for name, own in whole.beside.items():
                torch.testing.assert_close(found.beside[name], own)
        assert "first - second" in repr(again)
        columns = list(whole.to_dataframe().columns)
        assert columns[5:] == ["mean", "standard_error", *whole.beside, "n"]

    def test_comparisons_and_attributions_do_not_mix(self):
        one, own = compared(), compared().first
        for pair in ([one, own], [own, one]):
            with pytest.raises(InputError, match="difference of two runs"):
                summarize(pair)
        with pytest.raises(InputError, match="put it in a list"):
            summarize(one)
        with pytest.raises(InputError, match="difference of two runs"):
            summarize([one]).merge(summarize([own]))

    def test_summaries_of_attributions_are_as_they_were(self):
        found = summarize([compared().first])
        assert not found.compared
        assert found.beside == {}
        assert "written" not in found.records()[0]


def sample_of(comparison, name, label, row):
    """One prompt's mean of a row, from all of its neurons if it is ranked."""
    if isinstance(comparison.difference, dla_hooks.DirectLogitAttribution):
        values = getattr(comparison, name)[comparison.labels.index(label)]
        return float(values[row].mean())
    whole = every_neuron(tuple(map(tuple, comparison.first.tokens)))
    if label == "remainder":
        values = {
            "attribution": whole.difference.remainder,
            "written": whole.beyond[1],
            "read": whole.difference.remainder - whole.beyond[1],
        }[name]
        return float(values[row].mean())
    number = whole.difference.rows.number_of(label)
    there = whole.difference.index == number
    values = {"attribution": whole.attribution, "written": whole.written, "read": whole.read}[name]
    return float((values * there).sum(0)[row].mean())


@functools.cache
def every_neuron(tokens):
    ids = torch.tensor([[int(token) for token in row] for row in tokens])
    return compare(*models(), ids, 5, 7, unit=dla_hooks.Neurons(top=None), pos=[0, 3])
