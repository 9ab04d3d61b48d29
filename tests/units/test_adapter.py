"""Adapters: what PEFT's adapters wrote themselves, against weights times captured activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapted import (
    ANSWER,
    INCORRECT,
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
from doors import seq2seq
from mapping_zoo import build_any, example_ids_any
from oracle_families import family_of, frozen_norm, module_at
from zoo import build, example_ids

import dla_hooks
from dla_hooks import Adapters, UnsupportedModelError, direct_logit_attribution, prepare

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")
NEOX = ("query_key_value", "dense", "dense_4h_to_h", "dense_h_to_4h")

# The model, what is adapted, and the path of each write's last map in a layer.
CASES = {
    "gpt2": (GPT2, {"attn_out": "attn.c_proj", "mlp_out": "mlp.c_proj"}),
    "llama-bias": (LLAMA, {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}),
    "qwen2": (LLAMA, {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}),
    "gemma2": (LLAMA, {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}),
    "gemma3_text": (LLAMA, {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}),
    "olmo2": (LLAMA, {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}),
    "granite": (LLAMA, {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}),
    "gpt_neox-parallel": (NEOX, {"attn_out": "attention.dense", "mlp_out": "mlp.dense_4h_to_h"}),
    "mixtral": (("q_proj", "o_proj"), {"attn_out": "self_attn.o_proj"}),
    "opt": (("out_proj", "fc1", "fc2"), {"attn_out": "self_attn.out_proj", "mlp_out": "fc2"}),
}


def ia3(*targets, feedforward):
    return peft.IA3Config(target_modules=list(targets), feedforward_modules=feedforward)


@torch.no_grad()
def by_hand(model, ids, maps):
    """What each adapter wrote, by its row: its own matrices times what entered, and the norm."""
    inner = model.base_model.model
    family, config = family_of(inner), inner.config
    found, modules, norms = {}, {}, {}
    for number, layer in enumerate(layers_of(inner)):
        for kind, path in maps.items():
            modules[number, kind] = module_at(layer, path)
            if family.post_norms is not None:
                nth = ("attn_out", "mlp_out").index(kind)
                norms[number, kind] = module_at(layer, family.post_norms[nth])
    with inputs_of(modules) as seen, inputs_of(norms) as normed:
        model(ids, use_cache=False)
    for key, module in modules.items():
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            wrote = seen[key][0] @ delta_of(module, name).T
            wrote = wrote.reshape(*ids.shape, -1)
            if key in norms:
                scale = own_scale(family.norm, norms[key], *(t.double() for t in normed[key]))
                zero = frozen_norm(family.norm, norms[key], torch.zeros_like(wrote), scale)
                wrote = frozen_norm(family.norm, norms[key], wrote, scale) - zero
            wrote = wrote * family.write_scale(config)
            found[f"{key[0]}_{key[1]}[{name}]"] = in_logits(inner, ids, wrote)
    return found


def check(result, model, ids, maps, atol):
    expected = by_hand(model, ids, maps)
    ours = {label for label in result.labels if label.endswith("]") and "@" not in label}
    assert {label for label in ours if "[base]" not in label} == set(expected)
    assert all(numbers.abs().max() > 1e-3 for numbers in expected.values())
    for label, numbers in expected.items():
        torch.testing.assert_close(result[label], numbers, rtol=0, atol=atol, msg=label)
    components = attribute(model, ids, unit="component")
    for label in components.labels:
        split = [name for name in result.labels if name == label or name.startswith(f"{label}[")]
        total = sum(result[name] for name in split)
        # Norms behind sublayers compute in float32.
        torch.testing.assert_close(total, components[label], rtol=1e-6, atol=1e-6, msg=label)
    whole = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(whole, result.logit, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", CASES)
def test_adapter_rows_are_its_matrices_times_what_entered(spec, seed):
    targets, maps = CASES[spec]
    model = adapted(spec, lora(*targets, fan_in_fan_out=spec == "gpt2"), seed)
    ids = example_ids(spec, seed=seed)
    # Gemma's norms add one to their weights in float32.
    check(attribute(model, ids), model, ids, maps, 1e-6 if "gemma" in spec else 1e-9)


def test_rank_stabilised_and_biased_adapters_are_exact():
    ids, maps = example_ids("llama"), CASES["qwen2"][1]
    model = adapted("llama", lora(*LLAMA, use_rslora=True))
    check(attribute(model, ids), model, ids, maps, 1e-9)
    biased = adapted("llama", lora("o_proj", lora_bias=True))
    plain = attribute(biased, ids)
    with torch.no_grad():
        for name, parameter in biased.named_parameters():
            if "lora_B" in name and name.endswith("bias") and "layers.2" in name:
                parameter += 1.0
    shifted = attribute(biased, ids)
    assert (shifted["2_attn_out[default]"] - plain["2_attn_out[default]"]).abs().max() > 1e-3


@pytest.mark.parametrize("spec", ["llama-bias", "gemma2"])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_adapters_with_singular_values_are_exact(spec, seed):
    """AdaLoRA keeps its matrices as parameters, and divides by the rank that is left."""
    config = peft.AdaLoraConfig(
        target_modules=["o_proj", "down_proj", "v_proj"], init_r=4, target_r=2, total_step=9
    )
    model, ids = adapted(spec, config, seed), example_ids(spec, seed=seed)
    maps = {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}
    check(attribute(model, ids), model, ids, maps, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_adapters_at_once_have_a_row_each(seed):
    model = adapted("llama", lora("o_proj", "down_proj", r=2), seed)
    model.add_adapter("other", lora("o_proj", "up_proj", r=5, lora_alpha=2))
    filled(model, seed + 3)
    model.base_model.set_adapter(["default", "other"])
    ids = example_ids("llama", seed=seed)
    result = attribute(model, ids)
    check(result, model, ids, CASES["qwen2"][1], 1e-9)
    assert result.labels[1:4] == ["0_attn_out[base]", "0_attn_out[default]", "0_attn_out[other]"]
    assert "0_mlp_out[other]" not in result.labels
    model.set_adapter("other")
    assert [label for label in attribute(model, ids).labels if "default" in label] == []


def test_scaling_of_an_adapter_scales_its_rows_in_the_last_layer():
    model, ids = adapted("llama", lora("down_proj")), example_ids("llama")
    before = attribute(model, ids)
    last = layers_of(model.base_model.model)[-1].mlp.down_proj
    last.scaling["default"] *= 3
    plan = prepare(model, ANSWER, INCORRECT, unit="adapter")
    after = plan(ids, pos=None)
    ratio = after["2_mlp_out[default]"] / after["2_mlp_out[base]"]
    was = before["2_mlp_out[default]"] / before["2_mlp_out[base]"]
    torch.testing.assert_close(ratio, 3 * was, rtol=1e-6, atol=1e-6)
    last.scaling["default"] *= 2  # a plan reads it anew
    again = plan(ids, pos=None)
    ratio = again["2_mlp_out[default]"] / again["2_mlp_out[base]"]
    torch.testing.assert_close(ratio, 6 * was, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("others", [[], ["other"]])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_magnitudes_of_dora_multiply_both_parts(seed, others):
    model = adapted("llama-bias", lora(*LLAMA, use_dora=True), seed)
    for name in others:
        model.add_adapter(name, lora("o_proj", "down_proj", r=2))
        filled(model, seed + 5)
        model.base_model.set_adapter(["other", "default"])
    ids = example_ids("llama-bias", seed=seed)
    result = attribute(model, ids)
    inner = model.base_model.model
    modules = {n: layer.self_attn.o_proj for n, layer in enumerate(layers_of(inner))}
    with inputs_of(modules) as seen:
        model(ids, use_cache=False)
    for number, module in modules.items():
        x, out = seen[number]
        W, b = module.base_layer.weight, module.base_layer.bias
        delta = {
            name: module.lora_B[name].weight @ module.lora_A[name].weight * module.scaling[name]
            for name in ["default", *others]
        }
        norm = (W + delta["default"]).norm(dim=1)
        m = module.lora_magnitude_vector["default"].weight / norm
        parts = {"base": x @ W.T * m + b}
        parts |= {name: x @ delta[name].T * m for name in delta}
        torch.testing.assert_close(sum(parts.values()), out)
        for name, wrote in parts.items():
            expected = in_logits(inner, ids, wrote)
            found = result[f"{number}_attn_out[{name}]"]
            if name == "base":  # the part of z that is made of the values' adapter is its own row
                found = found + result[f"{number}_attn_out[default@v_proj]"]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_adapters_of_experts_parameters_are_exact(spec, seed):
    config = peft.LoraConfig(
        r=2,
        target_modules=["o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model, ids = adapted(spec, config, seed), example_ids(spec, seed=seed)
    inner = model.base_model.model
    result = attribute(model, ids)
    experts = layers_of(inner)[-1].mlp.experts  # the last layer: nothing comes behind it
    assert experts.parameter_name in ("down_proj", "gate_up_proj")
    while experts.parameter_name != "down_proj":
        experts = experts.base_layer
    delta, seen = experts.get_delta_weight("default"), []
    own = experts.base_layer
    while hasattr(own, "base_layer"):
        own = own.base_layer
    handle = own.register_forward_hook(
        lambda module, args, out: seen.append((args, module.gate_up_proj.detach().clone()))
    )
    model(ids, use_cache=False)
    handle.remove()
    (x, chosen, weights), gate_up = seen[0]
    rows = []
    for token in range(len(x)):
        wrote = torch.zeros_like(x[0])
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            if spec == "mixtral":
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                wrote += weight * (delta[expert] @ (torch.nn.functional.silu(gate) * up))
            else:
                both = x[token] @ gate_up[expert] + own.gate_up_proj_bias[expert]
                gate, up = both[::2].clamp(max=own.limit), both[1::2].clamp(-own.limit, own.limit)
                hidden = (up + 1) * gate * torch.sigmoid(gate * own.alpha)
                wrote += weight * (hidden @ delta[expert])
        rows.append(wrote)
    expected = in_logits(inner, ids, torch.stack(rows).reshape(*ids.shape, -1))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(result["1_mlp_out[default]"], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_gate_parameters_of_experts_have_no_part():
    config = peft.LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )
    result = attribute(adapted("mixtral", config), example_ids("mixtral"))
    assert "0_mlp_out" in result.labels
    assert "0_attn_out[default]" in result.labels


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_adapted_embeddings_are_split(seed):
    model = adapted("gpt2", lora("wte", "wpe"), seed)
    ids = example_ids("gpt2", seed=seed)
    inner, result = model.base_model.model, attribute(model, ids)
    for module, label, read in (
        (inner.transformer.wte, "embed", ids),
        (inner.transformer.wpe, "pos_embed", torch.arange(ids.shape[1]).expand(ids.shape)),
    ):
        A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        wrote = A.T[read] @ B.T * module.scaling["default"]
        base = module.base_layer.weight[read]
        for name, vectors in (("default", wrote), ("base", base)):
            expected = in_logits_of_lm_head(inner, ids, vectors)
            torch.testing.assert_close(result[f"{label}[{name}]"], expected, rtol=0, atol=1e-9)


def in_logits_of_lm_head(inner, ids, vectors):
    norm, x = inner.transformer.ln_f, []
    handle = norm.register_forward_hook(lambda _, args, out: x.append(args[0]))
    inner(ids, use_cache=False)
    handle.remove()
    scale = (x[0].var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    W = inner.lm_head.weight
    centred = vectors - vectors.mean(-1, keepdim=True)
    return (centred / scale * norm.weight) @ (W[ANSWER] - W[INCORRECT])


def test_scaled_embeddings_of_gemma_are_split():
    model, ids = adapted("gemma2", lora("embed_tokens")), example_ids("gemma2")
    result, whole = attribute(model, ids), attribute(model, ids, unit="component")
    both = result["embed[base]"] + result["embed[default]"]
    torch.testing.assert_close(both, whole["embed"], rtol=0, atol=1e-6)
    with torch.no_grad(), model.disable_adapter():
        base_only = attribute(model, ids, unit="component")  # another scale, the same direction
    ratio = result["embed[base]"] / base_only["embed"]
    assert (ratio > 0).all()


def test_copied_modules_write_for_the_adapter_alone():
    ids = example_ids("llama")
    for saved in ("down_proj", "mlp"):
        model = adapted("llama", lora("o_proj", modules_to_save=[saved]))
        result, whole = attribute(model, ids), attribute(model, ids, unit="component")
        assert "1_mlp_out[base]" not in result.labels
        torch.testing.assert_close(result["1_mlp_out[default]"], whole["1_mlp_out"])
    model = adapted("llama", lora("o_proj", modules_to_save=["up_proj", "embed_tokens", "norm"]))
    labels = attribute(model, ids).labels
    assert labels[:2] == ["embed[default]", "0_attn_out[base]"]
    assert "1_mlp_out" in labels


def test_disabled_and_merged_adapters_are_no_part():
    model, ids = adapted("llama", lora("o_proj", "down_proj")), example_ids("llama")
    plan = prepare(model, ANSWER, INCORRECT, unit="adapter")
    with model.disable_adapter():
        off = plan(ids)
        assert off.labels == attribute(model, ids, unit="component").labels
    model.merge_adapter()
    merged = plan(ids)
    torch.testing.assert_close(
        merged.attribution, attribute(model, ids, unit="component", pos=-1).attribution
    )
    model.unmerge_adapter()
    assert "2_mlp_out[default]" in plan(ids).labels
    assert "2_mlp_out[default]" in attribute(model, ids).labels


def test_models_without_adapters_are_refused():
    for model in (build("llama"), peft.get_peft_model(build("llama"), lora("o_proj")).unload()):
        with pytest.raises(UnsupportedModelError, match=r"no PEFT adapters.*components"):
            prepare(model, ANSWER, unit=Adapters())


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            lambda: peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
            "ia3",
        ),
        (lambda: peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[]), "ia3"),
        (lambda: peft.LoHaConfig(r=2, target_modules=["o_proj"], init_weights=False), "loha"),
        (lambda: peft.OFTConfig(r=0, oft_block_size=2, target_modules=["o_proj"]), "oft"),
        (lambda: lora("embed_tokens", use_dora=True), "DoRA of embeddings"),
        (
            lambda: lora("o_proj", trainable_token_indices=[5]),
            "trainable_tokens|more than a factor",
        ),
    ],
)
def test_adapters_without_a_part_of_their_own_are_refused_by_name(config, what):
    model = adapted("llama", config())
    with pytest.raises(UnsupportedModelError, match=rf"(?:layers|embed).*{what}"):
        prepare(model, ANSWER, unit="adapter")


def test_adapters_without_a_direct_part_are_within_the_base():
    for spec, config in (
        ("llama", lora("q_proj", "k_proj", "gate_proj")),
        ("llama", ia3("v_proj", feedforward=[])),
        ("opt", lora("fc1", "q_proj")),
    ):
        model, ids = adapted(spec, config), example_ids(spec)
        found, whole = attribute(model, ids), attribute(model, ids, unit="component")
        assert found.labels == whole.labels
        assert torch.equal(found.attribution, whole.attribution)


def test_queries_that_are_small_beside_what_is_written_are_no_term_of_it_in_16_bits():
    model = adapted("qwen2", lora("q_proj"), dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in layers_of(model.base_model.model):
            for parameter in layer.self_attn.q_proj.parameters():
                parameter.mul_(0.02)
    result = attribute(model, example_ids("qwen2"))
    assert not [label for label in result.labels if "default" in label]


def test_adapters_of_large_activations_in_float16_are_split():
    model, ids = adapted("qwen2", lora("down_proj"), dtype=torch.float16), example_ids("qwen2")
    with torch.no_grad():
        for layer in layers_of(model.base_model.model):
            for parameter in layer.mlp.down_proj.parameters():
                parameter.mul_(8)
            layer.mlp.up_proj.weight.mul_(64)
    with inputs_of({0: layers_of(model.base_model.model)[0].mlp}) as seen:
        model(ids, use_cache=False)
    assert seen[0][1].abs().max() > 300  # its square is none of float16
    assert "0_mlp_out[default]" in attribute(model, ids).labels


def test_an_adapter_that_is_called_as_a_row_is_refused():
    model = filled(peft.get_peft_model(build("llama"), lora("o_proj"), adapter_name="base"))
    with pytest.raises(UnsupportedModelError, match="'base'.*another name"):
        prepare(model, ANSWER, unit="adapter")


def test_shared_experts_with_a_gate_are_refused_and_without_one_are_split():
    weighed = build_any("qwen2_moe")
    config = peft.LoraConfig(r=2, target_modules=r".*shared_expert\.down_proj")
    with pytest.raises(UnsupportedModelError, match=r"shared_expert.down_proj.*weighed"):
        prepare(filled(peft.get_peft_model(weighed, config)), ANSWER, unit="adapter")
    plain = build_any("deepseek_v3")
    config = peft.LoraConfig(r=2, target_modules=r".*shared_experts\.down_proj")
    model = filled(peft.get_peft_model(plain, config))
    ids = example_ids_any("deepseek_v3")
    result, whole = attribute(model, ids), attribute(model, ids, unit="component")
    labels = [label for label in result.labels if label.endswith("[default]")]
    assert labels
    for label in labels:
        name = label.removesuffix("[default]")
        both = result[label] + result[f"{name}[base]"]
        torch.testing.assert_close(both, whole[name], rtol=1e-6, atol=1e-6)
        assert result[label].abs().max() > 1e-4


@pytest.mark.parametrize("spec", ["llama", "gemma2"])
def test_hooks_between_the_adapter_and_the_stream_have_their_own_row(spec):
    model, ids = adapted(spec, lora("o_proj", "down_proj")), example_ids(spec)
    layer = layers_of(model.base_model.model)[1]
    layer.mlp.register_forward_hook(lambda module, args, out: out * 1.5)
    layer.self_attn.o_proj.register_forward_hook(lambda module, args, out: out + 0.25)
    result, whole = attribute(model, ids), attribute(model, ids, unit="component")
    for label in ("1_attn_out", "1_mlp_out"):
        parts = [result[f"{label}[{name}]"] for name in ("base", "default", "hook")]
        torch.testing.assert_close(sum(parts), whole[label], rtol=1e-6, atol=1e-6)
    wrote = result["1_mlp_out[base]"] + result["1_mlp_out[default]"]
    if spec == "llama":
        torch.testing.assert_close(result["1_mlp_out[hook]"], 0.5 * wrote, rtol=1e-6, atol=1e-8)


def test_padding_batches_chunks_and_float32_are_exact():
    model = adapted("llama-bias", lora(*LLAMA), dtype=torch.float32)
    ids = example_ids("llama-bias", batch=2, length=12)
    one = attribute(model, ids)
    pieces = attribute(model, ids, chunk_size=5)
    torch.testing.assert_close(one.attribution, pieces.attribution, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = attribute(model, ids, attention_mask=mask, pos=-1)
    alone = attribute(model, ids[:1, 4:], pos=-1)
    torch.testing.assert_close(
        padded.attribution[:, 0], alone.attribution[:, 0], rtol=1e-4, atol=1e-4
    )
    targets = direct_logit_attribution(model, ids[:, :-1], ids[:, 1:], unit="adapter", pos=None)
    components = direct_logit_attribution(model, ids[:, :-1], ids[:, 1:], pos=None)
    total = sum(targets[f"1_mlp_out[{name}]"] for name in ("base", "default", "default@up_proj"))
    torch.testing.assert_close(total, components["1_mlp_out"], rtol=1e-4, atol=1e-4)


def test_the_model_is_as_it_was_found():
    config = peft.LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    model, ids = adapted("mixtral", config), example_ids("mixtral")
    weights = {name: (p, p.clone()) for name, p in model.named_parameters()}
    modules = [(type(m), m.training, len(m._forward_hooks)) for m in model.modules()]
    rng = torch.get_rng_state()
    attribute(model, ids)
    assert modules == [(type(m), m.training, len(m._forward_hooks)) for m in model.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert parameter is weights[name][0]
        assert torch.equal(parameter, weights[name][1])


def test_a_broken_split_is_seen(monkeypatch):
    from dla_hooks.projection import adapted as module

    model, ids = adapted("llama", lora("o_proj", use_dora=True)), example_ids("llama")
    terms = module.terms
    monkeypatch.setattr(
        module, "terms", lambda m: [replace(t, factor=1.1 * t.factor) for t in terms(m)]
    )
    with pytest.raises(dla_hooks.DecompositionError, match="base and its adapters"):
        attribute(model, ids)


@pytest.mark.parametrize(
    "model_type",
    [
        *("bitnet", "codegen", "ernie4_5_moe", "exaone4", "gemma4_text", "glm4", "longcat_flash"),
        *("granitemoeshared", "lfm2", "olmoe", "phi3", "qwen3_next", "stablelm", "xglm"),
    ],
)
def test_other_families_with_all_their_linear_maps_adapted_add_up(model_type):
    base = build_any(model_type)
    model = filled(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear")))
    ids = example_ids_any(model_type)
    result, whole = attribute(model, ids), attribute(model, ids, unit="component")
    assert any(label.endswith("_out[default]") for label in result.labels)
    for label in whole.labels:
        split = [name for name in result.labels if name == label or name.startswith(f"{label}[")]
        total = sum(result[name] for name in split)
        torch.testing.assert_close(total, whole[label], rtol=1e-5, atol=1e-5, msg=label)
    off = {name for name in result.labels if name.endswith("[default]")}
    assert all(result[name].abs().max() > 1e-6 for name in off)


@pytest.mark.parametrize("unit", ["head", "neuron", "source"])
def test_other_units_of_the_adapted_maps_in_the_same_run(unit):
    peft = pytest.importorskip("peft")
    from zoo import build

    config = peft.LoraConfig(r=3, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama", dtype=torch.float32), config).eval()
    both = dla_hooks.direct_logit_attribution(model, [[3, 4, 5]], 7, unit=("adapter", unit))
    alone = dla_hooks.direct_logit_attribution(model, [[3, 4, 5]], 7, unit=unit)
    torch.testing.assert_close(both[unit].attribution, alone.attribution, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("other", ["head", "neuron", "source"])
@pytest.mark.parametrize("spec", ["llama", "gemma2"])
def test_directions_that_are_made_while_the_model_runs_leave_adapters_alone(spec, other):
    """Of many answers; the modules that make them are called then, and adapters are inside."""
    model, ids = adapted(spec, lora("o_proj", "down_proj")), example_ids(spec, 4, 12)
    answers = torch.arange(48).view(4, 12)
    found = direct_logit_attribution(model, ids, answers, unit=("adapter", other), pos=None)
    for unit in ("adapter", other):
        alone = direct_logit_attribution(model, ids, answers, unit=unit, pos=None)
        torch.testing.assert_close(found[unit].attribution, alone.attribution, rtol=0, atol=1e-9)


def test_adapters_of_what_cross_attention_reads_are_refused_with_that_reason():
    model = peft.get_peft_model(seq2seq.build("mbart"), lora("v_proj", "out_proj")).double().eval()
    with pytest.raises(UnsupportedModelError, match="an encoder's positions"):
        direct_logit_attribution(model, seq2seq.inputs(), 5, unit="adapter")
