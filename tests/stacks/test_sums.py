"""Stacks make up what the model computed, as attributions do, or they are refused."""

from __future__ import annotations

import pytest
import torch
from alter import alter_output
from mapping_zoo import MODEL_TYPES, CannotBuild, example_ids_any, runs
from mapping_zoo import build_any as build_mapped
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM
from zoo import build, example_ids

import dla_hooks
from dla_hooks import DecompositionError, DLAError, InputError, UnsupportedModelError
from dla_hooks.modules.version import forget


def build_any(model_type):
    """A tiny model of this type, where this version of transformers has one that runs."""
    try:
        model = build_mapped(model_type)
    except CannotBuild as error:
        pytest.skip(str(error))
    if not runs(model):
        pytest.skip(f"{model_type} does not run in its dtype here")
    return model


def last_stream(model, ids, norm):
    seen = {}
    handle = model.get_submodule(norm).register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen["x"].detach()


@pytest.mark.parametrize(
    ("model_type", "norm"),
    [("zaya", "model.norm"), ("gpt_neox_japanese", "gpt_neox_japanese.final_layer_norm")],
)
def test_decompose_with_block_constants_sums_to_the_stream(model_type, norm):
    model = build_any(model_type)
    ids = example_ids_any(model)
    stack, labels = dla_hooks.decompose_resid(model, ids, return_labels=True)
    torch.testing.assert_close(stack.sum(0), last_stream(model, ids, norm), rtol=1e-6, atol=1e-6)
    result = dla_hooks.direct_logit_attribution(model, ids, 5, pos=None)
    assert labels == result.labels
    assert any(label.endswith("_constant") for label in labels)
    attrs = dla_hooks.logit_attrs(model, ids, stack, 5)
    torch.testing.assert_close(attrs, result.attribution, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_decompose_of_a_middle_layer_holds_constants_of_the_blocks_before_it():
    model = build_any("zaya")
    ids = example_ids_any(model)
    end = len(model.model.layers) - 1
    seen = {}
    block = model.model.layers[end]
    handle = block.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    stack = dla_hooks.decompose_resid(model, ids, layer=end)
    torch.testing.assert_close(stack.sum(0), seen["x"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_steering_is_a_row_of_its_own(layer):
    model, ids = build("granite"), example_ids("granite")
    steer = torch.randn(model.config.hidden_size, dtype=torch.float64)

    def add(module, args, out):
        out = out.clone()
        out[:, 2:] += steer
        return out

    model.model.layers[1].register_forward_hook(add)
    model.model.layers[0].register_forward_pre_hook(lambda m, args: (args[0] + steer, *args[1:]))
    stack, labels = dla_hooks.decompose_resid(model, ids, layer=layer, return_labels=True)
    at = "model.norm" if layer != 1 else f"model.layers.{layer}"
    torch.testing.assert_close(stack.sum(0), last_stream(model, ids, at), rtol=1e-6, atol=1e-6)
    assert ("1_hook" in labels) == (layer != 1)
    if layer != 1:
        row = stack[labels.index("1_hook")]
        torch.testing.assert_close(row[:, 2:], steer.expand_as(row[:, 2:]), rtol=1e-6, atol=1e-6)
        assert not row[:, :2].any()
    mid = dla_hooks.decompose_resid(model, ids, layer=0, mlp_input=True, return_labels=True)
    assert mid[1] == ["embed", "0_attn_out", "0_hook"]


def test_a_constant_is_a_row():
    model, ids = build("llama"), example_ids("llama")
    steer = torch.randn(model.config.hidden_size, dtype=torch.float64)
    alter_output(model.model.layers[1], lambda out: out + steer)
    stack, labels = dla_hooks.decompose_resid(model, ids, return_labels=True)
    row = stack[labels.index("1_constant")]
    torch.testing.assert_close(row, steer.expand_as(row), rtol=1e-6, atol=1e-6)
    only = dla_hooks.decompose_resid(model, ids, mode="mlp", incl_embeds=False, return_labels=True)
    assert "1_constant" not in only[1]


def steer_last_position(model):
    def steer(out):
        out[:, -1] += 1.0 * (out.shape[1] > 4)  # not where the model is measured
        return out

    alter_output(model.model.layers[1], steer)


def change_projection(model):
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, a, out: 1.5 * out)


def change_final_norm(model):
    model.model.norm.register_forward_hook(lambda m, a, out: out + out.flip(-1))


def change_logits(model):
    model.lm_head.register_forward_hook(lambda m, a, out: out + 3 * out.roll(1, -1))


@pytest.mark.parametrize(
    ("change", "primitive"),
    [
        (steer_last_position, "decompose_resid"),
        (steer_last_position, "stack_head_results"),
        (steer_last_position, "stack_neuron_results"),
        (change_projection, "stack_head_results"),
        (change_final_norm, "apply_ln_to_stack"),
        (change_logits, "logit_attrs"),
    ],
)
def test_what_does_not_add_up_is_refused(change, primitive):
    model, ids = build("llama"), example_ids("llama")
    stack = dla_hooks.decompose_resid(model, ids)
    more = {"apply_ln_to_stack": (stack,), "logit_attrs": (stack, 5)}.get(primitive, ())
    change(model)
    with pytest.raises(DLAError) as raised:
        getattr(dla_hooks, primitive)(model, ids, *more)
    assert isinstance(raised.value, (DecompositionError, UnsupportedModelError))


def test_a_refused_stack_is_had_with_check_off():
    model, ids = build("llama"), example_ids("llama")
    steer_last_position(model)
    with pytest.raises(DecompositionError, match="the parts of the stream miss"):
        dla_hooks.decompose_resid(model, ids)
    stack = dla_hooks.decompose_resid(model, ids, check=False)
    assert bool(torch.isfinite(stack).all())


@pytest.mark.parametrize("primitive", ["stack_head_results", "stack_neuron_results"])
def test_products_that_autocast_rounds_are_named(primitive):
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    with torch.autocast("cpu", torch.bfloat16):
        dla_hooks.decompose_resid(model, ids)
        with pytest.raises(DecompositionError, match="Autocast is on"):
            getattr(dla_hooks, primitive)(model, ids)
        stack = getattr(dla_hooks, primitive)(model, ids, check=False)
    assert bool(torch.isfinite(stack).all())


def test_padding_is_no_part_of_the_check():
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    stack = dla_hooks.decompose_resid(model, ids, attention_mask=mask)
    assert bool(stack[:, 0, :3].isnan().all())
    alone = dla_hooks.decompose_resid(model, ids[:1, 3:])
    torch.testing.assert_close(stack[:, :1, 3:], alone, rtol=1e-4, atol=1e-4)
    assert dla_hooks.decompose_resid(model, ids, pos_slice=(0, 0)).shape[2] == 0


@pytest.mark.parametrize("field", ["residual_multiplier", "embedding_multiplier"])
def test_a_multiplier_changed_without_a_trace_is_noticed(field):
    model, ids = build("granite"), example_ids("granite")
    names = ("decompose_resid", "stack_head_results", "stack_neuron_results")
    for name in names:
        getattr(dla_hooks, name)(model, ids)
    for module in model.modules():
        if hasattr(module, field):
            setattr(module, field, 0.9)
    expected = last_stream(model, ids, "model.norm")
    stack = dla_hooks.decompose_resid(model, ids)
    torch.testing.assert_close(stack.sum(0), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("primitive", "options"),
    [
        ("stack_head_results", {}),
        ("stack_neuron_results", {}),
        ("decompose_resid", {"mode": "mlp", "incl_embeds": False}),
        ("accumulated_resid", {"incl_mid": True}),
    ],
)
def test_stale_factors_are_noticed_by_every_primitive_that_uses_them(primitive, options):
    model, ids = build("granite"), example_ids("granite")
    call = getattr(dla_hooks, primitive)
    call(model, ids, **options)
    for layer in model.model.layers:
        layer.residual_multiplier = 0.9
    after = call(model, ids, **options)
    forget(model)
    torch.testing.assert_close(after, call(model, ids, **options))


def test_a_changed_logit_scale_is_noticed():
    model, ids = build("granite"), example_ids("granite")
    stack = dla_hooks.decompose_resid(model, ids)
    dla_hooks.logit_attrs(model, ids, stack, 3, 7)
    model.config.logits_scaling = 5.0
    attrs = dla_hooks.logit_attrs(model, ids, stack, 3, 7)
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(attrs.sum(0), logits[..., 3] - logits[..., 7], rtol=1e-5, atol=1e-5)


def test_a_lifted_early_exit_is_noticed():
    model, ids = build("llama"), example_ids("llama")
    every = dla_hooks.decompose_resid(model, ids)
    model.config.num_hidden_layers = 2
    fewer = dla_hooks.decompose_resid(model, ids)
    assert len(fewer) == len(every) - 2
    model.config.num_hidden_layers = 3
    torch.testing.assert_close(dla_hooks.decompose_resid(model, ids), every)


def test_activations_that_overflow_are_named():
    model, ids = build("llama"), example_ids("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: out * torch.inf)
    with pytest.raises(DLAError):
        dla_hooks.decompose_resid(model, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", ["gpt2", "llama", "gemma2", "olmo2", "granite"])
def test_sums_hold_to_rounding_in_every_dtype(spec, dtype):
    model, ids = build(spec, dtype=dtype), example_ids(spec, batch=4, length=16)
    stack = dla_hooks.decompose_resid(model, ids)
    assert stack.dtype == dtype
    dla_hooks.stack_head_results(model, ids)
    dla_hooks.stack_neuron_results(model, ids)
    dla_hooks.logit_attrs(model, ids, stack, 5)


# --- kinds of writes -------------------------------------------------------------------------


def test_mode_mlp_of_a_hybrid_holds_mlps_alone():
    model = build_any("falcon_h1")
    ids = example_ids_any(model)
    options = {"incl_embeds": False, "return_labels": True}
    every, labels = dla_hooks.decompose_resid(model, ids, **options)
    for mode in ("mlp", "attn"):
        stack, found = dla_hooks.decompose_resid(model, ids, mode=mode, **options)
        wanted = [label for label in labels if label.endswith(f"_{mode}_out")]
        assert found == wanted
        torch.testing.assert_close(stack, every[[labels.index(label) for label in wanted]])


def test_modes_of_a_block_with_two_attentions_and_experts():
    model = build_any("longcat_flash")
    ids = example_ids_any(model)
    found = {
        mode: dla_hooks.decompose_resid(
            model, ids, mode=mode, layer=1, incl_embeds=False, return_labels=True
        )[1]
        for mode in ("attn", "mlp")
    }
    assert found["attn"] == ["0_attn_out", "0_attn1_out"]
    assert found["mlp"] == ["0_mlp_out", "0_mlp1_out", "0_moe_out"]


def test_heads_of_two_attentions_in_a_block_have_labels_of_their_own():
    model = build_any("longcat_flash")
    ids = example_ids_any(model)
    stack, labels = dla_hooks.stack_head_results(
        model, ids, incl_remainder=True, return_labels=True
    )
    assert len(set(labels)) == len(labels)
    result = dla_hooks.direct_logit_attribution(model, ids, 5, unit="head", pos=None)
    assert labels == result.labels
    assert "L0.1H0" in labels
    attrs = dla_hooks.logit_attrs(model, ids, stack, 5)
    torch.testing.assert_close(attrs, result.attribution, rtol=1e-5, atol=1e-5)


# --- neurons ---------------------------------------------------------------------------------


def test_mixers_are_no_mlps():
    model = build_any("mamba")
    ids = example_ids_any(model)
    options = {"incl_embeds": False, "return_labels": True}
    _, labels = dla_hooks.decompose_resid(model, ids, mode="all", **options)
    assert labels
    assert {label.partition("_")[2] for label in labels} == {"mixer_out"}
    for mode in ("mlp", "attn"):
        with pytest.raises(InputError, match=f"nothing of mode='{mode}' was written"):
            dla_hooks.decompose_resid(model, ids, mode=mode, **options)


def test_a_model_without_mlps_has_no_neurons_to_stack():
    model = build_any("mamba")
    with pytest.raises(UnsupportedModelError, match="no MLP neurons"):
        dla_hooks.stack_neuron_results(model, example_ids_any(model))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "olmo3"])
def test_neurons_behind_a_norm_make_up_the_write(model_type):
    model = build_any(model_type)
    ids = example_ids_any(model)
    stack, labels = dla_hooks.stack_neuron_results(model, ids, return_labels=True)
    writes, names = dla_hooks.decompose_resid(model, ids, return_labels=True)
    last = model.config.num_hidden_layers - 1
    rows = [row for row, label in enumerate(labels) if label.startswith(f"L{last}N")]
    write = writes[names.index(f"{last}_mlp_out")]
    torch.testing.assert_close(stack[rows].sum(0), write, rtol=1e-5, atol=1e-5)
    onto = torch.randn(write.shape[-1], dtype=write.dtype)
    along = dla_hooks.stack_neuron_results(model, ids, project_output_onto=onto)
    torch.testing.assert_close(along, stack @ onto, rtol=1e-6, atol=1e-6)


def test_the_bias_of_a_norm_belongs_to_no_neuron():
    model, ids = build("olmo2"), example_ids("olmo2")
    block = model.model.layers[-1]
    norm = nn.LayerNorm(model.config.hidden_size, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    block.post_feedforward_layernorm = norm.eval()
    stack, labels = dla_hooks.stack_neuron_results(model, ids, return_labels=True)
    writes, names = dla_hooks.decompose_resid(model, ids, return_labels=True)
    last = len(model.model.layers) - 1
    rows = [row for row, label in enumerate(labels) if label.startswith(f"L{last}N")]
    without_bias = writes[names.index(f"{last}_mlp_out")] - norm.bias
    torch.testing.assert_close(stack[rows].sum(0), without_bias.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("neurons", [[10**6], 10**6, [-(10**6)]], ids=str)
def test_a_neuron_that_no_layer_has_is_named(neurons):
    model, ids = build("llama"), example_ids("llama")
    with pytest.raises(IndexError, match="L0 has 54 neurons") as raised:
        dla_hooks.stack_neuron_results(model, ids, neuron_slice=neurons)
    assert isinstance(raised.value, DLAError)


# --- blocks that do not run, and mid streams -------------------------------------------------


def model_with_a_block_that_does_not_run():
    config = MllamaTextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_scaling={"rope_type": "default", "rope_theta": 10000.0},
    )
    return MllamaForCausalLM(config).eval()


@pytest.mark.parametrize("layer", [None, 0, 1, 2, 3])
def test_blocks_that_do_not_run_are_left_out(layer):
    model = model_with_a_block_that_does_not_run()
    ids = torch.tensor([[3, 5, 17, 33]])
    before = {0: [], 1: ["0"], 2: ["0"], 3: ["0", "2"], None: ["0", "2"]}[layer]
    stack, labels = dla_hooks.decompose_resid(model, ids, layer=layer, return_labels=True)
    assert labels == ["embed", *(f"{n}_{w}_out" for n in before for w in ("attn", "mlp"))]
    states, names = dla_hooks.accumulated_resid(model, ids, layer=layer, return_labels=True)
    torch.testing.assert_close(stack.sum(0), states[-1])
    assert names[-1] == ("final_post" if layer in (None, 3) else "0_pre" if layer == 0 else "2_pre")
    heads = dla_hooks.stack_head_results(model, ids, layer=layer, return_labels=True)[1]
    assert heads == [f"L{n}H{head}" for n in before for head in range(4)]
    neurons = dla_hooks.stack_neuron_results(model, ids, layer=layer, return_labels=True)[1]
    assert neurons == [f"L{n}N{neuron}" for n in before for neuron in range(48)]


def test_the_mlp_of_a_block_that_does_not_run_reads_nothing():
    model = model_with_a_block_that_does_not_run()
    with pytest.raises(InputError, match="block 1 does not run"):
        dla_hooks.decompose_resid(model, torch.tensor([[3, 5]]), layer=1, mlp_input=True)


MIDS = {
    "beam": ("model.layers", "pre_feedforward_layernorm"),
    "doge": ("model.layers", "post_attention_layernorm"),
    "granite": ("model.layers", "post_attention_layernorm"),
    "gemma4_text": ("model.layers", "pre_feedforward_layernorm"),
    "gpt_neox_japanese": ("gpt_neox_japanese.layers", "post_attention_layernorm"),
}


@pytest.mark.parametrize("model_type", [name for name in MIDS if name in MODEL_TYPES])
def test_mid_streams_are_what_the_mlp_reads(model_type):
    """Gains, multipliers and constants of a block stand on the side where the model puts them."""
    model = build_any(model_type)
    ids = example_ids_any(model)
    path, name = MIDS[model_type]
    seen = []
    handles = [
        getattr(block, name).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
        for block in model.get_submodule(path)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    stack, labels = dla_hooks.accumulated_resid(model, ids, incl_mid=True, return_labels=True)
    mids = [row for row, label in enumerate(labels) if label.endswith("_mid")]
    assert len(mids) == len(seen)
    torch.testing.assert_close(stack[mids], torch.stack(seen), rtol=1e-6, atol=1e-6)
    for layer in (0, len(seen) - 1):
        parts = dla_hooks.decompose_resid(model, ids, layer=layer, mlp_input=True)
        torch.testing.assert_close(parts.sum(0), seen[layer], rtol=1e-6, atol=1e-6)


def test_a_mid_stream_that_nothing_reads_is_refused():
    model = build_any("zaya")  # biases on both sides of it, of which only their sum is known
    with pytest.raises(UnsupportedModelError, match="no module in it reads"):
        dla_hooks.accumulated_resid(model, example_ids_any(model), incl_mid=True)


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [None, "numpy", torch.zeros(2, 2, 7, 40, dtype=torch.long)])
@pytest.mark.parametrize("primitive", ["apply_ln_to_stack", "logit_attrs"])
def test_what_is_no_stack_is_refused_by_name(primitive, stack):
    model, ids = build("llama"), example_ids("llama")
    if isinstance(stack, str):
        stack = torch.zeros(2, 2, 7, 40).numpy()
    more = (5,) if primitive == "logit_attrs" else ()
    with pytest.raises(DLAError, match="residual_stack must be a floating-point tensor"):
        getattr(dla_hooks, primitive)(model, ids, stack, *more)


def test_prompts_that_the_verb_runs_in_chunks_run_at_once(monkeypatch):
    model, ids = build("llama"), example_ids("llama", length=12)
    calls = {
        "decompose_resid": {},
        "accumulated_resid": {"incl_mid": True},
        "stack_head_results": {},
        "stack_neuron_results": {},
    }
    expected = {name: getattr(dla_hooks, name)(model, ids, **more) for name, more in calls.items()}
    promoted = dla_hooks.promoted_tokens(model, ids, pos=None)
    monkeypatch.setattr("dla_hooks.sources.live.LONG_PROMPT", 8)
    monkeypatch.setattr("dla_hooks.sources.live.AUTOMATIC_CHUNK", 4)
    for name, more in calls.items():
        torch.testing.assert_close(getattr(dla_hooks, name)(model, ids, **more), expected[name])
    attrs = dla_hooks.logit_attrs(model, ids, expected["decompose_resid"], 5)
    assert attrs.shape[1:] == ids.shape
    assert torch.equal(dla_hooks.promoted_tokens(model, ids, pos=None).up_ids, promoted.up_ids)
