"""Two runs compared: who wrote otherwise, and what is read otherwise.

The truth is computed from stored vectors (`two_runs`), or it is the models' own logits.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from alter import alter_output
from mapping_zoo import build_any, example_ids_any
from two_runs import Vectors, written_and_read
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import (
    ArgumentTypeError,
    Comparison,
    DecompositionError,
    InputError,
    ShapeMismatchError,
    UnsupportedModelError,
    compare,
    direct_logit_attribution,
)
from dla_hooks.projection import directions
from dla_hooks.targets import pair
from dla_hooks.targets.token_sets import TokenSets

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT

GAINED = ("gemma4_text", "doge")
FAMILIES = [
    "gpt2",
    "llama",
    "gemma2",
    "granite",
    "gpt_neox-parallel",
    "cohere",
    "mixtral",
    "opt",
    "falcon-new",
    *GAINED,
]


def made(spec, seed=0, **options):
    return build_any(spec, seed, **options) if spec in GAINED else build(spec, seed, **options)


def ids_of(spec, seed=0):
    if spec in GAINED:
        return example_ids_any(made(spec), seed=seed)
    return example_ids(spec, seed=seed)


def close(found, expected, atol=2e-6):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=atol)


def assert_exact(found, atol=1e-12):
    """What holds of every comparison, whatever it is of."""
    difference = found.difference
    close(found.attribution, found.written + found.read, atol)
    close(difference.total() + found.bias, found.logit, 10 * atol)
    close(found.logit, found.first.logit - found.second.logit, atol)
    close(found.bias, found.first.bias - found.second.bias, atol)


@torch.no_grad()
def logits_of(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits.double()


def state_of(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks, model.training, [p.detach().clone() for p in model.parameters()]


def assert_unchanged(model, before):
    hooks, training, weights = state_of(model)
    assert (hooks, training) == before[:2]
    assert all(torch.equal(one, other) for one, other in zip(weights, before[2], strict=True))


class TestComponents:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("spec", FAMILIES)
    def test_two_checkpoints_differ_as_their_stored_vectors_do(self, spec, seed):
        """Gains, norms and unembeddings all differ: each run folds both directions itself."""
        models = made(spec, seed), made(spec, seed + 5)
        ids = ids_of(spec, seed)
        found = compare(*models, ids, 5, 7, pos=None)
        first, second = (Vectors.of(model, ids) for model in models)
        expected = written_and_read(first, second, 5, 7)
        assert found.labels == list(expected)
        for place, (written, read) in enumerate(expected.values()):
            close(found.written[place], written)
            close(found.read[place], read)
        assert_exact(found)
        close(found.bias, (first.bias(5, 7) - second.bias(5, 7)).expand(ids.shape))
        assert float(found.read.abs().max()) > 1e-3
        assert float(found.written.abs().max()) > 1e-3

    @pytest.mark.parametrize("spec", FAMILIES)
    def test_rows_and_bias_sum_to_the_difference_of_the_models_logits(self, spec):
        models, ids = (made(spec, 0), made(spec, 1)), ids_of(spec)
        found = compare(*models, ids, 5, 7)
        own = [logits_of(model, ids)[:, -1] for model in models]
        if found.difference.softcap is not None:
            cap = found.difference.softcap
            own = [cap * (each / cap).atanh() for each in own]
        expected = (own[0] - own[1])[:, 5] - (own[0] - own[1])[:, 7]
        close(found.attribution.sum(0) + found.bias, expected, 1e-4)

    @pytest.mark.parametrize("spec", ["gpt2", "gemma2", "doge"])
    @pytest.mark.parametrize("unit", ["component", "layer", "head"])
    def test_exchanging_the_runs_changes_the_signs(self, spec, unit):
        one, other, ids = made(spec, 0), made(spec, 1), ids_of(spec)
        found, back = (compare(*pair, ids, 5, unit=unit) for pair in ((one, other), (other, one)))
        for name in ("attribution", "written", "read", "bias", "logit"):
            close(getattr(found, name), -getattr(back, name), 1e-12)
        close(found.first.attribution, back.second.attribution, 1e-12)

    @pytest.mark.parametrize("unit", ["component", "layer", "head", "neuron"])
    def test_equal_runs_differ_by_nothing(self, unit):
        model, ids = build("llama"), example_ids("llama")
        for other in (None, model, copy.deepcopy(model)):
            found = compare(model, other, ids, 5, 7, unit=unit, pos=None)
            for name in ("attribution", "written", "read", "bias", "logit"):
                assert not bool(getattr(found, name).any()), name

    def test_each_run_is_its_own_attribution(self):
        models, ids = (build("gemma2", 0), build("gemma2", 1)), example_ids("gemma2")
        for unit in ("component", "layer", "head", "neuron"):
            found = compare(*models, ids, 5, 7, unit=unit, pos=[1, -1])
            for model, run in zip(models, (found.first, found.second), strict=True):
                alone = direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=[1, -1])
                assert type(run) is type(alone)
                close(run.attribution, alone.attribution, 1e-12)
                assert [row.label for row in run.rows] == [row.label for row in alone.rows]
                if unit == "neuron":
                    assert torch.equal(run.index, alone.index)
                    close(run.rest, alone.rest, 1e-12)
                    close(run.remainder, alone.remainder, 1e-12)
                    close(run.prompt_means, alone.prompt_means, 1e-12)
                assert (run.answer, run.incorrect, run.tokens) == (
                    alone.answer,
                    alone.incorrect,
                    alone.tokens,
                )

    def test_layers_are_running_sums_of_both_halves(self):
        models, ids = (build("llama", 0), build("llama", 1)), example_ids("llama")
        parts = compare(*models, ids, 5, 7, pos=None)
        found = compare(*models, ids, 5, 7, pos=None, unit="layer")
        for name in ("attribution", "written", "read"):
            close(getattr(found, name), getattr(parts, name).cumsum(0), 1e-12)

    def test_several_units_are_measured_in_one_run_of_each_model(self):
        models, ids = (build("gpt2", 0), build("gpt2", 1)), example_ids("gpt2")
        compare(*models, ids, 5)  # measured
        count = []
        handles = [m.register_forward_pre_hook(lambda *_: count.append(1)) for m in models]
        found = compare(*models, ids, 5, unit=("component", "head"))
        for handle in handles:
            handle.remove()
        assert len(count) == 2
        assert list(found) == ["component", "head"]
        assert all(isinstance(one, Comparison) for one in found.values())


class TestWhatDiffers:
    def test_another_unembedding_is_read_and_not_written(self):
        model, ids = build("gpt2-untied"), example_ids("gpt2-untied")
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(37.0).add_(0.2)
        found = compare(model, other, ids, 5, 7, pos=None)
        assert float(found.written.abs().max()) < 1e-12
        close(found.read, found.attribution, 1e-11)
        assert float(found.attribution.abs().max()) > 1

    def test_another_scale_is_read_and_not_written(self):
        model, ids = build("llama"), example_ids("llama")
        other = copy.deepcopy(model)
        other.model.norm.variance_epsilon = 3.0
        found = compare(model, other, ids, 5, 7, pos=None)
        assert float(found.written.abs().max()) < 1e-12
        ratio = found.second.attribution / found.first.attribution
        close(found.read, found.first.attribution * (1 - ratio), 1e-9)
        close(ratio, ratio[:1].expand_as(ratio), 1e-9)  # one factor for all rows
        assert float((1 - ratio).abs().min()) > 1e-3

    def test_another_last_write_is_written_and_its_scale_is_read(self):
        """What all other rows lose or gain is the norm's share alone."""
        model, ids = build("llama"), example_ids("llama")
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.layers[-1].mlp.down_proj.weight.mul_(1.7)
        found = compare(model, other, ids, 5, 7)
        assert float(found.written[:-1].abs().max()) < 1e-12
        assert float(found.written[-1].abs().min()) > 1e-3
        assert float(found.read[:-1].abs().max()) > 1e-3


