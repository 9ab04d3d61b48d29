"""Break each mechanism, and see it noticed: a wrong declaration or readout never gives a number."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import head_effects
from zoo import build, example_ids

import dla_hooks.linear
import dla_hooks.norms
import dla_hooks.readout
from dla_hooks import (
    DecompositionError,
    HookError,
    UnsupportedModelError,
    direct_logit_attribution,
    registry,
    verify,
)


@pytest.fixture
def declare(monkeypatch):
    """Replace fields of a model type's declaration, and of its writes, for one test."""

    def change(model_type: str, writes: dict | None = None, **fields) -> None:
        original = registry.adapter_for(model_type)
        changed = [
            dataclasses.replace(w, **(writes or {}).get(w.label, {})) for w in original.writes
        ]
        broken = dataclasses.replace(original, writes=tuple(changed), **fields)
        monkeypatch.setitem(registry._registered, model_type, broken)

    return change


WRONG_DECLARATIONS = {
    "write scale": ("granite", {"attn_out": {"scale": None}}, {}, "0_attn_out enters .* times"),
    "logit divisor": ("granite", {}, {"logit_divisor": None}, "model's logits are"),
    "logit scale": ("cohere", {}, {"logit_scale": None}, "model's logits are"),
    "softcap": ("gemma2", {}, {"softcap": None}, "model's logits are"),
    "post-norm of attention": ("gemma2", {"attn_out": {"post_norm": None}}, {}, "layers.0"),
    "post-norm of the MLP": ("olmo2", {"mlp_out": {"post_norm": None}}, {}, "layers.0"),
    "residual inside the sublayer": (
        "bloom",
        {"mlp_out": {"module": "mlp"}},
        {},
        r"transformer\.h\.0",
    ),
    "mixture of experts": ("mixtral", {"mlp_out": {"module": "self_attn"}}, {}, "layers.0"),
}


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@pytest.mark.parametrize("what", WRONG_DECLARATIONS)
def test_a_wrong_declaration_is_refused_by_every_unit(declare, what, unit):
    model_type, writes, fields, said = WRONG_DECLARATIONS[what]
    model = build(model_type)
    declare(model_type, writes, **fields)
    with pytest.raises(DecompositionError, match=said):
        direct_logit_attribution(model, example_ids(model_type), 5, 7, unit=unit)


def test_a_write_left_out_is_noticed(declare):
    model = build("llama")
    attention = registry.adapter_for("llama").writes[:1]
    original = registry.adapter_for("llama")
    registry_entry = dataclasses.replace(original, writes=attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._registered, "llama", registry_entry)
        with pytest.raises(
            DecompositionError, match=r"model\.layers\.0: output = input \+ attn_out"
        ):
            direct_logit_attribution(model, example_ids("llama"), 5)


def test_a_module_that_is_not_as_wide_as_the_stream_is_refused(declare):
    declare("llama", {"mlp_out": {"module": "mlp.gate_proj"}})
    with pytest.raises(UnsupportedModelError, match=r"mlp\.gate_proj puts out \d+ channels"):
        direct_logit_attribution(build("llama"), example_ids("llama"), 5)


def broken_probe(monkeypatch, **changes):
    probe = dla_hooks.norms.probe

    def wrong(*args, **kwargs):
        norm = probe(*args, **kwargs)
        return dataclasses.replace(norm, **{name: f(norm) for name, f in changes.items()})

    monkeypatch.setattr(dla_hooks.norms, "probe", wrong)


@pytest.mark.parametrize("spec", ["gpt2", "llama", "gemma", "starcoder2"])
@pytest.mark.parametrize(
    "change",
    [
        {"centred": lambda norm: not norm.centred},
        {"gamma": lambda norm: norm.gamma + 1},
        {"gamma": lambda norm: norm.gamma.roll(1)},
        {"beta": lambda norm: norm.beta + 0.5},
    ],
    ids=["centring", "1+w", "channels", "beta"],
)
def test_a_norm_taken_for_another_is_noticed(monkeypatch, spec, change):
    model = build(spec)
    broken_probe(monkeypatch, **change)
    with pytest.raises(DecompositionError):
        direct_logit_attribution(model, example_ids(spec), 5)


@pytest.mark.parametrize("spec", ["phi", "gptj"])
def test_an_unembedding_bias_left_out_is_noticed(monkeypatch, spec):
    rows = dla_hooks.linear.rows
    monkeypatch.setattr(
        dla_hooks.readout, "rows", lambda *args: (rows(*args)[0], torch.zeros_like(rows(*args)[1]))
    )
    with pytest.raises(DecompositionError, match="own logits"):
        direct_logit_attribution(build(spec), example_ids(spec), 5)


