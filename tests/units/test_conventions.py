"""``center_unembed`` and ``fold_value_biases`` against formulas of their own.

Against the reference itself: test_reference.py.
"""

from __future__ import annotations

import pytest
import torch
from oracle import head_effects
from units import UNIT_NAMES
from zoo import ZOO, Spec, build, example_ids

from dla_hooks import UnsupportedModelError, direct_logit_attribution


@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("spec", ["gpt2", "phi", "cohere", "granite"])
def test_centring_subtracts_vocabulary_mean(spec, unit):
    model = build(spec)
    ids = example_ids(spec, batch=1)
    everything = torch.arange(model.config.vocab_size)
    raw = direct_logit_attribution(model, ids, everything, unit=unit)
    centred = direct_logit_attribution(model, ids, everything, unit=unit, center_unembed=True)
    for name in ("attribution", "bias", "logit"):
        one, other = getattr(raw, name), getattr(centred, name)
        torch.testing.assert_close(other, one - one.mean(-1, keepdim=True))


@pytest.mark.parametrize("spec", ["gpt2", "phi", "gemma2"])
def test_centring_changes_no_difference_and_no_capped_model(spec):
    model = build(spec)
    ids = example_ids(spec)
    incorrect = None if spec == "gemma2" else 7
    raw = direct_logit_attribution(model, ids, 5, incorrect)
    centred = direct_logit_attribution(model, ids, 5, incorrect, center_unembed=True)
    torch.testing.assert_close(raw.attribution, centred.attribution)


SINKS = [spec for spec in ZOO if spec.model_type == "gpt_oss"]
CLIPPED = [spec for spec in ZOO if spec.config.get("clip_qkv")]
FOLDABLE = [spec for spec in ZOO if spec not in SINKS + CLIPPED]


@pytest.mark.parametrize("spec", FOLDABLE, ids=repr)
def test_folding_subtracts_one_constant_per_head(spec: Spec):
    """A constant vector of z, times u, over the scales: what is left of it at one token."""
    model = build(spec)
    ids = example_ids(spec)
    options = {"unit": "head", "pos": None, "fold_value_biases": True}
    folded = direct_logit_attribution(model, ids, 5, 7, **options)
    raw = direct_logit_attribution(model, ids, 5, 7, unit="head", pos=None)
    torch.testing.assert_close(folded.attribution.sum(0), raw.attribution.sum(0))
    for unit in ("component", "layer"):
        one = direct_logit_attribution(model, ids, 5, 7, unit=unit, fold_value_biases=True)
        other = direct_logit_attribution(model, ids, 5, 7, unit=unit)
        assert torch.equal(one.attribution, other.attribution)

    moved = (raw.attribution - folded.attribution)[:-1].flatten(1)  # [head, entry]
    if moved.abs().max() < 1e-9:
        return  # no value biases and no bias before them: see the test below
    # All heads of a layer lose constants through the same scales: the ratios do not move.
    n_heads = model.config.num_attention_heads
    first = moved[:n_heads]
    reference = first[first.abs().mean(-1).argmax()]
    ratios = first / reference
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-5, atol=1e-6)


def value_constant(spec: str, model, layer: int) -> torch.Tensor:
    """b_V + W_V beta of every query head, for layouts with a value projection of its own."""
    if spec.startswith("gpt_neo"):
        block = model.transformer.h[layer]
        norm, value = block.ln_1, block.attn.attention.v_proj
    elif spec.startswith("opt"):
        block = model.model.decoder.layers[layer]
        norm, value = block.self_attn_layer_norm, block.self_attn.v_proj
    elif spec == "olmo2-bias-tied":
        norm, value = None, model.model.layers[layer].self_attn.v_proj
    else:
        block = model.model.layers[layer]
        norm, value = block.input_layernorm, block.self_attn.v_proj
    bias = getattr(norm, "bias", None)
    beta = torch.zeros(model.config.hidden_size).double() if bias is None else bias
    constant = value(beta)
    heads = model.config.num_attention_heads
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    return constant.reshape(kv_heads, -1).repeat_interleave(heads // kv_heads, 0)


@pytest.mark.parametrize(
    "spec", ["gpt_neo", "opt", "phi", "starcoder2", "llama-bias", "qwen2", "granite-bias-tied",
             "stablelm-parallel", "llama"],
)  # fmt: skip
def test_constant_is_value_bias_plus_norm_bias(spec):
    model = build(spec)
    ids = example_ids(spec)
    with torch.no_grad():
        constants = [value_constant(spec, model, i) for i in range(model.config.num_hidden_layers)]
    if spec == "llama":
        assert all(constant.abs().max() == 0 for constant in constants)
    raw = direct_logit_attribution(model, ids, 5, unit="head", pos=None)
    folded = direct_logit_attribution(model, ids, 5, unit="head", pos=None, fold_value_biases=True)
    # Adding the constant to every z once more has the effect of what folding takes away.
    from oracle_families import layer_at

    paths = {"gpt_neo": "attn.attention.out_proj", "opt": "self_attn.out_proj",
             "phi": "self_attn.dense"}  # fmt: skip
    path = paths.get(spec, "self_attn.o_proj")
    handles = []
    for layer, constant in enumerate(constants):
        proj = layer_at(model, layer).get_submodule(path)
        handles.append(
            proj.register_forward_pre_hook(lambda m, a, c=constant: (a[0] - c.flatten(),))
        )
        effects = head_effects(model, ids, 5)[layer]
        handles.pop().remove()
        n_heads = len(effects)
        ours = folded.attribution[:-1][layer * n_heads : (layer + 1) * n_heads]
        size = float(raw.attribution.abs().max())
        if model.config.num_hidden_layers - 1 == layer:  # no later block reads the change
            scale = raw_scale_ratio(model, ids, proj, constant)
            torch.testing.assert_close(ours, effects * scale, rtol=0, atol=1e-6 * size)


def raw_scale_ratio(model, ids, proj, constant) -> torch.Tensor:
    """How the change of the stream by that constant changes the final norm's scale."""
    from oracle import last_stream
    from oracle_families import family_of, final_norm, norm_scale

    kind, norm = family_of(model).norm, final_norm(model)
    before = norm_scale(kind, norm, last_stream(model, ids))
    handle = proj.register_forward_pre_hook(lambda m, a: (a[0] - constant.flatten(),))
    after = norm_scale(kind, norm, last_stream(model, ids))
    handle.remove()
    return (after / before)[..., 0] if after.ndim == 3 else after / before


@pytest.mark.parametrize("spec", SINKS, ids=repr)
def test_folding_with_sinks_is_refused(spec):
    with pytest.raises(UnsupportedModelError, match="attention sinks"):
        direct_logit_attribution(
            build(spec), example_ids(spec), 5, unit="head", fold_value_biases=True
        )


@pytest.mark.parametrize("spec", [spec for spec in CLIPPED if spec.config.get("attention_bias")])
def test_folding_with_clipped_values_is_refused(spec):
    with pytest.raises(UnsupportedModelError, match="not an affine map"):
        direct_logit_attribution(
            build(spec), example_ids(spec), 5, unit="head", fold_value_biases=True
        )