class TestOtherUnits:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("spec", ["gpt2", "llama", "gemma2", "granite"])
    def test_heads_differ_as_their_stored_vectors_do(self, spec, seed):
        models, ids = (build(spec, seed), build(spec, seed + 5)), example_ids(spec)
        found = compare(*models, ids, 5, 7, pos=None, unit="head")
        runs = [Vectors.of(model, ids) for model in models]
        for run, model in zip(runs, models, strict=True):
            run.x = head_vectors(model, ids, run)
        expected = written_and_read(*runs, 5, 7)
        for label, (written, read) in expected.items():
            place = found.labels.index(label)
            close(found.written[place], written)
            close(found.read[place], read)
        assert len(expected) == len(found.labels) - 1  # and the remainder
        assert_exact(found)

    @pytest.mark.parametrize("spec", ["llama", "gemma2", "gpt2"])
    def test_neurons_differ_as_their_stored_vectors_do(self, spec):
        models, ids = (build(spec, 0), build(spec, 1)), example_ids(spec)
        runs = [Vectors.of(model, ids) for model in models]
        for run, model in zip(runs, models, strict=True):
            run.x = neuron_vectors(model, ids)
        expected = written_and_read(*runs, 5, 7)
        for top in (4, None):
            found = compare(*models, ids, 5, 7, pos=None, unit=dla_hooks.Neurons(top=top))
            kept = len(expected) if top is None else top
            assert found.attribution.shape == (kept, *ids.shape)
            every = torch.stack([sum(halves) for halves in expected.values()])
            strongest = every.abs().sort(0, descending=True).values
            close(found.attribution.abs(), strongest[:kept])
            for entry in [(0, 2), (1, 6)]:
                for place in range(min(kept, 4)):
                    label = found.rows[int(found.difference.index[place][entry])].label
                    close(found.written[place][entry], expected[label][0][entry])
                    close(found.read[place][entry], expected[label][1][entry])
            close(found.attribution.sum(0) + found.difference.rest, every.sum(0), 1e-5)
            assert_exact(found)

    def test_a_neuron_that_differs_is_found_though_neither_run_ranks_it(self):
        model, ids = build("llama"), example_ids("llama")
        last = dla_hooks.Neurons(top=None, layers=len(model.model.layers) - 1)
        every = direct_logit_attribution(model, ids, 5, unit=last)
        row = every.rows[int(every.mean_rows.abs().argmin())]
        other = copy.deepcopy(model)
        with torch.no_grad():
            down = other.model.layers[row.layer].mlp.down_proj.weight
            down[:, row.index] += 0.5 * model.lm_head.weight[5]
        found = compare(other, model, ids, 5, unit=dla_hooks.Neurons(top=1))
        labels = {found.rows[int(number)].label for number in found.difference.index.flatten()}
        assert labels == {row.label}

    @pytest.mark.parametrize("top", [None, 3])
    def test_experts_that_one_run_alone_chose_count_nothing_in_the_other(self, top):
        models, ids = (build("mixtral", 0), build("mixtral", 1)), example_ids("mixtral")
        unit = dla_hooks.Experts(top=top)
        found = compare(*models, ids, 5, 7, pos=None, unit=unit)
        alone = [
            direct_logit_attribution(model, ids, 5, 7, pos=None, unit="expert") for model in models
        ]
        assert_exact(found)
        for run, own in zip((found.first, found.second), alone, strict=True):
            if top is None:
                close(run.attribution, own.attribution, 1e-12)
            else:
                every = own.attribution[:-1].abs().sort(0, descending=True).values
                close(run.attribution.abs(), every[:top], 1e-12)
        difference = alone[0].attribution - alone[1].attribution
        if top is None:
            close(found.attribution, difference, 1e-12)
            chosen = [own.beside["weight"] != 0 for own in alone]
            one_alone = chosen[0] & ~chosen[1]
            assert bool(one_alone.any())
            close(found.difference.beside["second"][one_alone], torch.zeros(int(one_alone.sum())))
            weight = alone[0].beside["weight"] - alone[1].beside["weight"]
            close(found.difference.beside["weight"], weight, 1e-12)
        else:
            every = difference[:-1].abs().sort(0, descending=True).values
            close(found.attribution.abs(), every[:top], 1e-12)
            close(found.difference.remainder, difference[-1], 1e-12)

    @pytest.mark.parametrize("spec", ["llama", "gemma2"])
    def test_sources_sum_to_their_heads_in_both_halves(self, spec):
        models = build(spec, 0, attn="eager"), build(spec, 1, attn="eager")
        ids = example_ids(spec, batch=1)
        unit = dla_hooks.SourceTokens(heads=["L0H1", "L1H2"], top=None)
        found = compare(*models, ids, 5, 7, unit=(unit, "head"))
        for name in ("attribution", "written", "read", "first", "second"):
            of_heads = found["head"].difference
            own = {"attribution": of_heads.attribution, **of_heads.beside}[name]
            mine = found["source"].difference
            values = {"attribution": mine.attribution, **mine.beside}[name]
            for head in ("L0H1", "L1H2"):
                here = [
                    mine.rows[int(number)].label.startswith(f"{head}<")
                    for number in mine.index[:, 0]
                ]
                expected = own[of_heads.labels.index(head)][0]
                close(values[torch.tensor(here), 0].sum(), expected, 1e-6)
        assert_exact(found["source"])

    def test_adapters_on_and_off_pair_up_what_both_have(self):
        peft = pytest.importorskip("peft")
        model, ids = adapted(peft, "llama", ["o_proj", "lm_head"]), example_ids("llama")
        found = compare(model, None, ids, 5, 7, unit="adapter", other_context=model.disable_adapter)
        assert_exact(found)
        second = found.difference.beside["second"]
        place = found.labels.index("0_attn_out[default]")
        assert not bool(second[place].any())
        assert bool(second[found.labels.index("0_attn_out")].any())


