"""Adapters in front of last maps, with pattern and gate frozen, against a computation by hand."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from adapted import (
    adapted,
    attribute,
    delta_of,
    filled,
    in_logits,
    inputs_of,
    layers_of,
    lora,
    own_scale,
)
from mapping_zoo import build_any, example_ids_any
from oracle_families import family_of, frozen_norm, module_at
from torch.nn import functional
from zoo import build, example_ids

import dla_hooks
from dla_hooks import DecompositionError, UnsupportedModelError, prepare

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = {"attn_out": ("self_attn.v_proj", "self_attn.o_proj")}
GATED = {"mlp_out": ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")}
ACTS = {"silu": functional.silu, "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh")}

# What is adapted; then for each write the module before its last map, that map, and the gate.
CASES = {
    "llama-bias": (LLAMA, ATTENTION | GATED),
    "mistral": (LLAMA, ATTENTION | GATED),
    "gemma2": (LLAMA, ATTENTION | GATED),
    "granite": (("v_proj", "up_proj"), ATTENTION | GATED),
    "olmo2": (("v_proj", "up_proj"), ATTENTION | GATED),
    "gpt2": (("c_attn", "c_proj", "c_fc"), {"attn_out": ("attn.c_attn", "attn.c_proj")}),
    "gpt_neox-parallel": (
        ("query_key_value", "dense_h_to_4h"),
        {"attn_out": ("attention.query_key_value", "attention.dense")},
    ),
    "phi3": (
        ("qkv_proj", "gate_up_proj", "o_proj", "down_proj"),
        {
            "attn_out": ("self_attn.qkv_proj", "self_attn.o_proj"),
            "mlp_out": ("mlp.gate_up_proj", "mlp.down_proj", "mlp.gate_up_proj"),
        },
    ),
}
FLOAT32_INSIDE = ("gemma2", "olmo2", "gpt_neox-parallel")  # norms or weights


@contextlib.contextmanager
def softmax_as_wide_as_scores():
    """The eager attention of transformers computes its weights in float32."""
    plain = functional.softmax
    functional.softmax = lambda x, dim=-1, dtype=None: plain(x, dim)
    try:
        yield
    finally:
        functional.softmax = plain


@torch.no_grad()
def patterns_of(model, ids, **options):
    """The attention weights [batch, head, query, source] of each layer, from the model itself."""
    inner = model.base_model.model
    wide = softmax_as_wide_as_scores()
    if inner.config._attn_implementation == "eager":
        wide = contextlib.nullcontext()
    eager = copy.deepcopy(inner)
    eager.set_attn_implementation("eager")
    with wide:
        return eager(ids, use_cache=False, output_attentions=True, **options).attentions


def of_values(config, matrix):
    """The rows of a matrix [d_out, d_in] that make values."""
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.model_type == "gpt2":
        return matrix.chunk(3)[2]
    if config.model_type == "gpt_neox":
        return matrix.unflatten(0, (config.num_attention_heads, 3, -1))[:, 2].flatten(0, 1)
    if config.model_type == "phi3":
        return matrix[-kv * (config.hidden_size // config.num_attention_heads) :]
    return matrix


def factor_of(module, name, W):
    """What DoRA multiplies: its magnitudes over the norms of the adapted weight's rows."""
    if name not in module.lora_magnitude_vector:
        return 1.0
    adapted = W + delta_of(module, name)
    return (module.lora_magnitude_vector[name].weight / adapted.norm(dim=1))[:, None]


def base_weight(module):
    """The base's part of a last map [d_model, d_in]."""
    base = getattr(module, "base_layer", module)
    W = base.weight.T if type(base).__name__ == "Conv1D" else base.weight
    for name in getattr(module, "lora_magnitude_vector", {}):
        W = W * factor_of(module, name, W)
    return W


