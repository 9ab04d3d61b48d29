"""Ablations, against models whose weights lack the part, and against hooks written by hand."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from ablations import (
    Made,
    by_hand,
    experts_of,
    head_slice,
    hooks_on,
    last_map,
    logits,
    o_proj,
    width_of,
    without_inputs,
    writer,
)
from mapping_zoo import build_any, example_ids_any
from oracle_families import final_norm, layer_at, n_layers
from torch import nn
from zoo import build, example_ids

import dla_hooks
from dla_hooks import (
    ArgumentTypeError,
    DLAWarning,
    Features,
    HookError,
    InputError,
    LabelError,
    ShapeMismatchError,
    UnsupportedModelError,
    ablated,
    direct_logit_attribution,
)

SPECS = (
    *("gpt2", "llama-bias", "gemma2", "gemma3_text-cap", "olmo2-bias-tied", "granite-bias-tied"),
    *("gpt_neox-parallel", "cohere", "falcon-7b", "bloom", "opt", "phi", "mixtral", "qwen3_moe"),
)
DENSE = tuple(name for name in SPECS if name not in ("mixtral", "qwen3_moe"))
SEEDS = (0, 1)


# Against the truth


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["attn", "mlp"])
@pytest.mark.parametrize("spec", SPECS)
def test_ablated_write_is_zero_where_it_enters_the_stream(spec, kind, seed):
    model, ids = build(spec, seed), example_ids(spec, seed=seed)
    label = f"{n_layers(model) - 1}_{kind}_out"
    with by_hand(writer(model, label), torch.zeros_like):
        due = logits(model, ids)
    with ablated(model, label):
        found = logits(model, ids)
    assert torch.equal(found, due)
    assert float((found - logits(model, ids)).abs().max()) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("spec", SPECS)
def test_ablated_heads_are_those_that_the_projection_does_not_read(spec, seed):
    model, ids = build(spec, seed), example_ids(spec, seed=seed)
    other = without_inputs(model, lambda m: o_proj(m, 0), head_slice(model, 0, 1))
    other = without_inputs(other, lambda m: o_proj(m, 1), head_slice(model, 1, 0))
    with ablated(model, ["L0H1", "L1H0"]):
        torch.testing.assert_close(logits(model, ids), logits(other, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("spec", DENSE)
def test_ablated_neurons_are_those_that_the_last_map_does_not_read(spec, seed):
    model, ids = build(spec, seed), example_ids(spec, seed=seed)
    other = without_inputs(model, lambda m: last_map(m, 1), slice(3, 5))
    with ablated(model, ["L1N3", "L1N4"]):
        torch.testing.assert_close(logits(model, ids), logits(other, ids), rtol=0, atol=1e-9)


EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "granitemoe", "olmoe")


@pytest.mark.parametrize("how", ["zero", "value"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_ablated_expert_writes_nothing_and_the_others_keep_their_weights(kind, how):
    model = build_any(kind)
    ids = example_ids_any(model, batch=2, length=9)
    layer = model.config.num_hidden_layers - 1
    other = copy.deepcopy(model)
    experts = experts_of(other, layer)
    with torch.no_grad():
        for name in ("down_proj", "down_proj_bias"):
            if name in experts._parameters:
                experts._parameters[name][1] = 0
    value = "zero"
    close = 1e-9 if logits(model, ids).dtype == torch.float64 else 1e-4
    due = logits(other, ids)
    with ablated(model, f"L{layer}E1"):
        torch.testing.assert_close(logits(model, ids), due, rtol=0, atol=close)
        result = direct_logit_attribution(model, ids, 5, 7, unit="expert", pos=None)
        assert float(result[f"L{layer}E1"].abs().max()) == 0
    if how == "value" and kind != "llama4_text":
        value = torch.linspace(-1, 1, model.config.hidden_size, dtype=due.dtype)
        with by_hand(experts, lambda y: y + value):
            due = logits(other, ids)
        with ablated(model, f"L{layer}E1", how=value):
            torch.testing.assert_close(logits(model, ids), due, rtol=0, atol=close)
            direct_logit_attribution(model, ids, 5, 7, unit="expert", pos=None)


def test_ablated_shared_expert_writes_nothing():
    model = build_any("deepseek_v3")
    ids = example_ids_any(model)
    layer = model.config.num_hidden_layers - 1
    with by_hand(model.model.layers[layer].mlp.shared_experts, torch.zeros_like):
        due = logits(model, ids)
    with ablated(model, f"L{layer}S0"):
        assert torch.equal(logits(model, ids), due)


@pytest.mark.parametrize("part", ["feature", "error", "b_dec"])
@pytest.mark.parametrize("place", ["1_mlp_out", "1_attn_out", "1_z", "1_pre", "final_post"])
@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "granite", "gpt_neox-parallel"])
def test_ablated_feature_is_taken_out_of_its_place(spec, place, part):
    model, ids = build(spec), example_ids(spec)
    name, at_input = place.partition("_")[2], True
    if place == "final_post":
        module = final_norm(model)
    elif name == "z":
        module = o_proj(model, 1)
    elif name == "pre":
        module = layer_at(model, 1)
    else:
        module, at_input = writer(model, place), False
    width = width_of(module) if name == "z" else model.config.hidden_size
    made = Made(width)
    layer = "" if place == "final_post" else "L1"
    label = {"feature": f"{layer}F11"}.get(part, f"{place}[{part}]")

    def without(x):
        f = made.encode(x)
        own = {"feature": f[..., 11:12] * made.W_dec[11], "b_dec": made.b}
        return x - own.get(part, x - made.decode(f))

    with by_hand(module, without, at_input):
        due = logits(model, ids)
    with ablated(model, label, unit=Features({place: made})):
        torch.testing.assert_close(logits(model, ids), due, rtol=0, atol=1e-9)
    assert float((due - logits(model, ids)).abs().max()) > 1e-3


def test_several_features_are_told_apart_in_one_activation():
    model, ids = build("llama"), example_ids("llama")
    made = Made(model.config.hidden_size)

    def without(x):
        f = made.encode(x)
        return x - f[..., 3:4] * made.W_dec[3] - f[..., 8:9] * made.W_dec[8] + 0.5

    with by_hand(model.model.layers[1].mlp, without):
        due = logits(model, ids)
    how = {"L1F3": "zero", "L1F8": 0.5}
    with ablated(model, ["L1F3", "L1F8"], how, unit=Features({"1_mlp_out": made})):
        torch.testing.assert_close(logits(model, ids), due, rtol=0, atol=1e-9)


# The mean, and other values


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("spec", ["gpt2", "llama-bias", "olmo2", "granite", "cohere"])
def test_mean_is_taken_over_the_real_tokens(spec, side):
    model = build(spec, attn="sdpa")
    ids = example_ids(spec, batch=3, length=8)
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :3] = mask[2, :5] = 0
    elif side == "right":
        mask[0, 5:] = mask[2, 3:] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    seen = {}

    def keep(label, at_input):
        def hook(_, args, kwargs, out=None):
            x = args[0] if at_input else out[0] if isinstance(out, tuple) else out
            seen[label] = x.detach().clone()

        return hook

    handles = [
        o_proj(model, 1).register_forward_pre_hook(keep("z", True), with_kwargs=True),
        last_map(model, 0).register_forward_pre_hook(keep("neurons", True), with_kwargs=True),
        writer(model, "1_mlp_out").register_forward_hook(keep("mlp", False), with_kwargs=True),
    ]
    logits(model, ids, attention_mask=mask, position_ids=position_ids)
    for handle in handles:
        handle.remove()
    real = mask.bool()
    due = {
        "L1H1": seen["z"][real].mean(0)[head_slice(model, 1, 1)],
        "L0N7": seen["neurons"][real].mean(0)[7:8],
        "1_mlp_out": seen["mlp"][real].mean(0),
    }
    found = ablated(model, list(due), "mean", input=ids, attention_mask=mask)
    for label, mean in due.items():
        torch.testing.assert_close(found.values[label].double(), mean, rtol=0, atol=1e-9)
    with found:
        result = direct_logit_attribution(model, ids, 5, 7, attention_mask=mask, pos=[-1, -2])
    with by_hand(writer(model, "1_mlp_out"), lambda x: due["1_mlp_out"].expand_as(x)):
        other = direct_logit_attribution(model, ids, 5, 7, attention_mask=mask, pos=[-1, -2])
    torch.testing.assert_close(
        found.values["1_mlp_out"], due["1_mlp_out"].to(found.values["1_mlp_out"])
    )
    assert result.labels == other.labels


def test_mean_of_an_expert_counts_tokens_that_do_not_go_to_it():
    model, ids = build("mixtral"), example_ids("mixtral", batch=2, length=9)
    experts, calls = model.model.layers[1].mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    logits(model, ids)
    handle.remove()
    hidden, index, weights = calls[0]
    total = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for token in range(len(hidden)):
        for slot in range(index.shape[-1]):
            if int(index[token, slot]) == 2:
                gate, up = (hidden[token] @ experts.gate_up_proj[2].T).chunk(2)
                own = (experts.act_fn(gate) * up) @ experts.down_proj[2].T
                total += (weights[token, slot] * own).detach()
    found = ablated(model, "L1E2", "mean", input=ids).values["L1E2"]
    assert 0 < (index == 2).sum() < index.numel()
    torch.testing.assert_close(found.double(), total / len(hidden), rtol=0, atol=1e-9)


def test_mean_of_a_feature_is_that_of_what_it_writes():
    model, ids = build("llama"), example_ids("llama")
    made, seen = Made(model.config.hidden_size), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out))
    logits(model, ids)
    handle.remove()
    due = (made.encode(seen[0])[..., 4].mean() * made.W_dec[4]).detach()
    found = ablated(model, "L0F4", "mean", input=ids, unit=Features({"0_mlp_out": made}))
    torch.testing.assert_close(found.values["L0F4"], due, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", ["number", "width", "pos", "batch"])
@pytest.mark.parametrize("label", ["1_mlp_out", "L1H2"])
def test_tensor_takes_the_place_of_the_part(label, shape):
    model, ids = build("gpt2"), example_ids("gpt2", batch=2, length=7)
    head = head_slice(model, 1, 2)
    width = model.config.hidden_size if label == "1_mlp_out" else head.stop - head.start
    shapes = {"number": (), "width": (width,), "pos": (7, width), "batch": (2, 7, width)}
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(shapes[shape], generator=generator, dtype=torch.float64)

    def put(x):
        x = x.clone()
        channels = slice(None) if label == "1_mlp_out" else head
        x[..., channels] = value
        return x

    module = model.transformer.h[1].mlp if label == "1_mlp_out" else o_proj(model, 1)
    with by_hand(module, put, at_input=label != "1_mlp_out"):
        due = logits(model, ids)
    with ablated(model, [label], float(value) if shape == "number" else value):
        assert torch.equal(logits(model, ids), due)


# What runs inside


@pytest.mark.parametrize("unit", ["component", "head", "neuron", "layer"])
@pytest.mark.parametrize("label", ["1_attn_out", "0_mlp_out", "L1H1", "L0N3"])
@pytest.mark.parametrize("spec", ["gpt2", "llama-bias", "gemma2-no-caps", "granite", "cohere"])
def test_attribution_inside_is_of_the_ablated_model(spec, label, unit):
    model, ids = build(spec), example_ids(spec)
    with ablated(model, label):
        result = direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=None)
        out = logits(model, ids)
        if label in result:
            numbers = result[label]
            assert float(numbers[numbers.isfinite()].abs().max() if unit != "neuron" else 0) == 0
    due = out[..., 5] - out[..., 7]
    torch.testing.assert_close((result.total() + result.bias).double(), due, rtol=0, atol=1e-5)
    assert not torch.equal(out, logits(model, ids))


def test_generation_inside_is_of_the_ablated_model_step_by_step():
    model, ids = build("llama-bias", attn="sdpa"), example_ids("llama-bias", batch=1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    other = without_inputs(model, lambda m: o_proj(m, 0), head_slice(model, 0, 1))
    with ablated(model, ["L0H1", "1_mlp_out"]):
        found = model.generate(ids, **options)
    with by_hand(other.model.layers[1].mlp, torch.zeros_like):
        assert torch.equal(other.generate(ids, **options), found)
    assert not torch.equal(model.generate(ids, **options), found)


def test_gradients_flow_past_what_is_replaced():
    model, ids = build("gpt2"), example_ids("gpt2")
    with ablated(model, ["L1H0", "0_mlp_out"]):
        model(ids).logits[..., 5].sum().backward()
    grad = model.transformer.h[1].attn.c_proj.weight.grad
    assert float(grad[head_slice(model, 1, 0)].abs().max()) == 0
    assert float(grad.abs().max()) > 0
    assert model.transformer.h[0].mlp.c_proj.weight.grad is None


def test_blocks_stand_in_each_other_and_may_be_entered_again():
    model, ids = build("llama"), example_ids("llama")
    clean = logits(model, ids)
    head, mlp = ablated(model, "L0H1"), ablated(model, "1_mlp_out")
    with ablated(model, ["L0H1", "1_mlp_out"]):
        both = logits(model, ids)
    for _ in range(2):
        with head, mlp:
            assert torch.equal(logits(model, ids), both)
        with head:
            alone = logits(model, ids)
            with head:
                assert torch.equal(logits(model, ids), alone)
            assert torch.equal(logits(model, ids), alone)
        assert torch.equal(logits(model, ids), clean)


def test_mean_inside_another_ablation_is_of_the_model_as_it_runs():
    model, ids = build("llama"), example_ids("llama")
    with ablated(model, "1_mlp_out", 0.25):
        found = ablated(model, "1_mlp_out", "mean", input=ids)
    assert float((found.values["1_mlp_out"] - 0.25).abs().max()) < 1e-12


def test_two_threads_have_their_own_ablations():
    model, ids = build("gpt2"), example_ids("gpt2")
    labels, due, wrong = ["L0H1", "1_mlp_out", "L2N4", None], {}, []
    for label in labels:
        with ablated(model, label) if label else contextlib.nullcontext():
            due[label] = logits(model, ids)
    barrier = threading.Barrier(len(labels))

    def run(label):
        barrier.wait()
        for _ in range(20):
            with ablated(model, label) if label else contextlib.nullcontext():
                if not torch.equal(logits(model, ids), due[label]):
                    wrong.append(label)

    threads = [threading.Thread(target=run, args=(label,)) for label in labels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert hooks_on(model) == 0


@pytest.mark.parametrize("every_thread", [True, False])
def test_other_thread_meets_the_ablation_where_it_is_asked_to(every_thread):
    model, ids = build("llama"), example_ids("llama")
    clean, found = logits(model, ids), []

    def block():
        with ablated(model, "L0H1", every_thread=every_thread):
            thread = threading.Thread(target=lambda: found.append(logits(model, ids)))
            thread.start()
            thread.join()

    if every_thread:
        block()
    else:
        with pytest.warns(DLAWarning, match="another thread only"):
            block()
    assert torch.equal(found[0], clean) != every_thread


def test_compiled_model_runs_eagerly_inside():
    model, ids = build("llama"), example_ids("llama")
    with ablated(model, "L0H1"):
        due = logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graph.forward)
    clean = logits(compiled, ids)
    with ablated(compiled, "L0H1"):
        torch.testing.assert_close(logits(compiled, ids), due, rtol=0, atol=1e-12)
    assert torch.equal(logits(compiled, ids), clean)
    torch._dynamo.reset()


def test_block_that_is_used_twice_is_ablated_in_one_of_its_uses():
    model, ids = build("llama"), example_ids("llama")
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[1], layers[0]])
    model.config.num_hidden_layers = 3
    for _ in range(2):
        runs = []

        def third(_, args, out, runs=runs):
            runs.append(1)
            return torch.zeros_like(out) if len(runs) == 2 else out

        handle = layers[0].mlp.register_forward_hook(third)
        due = logits(model, ids)
        handle.remove()
        with ablated(model, "2_mlp_out"):
            with contextlib.suppress(RuntimeError), by_hand(layers[1], _fail):
                logits(model, ids)  # a run that ends half-way
            assert torch.equal(logits(model, ids), due)


def _fail(x):
    raise RuntimeError("half-way")


# Nothing stays


@pytest.mark.parametrize("label", ["1_mlp_out", "L1H2", "L0N3", "L1E2"])
@pytest.mark.parametrize("spec", ["llama-bias", "mixtral"])
def test_nothing_is_left_behind_after_an_error(spec, label):
    if ("N" in label) == (spec == "mixtral") or ("E" in label) != (
        spec == "mixtral" and "E" in label
    ):
        pytest.skip("the model has no such part")
    model, ids = build(spec), example_ids(spec)
    clean, before = logits(model, ids), hooks_on(model)

    def fail():
        with ablated(model, label, "mean", input=ids):
            assert hooks_on(model) > before
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert hooks_on(model) == before
    assert torch.equal(logits(model, ids), clean)


def test_hooks_come_off_when_a_run_fails_inside():
    model = build("llama")
    with pytest.raises(IndexError), ablated(model, ["L0H1", "1_mlp_out"]):
        logits(model, torch.tensor([[10**6]]))
    assert hooks_on(model) == 0


def test_hooks_of_the_callers_own_stay_in_their_order():
    model, ids = build("llama"), example_ids("llama")
    seen = []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda m, a, out: seen.append(float(out.abs().max())))
    before = dict(mlp._forward_hooks)
    with ablated(model, "1_mlp_out"):
        mlp.register_forward_hook(lambda m, a, out: seen.append(float(out.abs().max())))
        logits(model, ids)
    assert seen[0] > 0
    assert seen[1] == 0
    assert next(iter(mlp._forward_hooks)) == next(iter(before))
    assert len(mlp._forward_hooks) == 2


def test_first_attribution_inside_measures_the_model_as_it_is():
    model, ids = build("gemma2-no-caps"), example_ids("gemma2-no-caps")
    due = direct_logit_attribution(build("gemma2-no-caps"), ids, 5, unit="head")
    with ablated(model, ["0_attn_out", "L1N2"]):
        from dla_hooks.modules.version import forget

        forget(model)
        direct_logit_attribution(model, ids, 5, unit="head")
    torch.testing.assert_close(
        direct_logit_attribution(model, ids, 5, unit="head").attribution, due.attribution
    )


# What is refused


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("L0H1<3", "ablate the head, 'L0H1'"),
        ("1_pre", "running sum"),
        ("1_mid", "running sum"),
        ("final_post", "running sum"),
        ("embed", "inputs_embeds"),
        ("pos_embed", "inputs_embeds"),
        ("remainder", "no part of the model"),
        ("1_hook", "take the hook off"),
        ("L1F3", "unit=Features"),
        ("1_mlp_out[error]", "unit=Features"),
        ("1_mlp_out[default]", "disable_adapter"),
    ],
)
def test_row_that_is_no_part_is_refused_with_what_to_do(label, says):
    model = build("gpt2")
    with pytest.raises(InputError, match=says):
        ablated(model, label)
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("L9H0", "has the layers 0 to 2"),
        ("L0H99", r"its layer has 4 \(0 to 3\)"),
        ("L0.1H0", "no head"),
        ("L0N999", "no neuron"),
        ("7_mlp_out", "'1_mlp_out'"),
        ("nonsense", "Parts are"),
    ],
)
def test_unknown_part_is_named_with_those_that_there_are(label, says):
    with pytest.raises(LabelError, match=says):
        ablated(build("gpt2"), label)


def test_other_bad_arguments_are_refused_before_any_run():
    model, ids = build("llama"), example_ids("llama")
    width = model.config.hidden_size
    for error, arguments, options in [
        (InputError, (["L0H1"], "mean"), {}),
        (InputError, (["L0H1"], "median"), {}),
        (InputError, ([],), {}),
        (ArgumentTypeError, (5,), {}),
        (ArgumentTypeError, ([5],), {}),
        (ShapeMismatchError, (["1_mlp_out"], torch.zeros(width + 1)), {}),
        (ShapeMismatchError, (["1_mlp_out"], torch.zeros(1, 1, 1, width)), {}),
        (InputError, (["1_mlp_out"], torch.full((width,), torch.nan)), {}),
        (InputError, (["1_mlp_out"], torch.zeros(width, dtype=torch.long)), {}),
        (InputError, (["1_mlp_out"], {"L0H1": "zero"}), {}),
        (InputError, (["L0H1"], {"L0H1": "zero", "L0H2": "zero"}), {}),
        (InputError, (["L0F1"],), {"unit": "head"}),
        (UnsupportedModelError, (["L0E1"],), {}),
    ]:
        with pytest.raises(error):
            ablated(model, *arguments, **options)
    with pytest.raises(dla_hooks.TrainingModeError):
        ablated(model.train(), "L0H1")
    model.eval()
    with pytest.raises(UnsupportedModelError, match="experts"):
        ablated(build("mixtral"), "L0N1")
    with ablated(model, "1_mlp_out", torch.zeros(3, width)), pytest.raises(ShapeMismatchError):
        logits(model, ids)
    assert hooks_on(model) == 0


def test_run_that_goes_past_a_part_is_refused():
    model, ids = build("llama"), example_ids("llama")
    forward = model.model.layers[1].mlp.forward
    found = ablated(model, "1_mlp_out")

    class Past(nn.Module):
        def forward(self, x):
            return forward(x)

    model.model.layers[1].mlp = Past().eval()
    with found, pytest.raises(HookError, match="nothing was replaced"):
        logits(model, ids)
    assert hooks_on(model) == 0


# Where a row is


@pytest.mark.parametrize("spec", ["gpt2", "llama-bias", "gemma2", "bloom", "mixtral"])
@pytest.mark.parametrize("unit", ["component", "head"])
def test_zero_put_where_a_row_stands_is_its_ablation(spec, unit):
    model, ids = build(spec), example_ids(spec)
    result = direct_logit_attribution(model, ids, 5, unit=unit)
    assert result.where(result.labels[0]) == dla_hooks.where(model, result.labels[0])
    for row in result.rows:
        if row.layer != 1:
            continue
        module, at, channels = result.where(row.label)

        def zero(x, channels=channels):
            x = x.clone()
            x[..., slice(None) if channels is None else channels] = 0
            return x

        with by_hand(model.get_submodule(module), zero, at_input=at == "input"):
            due = logits(model, ids)
        with ablated(model, row.label):
            assert torch.equal(logits(model, ids), due)


def test_where_knows_rows_of_every_unit():
    model, ids = build("llama"), example_ids("llama")
    made = {"1_mlp_out": Made(model.config.hidden_size), "0_z": Made(width_of(o_proj(model, 0)))}
    units = ("layer", dla_hooks.Neurons(top=2), dla_hooks.SourceTokens(top=2), Features(made))
    found = direct_logit_attribution(model, ids, 5, unit=units)
    for result, label, due in [
        (found["layer"], "1_pre", ("model.layers.1", "input", None)),
        (found["layer"], "final_post", ("model.norm", "input", None)),
        (found["neuron"], "L1N5", ("model.layers.1.mlp.down_proj", "input", slice(5, 6))),
        (found["source"], "L1H2<3", ("model.layers.1.self_attn.o_proj", "input", slice(20, 30))),
        (found["feature"], "L1F3", ("model.layers.1.mlp", "output", None)),
        (found["feature"], "L0F3", ("model.layers.0.self_attn.o_proj", "input", None)),
        (found["feature"], "0_z[error]", ("model.layers.0.self_attn.o_proj", "input", None)),
    ]:
        assert tuple(result.where(label)) == due
    assert dla_hooks.where(model, "embed") == ("model.embed_tokens", "output", None)
    assert dla_hooks.where(build("mixtral"), "L1E2")[:2] == ("model.layers.1.mlp.experts", "output")


@pytest.mark.parametrize(
    "spec",
    [
        "gpt2",
        "gemma2",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("llama", "gpt_neox-parallel", "mixtral")
        ),
    ],
)
def test_where_of_a_comparison_is_that_of_the_first_model(spec, tmp_path):
    first, second = build(spec, seed=0), build(spec, seed=1)
    units = ("component", "layer", "head", dla_hooks.SourceTokens(top=2))
    found = dla_hooks.compare(first, second, example_ids(spec), 5, unit=units, pos=None)
    for unit, comparison in found.items():
        for label in comparison.labels:
            if label == "remainder":
                with pytest.raises(InputError, match="no place"):
                    comparison.where(label)
                continue
            due = dla_hooks.where(first, label)
            assert comparison.where(label) == comparison.prompt(0).where(label) == due, unit
            assert comparison.position(1).where(label) == due
            assert comparison.second.where(label) == dla_hooks.where(second, label)
        with pytest.raises(LabelError):
            comparison.where("9_mlp_out")
    read = dla_hooks.load(found["head"].save(tmp_path / "one.safetensors"))
    with pytest.raises(InputError, match=r"dla_hooks\.where\(model, 'L1H1'\)"):
        read.where("L1H1")


def test_where_survives_copies_and_says_what_to_do_after_a_file(tmp_path):
    import pickle

    model, ids = build("llama"), example_ids("llama")
    result = direct_logit_attribution(model, ids, 5, pos=None)
    due = result.where("1_mlp_out")
    for other in (result.prompt(0), result.position(1), copy.copy(result), copy.deepcopy(result)):
        assert other.where("1_mlp_out") == due
    gone = [
        dla_hooks.load(result.save(tmp_path / "one.safetensors")),
        pickle.loads(pickle.dumps(result)),
    ]
    for other in gone:
        with pytest.raises(InputError, match=r"dla_hooks\.where\(model, '1_mlp_out'\)"):
            other.where("1_mlp_out")
    with pytest.raises(LabelError):
        result.where("9_mlp_out")
    with pytest.raises(InputError, match="no place"):
        direct_logit_attribution(model, ids, 5, unit="head").where("remainder")
    del model
    with pytest.raises(InputError, match="gone"):
        result.where("1_mlp_out")


@pytest.mark.tl
@pytest.mark.parametrize("spec", ["gpt2", "llama"])
def test_ablation_of_a_transformer_lens_model_is_that_of_the_raw_one(spec, references):
    pytest.importorskip("transformer_lens")
    model = references.raw(spec)
    ids = example_ids(spec)
    reference = references.bridged(spec)
    # A bridge of GPT-2 has moved its value biases behind the heads.
    heads = () if spec == "gpt2" else ("L1H1",)
    for label in ("1_attn_out", "1_mlp_out", "L0N3", *heads):
        with ablated(model, label):
            due = logits(model, ids)[:, -1]
        with ablated(reference, label):
            found = direct_logit_attribution(reference, ids, 5, 7)
        own = due[:, 5] - due[:, 7]
        torch.testing.assert_close(found.logit.to(own), own, rtol=1e-3, atol=1e-3)


def test_other_thread_runs_the_model_while_an_ablation_is_being_put_on_or_off():
    """Torch writes down that a hook is there, and apart from it that it takes keywords."""
    model, ids = build("llama"), example_ids("llama")
    clean, found = logits(model, ids), []
    with ablated(model, ["L0H1", "L1H0"]):
        halves = [module._forward_pre_hooks_with_kwargs for module in model.modules()]
        kept = [dict(half) for half in halves]
        for half in halves:
            half.clear()
        thread = threading.Thread(target=lambda: found.append(logits(model, ids)))
        thread.start()
        thread.join()
        for half, own in zip(halves, kept, strict=True):
            half.update(own)
        assert not torch.equal(logits(model, ids), clean)
    assert torch.equal(found[0], clean)