class TestContexts:
    @pytest.mark.parametrize("spec", ["llama", "gemma2"])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_an_adapter_on_and_off_is_the_merged_model_and_the_base(self, spec, seed):
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "o_proj", "down_proj"] + ["lm_head"] * (spec == "llama")
        model = adapted(peft, spec, targets, seed)
        base, ids = build(spec, seed), example_ids(spec)
        merged = copy.deepcopy(model).merge_and_unload().eval()
        before = state_of(model)
        for unit in ("component", "head", "neuron"):
            found = compare(
                model, None, ids, 5, 7, unit=unit, pos=None, other_context=model.disable_adapter
            )
            expected = compare(merged, base, ids, 5, 7, unit=unit, pos=None)
            for name in ("attribution", "written", "read", "bias", "logit"):
                close(getattr(found, name), getattr(expected, name), 1e-9)
            assert_exact(found, 1e-11)
        assert_unchanged(model, before)
        runs = [Vectors.of(one, ids) for one in (merged, base)]
        found = compare(model, None, ids, 5, 7, pos=None, other_context=model.disable_adapter)
        for place, (written, read) in enumerate(written_and_read(*runs, 5, 7).values()):
            close(found.written[place], written)
            close(found.read[place], read)

    def test_directions_are_those_of_each_context_when_they_are_made_late(self, monkeypatch):
        """Of many targets they are made tile by tile, when the other context may be left."""
        peft = pytest.importorskip("peft")
        monkeypatch.setattr(directions, "_HELD_ELEMENTS", 10)
        model, ids = adapted(peft, "llama", ["lm_head"]), example_ids("llama")
        answers = ids.roll(-1, 1)
        found = compare(model, None, ids, answers, pos=None, other_context=model.disable_adapter)
        merged = copy.deepcopy(model).merge_and_unload().eval()
        expected = compare(merged, build("llama"), ids, answers, pos=None)
        close(found.read, expected.read, 1e-9)
        assert float(found.written.abs().max()) < 1e-9
        assert float(found.read.abs().max()) > 1e-2
        monkeypatch.setattr(pair, "_MOST_LENT", 100)
        with pytest.raises(InputError, match="different targets with other_context.* fit"):
            compare(model, None, ids, answers, pos=None, other_context=model.disable_adapter)
        with model.disable_adapter():
            compare(model, None, ids, answers, pos=None)

    def test_an_ablation_in_a_context_is_the_second_run_alone(self):
        model, ids = build("llama"), example_ids("llama")
        mlp = model.model.layers[0].mlp

        @contextlib.contextmanager
        def ablation():
            handle = mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
            try:
                yield
            finally:
                handle.remove()

        before = state_of(model)
        clean = logits_of(model, ids)[:, -1]
        with ablation():
            ablated = logits_of(model, ids)[:, -1]
        found = compare(model, None, ids, 5, 7, other_context=ablation)
        assert_unchanged(model, before)
        expected = (clean - ablated)[:, 5] - (clean - ablated)[:, 7]
        close(found.attribution.sum(0) + found.bias, expected, 1e-5)
        assert not bool(found.difference.beside["second"][found.labels.index("0_mlp_out")].any())
        assert_exact(found)
        back = compare(ablated_copy(model), model, ids, 5, 7)
        close(found.attribution, -back.attribution, 1e-9)
        close(found.written, -back.written, 1e-9)

    @pytest.mark.parametrize("unit", ["component", "layer", "head", "neuron"])
    @pytest.mark.parametrize("place", ["input", "norm", "head", "model"])
    def test_hooks_of_the_caller_have_rows_that_one_run_alone_has(self, unit, place):
        spec = "gpt2-untied"
        one, other, ids = build(spec, 0), build(spec, 1), example_ids(spec)
        steer = torch.linspace(-1, 1, 24, dtype=torch.float64)
        modules = {
            "input": one.transformer.h[1],
            "norm": one.transformer.ln_f,
            "head": one.lm_head,
            "model": one,
        }
        module = modules[place]

        def hook(_, args, out):
            if place == "model":
                out.logits = out.logits + torch.arange(out.logits.shape[-1])
                return out
            if place == "head":
                return out + torch.arange(out.shape[-1])
            return out + steer

        def before(_, args, kwargs):
            return (args[0] + steer, *args[1:]), kwargs

        @contextlib.contextmanager
        def steered():
            if place == "input":
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook)
            try:
                yield
            finally:
                handle.remove()

        found = compare(other, one, ids, 5, 9, unit=unit, pos=None, other_context=steered)
        assert_exact(found, 1e-10)
        with steered():
            hooked = logits_of(one, ids)
        plain = logits_of(other, ids)
        difference = plain - hooked
        expected = difference[..., 5] - difference[..., 9]
        close(found.difference.total() + found.bias, expected, 1e-5)
        parts = compare(other, one, ids, 5, 9, pos=None, other_context=steered)
        whole = found.written[-1] if unit == "layer" else found.written.sum(0)
        whole = whole if found.beyond is None else whole + found.beyond.sum(0)
        close(whole, parts.written.sum(0), 1e-9)  # every unit halves the whole alike
        if unit != "component":
            return
        label = {"input": "1_hook", "norm": "final_hook"}.get(place, "logit_hook")
        row = found.labels.index(label)
        assert not bool(found.difference.beside["first"][row].any())
        second = found.difference.beside["second"][row]
        W = [m.lm_head.weight.detach().double() for m in (other, one)]
        reads = [w[5] - w[9] for w in W]
        if place in ("head", "model"):  # ids are no directions: both read them alike
            close(second, torch.full_like(second, 5 - 9), 1e-9)
            close(found.written[row], torch.full_like(second, 9 - 5), 1e-9)
            close(found.read[row], torch.zeros_like(second), 1e-9)
        if place == "norm":  # divided by no scale
            close(second, (steer @ reads[1]).expand_as(second), 1e-9)
            close(found.written[row], -(steer @ (reads[0] + reads[1]) / 2).expand_as(second), 1e-9)
            close(found.read[row], (steer @ (reads[0] - reads[1]) / 2).expand_as(second), 1e-9)
        if place == "input":
            runs = [Vectors.of(other, ids), None]
            with steered():
                runs[1] = vectors_with_hook(one, ids, steer)
            u, v = (run.direction(5, 9) / run.scale[..., None] for run in runs)
            close(found.written[row], -(steer * (u + v)).sum(-1) / 2)
            close(found.read[row], (steer * (u - v)).sum(-1) / 2)