@torch.no_grad()
def by_hand(model, ids, maps):
    """What each adapter wrote through the last map, by its row."""
    inner = model.base_model.model
    family, config = family_of(inner), inner.config
    patterns, modules, norms = patterns_of(model, ids), {}, {}
    for number, layer in enumerate(layers_of(inner)):
        for kind, paths in maps.items():
            for role, path in zip(("before", "last", "gate"), paths, strict=False):
                modules[number, kind, role] = module_at(layer, path)
            if family.post_norms is not None:
                nth = ("attn_out", "mlp_out").index(kind)
                norms[number, kind] = module_at(layer, family.post_norms[nth])
    with inputs_of(modules) as seen, inputs_of(norms) as normed:
        model(ids, use_cache=False)
    found = {}
    for number, kind in {key[:2] for key in modules}:
        before = modules[number, kind, "before"]
        W = base_weight(modules[number, kind, "last"])
        for name in before.active_adapters:
            delta = delta_of(before, name)
            base = before.base_layer.weight
            delta = delta * factor_of(before, name, base)
            x = seen[number, kind, "before"][0].reshape(*ids.shape, -1)
            if kind == "attn_out":
                p = patterns[number].double()
                v = (x @ of_values(config, delta).T).unflatten(-1, (-1, W.shape[1] // p.shape[1]))
                v = v.transpose(1, 2).repeat_interleave(p.shape[1] // v.shape[2], 1)
                entered = (p @ v).transpose(1, 2).flatten(2)
            else:
                act = ACTS[getattr(config, "hidden_act", None) or config.hidden_activation]
                gate = seen[number, kind, "gate"][1]
                if config.model_type == "phi3":
                    gate, delta = gate.chunk(2, -1)[0], delta.chunk(2)[1]
                entered = act(gate).reshape(*ids.shape, -1) * (x @ delta.T)
            wrote = entered @ W.T
            if (number, kind) in norms:
                norm = norms[number, kind]
                scale = own_scale(family.norm, norm, *(t.double() for t in normed[number, kind]))
                zero = frozen_norm(family.norm, norm, torch.zeros_like(wrote), scale)
                wrote = frozen_norm(family.norm, norm, wrote, scale) - zero
            wrote = wrote * family.write_scale(config)
            leaf = maps[kind][0].rpartition(".")[2]
            found[f"{number}_{kind}[{name}@{leaf}]"] = in_logits(inner, ids, wrote)
    return found


def check(result, model, ids, maps, atol=1e-9):
    expected = by_hand(model, ids, maps)
    assert {label for label in result.labels if "@" in label} == set(expected)
    for label, numbers in expected.items():
        assert numbers.abs().max() > 1e-3
        torch.testing.assert_close(result[label], numbers, rtol=0, atol=atol, msg=label)
    check_sums(result, attribute(model, ids, unit="component"))


def check_sums(result, components, tolerance=1e-6):
    """The rows of each write sum to it; norms behind sublayers compute in float32."""
    for label in components.labels:
        split = [name for name in result.labels if name == label or name.startswith(f"{label}[")]
        total = sum(result[name] for name in split)
        torch.testing.assert_close(
            total, components[label], rtol=tolerance, atol=tolerance, msg=label
        )
    whole = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(whole, result.logit, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", CASES)
def test_deltas_of_values_and_of_up_maps_are_what_they_write_with_pattern_and_gate_frozen(
    spec, seed
):
    targets, maps = CASES[spec]
    model = adapted(spec, lora(*targets, fan_in_fan_out=spec == "gpt2"), seed)
    ids = example_ids(spec, seed=seed)
    check(attribute(model, ids), model, ids, maps, 1e-6 if spec in FLOAT32_INSIDE else 1e-9)


BOTH = ATTENTION | GATED


def test_rank_stabilised_adapters_are_exact():
    model, ids = adapted("llama-bias", lora(*LLAMA, use_rslora=True)), example_ids("llama-bias")
    check(attribute(model, ids), model, ids, BOTH)


@pytest.mark.parametrize("seed", [0, 1])
def test_magnitudes_of_dora_multiply_deltas_and_the_last_map(seed):
    model = adapted("llama-bias", lora(*LLAMA, use_dora=True), seed)
    ids = example_ids("llama-bias", seed=seed)
    check(attribute(model, ids), model, ids, BOTH)


def test_adapters_with_singular_values_are_exact():
    """AdaLoRA keeps its matrices as parameters."""
    config = peft.AdaLoraConfig(
        target_modules=["v_proj", "up_proj"], init_r=4, target_r=2, total_step=9
    )
    model, ids = adapted("mistral", config), example_ids("mistral")
    check(attribute(model, ids), model, ids, BOTH)


def test_two_adapters_at_once_have_a_row_each_where_they_are():
    model = adapted("llama-bias", lora("v_proj", "o_proj", r=2))
    model.add_adapter("other", lora("v_proj", "k_proj", r=5, lora_alpha=2))
    filled(model, 3)
    model.base_model.set_adapter(["default", "other"])
    ids = example_ids("llama-bias")
    result = attribute(model, ids)
    check(result, model, ids, ATTENTION)
    assert result.labels[1:5] == [
        "0_attn_out[base]",
        "0_attn_out[default]",
        "0_attn_out[default@v_proj]",
        "0_attn_out[other@v_proj]",
    ]


def test_biases_of_adapters_are_part_of_their_deltas():
    model = adapted("llama-bias", lora("v_proj", "up_proj", lora_bias=True))
    ids = example_ids("llama-bias")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0 if "lora_A" in name else 1)
    biases = attribute(model, ids)  # the deltas are their biases: the same values at each token
    inner = model.base_model.model
    for number, layer in enumerate(layers_of(inner)):
        v, o = layer.self_attn.v_proj, layer.self_attn.o_proj
        bias = v.lora_B["default"].bias * v.scaling["default"]
        z = bias.view(inner.config.num_key_value_heads, -1).repeat_interleave(
            inner.config.num_attention_heads // inner.config.num_key_value_heads, 0
        )
        wrote = (z.flatten() @ o.weight.T).expand(*ids.shape, -1)
        expected = in_logits(inner, ids, wrote)
        found = biases[f"{number}_attn_out[default@v_proj]"]
        # Attention weights are computed in float32, and sum to one as exactly.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert biases[f"{number}_mlp_out[default@up_proj]"].abs().max() > 1e-4


@pytest.mark.parametrize("spec", ["llama-bias", "gemma2"])
def test_deltas_in_chunks_and_at_the_last_position_are_those_of_the_whole_prompt(spec):
    model, ids = adapted(spec, lora(*LLAMA)), example_ids(spec, batch=2, length=12)
    whole = attribute(model, ids)
    for options in ({"chunk_size": 5}, {"chunk_size": 5, "pos": -1}, {"pos": -1}):
        found = attribute(model, ids, **options)
        assert found.labels == whole.labels
        expected = whole.attribution
        if options.get("pos"):
            expected = expected[..., -1]
        torch.testing.assert_close(found.attribution, expected, rtol=0, atol=1e-6)


def test_deltas_of_padded_prompts_and_of_many_answers_are_those_alone():
    model = adapted("llama-bias", lora("v_proj", "up_proj"), dtype=torch.float32)
    ids = example_ids("llama-bias", batch=2, length=12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = attribute(model, ids, attention_mask=mask, pos=-1)
    alone = attribute(model, ids[:1, 4:], pos=-1)
    torch.testing.assert_close(padded.attribution[:, 0], alone.attribution[:, 0], rtol=0, atol=1e-4)
    answers = ids.roll(-1, 1)
    many = dla_hooks.direct_logit_attribution(model, ids, answers, unit="adapter", pos=None)
    for row, pos in ((0, 3), (1, 11), (1, 0)):
        answer = int(answers[row, pos])
        one = dla_hooks.direct_logit_attribution(model, ids, answer, unit="adapter", pos=None)
        torch.testing.assert_close(
            many.attribution[:, row, pos], one.attribution[:, row, pos], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    ("model_type", "inside"),
    [
        ("deepseek_v3", "attn_out[default@kv_b_proj]"),  # keys beside values, of other widths
        ("qwen3_next", "attn_out[default@v_proj]"),  # attention's output is gated
        ("glm4", "mlp_out[default@gate_up_proj]"),  # two post-norms
        ("cohere", "attn_out[default@v_proj]"),
        ("moshi", "attn_out[default@v_proj.linear]"),
    ],
)
def test_deltas_of_other_layouts_add_up(model_type, inside):
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    model = filled(peft.get_peft_model(build_any(model_type), config))
    ids = example_ids_any(model_type)
    result, whole = attribute(model, ids), attribute(model, ids, unit="component")
    rows = [label for label in result.labels if label.endswith(inside)]
    assert rows
    assert all(result[label].abs().max() > 1e-6 for label in rows)
    check_sums(result, whole, 1e-5)


def test_adapters_without_a_direct_part_are_named():
    model, ids = adapted("llama-bias", lora(*LLAMA)), example_ids("llama-bias")
    named = "self_attn.q_proj, self_attn.k_proj, mlp.gate_proj"
    assert f"(no direct part is read of {named})" in repr(attribute(model, ids))
    model, ids = adapted("gpt2", lora("c_fc", "c_proj", fan_in_fan_out=True)), example_ids("gpt2")
    result = attribute(model, ids)
    assert result.words.sentence.endswith("(no direct part is read of mlp.c_fc)")
    assert not [label for label in result.labels if "@" in label]
    model, ids = adapted("llama", lora("o_proj", "down_proj")), example_ids("llama")
    assert "no direct part" not in repr(attribute(model, ids))


def test_an_adapter_that_is_called_as_the_row_of_another_is_refused():
    base = build("llama-bias")
    model = peft.get_peft_model(base, lora("o_proj"), adapter_name="one@v_proj")
    model.add_adapter("one", lora("v_proj"))
    model.base_model.set_adapter(["one", "one@v_proj"])
    with pytest.raises(UnsupportedModelError, match="'one@v_proj'.*another name"):
        prepare(filled(model), 5, unit="adapter")


def test_scaling_of_an_adapter_scales_its_delta_in_the_last_layer():
    model, ids = adapted("llama-bias", lora("up_proj")), example_ids("llama-bias")
    before = attribute(model, ids)
    last = layers_of(model.base_model.model)[-1].mlp.up_proj
    plan = prepare(model, 5, 7, unit="adapter")
    last.scaling["default"] *= 3
    after = plan(ids, pos=None)
    ratio = after["1_mlp_out[default@up_proj]"] / after["1_mlp_out[base]"]
    was = before["1_mlp_out[default@up_proj]"] / before["1_mlp_out[base]"]
    torch.testing.assert_close(ratio, 3 * was, rtol=1e-6, atol=1e-6)


def test_hooks_of_the_caller_are_no_part_of_a_delta():
    model, ids = adapted("llama-bias", lora(*LLAMA)), example_ids("llama-bias")
    layer = layers_of(model.base_model.model)[1]  # the last: nothing reads what changes
    layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: out * 1.5)
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] + 0.25,))
    layer.mlp.up_proj.register_forward_hook(lambda module, args, out: out + 0.5)
    layer.mlp.act_fn.register_forward_hook(lambda module, args, out: out * 2)
    layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    result = attribute(model, ids)
    assert "1_attn_out[default@v_proj]" in result.labels
    check_sums(result, attribute(model, ids, unit="component"))


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("attention_weights", "v_proj"),
        *((what, where) for what in ("low_rank", "channels") for where in ("v_proj", "up_proj")),
    ],
)
def test_broken_deltas_are_seen(monkeypatch, what, where):
    from dla_hooks.projection import attention_reads
    from dla_hooks.units import adapter_inner

    model, ids = adapted("llama-bias", lora(where)), example_ids("llama-bias")
    if what == "attention_weights":
        plain = attention_reads.attention_weights
        monkeypatch.setattr(attention_reads, what, lambda *args: 1.1 * plain(*args))
    elif what == "low_rank":
        made = adapter_inner.low_rank
        monkeypatch.setattr(
            adapter_inner, what, lambda *args: tuple(1.1 * one for one in made(*args))
        )
    else:
        asked = adapter_inner.inner_adapters

        def reversed_channels(stream):
            found = copy.deepcopy(asked(stream))
            for inner in (one for every in found.values() for one in every):
                inner.channels.copy_(inner.channels.flip(0))
            return found

        monkeypatch.setattr(adapter_inner, "inner_adapters", reversed_channels)
    with pytest.raises(DecompositionError, match=r"miss by"):
        attribute(model, ids)


def test_nothing_as_wide_as_the_stream_outlives_its_hook():
    """Of each position that may be read an adapter's few channels are kept, and no more."""
    from dla_hooks.units import adapter_inner_rows

    model, ids = adapted("llama-bias", lora("v_proj", r=2)), example_ids("llama-bias", 1, 12)
    kept, see = [], adapter_inner_rows.InnerRecorder._see_z

    def look(self, view, call):
        kept.extend(few.shape for seen in self._seen for fews in seen.few for few in fews)
        see(self, view, call)
        assert all(not any(seen.few) for seen in self._seen)

    adapter_inner_rows.InnerRecorder._see_z = look
    try:
        attribute(model, ids)
    finally:
        adapter_inner_rows.InnerRecorder._see_z = see
    assert kept
    assert all(shape == (1, 12, 2) for shape in kept)
