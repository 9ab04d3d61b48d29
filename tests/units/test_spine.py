"""Several units in one run, units as objects, and plans that are made once and asked many times."""

from __future__ import annotations

import pytest
import torch
from alter import alter_output
from hypothesis import given, settings
from hypothesis import strategies as st
from units import UNIT_NAMES
from zoo import build, example_ids

import dla_hooks
from dla_hooks import DecompositionError, InputError, direct_logit_attribution, prepare
from dla_hooks.inputs.entries import Entries, one_target
from dla_hooks.projection.ledger import TopRows
from dla_hooks.projection.tiles import Tile
from dla_hooks.units.plan import Recording

SPECS = ["gpt2", "gemma2", "granite", "olmo2-bias-tied", "gpt_neox-parallel"]


def passes(model, call):
    """How often the whole model runs within a call, and what the call returns."""
    count = []
    handle = model.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        result = call()
    finally:
        handle.remove()
    return len(count), result


def assert_same(found, expected):
    assert found.labels == expected.labels
    assert found.unit == expected.unit
    for name in ("attribution", "bias", "logit"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.tokens == expected.tokens
    assert found.answer == expected.answer


def tensors_of(result):
    """Every tensor in a result and in what it has seen, by its name."""
    seen = result.seen
    assert seen.rank is not None  # read, and there from then on
    kept = {**vars(result), **vars(seen)}
    return {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}


class TestSeveralUnits:
    @pytest.mark.parametrize("spec", SPECS)
    def test_each_result_is_that_of_its_own_call(self, spec):
        model, ids = build(spec), example_ids(spec)
        found = direct_logit_attribution(model, ids, 5, 7, unit=UNIT_NAMES, pos=None)
        assert tuple(found) == UNIT_NAMES
        for name, result in found.items():
            assert_same(result, direct_logit_attribution(model, ids, 5, 7, unit=name, pos=None))

    @pytest.mark.parametrize("pos", [-1, None])
    @pytest.mark.parametrize("spec", ["gpt2", "llama", "gemma2"])
    def test_results_that_are_written_to_change_no_other_and_no_later_one(self, spec, pos):
        model, ids = build(spec), example_ids(spec)
        units = {"one": "component", "again": "component", "two": "head", "three": "layer"}
        plan = prepare(model, dla_hooks.Each([5, 7]), unit=units)
        untouched = plan(ids, pos=pos)
        results = plan(ids, pos=pos)
        for key, result in results.items():
            for name, own in tensors_of(result).items():
                torch.testing.assert_close(own, tensors_of(untouched[key])[name], equal_nan=True)
                own.fill_(77)
        for key, result in plan(ids, pos=pos).items():
            for name, own in tensors_of(result).items():
                torch.testing.assert_close(own, tensors_of(untouched[key])[name], equal_nan=True)

    def test_the_model_runs_once(self):
        model, ids = build("llama"), example_ids("llama")
        runs = []
        alter_output(model.get_input_embeddings(), lambda out: runs.append(1) or out)
        direct_logit_attribution(model, ids, 5, unit=UNIT_NAMES)
        runs.clear()
        direct_logit_attribution(model, ids, 5, unit=UNIT_NAMES)
        assert len(runs) == 1
        plan = prepare(model, 5, unit=UNIT_NAMES)
        runs.clear()
        plan(ids)
        assert len(runs) == 1

    def test_two_of_a_kind_need_keys_of_their_own(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        with pytest.raises(InputError, match="'head' twice.*mapping"):
            direct_logit_attribution(model, ids, 5, unit=("head", dla_hooks.Heads()))
        units = {"plain": "head", "folded": dla_hooks.Heads(fold_value_biases=True)}
        found = direct_logit_attribution(model, ids, 5, unit=units)
        assert list(found) == ["plain", "folded"]
        assert_same(found["plain"], direct_logit_attribution(model, ids, 5, unit="head"))
        folded = direct_logit_attribution(model, ids, 5, unit="head", fold_value_biases=True)
        assert_same(found["folded"], folded)
        assert not torch.allclose(found["folded"].attribution, found["plain"].attribution)

    @pytest.mark.parametrize("unit", [(), [], {}, {5: "head"}, ("head", "neurons"), 7, None])
    def test_other_forms_are_refused(self, unit):
        with pytest.raises(InputError, match="unit"):
            direct_logit_attribution(build("gpt2"), example_ids("gpt2"), 5, unit=unit)


class TestUnitObjects:
    def test_an_object_is_its_name_with_options(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        for cls in (dla_hooks.Components, dla_hooks.Layers, dla_hooks.Heads):
            name = cls.words.name
            found = direct_logit_attribution(model, ids, 5, unit=cls())
            assert_same(found, direct_logit_attribution(model, ids, 5, unit=name))
            assert cls() == cls()
            assert cls.__name__ in repr(cls())

    def test_its_own_option_wins_over_the_calls(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        unit = dla_hooks.Heads(fold_value_biases=False)
        found = direct_logit_attribution(model, ids, 5, unit=unit, fold_value_biases=True)
        assert_same(found, direct_logit_attribution(model, ids, 5, unit="head"))

    def test_a_class_is_refused_with_what_to_write(self):
        with pytest.raises(InputError, match=r"unit=Heads\(\)"):
            direct_logit_attribution(build("gpt2"), example_ids("gpt2"), 5, unit=dla_hooks.Heads)
        with pytest.raises(InputError, match="fold_value_biases"):
            dla_hooks.Heads(fold_value_biases="yes")

    def test_with_a_projection_heads_are_a_declaration(self):
        found = dla_hooks.Heads("self_attn.o_proj", post_norm="norm")
        assert (found.proj, found.count, found.post_norm) == (
            "self_attn.o_proj",
            "num_attention_heads",
            "norm",
        )
        assert dla_hooks.Heads(proj="x").proj == "x"


class TestPlans:
    @pytest.mark.parametrize("spec", SPECS)
    def test_a_plan_gives_what_single_calls_give(self, spec):
        model, ids = build(spec), example_ids(spec)
        plan = prepare(model, 5, 7, unit="head")
        for prompt, pos in ((ids, -1), (ids[:1, :4], None), (ids, [0, 2])):
            expected = direct_logit_attribution(model, prompt, 5, 7, unit="head", pos=pos)
            assert_same(plan(prompt, pos=pos), expected)

    def test_answers_for_each_row_are_laid_over_each_prompt(self):
        model, ids = build("llama"), example_ids("llama", batch=2)
        answers = torch.tensor([5, 8])
        plan = prepare(model, answers, unit=("component", "head"))
        expected = direct_logit_attribution(model, ids, answers, unit="head", pos=None)
        assert_same(plan(ids, pos=None)["head"], expected)
        with pytest.raises(dla_hooks.ShapeMismatchError):
            plan(example_ids("llama", batch=3))

    def test_padding_is_as_in_a_single_call(self):
        model, ids = build("llama", attn="sdpa"), example_ids("llama", batch=2, length=6)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        plan = prepare(model, 5, unit="component")
        expected = direct_logit_attribution(model, ids, 5, attention_mask=mask, pos=None)
        assert_same_with_nan(plan(ids, attention_mask=mask, pos=None), expected)

    def test_a_plan_refuses_what_a_call_refuses(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        with pytest.raises(InputError, match="answer_tokens is required"):
            prepare(model, None)
        with pytest.raises(InputError, match="unit must be one of"):
            prepare(model, 5, unit="neurons")
        plan = prepare(model, 10**6)
        with pytest.raises(dla_hooks.TokenError, match="1000000"):
            plan(ids)
        plan = prepare(model, 5)
        with pytest.raises(InputError, match="provide either"):
            plan()
        model.train()
        with pytest.raises(dla_hooks.TrainingModeError):
            plan(ids)
        model.eval()
        plan(ids)

    @pytest.mark.parametrize("unit", UNIT_NAMES)
    @pytest.mark.parametrize("trace", [True, False], ids=["seen", "through .data"])
    def test_changed_weights_are_noticed(self, unit, trace):
        model, ids = build("llama-bias"), example_ids("llama-bias")
        plan = prepare(model, 5, 7, unit=unit)
        plan(ids)
        weights = [
            model.lm_head.weight,
            model.model.norm.weight,
            model.model.layers[1].self_attn.o_proj.weight,
            model.model.layers[0].self_attn.o_proj.bias,
        ]
        for weight in weights:
            with torch.no_grad():
                (weight if trace else weight.data).mul_(1.5)
                (weight if trace else weight.data)[0].add_(0.3)
            expected = direct_logit_attribution(model, ids, 5, 7, unit=unit)
            assert_same(plan(ids), expected)

    def test_changed_norms_are_noticed_without_the_check(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        plan = prepare(model, 5, unit="component", check=False)
        plan(ids)
        model.transformer.ln_f.weight.data[:7].mul_(2.0)
        assert_same(plan(ids), direct_logit_attribution(model, ids, 5))

    def test_a_hook_and_its_removal_are_noticed(self):
        model, ids = build("llama"), example_ids("llama")
        plan = prepare(model, 5, unit="component")
        before = plan(ids)
        mlp = model.model.layers[1].mlp
        handle = mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        ablated = plan(ids)
        row = ablated.labels.index("1_mlp_out")
        assert not bool(ablated.attribution[row].any())
        handle.remove()
        assert_same(plan(ids), before)

    def test_a_plan_that_no_longer_holds_raises(self):
        model, ids = build("llama"), example_ids("llama")
        plan = prepare(model, 5)
        alter_output(model.model.layers[1], lambda out: out + out.square())
        with pytest.raises((DecompositionError, dla_hooks.UnsupportedModelError)):
            plan(ids)

    def test_a_plan_says_what_it_is(self):
        plan = prepare(build("gpt2"), 5, unit=("component", "head"))
        assert repr(plan) == "Plan(GPT2LMHeadModel (gpt2): component, head)"
        assert isinstance(plan, dla_hooks.Plan)
        assert dla_hooks.Plan.__module__ == "dla_hooks"


def assert_same_with_nan(found, expected):
    assert found.labels == expected.labels
    torch.testing.assert_close(found.attribution, expected.attribution, equal_nan=True)


def two_entries():
    both = torch.arange(2)
    return one_target(both * 0, both, both >= 0, (1, 2))


class TestTopRows:
    """A ledger of the strongest rows against all of them at once."""

    @settings(deadline=None, max_examples=100)
    @given(
        seed=st.integers(0, 10**6),
        n_rows=st.integers(1, 12),
        n_entries=st.integers(1, 7),
        k=st.integers(1, 14),
        at_once=st.integers(1, 5),
        tile=st.integers(1, 4),
        of_rows=st.booleans(),
    )
    def test_the_strongest_rows_and_the_sum_of_all(
        self, seed, n_rows, n_entries, k, at_once, tile, of_rows
    ):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(n_rows, n_entries, generator=generator, dtype=torch.float64)
        values[torch.rand(values.shape, generator=generator) < 0.2] = 0
        scale = torch.rand(n_entries, generator=generator, dtype=torch.float64) + 0.5
        ledger = TopRows(k, n_rows, n_entries, torch.float64, n_beside=1, of_rows=of_rows)
        order = torch.randperm(n_rows, generator=generator)
        for rows in order.split(at_once):
            for start in range(0, n_entries, tile):
                place = slice(start, min(start + tile, n_entries))
                piece = Tile(place, place, place.stop - place.start, torch.zeros(1), None)
                ledger.add(values[rows][:, place], rows, piece, [10 * values[rows][:, place]])
        batch = torch.arange(n_entries) % 2
        every = Entries(batch, batch, batch, batch >= 0, (2, 1))
        top = ledger.gathered(scale, every)
        assert top.values_KN.shape == (min(k, n_rows), n_entries)
        torch.testing.assert_close(top.sum_N, values.sum(0) / scale)
        torch.testing.assert_close(top.values_KN, values.gather(0, top.index_KN) / scale)
        torch.testing.assert_close(top.rest_N, top.sum_N - top.values_KN.sum(0))
        torch.testing.assert_close(top.beside[0], 10 * values.gather(0, top.index_KN))
        if of_rows:
            for row in (0, 1):
                own = (values / scale)[:, batch == row].sum(1)
                torch.testing.assert_close(top.row_sums_RB[:, row], own)
        else:
            assert top.row_sums_RB is None
        strongest = (values / scale).abs().sort(0, descending=True).values[: len(top.values_KN)]
        torch.testing.assert_close(top.values_KN.abs(), strongest)
        assert all(len(set(column)) == len(column) for column in top.index_KN.T.tolist())

    @pytest.mark.parametrize("of_rows", [True, False])
    def test_each_entry_has_rows_of_its_own(self, of_rows):
        ledger = TopRows(3, 9, 2, torch.float64, of_rows=of_rows)
        piece = Tile(None, slice(0, 2), 2, torch.zeros(1), None)
        rows = torch.tensor([[4, 8], [2, -1]])
        ledger.add(torch.tensor([[1.0, 5.0], [-3.0, 0.0]]), rows, piece)
        top = ledger.gathered(torch.tensor([1.0, 2.0], dtype=torch.float64), two_entries())
        assert top.index_KN.T.tolist()[0][:2] == [2, 4]
        assert top.index_KN.T.tolist()[1][0] == 8
        assert (top.index_KN >= 0).sum() == 3
        assert top.values_KN.T.tolist() == [[-3, 1, 0], [2.5, 0, 0]]

    def test_everything_is_kept_where_no_number_is_given(self):
        ledger = TopRows(None, 3, 2, torch.float32)
        piece = Tile(None, slice(0, 2), 2, torch.zeros(1), None)
        ledger.add(torch.tensor([[1.0, 0.0], [-3.0, 2.0], [0.0, 0.0]]), torch.arange(3), piece)
        top = ledger.gathered(torch.ones(2), two_entries())
        assert top.values_KN[:, 0].tolist() == [-3.0, 1.0, 0.0]
        assert sorted(top.index_KN[:, 1].tolist()) == [0, 1, 2]


def test_a_recording_is_finished_once(monkeypatch):
    """Its numbers are divided by the final scale in place; twice would be twice too often."""
    finish, told = Recording.finish, []

    def twice(recording):
        found = finish(recording)
        with pytest.raises(RuntimeError, match="gathered once"):
            finish(recording)
        told.append(recording)
        return found

    model, ids = build("gpt2"), example_ids("gpt2")
    expected = direct_logit_attribution(model, ids, 5, unit=UNIT_NAMES)
    monkeypatch.setattr(Recording, "finish", twice)
    found = direct_logit_attribution(model, ids, 5, unit=UNIT_NAMES)
    assert len(told) == 1
    for unit in UNIT_NAMES:
        assert torch.equal(found[unit].attribution, expected[unit].attribution)