class TestPrompts:
    def test_a_corrupted_prompt_differs_as_the_stored_vectors_do(self):
        model = build("llama")
        clean, corrupted = example_ids("llama", seed=0), example_ids("llama", seed=3)
        found = compare(model, None, clean, 5, 7, other_input=corrupted, pos=None)
        runs = [Vectors.of(model, ids) for ids in (clean, corrupted)]
        for place, (written, read) in enumerate(written_and_read(*runs, 5, 7).values()):
            close(found.written[place], written)
            close(found.read[place], read)
        assert_exact(found)
        assert not bool(found.bias.any())

    def test_padded_batches_are_compared_row_by_row(self):
        models = build("llama", 0, attn="sdpa"), build("llama", 1, attn="sdpa")
        ids, others = example_ids("llama", seed=0), example_ids("llama", seed=3)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        for pos in (-1, None, [0, -1]):
            found = compare(*models, ids, 5, 7, other_input=others, attention_mask=mask, pos=pos)
            for row, start in ((0, 2), (1, 0)):
                alone = compare(
                    *models,
                    ids[row : row + 1, start:],
                    5,
                    7,
                    other_input=others[row : row + 1, start:],
                    pos=pos,
                )
                own = found.attribution[:, row]
                own = own[:, start:] if pos is None else own
                close(own, alone.attribution[:, 0], 1e-9)
                cut = found.prompt(row)
                kept = ~cut.attribution[0].isnan()
                close(cut.written[:, kept], found.written[:, row : row + 1][:, kept], 1e-12)
            if pos is None:
                assert bool(found.attribution[:, 0, :2].isnan().all())

    def test_prompts_of_different_lengths_need_positions_of_their_own(self):
        model, ids = build("llama"), example_ids("llama", batch=1, length=7)
        shorter = ids[:, 2:]
        with pytest.raises(ShapeMismatchError, match="7 and 5 tokens in row 0.*other_pos"):
            compare(model, None, ids, 5, other_input=shorter)
        found = compare(model, None, ids, 5, other_input=shorter, pos=[2, -1], other_pos=[0, -1])
        for column, (here, there) in enumerate(((2, 0), (6, 4))):
            one = direct_logit_attribution(model, ids, 5, pos=here).attribution
            other = direct_logit_attribution(model, shorter, 5, pos=there).attribution
            close(found.attribution[..., column], one - other, 1e-12)
        assert_exact(found)
        with pytest.raises(ShapeMismatchError, match="as many in both"):
            compare(model, None, ids, 5, other_input=shorter, pos=[2, -1], other_pos=-1)

    def test_every_position_may_have_its_own_target(self):
        models, ids = (build("gpt2", 0), build("gpt2", 1)), example_ids("gpt2")
        answers = ids.roll(-1, 1)
        found = compare(*models, ids, answers, pos=None)
        runs = [Vectors.of(model, ids) for model in models]
        for position in range(ids.shape[1]):
            for row in range(len(ids)):
                expected = written_and_read(*runs, int(answers[row, position]))
                for place, halves in enumerate(expected.values()):
                    close(found.written[place, row, position], halves[0][row, position])
                    close(found.read[place, row, position], halves[1][row, position])

    @pytest.mark.parametrize("answers", [5, [5, 8], [[5], [8]]])
    def test_forms_of_answers_are_those_of_an_attribution(self, answers):
        models, ids = (build("gpt2", 0), build("gpt2", 1)), example_ids("gpt2")
        answers = torch.tensor(answers) if isinstance(answers, list) else answers
        found = compare(*models, ids, answers, pos=-1)
        alone = direct_logit_attribution(models[0], ids, answers, pos=-1)
        close(found.first.attribution, alone.attribution, 1e-12)
        assert found.difference.answer == alone.answer
        assert_exact(found)

    def test_pieces_of_a_prompt_give_the_same(self):
        models = build("llama", 0), build("llama", 1)
        ids = example_ids("llama", length=9)
        for unit in ("component", "head", "neuron"):
            whole = compare(*models, ids, 5, 7, unit=unit, pos=None)
            found = compare(*models, ids, 5, 7, unit=unit, pos=None, chunk_size=4)
            close(found.attribution, whole.attribution, 1e-9)
            close(found.written, whole.written, 1e-9)

    def test_strings_are_read_by_one_tokenizer(self):
        models, tokenizer = (build("gpt2", 0), build("gpt2", 1)), tiny_tokenizer()
        texts = ["the cat sat", "the dog sat"]
        found = compare(*models, texts[0], 5, other_input=texts[0], tokenizer=tokenizer)
        ids = torch.tensor([tokenizer.encode(texts[0])])
        close(found.attribution, compare(*models, ids, 5).attribution, 1e-12)