@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "gpt_oss", "olmo2-bias-tied", "llama-bias"])
def test_heads_folded_through_a_wrong_projection_are_noticed(monkeypatch, spec):
    import dla_hooks.units.head as head

    pull_back = dla_hooks.linear.pull_back
    monkeypatch.setattr(head, "pull_back", lambda module, d: pull_back(module, d).roll(1, -1))
    with pytest.raises(DecompositionError, match="the heads in"):
        direct_logit_attribution(build(spec), example_ids(spec), 5, unit="head")


@pytest.mark.parametrize("spec", ["gpt2", "gpt_oss", "olmo2-bias-tied", "llama-bias"])
def test_an_output_bias_left_out_is_noticed(monkeypatch, spec):
    import dla_hooks.units.head as head

    value_at = dla_hooks.linear.value_at
    monkeypatch.setattr(head, "value_at", lambda module, z: 0 * value_at(module, z))
    with pytest.raises(DecompositionError, match="the heads in"):
        direct_logit_attribution(build(spec), example_ids(spec), 5, unit="head")


def test_a_wrong_head_count_gives_other_heads_than_the_oracle(declare):
    """No sum can notice it, so it is read from the config field that the model itself uses."""
    model = build("llama")
    ids = example_ids("llama")
    truth = head_effects(model, ids, 5)
    right = direct_logit_attribution(model, ids, 5, unit="head", pos=None).attribution
    torch.testing.assert_close(right[:-1].reshape(truth.shape), truth, rtol=0, atol=1e-6)
    heads = dataclasses.replace(
        registry.adapter_for("llama").writes[0].heads, count="num_key_value_heads"
    )
    declare("llama", {"attn_out": {"heads": heads}})
    wrong = direct_logit_attribution(model, ids, 5, unit="head", pos=None).attribution
    assert len(wrong) < len(right)


def test_a_head_count_that_does_not_divide_the_width_is_refused(declare):
    model = build("llama")
    heads = dataclasses.replace(registry.adapter_for("llama").writes[0].heads, count="vocab_size")
    declare("llama", {"attn_out": {"heads": heads}})
    with pytest.raises(UnsupportedModelError, match="cannot share evenly"):
        direct_logit_attribution(model, example_ids("llama"), 5)


def test_a_hook_that_writes_to_the_stream_is_noticed_and_located():
    model = build("llama")
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: out + 0.1)
    with pytest.raises(DecompositionError, match=r"First break: model\.layers\.1"):
        direct_logit_attribution(model, example_ids("llama"), 5)
    report = verify(model, show=False)
    assert not report.ok
    assert [line.ok for line in report.lines[:3]] == [True, False, True][: len(report.lines[:3])]
    handle.remove()
    direct_logit_attribution(model, example_ids("llama"), 5)


def test_a_hook_that_ablates_a_head_is_followed():
    """Changing what a module reads keeps the stream a sum: the numbers are the changed model's."""
    model = build("gpt2")
    ids = example_ids("gpt2")
    d_head = model.config.n_embd // model.config.n_head

    def ablate(module, args):
        z = args[0].clone()
        z[..., :d_head] = 0
        return (z,)

    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(ablate)
    result = direct_logit_attribution(model, ids, 5, unit="head")
    handle.remove()
    assert result.attribution[0].abs().max() == 0
    assert result.attribution[1].abs().max() > 0


def test_a_module_that_runs_twice_is_refused():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    forward = type(mlp).forward
    mlp.forward = lambda x: forward(mlp, x) + 0 * mlp.down_proj(mlp.up_proj(x))
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(HookError, match=r"model\.layers\.0\.mlp ran 2 times"):
        direct_logit_attribution(model, example_ids("llama"), 5)


def test_a_module_that_is_bypassed_is_refused():
    model = build("bloom")
    model.transformer.h[0].mlp.forward = lambda x, residual: residual + x
    with pytest.raises(HookError, match=r"mlp\.dense_4h_to_h never ran"):
        direct_logit_attribution(model, example_ids("bloom"), 5)


def test_unchecked_calls_return_what_the_check_would_refuse():
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda m, a, out: out + 0.1)
    result = direct_logit_attribution(model, example_ids("llama"), 5, check=False)
    assert result.gap > 1e-6
    assert result.logit_gap != result.logit_gap  # nothing was compared: NaN
