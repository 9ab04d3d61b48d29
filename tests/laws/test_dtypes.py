"""Rounding is judged where it happens: more than one dtype in a model, and 16 bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import ZOO, build, example_ids

from dla_hooks import DecompositionError, DLAError, direct_logit_attribution, verify
from dla_hooks.units.parts import PartsRecorder

UNITS = ("component", "layer", "head")
HALVES = [torch.bfloat16, torch.float16]


def holds(model, ids, token=5, **options):
    """Every unit's rows make up the model's own logit, to a hundredth of the spread."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, -1].double()
    spread = float((logits.amax(-1) - logits.amin(-1)).mean())
    for unit, result in direct_logit_attribution(model, ids, token, unit=UNITS, **options).items():
        rows = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        gap = (rows + result.bias).double() - logits[:, token]
        assert float(gap.abs().max()) < 0.02 * spread, unit


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["llama", "gpt2-untied", "gpt_neox-parallel"])
def test_float32_head_on_a_body_in_16_bits_is_attributed(name, half):
    model, ids = build(name, dtype=torch.float32).to(half), example_ids(name)
    head = model.get_output_embeddings().float()
    head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    holds(model, ids)
    assert verify(model, show=False).ok


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_model_that_runs_under_autocast_alone_is_measured_there(name):
    model, ids = build(name, dtype=torch.float32).to(torch.bfloat16), example_ids(name)
    for path, parameter in model.named_parameters():
        if parameter.ndim == 1 or "embed" in path or "lm_head" in path:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        holds(model, ids)
        holds(model, ids, chunk_size=3)


class Rounding(nn.Linear):
    """Computes in its weight's dtype and hands back its input's, as layers of four bits do."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt-untied"])
def test_matrices_in_16_bits_under_a_float32_stream_are_attributed(name):
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    for path, old in list(model.named_modules()):
        if type(old) is nn.Linear and "head" not in path:
            new = Rounding(old.in_features, old.out_features, bias=old.bias is not None).eval()
            new.weight = nn.Parameter(old.weight.detach().bfloat16())
            if old.bias is not None:
                new.bias = nn.Parameter(old.bias.detach())
            model.set_submodule(path, new)
    holds(model, ids)
    assert direct_logit_attribution(model, ids, 5).gap < 1e-4  # the stream itself is exact


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_forward_that_autocasts_inside_is_attributed(name):
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    inner = model.forward

    def forward(input_ids=None, logits_to_keep=0, **rest):
        with torch.autocast("cpu", torch.bfloat16):
            output = inner(input_ids=input_ids, logits_to_keep=logits_to_keep, **rest)
        output.logits = output.logits.float()
        return output

    model.forward = forward
    holds(model, ids)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_default_dtype_of_16_bits_changes_nothing_of_a_float32_model(name, half):
    ids = example_ids(name)
    expected = direct_logit_attribution(build(name, dtype=torch.float32), ids, 5, unit="head")
    model = build(name, dtype=torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(half)
    try:
        found = direct_logit_attribution(model, ids, 5, unit="head")
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", HALVES)
def test_small_differences_of_large_logits_pass_in_16_bits(half):
    model, ids = build("gpt2-untied", dtype=torch.float32), example_ids("gpt2-untied")
    with torch.no_grad():
        common = model.transformer.ln_f.bias
        model.lm_head.weight += common / float(common @ common) * 127
    model = model.to(half)
    for wrong in (7, 20, 33):
        result = direct_logit_attribution(model, ids, 5, wrong)
        assert result.logit_gap < 2.0


@pytest.mark.parametrize("name", ["llama", "gpt2-untied"])
def test_head_of_zeros_says_that_there_is_nothing_to_attribute(name):
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(DLAError, match="nothing to attribute; "):
        direct_logit_attribution(model, ids, 5)


def spread_of(logits):
    return float((logits.amax(-1) - logits.amin(-1)).mean())


def put_the_last_write_off(by, monkeypatch):
    """Make the last write miss its value by so much, away from what the stream has."""
    finish = PartsRecorder.finish

    def off(self, reading, told_LN=None):
        parts = finish(self, reading, told_LN)
        raw_CN = parts.raw_CN.clone()
        raw_CN[-1] += by * torch.sign(parts.sum_N - reading.total_N)
        return dataclasses.replace(parts, raw_CN=raw_CN)

    monkeypatch.setattr(PartsRecorder, "finish", off)


@pytest.mark.parametrize("name", ["llama", "gpt2-untied", "gemma2", "gpt_neox-parallel"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_write_off_by_a_hundredth_of_the_spread_is_seen_in_bfloat16(name, seed, monkeypatch):
    model, ids = build(name, seed=seed, dtype=torch.bfloat16), example_ids(name)
    direct_logit_attribution(model, ids, 5)
    put_the_last_write_off(0.01 * spread_of(own_logits(model, ids)), monkeypatch)
    with pytest.raises(DecompositionError):
        direct_logit_attribution(model, ids, 5)


def own_logits(model, ids):
    """The model's logits at the last position, before any cap."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        logits = model(ids).logits[:, -1].double()
    return logits if cap is None else cap * torch.atanh(logits / cap)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("depth", [4, 24])
@pytest.mark.parametrize("name", ["llama", "gpt2-untied", "gemma2"])
def test_clean_model_in_16_bits_is_not_refused_at_any_depth(name, depth, half):
    spec = next(spec for spec in ZOO if spec.name == name)
    field = "n_layer" if name.startswith("gpt2") else "num_hidden_layers"
    config = {key: value for key, value in spec.config.items() if key != "layer_types"}
    spec = dataclasses.replace(spec, config={**config, field: depth})
    for seed in range(2):
        model, ids = build(spec, seed=seed, dtype=half), example_ids(name)
        for wrong in (None, 7):
            direct_logit_attribution(model, ids, 5, wrong, pos=None, unit=UNITS)


def deep(n_layers, dtype, seed=0, massive=False):
    """A Llama of many layers; massive: a channel of the embeddings is a thousand times as large."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=n_layers, vocab_size=300)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
        if massive:
            model.model.embed_tokens.weight[:, 3] *= 1000
            model.model.norm.weight[3] = 0.01
    return model.to(dtype), torch.randint(300, (3, 20))


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n_layers", [12, 24])
def test_deep_clean_models_pass_at_every_position_in_16_bits(n_layers, dtype, massive):
    for seed in (0, 1):
        model, ids = deep(n_layers, dtype, seed, massive)
        direct_logit_attribution(model, ids, 5, pos=None)
        direct_logit_attribution(model, ids, 5, 7, pos=None, unit="head")


@pytest.mark.parametrize("seed", [0, 1])
def test_write_off_by_a_hundredth_of_the_spread_is_seen_in_a_deep_model(seed, monkeypatch):
    model, ids = deep(12, torch.bfloat16, seed)
    put_the_last_write_off(0.01 * spread_of(own_logits(model, ids)), monkeypatch)
    with pytest.raises(DecompositionError):
        direct_logit_attribution(model, ids, 5)