class TestOtherTargets:
    """Readings ahead of the final norm: nothing behind them runs, and both runs end there."""

    @pytest.mark.parametrize("spec", ["llama", "gpt2", "gemma2", "doge"])
    @pytest.mark.parametrize("unit", ["component", "layer", "head"])
    def test_a_plain_direction_is_read_alike_and_written_otherwise(self, spec, unit):
        models, ids = (made(spec, 0), made(spec, 1)), ids_of(spec)
        width = models[0].config.hidden_size
        vector = torch.linspace(-1, 2, width, dtype=torch.float64)
        target = dla_hooks.Direction(vector, at="1_pre")
        found = compare(*models, ids, target, unit=unit, pos=None)
        assert not bool(found.read.any())
        streams = [
            model(ids, use_cache=False, output_hidden_states=True).hidden_states[1].double()
            for model in models
        ]
        close(found.logit, (streams[0] - streams[1]).detach() @ vector)
        assert_exact(found, 1e-11)

    @pytest.mark.parametrize("spec", ["llama", "gpt2", "gemma2"])
    @pytest.mark.parametrize("unit", ["component", "head", "neuron"])
    def test_a_neurons_input_differs_as_the_models_say(self, spec, unit):
        models, ids = (build(spec, 0), build(spec, 1)), example_ids(spec)
        path = "transformer.h.1.mlp.c_fc" if spec == "gpt2" else "model.layers.1.mlp.gate_proj"
        found = compare(*models, ids, dla_hooks.Output(path, 3), unit=unit, pos=None)
        seen = []
        for model in models:
            module = model.get_submodule(path)
            handle = module.register_forward_hook(lambda m, args, out: seen.append(out[..., 3]))
            logits_of(model, ids)
            handle.remove()
        close(found.logit, seen[0] - seen[1])
        assert_exact(found, 1e-11)
        assert float(found.read.abs().max()) > 1e-3

    def test_a_witness_that_says_otherwise_is_refused(self):
        models, ids = (build("llama", 0), build("llama", 1)), example_ids("llama")
        target = dla_hooks.Output("model.layers.1.mlp.gate_proj", 3)
        compare(*models, ids, target)
        alter_output(models[1].model.layers[1].mlp.gate_proj, lambda out: out + 0.1 * out.square())
        with pytest.raises((DecompositionError, UnsupportedModelError)) as refusal:
            compare(*models, ids, target)
        assert "gate_proj" in str(refusal.value)

    def test_a_direction_of_another_width_is_refused(self):
        model, ids = build("llama"), example_ids("llama")
        with pytest.raises(InputError, match="39 entries"):
            compare(model, None, ids, dla_hooks.Direction(torch.ones(39)))


