"""Neurons against writes that are built one by one, and pushed through frozen norms by formula."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from alter import alter_output
from hypothesis import given, settings
from hypothesis import strategies as st
from mapping_zoo import MODEL_TYPES, build_any, example_ids_any
from oracle import _clean_run, _logit
from oracle_families import family_of, final_norm, frozen_norm, layer_at, norm_scale, post_norms
from torch import nn
from zoo import ZOO, build, example_ids

import dla_hooks
from dla_hooks import (
    DecompositionError,
    InputError,
    Neurons,
    UnsupportedModelError,
    direct_logit_attribution,
)
from dla_hooks.projection import ledger
from dla_hooks.projection.strongest import strongest

ANSWER, INCORRECT = 5, 7
EXPERTS = {"mixtral", "mixtral-tied", "qwen3_moe", "gpt_oss", "gpt_oss-mha-tied"}
DENSE = [spec for spec in ZOO if spec.name not in EXPERTS]
EVERY = Neurons(top=None)
# The last linear map, relative to a block.
MAPS = ("mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "fc2", "mlp.fc2", "mlp.down_proj")


def last_map(model, layer):
    block = layer_at(model, layer)
    for path in MAPS:
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    return None  # experts


def spread(model, ids):
    with torch.no_grad():
        logits = model(ids).logits.double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    return float((logits.amax(-1) - logits.amin(-1)).mean())


@torch.no_grad()
def by_hand(model, ids, answer=ANSWER, incorrect=INCORRECT, **inputs):
    """What each neuron writes, as a vector, through frozen norms to the logit [row, batch, pos].

    And what each layer's MLP writes besides, by layer: biases of the last map and the post-norm.
    """
    entered = {}

    def keep(layer):
        def hook(module, args):
            entered[layer] = args[0].detach().clone().reshape(*ids.shape, -1).double()

        return hook

    layers = [layer for layer in range(model.config.num_hidden_layers) if last_map(model, layer)]
    handles = [last_map(model, layer).register_forward_pre_hook(keep(layer)) for layer in layers]
    clean = _clean_run(model, ids, inputs)
    for handle in handles:
        handle.remove()
    kind, norm = family_of(model).norm, final_norm(model)
    scale = norm_scale(kind, norm, clean.last_stream)
    zero = torch.zeros_like(clean.last_stream)

    def logit(x):
        return _logit(model, frozen_norm(kind, norm, x, scale), answer, incorrect)

    rows, besides = [], {}
    for layer in layers:
        linear, label = last_map(model, layer), f"{layer}_mlp_out"
        bias = zero if linear.bias is None else linear.bias.double().expand_as(zero)
        rows_of = linear.weight.T if isinstance(linear, nn.Linear) else linear.weight
        post = post_norms(model).get(label)

        def in_stream(write, post=post, label=label):
            if post is not None:
                at = norm_scale(kind, post, clean.post_norm_inputs[label])
                write = frozen_norm(kind, post, write, at)
            return logit(write * family_of(model).write_scale(model.config))

        for neuron, row in enumerate(rows_of):
            write = entered[layer][..., neuron, None] * row.double()
            rows.append(in_stream(write) - in_stream(zero))
        besides[layer] = in_stream(bias) - logit(zero)
    return torch.stack(rows), besides


def all_neurons(result):
    """The rows of a result that keeps all, in the order of its records [row, *batch_and_pos]."""
    return result.attribution.gather(0, result.index.argsort(0))


@functools.cache
def case(spec, seed):
    model, ids = build(spec, seed), example_ids(spec, seed=seed)
    return model, ids, by_hand(model, ids), spread(model, ids)


@pytest.fixture(params=[0, 1], ids="seed{}".format, scope="module")
def seed(request):
    return request.param


@pytest.fixture
def streams(monkeypatch):
    """Nothing waits for the final scale, as in large models at many positions."""
    monkeypatch.setattr(ledger, "_MOST_HELD", 0)
    monkeypatch.setattr(ledger, "_FEW_ENTRIES", -9)


class TestNumbers:
    @pytest.mark.parametrize("spec", DENSE, ids=repr)
    def test_every_neuron_is_its_own_write_through_frozen_norms(self, spec, seed):
        model, ids, (truth, _), size = case(spec, seed)
        result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=EVERY, pos=None)
        # transformers computes norms in float32, so that the frozen scales are good to that.
        torch.testing.assert_close(all_neurons(result), truth, rtol=0, atol=1e-6 * size)
        assert not bool(result.rest.abs().max() > 1e-12 * size)
        whole = result.attribution.sum(0) + result.rest + result.remainder + result.bias
        torch.testing.assert_close(whole, result.logit, rtol=0, atol=1e-9 * size)

    @pytest.mark.parametrize("spec", DENSE, ids=repr)
    def test_each_mlps_neurons_and_constants_sum_to_its_row(self, spec, seed):
        model, ids, (_, besides), size = case(spec, seed)
        units = (EVERY, "component")
        found = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=units, pos=None)
        neurons, parts = all_neurons(found["neuron"]), found["component"]
        runs = found["neuron"].rows
        for run, start in zip(runs.runs, runs.starts, strict=True):
            label = f"{run.layer}_mlp_out"
            own = neurons[start : start + run.n].sum(0)
            row = parts.attribution[parts.labels.index(label)]
            near = 1e-5 if label in post_norms(model) else 1e-6
            if label not in post_norms(model) and last_map(model, run.layer).bias is None:
                near = 1e-9
            torch.testing.assert_close(own + besides[run.layer], row, rtol=0, atol=near * size)

    @pytest.mark.parametrize("held", [True, False], ids=["held", "streamed"])
    @pytest.mark.parametrize(
        "spec", ["gpt2", "gemma2", "olmo2", "gemma3_text", "granite", "opt", "bloom"]
    )
    def test_the_strongest_are_ranked_at_every_position(self, spec, seed, held, request):
        if not held:
            request.getfixturevalue("streams")
        model, ids, (truth, _), size = case(spec, seed)
        unit = Neurons(top=6)
        result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=unit, pos=None)
        kept = truth.gather(0, result.index)
        torch.testing.assert_close(result.attribution, kept, rtol=0, atol=1e-6 * size)
        strongest_first = truth.abs().sort(0, descending=True).values[:6]
        torch.testing.assert_close(kept.abs(), strongest_first, rtol=0, atol=1e-6 * size)
        rest = truth.sum(0) - kept.sum(0)
        torch.testing.assert_close(result.rest, rest, rtol=0, atol=1e-5 * size)
        if held:
            means = truth.flatten(1).mean(1)
            torch.testing.assert_close(result.mean_rows, means, rtol=0, atol=1e-6 * size)
            best = truth.flatten(1).mean(1).argmax()
            assert result.top(1)[0][0] == result.rows[int(best)].label
        else:
            assert result.mean_rows is None

    @pytest.mark.parametrize("spec", DENSE, ids=repr)
    def test_float32_is_within_the_logits_spread(self, spec):
        _, ids, (truth, _), size = case(spec, 0)
        model = build(spec, dtype=torch.float32)
        result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=EVERY, pos=None)
        assert result.attribution.dtype == torch.float32
        torch.testing.assert_close(all_neurons(result).double(), truth, rtol=0, atol=1e-4 * size)

    def test_half_precision_passes_its_own_check(self):
        for spec in ("llama", "gemma2", "gpt2"):
            model = build(spec, dtype=torch.bfloat16)
            direct_logit_attribution(model, example_ids(spec), ANSWER, unit="neuron", pos=None)

    @pytest.mark.parametrize("spec", ["gpt2", "gemma2"])
    def test_each_entry_has_an_answer_of_its_own(self, spec, seed):
        model, ids, *_, size = case(spec, seed)
        answers = example_ids(spec, seed=seed + 9)
        truth, _ = by_hand(model, ids, answers, None)
        result = direct_logit_attribution(model, ids, answers, unit=EVERY, pos=None)
        torch.testing.assert_close(all_neurons(result), truth, rtol=0, atol=1e-6 * size)
        per_row = answers[:, :1]
        truth = by_hand(model, ids, per_row, None)[0][..., -1]
        result = direct_logit_attribution(model, ids, per_row[:, 0], unit=EVERY)
        torch.testing.assert_close(all_neurons(result), truth, rtol=0, atol=1e-6 * size)

    @pytest.mark.parametrize("held", [True, False], ids=["held", "streamed"])
    @pytest.mark.parametrize("spec", ["llama", "gemma2", "opt"])
    @pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
    def test_padding_changes_nothing(self, spec, left, held, request):
        if not held:
            request.getfixturevalue("streams")
        attn = "eager" if spec == "gemma2" else "sdpa"
        model = build(spec, dtype=torch.float32, attn=attn)
        ids = example_ids(spec)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        if not left:
            mask = mask.flip(1)
        unit, options = Neurons(top=4), {"pos": None}
        padded = direct_logit_attribution(
            model, ids, ANSWER, unit=unit, attention_mask=mask, **options
        )
        real = mask[0].bool()
        alone = direct_logit_attribution(model, ids[:1, real], ANSWER, unit=unit, **options)
        found = padded.attribution[:, 0]
        found = found[:, ~found[0].isnan()]
        torch.testing.assert_close(found, alone.attribution[:, 0], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("spec", ["gpt2", "gemma2", "granite"])
    @pytest.mark.parametrize("pos", [-1, None, [0, 4]], ids=str)
    def test_chunks_give_the_same(self, spec, pos, seed):
        model, ids, *_, size = case(spec, seed)
        unit = Neurons(top=7)
        whole = direct_logit_attribution(model, ids, ANSWER, unit=unit, pos=pos)
        pieces = direct_logit_attribution(model, ids, ANSWER, unit=unit, pos=pos, chunk_size=3)
        assert torch.equal(whole.index, pieces.index)
        torch.testing.assert_close(whole.attribution, pieces.attribution, rtol=0, atol=1e-5 * size)

    def test_layers_are_chosen_and_the_others_are_in_the_remainder(self):
        model, ids, (truth, _), size = case("llama", 0)
        result = direct_logit_attribution(
            model, ids, ANSWER, INCORRECT, unit=Neurons(None, layers=[2, 0]), pos=None
        )
        chosen = torch.cat((truth[:54], truth[108:]))
        assert [run.label for run in result.rows.runs] == ["L0N{}", "L2N{}"]
        torch.testing.assert_close(all_neurons(result), chosen, rtol=0, atol=1e-6 * size)
        rest = result.logit - result.bias - chosen.sum(0)
        torch.testing.assert_close(result.remainder, rest, rtol=0, atol=1e-5 * size)
        row = result.records()[0]
        assert row["label"] == f"L{row['layer']}N{row['neuron']}"


# Types that the zoo lacks, each with what is particular about its MLPs.
PARTICULAR = {
    "falcon_h1": "a constant multiplies the output of the map",
    "bitnet": "a norm stands before the map",
    "longcat_flash": "two MLPs in a block, experts beside",
    "granitemoeshared": "an MLP beside experts",
    "nemotron_h": "a block is a mixer, and some mixers are MLPs",
    "gemma4_text": "blocks have gains",
    "lfm3": "a post-norm",
    "xlstm": "a recurrent mixer",
    "mpt": "the declared write is the map itself",
    "doge": "a gain on each channel",
    "whisper": "a decoder beside an encoder",
    "qwen3_moe": "some blocks have experts",
}


@pytest.mark.parametrize("model_type", [t for t in PARTICULAR if t in MODEL_TYPES])
def test_mlps_of_a_particular_kind_sum_to_their_rows(model_type, seed):
    model = build_any(model_type, seed=seed)
    ids = example_ids_any(model, seed=seed)
    units = (EVERY, "component")
    found = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=units, pos=None)
    result, parts = found["neuron"], found["component"]
    neurons = all_neurons(result)
    size = float(parts.attribution.abs().max())
    for run, start in zip(result.rows.runs, result.rows.starts, strict=True):
        labels = [label for label in parts.labels if label.startswith(f"{run.layer}_")]
        labels = [label for label in labels if "mlp" in label or model_type == "nemotron_h"]
        label = [one for one in labels if "moe" not in one][-1 if run.sub or len(labels) < 2 else 0]
        if model_type == "granitemoeshared":
            label = f"{run.layer}_shared_mlp_out"
        own = neurons[start : start + run.n].sum(0)
        if model_type != "whisper":  # whose maps have biases: left to the check of the call
            row = parts.attribution[parts.labels.index(label)]
            torch.testing.assert_close(own, row, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("n", [200, 64, 33, 7])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 9), some=st.booleans())
def test_the_largest_of_groups_are_the_largest_of_all(n, seed, k, some):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, n, generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.5] = 0
    there = torch.rand(values.shape, generator=generator) < 0.7 if some else None
    kept = strongest(values, k, there)
    sizes = values.abs() if there is None else values.abs().masked_fill(~there, -1)
    expected = sizes.sort(1, descending=True).values[:, : min(k, n)]
    assert torch.equal(sizes.gather(1, kept), expected)
    assert all(len(set(row)) == len(row) for row in kept.tolist())


class TestChangedModels:
    @pytest.mark.filterwarnings("ignore")  # PEFT's own
    def test_an_adapter_on_the_last_map_is_that_of_the_merged_model(self, seed):
        peft = pytest.importorskip("peft")
        for spec, target in (
            ("llama", "down_proj"),
            ("gpt2", "mlp.c_proj"),
            ("gemma2", "down_proj"),
        ):
            base = build(spec, seed)
            config = peft.LoraConfig(r=2, target_modules=[target], fan_in_fan_out=spec == "gpt2")
            model = peft.get_peft_model(base, config).eval()
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.data.copy_(0.3 * noise)
            ids = example_ids(spec, seed=seed)
            plain = copy.deepcopy(model).merge_and_unload().eval()
            truth, _ = by_hand(plain, ids)
            result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=EVERY, pos=None)
            size = spread(plain, ids)
            torch.testing.assert_close(all_neurons(result), truth, rtol=0, atol=1e-6 * size)

    @pytest.mark.parametrize("spec", ["gpt2", "gemma2"])
    def test_a_neuron_that_a_hook_ablates_is_zero(self, spec, seed):
        model, ids = build(spec, seed), example_ids(spec, seed=seed)

        def ablate(module, args):
            x = args[0].clone()
            x[..., 11] = 0
            return (x, *args[1:])

        last_map(model, 1).register_forward_pre_hook(ablate)
        truth, _ = by_hand(model, ids)
        result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=EVERY, pos=None)
        found = all_neurons(result)
        row = [result.rows[i].label for i in range(len(result.rows))].index("L1N11")
        assert not bool(found[row].any())
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * spread(model, ids))

    @pytest.mark.parametrize(
        ("spec", "place"),
        [
            ("gpt2", "transformer.h.1.mlp"),
            ("gpt2", "transformer.h.1.mlp.c_proj"),
            ("gpt2", "transformer.h.1.mlp.dropout"),
            ("gemma2", "model.layers.1.mlp"),
            ("gemma2", "model.layers.1.mlp.down_proj"),
            ("gemma2", "model.layers.1.post_feedforward_layernorm"),
            ("opt", "model.decoder.layers.1.fc2"),
        ],
    )
    def test_what_a_hook_writes_behind_the_neurons_is_in_the_remainder(self, spec, place, seed):
        model, ids = build(spec, seed), example_ids(spec, seed=seed)
        module = model.get_submodule(place)
        module.register_forward_hook(lambda m, args, out: 1.5 * out)
        units = (EVERY, "component")
        found = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=units, pos=None)
        result, parts = found["neuron"], found["component"]
        size = spread(model, ids)
        whole = result.attribution.sum(0) + result.rest + result.remainder
        torch.testing.assert_close(whole, parts.attribution.sum(0), rtol=0, atol=1e-9 * size)
        # The row of the MLP has what the hook wrote; its neurons and constants are two thirds.
        start, stop = result.rows.starts[1], result.rows.starts[2:3]
        own = all_neurons(result)[start : stop[0] if stop else None].sum(0)
        linear = last_map(model, 1)
        row = parts.attribution[parts.labels.index("1_mlp_out")]
        if linear.bias is None and "norm" in place:
            torch.testing.assert_close(1.5 * own, row, rtol=0, atol=1e-5 * size)

    def test_a_hook_ahead_of_the_post_norm_is_in_the_remainder(self, seed):
        model, ids = build("gemma2", seed), example_ids("gemma2", seed=seed)
        norm = model.model.layers[1].post_feedforward_layernorm
        norm.register_forward_pre_hook(lambda m, args: (args[0] + 0.3,))
        truth, _ = by_hand(model, ids)
        result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=EVERY, pos=None)
        size = spread(model, ids)
        torch.testing.assert_close(all_neurons(result), truth, rtol=0, atol=1e-6 * size)

    @pytest.mark.parametrize("spec", ["gpt2", "llama", "gemma2"])
    def test_a_wrapped_mlp_has_the_same_neurons(self, spec, seed):
        model, ids, (truth, _), size = case(spec, seed)
        model = copy.deepcopy(model)

        class Shell(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, *args, **kwargs):
                return self.inner(*args, **kwargs)

        block = layer_at(model, 1)
        block.mlp = Shell(block.mlp).eval()
        name = "c_proj" if spec == "gpt2" else "down_proj"
        setattr(block.mlp.inner, name, Shell(getattr(block.mlp.inner, name)).eval())
        result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=EVERY, pos=None)
        torch.testing.assert_close(all_neurons(result), truth, rtol=0, atol=1e-6 * size)

    def test_a_constant_behind_the_map_multiplies_its_neurons(self, seed):
        model, ids = build("llama-bias", seed), example_ids("llama-bias", seed=seed)
        plain = copy.deepcopy(model)
        for layer, block in enumerate(model.model.layers):
            factor = 0.7 + layer
            alter_output(block.mlp, lambda out, factor=factor: factor * out)
            with torch.no_grad():
                for parameter in plain.model.layers[layer].mlp.down_proj.parameters():
                    parameter.mul_(factor)
        found, expected = (
            direct_logit_attribution(m, ids, ANSWER, INCORRECT, unit=EVERY, pos=None)
            for m in (model, plain)
        )
        torch.testing.assert_close(all_neurons(found), all_neurons(expected), rtol=0, atol=1e-9)

    def test_an_mlp_that_ends_in_a_norm_is_read_through_it(self, seed):
        """As a declared post-norm is; here nothing declares it."""
        model, ids = build("llama", seed), example_ids("llama", seed=seed)

        class Normed(nn.Module):
            def __init__(self, mlp, norm):
                super().__init__()
                self.inside, self.norm = mlp, norm

            def forward(self, x):
                return self.norm(self.inside(x))

        for block in model.model.layers:
            block.mlp = Normed(block.mlp, copy.deepcopy(block.input_layernorm)).eval()
        seen = {}
        for layer, block in enumerate(model.model.layers):
            down = block.mlp.inside.down_proj
            down.register_forward_hook(lambda m, x, y, at=layer: seen.update({at: (x[0], y)}))
        model.model.norm.register_forward_hook(lambda m, x, y: seen.update(last=x[0]))
        result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=EVERY, pos=None)
        W, norm, truth = model.lm_head.weight, model.model.norm, []

        def scale(x, of):
            return (x.pow(2).mean(-1, keepdim=True) + of.variance_epsilon).sqrt()

        d = norm.weight * (W[ANSWER] - W[INCORRECT]) / scale(seen["last"], norm)
        for layer, block in enumerate(model.model.layers):
            a, y = seen[layer]
            own = d * block.mlp.norm.weight / scale(y, block.mlp.norm)
            truth.append((a * (own @ block.mlp.inside.down_proj.weight)).movedim(-1, 0))
        near = 1e-6 * spread(model, ids)
        torch.testing.assert_close(all_neurons(result), torch.cat(truth), rtol=0, atol=near)

    def test_changed_weights_are_noticed_by_a_plan(self):
        model, ids = build("llama"), example_ids("llama")
        plan = dla_hooks.prepare(model, ANSWER, INCORRECT, unit=EVERY)
        plan(ids, pos=None)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.data[3].mul_(2)
        truth, _ = by_hand(model, ids)
        found = all_neurons(plan(ids, pos=None))
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * spread(model, ids))

    def test_an_mlp_that_does_something_else_in_the_run_is_refused(self):
        model, ids = build("llama"), example_ids("llama")
        mlp = model.model.layers[1].mlp
        down = mlp.down_proj.forward
        mlp.down_proj.forward = lambda x: down(x) + (x.shape[1] == 7) * 0.1
        with pytest.raises((DecompositionError, UnsupportedModelError)):
            direct_logit_attribution(model, ids, ANSWER, unit="neuron")

    def test_a_stale_map_is_found_by_the_claim(self, monkeypatch):
        from dla_hooks.units import neuron

        wrong = neuron.pull_back
        monkeypatch.setattr(neuron, "pull_back", lambda *args: 1.001 * wrong(*args))
        with pytest.raises(DecompositionError, match="the neurons in"):
            direct_logit_attribution(build("llama"), example_ids("llama"), ANSWER, unit="neuron")


class TestRefusals:
    @pytest.mark.parametrize("spec", sorted(EXPERTS - {"qwen3_moe-mixed"}))
    def test_experts_have_no_neurons(self, spec):
        model, ids = build(spec), example_ids(spec)
        for call in (
            lambda: direct_logit_attribution(model, ids, ANSWER, unit="neuron"),
            lambda: dla_hooks.prepare(model, ANSWER, unit="neuron"),
        ):
            with pytest.raises(UnsupportedModelError, match=r"experts.*leave out unit="):
                call()

    def test_layers_with_experts_are_left_out_or_refused_where_asked_for(self):
        model, ids = build("qwen3_moe-mixed"), example_ids("qwen3_moe-mixed")
        result = direct_logit_attribution(model, ids, ANSWER, unit="neuron")
        assert [run.label for run in result.rows.runs] == ["L1N{}"]
        with pytest.raises(UnsupportedModelError, match="layer 0 of"):
            direct_logit_attribution(model, ids, ANSWER, unit=Neurons(layers=[0, 1]))

    def test_a_gated_output_has_no_last_map(self):
        if "rwkv" in MODEL_TYPES:
            model = build_any("rwkv")
            with pytest.raises(UnsupportedModelError, match="gated"):
                direct_logit_attribution(model, example_ids_any(model), ANSWER, unit="neuron")

    @pytest.mark.parametrize("top", [0, -1, True, "5", 2.0, [3]])
    def test_top_is_a_positive_number_or_none(self, top):
        with pytest.raises(InputError, match="top takes whole numbers from 1"):
            Neurons(top=top)

    @pytest.mark.parametrize("layers", [-1, True, "1", 1.5, [1, -2], [True], [None]])
    def test_layers_are_numbers(self, layers):
        with pytest.raises(InputError, match="layers takes whole numbers from 0"):
            Neurons(layers=layers)

    def test_no_layer_and_one_that_is_not_there(self):
        with pytest.raises(InputError, match="layers is empty"):
            Neurons(layers=[])
        with pytest.raises(InputError, match="layers=3 is not there.*0 to 2"):
            dla_hooks.prepare(build("llama"), ANSWER, unit=Neurons(layers=[1, 3]))

    def test_options_make_equal_units(self):
        assert Neurons(5, layers=[1, 0]) == Neurons(top=5, layers=range(2))
        assert Neurons(layers=1) == Neurons(layers=(1,)) != Neurons()
        assert repr(Neurons(3, 1)) == "Neurons(top=3, layers=(1,))"


def test_the_model_is_as_found_and_runs_once():
    model, ids = build("gemma2"), example_ids("gemma2")
    plan = dla_hooks.prepare(model, ANSWER, unit="neuron")
    runs = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    plan(ids)
    handle.remove()
    assert len(runs) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("seed", [0, 1])
def test_bias_of_a_post_norm_is_no_neurons(seed):
    """No family of transformers has a post-norm with a bias: it is put in."""
    torch.manual_seed(seed)
    model, ids = build("olmo2", seed=seed), example_ids("olmo2")
    for layer in model.model.layers:
        norm = torch.nn.LayerNorm(model.config.hidden_size, dtype=torch.float64)
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
        layer.post_feedforward_layernorm = norm.eval()
    units = (dla_hooks.Neurons(top=None), "component")
    found = dla_hooks.direct_logit_attribution(model, ids, 5, 7, unit=units)
    neurons, components = found["neuron"], found["component"]
    d_M = model.lm_head.weight[5] - model.lm_head.weight[7]
    for number, layer in enumerate(model.model.layers):
        kept = []
        handle = model.model.norm.register_forward_hook(
            lambda module, args, out, kept=kept: kept.append((args[0], out))
        )
        with torch.no_grad():
            model(ids)
        handle.remove()
        (x, y), gain = kept[0], model.model.norm.weight
        per_scale = (y / (x * gain))[:, -1].mean(-1)  # one over the final norm's scale
        beta = (layer.post_feedforward_layernorm.bias * gain) @ d_M * per_scale
        own = torch.zeros_like(beta)
        for place in range(len(neurons.index)):
            here = torch.tensor([neurons.rows[i].layer == number for i in neurons.index[place]])
            own += torch.where(here, neurons.attribution[place], 0.0)
        wrote = components[f"{number}_mlp_out"]
        torch.testing.assert_close(own + beta, wrote, rtol=0, atol=1e-5 * float(wrote.abs().max()))