class TestNumbers:
    def test_models_of_two_dtypes_are_compared_in_the_finer(self):
        one, other = build("llama", 0), build("llama", 1)
        single = copy.deepcopy(other).float()
        ids = example_ids("llama")
        found = compare(one, single, ids, 5, 7, unit=("component", "head"), pos=None)
        expected = compare(one, other, ids, 5, 7, unit=("component", "head"), pos=None)
        for unit, own in found.items():
            assert own.attribution.dtype == torch.float64
            close(own.written, expected[unit].written, 1e-4)
            close(own.read, expected[unit].read, 1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("spec", ["gpt2", "gemma2", "granite"])
    def test_coarser_dtypes_keep_the_identity(self, spec, dtype):
        models, ids = (build(spec, 0, dtype), build(spec, 1, dtype)), example_ids(spec)
        found = compare(*models, ids, 5, 7, unit=("component", "head"), pos=None)
        for own in found.values():
            assert own.attribution.dtype == torch.float32
            close(own.attribution, own.written + own.read, 1e-5)
            gap = (own.difference.total() + own.bias - own.logit).abs().max()
            assert float(gap) <= own.gap + 1e-4

    def test_a_capped_and_an_uncapped_model_are_compared_before_the_cap(self):
        one, ids = build("gemma2"), example_ids("gemma2")
        config = copy.deepcopy(one.config)
        config.final_logit_softcapping = None
        other = type(one)(config).double().eval()
        other.load_state_dict(one.state_dict())
        for models in ((one, other), (other, one)):
            for incorrect in (7, None):
                found = compare(*models, ids, 5, incorrect, unit=("component", "head"), pos=None)
                for own in found.values():
                    assert float(own.attribution.abs().max()) < 1e-9
                    assert own.difference.softcap is not None
        assert_exact(compare(build("gemma2", 1), other, ids, 5, 7, pos=None))

    def test_a_weight_changed_without_a_trace_is_noticed(self):
        one, other, ids = build("llama", 0), build("llama", 1), example_ids("llama")
        compare(one, other, ids, 5, 7)
        for check in (True, False):
            other.model.norm.weight.data[:7].mul_(2.0)
            found = compare(one, other, ids, 5, 7, check=check)
            expected = compare(one, copy.deepcopy(other), ids, 5, 7)
            close(found.attribution, expected.attribution, 1e-9)
            close(found.read, expected.read, 1e-9)

    def test_a_model_that_does_not_add_up_is_refused(self):
        one, other, ids = build("llama", 0), build("llama", 1), example_ids("llama")
        alter_output(other.model.layers[1], lambda out: out + out.square())
        before = state_of(one), state_of(other)
        with pytest.raises((DecompositionError, UnsupportedModelError)):
            compare(one, other, ids, 5, 7)
        assert_unchanged(one, before[0])
        assert_unchanged(other, before[1])


class TestRefusals:
    """Before either model runs, with nothing left on them."""

    @pytest.fixture
    def model(self):
        return build("llama")

    def refused(self, error, match, *args, **kwargs):
        models = [one for one in args[:2] if isinstance(one, torch.nn.Module)]
        for one in models:  # measured by now
            direct_logit_attribution(one, example_ids("gpt2")[:1] % 50, 5)
        runs, before = [], [state_of(one) for one in models]
        handles = [one.register_forward_pre_hook(lambda *_: runs.append(1)) for one in models]
        with pytest.raises(error, match=match):
            compare(*args, **kwargs)
        for handle in handles:
            handle.remove()
        assert not runs
        for one, own in zip(models, before, strict=True):
            assert_unchanged(one, own)

    def test_models_of_other_shapes_are_refused(self, model):
        ids = example_ids("llama")
        others = {
            "llama-mqa": "d_model is 40 in the first and 36 in the second",
            "llama-bias": "the number of blocks is 3 in the first and 2 in the second",
        }
        for spec, match in others.items():
            self.refused(UnsupportedModelError, match, model, build(spec), ids % 50, 5)
        wide = build("mistral")
        self.refused(
            UnsupportedModelError, "number of logits is 65 .* 85", build("llama-bias"), wide, ids, 5
        )

    def test_rows_that_do_not_pair_up_are_refused(self):
        one, other = build("qwen3_moe"), build("qwen3_moe")
        ids = example_ids("qwen3_moe")
        fewer = copy.deepcopy(one.config)
        fewer.num_attention_heads = fewer.num_key_value_heads = 2
        other = type(one)(fewer).double().eval()
        found = compare(one, other, ids, 5)
        assert_exact(found, 1e-6)
        self.refused(
            UnsupportedModelError, "only the first has L0H2, L0H3", one, other, ids, 5, unit="head"
        )

    def test_running_sums_of_parallel_and_sequential_blocks_are_refused(self):
        one = build("gpt_neox-parallel")
        config = copy.deepcopy(one.config)
        config.use_parallel_residual = False
        other = type(one)(config).double().eval()
        ids = example_ids("gpt_neox-parallel")
        assert_exact(compare(one, other, ids, 5), 1e-6)
        self.refused(UnsupportedModelError, "running sums", one, other, ids, 5, unit="layer")

    def test_too_many_ranked_numbers_are_refused_with_what_fits(self, model, monkeypatch):
        from dla_hooks.questions import alike

        monkeypatch.setattr(alike, "MOST_NUMBERS", 4 * 162 * 5)
        ids = example_ids("llama", batch=1)
        self.refused(
            InputError,
            "162 rows .* at 7 entries .* 5 entries fit",
            model,
            None,
            ids,
            5,
            unit="neuron",
            pos=None,
        )
        assert_exact(compare(model, None, ids, 5, unit="neuron", pos=[0, 1, 2, 3, 4]))

    def test_arguments_that_cannot_be_used_are_refused(self, model):
        ids = example_ids("llama")
        refused = self.refused
        refused(InputError, "answer_tokens is required", model, None, ids)
        refused(InputError, "provide either", model, None, None, 5)
        refused(ArgumentTypeError, "other_context", model, None, ids, 5, other_context=True)
        refused(
            ArgumentTypeError, "returned NoneType", model, None, ids, 5, other_context=lambda: None
        )
        refused(InputError, "unit must be one of", model, None, ids, 5, unit="neurons")
        refused(dla_hooks.PositionError, "out of range", model, None, ids, 5, pos=9)
        refused(dla_hooks.TokenError, "vocabulary", model, None, ids, 10**6)
        refused(
            ShapeMismatchError, "2 rows and other_input 1", model, None, ids, 5, other_input=ids[:1]
        )
        refused(ShapeMismatchError, "tokens in row 0", model, None, ids, 5, other_input=ids[:, 1:])
        with pytest.raises(InputError, match="no model|causal"):
            compare(model, "gpt2", ids, 5)

    def test_a_model_in_training_mode_is_refused(self, model):
        other = copy.deepcopy(model).train()
        with pytest.raises(dla_hooks.TrainingModeError):
            compare(model, other, example_ids("llama"), 5)

    def test_batches_padded_on_different_sides_are_refused(self):
        model = build("llama", attn="sdpa")
        ids = example_ids("llama")
        left, right = torch.ones_like(ids), torch.ones_like(ids)
        left[0, :2] = 0
        right[0, -2:] = 0
        inputs = [{"input_ids": ids, "attention_mask": mask} for mask in (left, right)]
        with pytest.raises(ShapeMismatchError, match="pad both on the same side"):
            compare(model, None, inputs[0], 5, other_input=inputs[1], pos=None)
        assert_exact(compare(model, None, inputs[0], 5, other_input=inputs[1]))

    def test_an_error_in_the_second_run_leaves_nothing_behind(self, model):
        other, ids = build("llama", 1), example_ids("llama")
        compare(model, other, ids, 5)
        handle = other.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        before = state_of(model), state_of(other)
        with pytest.raises(ZeroDivisionError):
            compare(model, other, ids, 5)
        assert_unchanged(model, before[0])
        assert_unchanged(other, before[1])
        handle.remove()
        compare(model, other, ids, 5)


# What is kept of single heads and neurons


@torch.no_grad()
def entered(model, ids, modules):
    seen = {}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():

            def see(_, args, output, name=name):
                seen[name] = args[0].detach().clone().double()

            stack.callback(module.register_forward_hook(see).remove)
        model(ids, use_cache=False)
    return seen


def linear_rows(module):
    """The matrix from inputs to outputs [in, out]."""
    weight = module.weight.detach().double()
    return weight if type(module).__name__ == "Conv1D" else weight.T


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def through_post_norm(model, layer, name, x):
    """What a post-norm makes of a part of what entered it, its scale frozen."""
    norm = getattr(layer, name, None)
    if norm is None or model.config.model_type != "gemma2":
        return lambda part: part * getattr(model.config, "residual_multiplier", 1.0)
    scale = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return lambda part: part * (1 + norm.weight.double()) / scale


def head_vectors(model, ids, run):
    layers = layers_of(model)
    gpt2 = hasattr(model, "transformer")
    projections = {n: (x.attn.c_proj if gpt2 else x.self_attn.o_proj) for n, x in enumerate(layers)}
    z = entered(model, ids, projections)
    found = {}
    for n, layer in enumerate(layers):
        n_heads = model.config.num_attention_heads
        W = linear_rows(projections[n])
        whole = z[n] @ W + (projections[n].bias.double() if projections[n].bias is not None else 0)
        out = through_post_norm(model, layer, "post_attention_layernorm", whole)
        width = W.shape[0] // n_heads
        for h in range(n_heads):
            part = slice(h * width, (h + 1) * width)
            found[f"L{n}H{h}"] = out(z[n][..., part] @ W[part])
    return {label: x.detach() for label, x in found.items()}


def neuron_vectors(model, ids):
    layers = layers_of(model)
    gpt2 = hasattr(model, "transformer")
    maps = {n: (x.mlp.c_proj if gpt2 else x.mlp.down_proj) for n, x in enumerate(layers)}
    a = entered(model, ids, maps)
    found = {}
    for n, layer in enumerate(layers):
        W = linear_rows(maps[n])
        whole = a[n] @ W + (maps[n].bias.double() if maps[n].bias is not None else 0)
        out = through_post_norm(model, layer, "post_feedforward_layernorm", whole)
        for i in range(len(W)):
            found[f"L{n}N{i}"] = out(a[n][..., i : i + 1] * W[i]).detach()
    return found


def ablated_copy(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.zero_()
    return other


def vectors_with_hook(model, ids, steer):
    """The vectors of a run whose second block is steered at its input."""
    from unittest import mock

    import two_runs

    def parts(model, ids, **inputs):
        return {**two_runs_parts(model, ids, **inputs), "hook": steer.expand(*ids.shape, -1)}

    two_runs_parts = two_runs.stream_parts
    with mock.patch.object(two_runs, "stream_parts", parts):
        return Vectors.of(model, ids)


def adapted(peft, spec, targets, seed=0):
    """A model with a LoRA that changes something."""
    model = peft.get_peft_model(
        build(spec, seed), peft.LoraConfig(r=2, target_modules=targets)
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * noise)
    return model


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "granite", "gpt_neox-parallel", "mixtral"])
def test_context_that_writes_weights_without_a_trace_is_measured_on_each_side(spec, check):
    model, ids = made(spec), ids_of(spec)
    changed = made(spec, 1)
    expected = compare(model, changed, ids, 4, 9, pos=None)

    @contextlib.contextmanager
    def other_weights():
        old = [weight.data.clone() for weight in model.parameters()]
        for weight, new in zip(model.parameters(), changed.parameters(), strict=True):
            weight.data.copy_(new.data)
        try:
            yield
        finally:
            for weight, new in zip(model.parameters(), old, strict=True):
                weight.data.copy_(new)

    for _ in range(2):
        found = compare(
            model,
            input=ids,
            answer_tokens=4,
            incorrect_tokens=9,
            pos=None,
            other_context=other_weights,
            check=check,
        )
        close(found.written, expected.written)
        close(found.read, expected.read)
        close(found.logit, expected.logit)


def test_errors_are_raised_through_a_context_that_swallows_them():
    model, ids = build("llama"), example_ids("llama")

    def fails(*_):
        raise OSError("no")

    @contextlib.contextmanager
    def swallows():
        handle = model.model.layers[0].register_forward_hook(fails)
        with contextlib.suppress(OSError):
            try:
                yield
            finally:
                handle.remove()

    with pytest.raises(OSError, match="no"):
        compare(model, None, ids, 5, other_context=swallows)


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e6])
def test_weighted_sets_are_held_to_their_own_size(weight, monkeypatch):
    model, ids = build("llama"), example_ids("llama")
    asked, rows = dla_hooks.Tokens({5: weight, 7: -0.5 * weight}), TokenSets.rows
    found = compare(model, None, ids, asked, other_input=ids.flip(1))
    assert_exact(found, 1e-9 * weight)
    monkeypatch.setattr(
        TokenSets, "rows", lambda self, *given: tuple(1.01 * one for one in rows(self, *given))
    )
    with pytest.raises(DecompositionError):
        compare(model, None, ids, asked, other_input=ids.flip(1))


def test_the_text_s_own_tokens_are_those_of_the_first_prompt():
    model, ids = build("llama"), example_ids("llama")
    found = compare(model, None, ids, dla_hooks.NEXT, other_input=ids.flip(1), pos=None)
    assert found.attribution.shape[1:] == (len(ids), ids.shape[1] - 1)
    with torch.no_grad():
        first, second = (model(one).logits[:, :-1] for one in (ids, ids.flip(1)))
    due = (first - second).gather(-1, ids[:, 1:, None])[..., 0]
    close(found.logit, due)
