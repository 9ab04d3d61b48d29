"""Break each mechanism, and see it noticed: a wrong declaration or readout never gives a number."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from alter import alter_output
from oracle import head_effects
from units import UNIT_NAMES
from zoo import build, example_ids

import dla_hooks.calibration.scales
import dla_hooks.modules.linear
import dla_hooks.modules.norms
import dla_hooks.targets.tokens
from dla_hooks import (
    DecompositionError,
    HookError,
    UnsupportedModelError,
    direct_logit_attribution,
    verify,
)
from dla_hooks.residual import registry

pytestmark = pytest.mark.lowest


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
    "post-norm of attention": ("gemma2", {"attn_out": {"post_norm": None}}, "0_attn_out"),
    "post-norm of the MLP": ("olmo2", {"mlp_out": {"post_norm": None}}, "0_mlp_out"),
    "residual inside the sublayer": ("bloom", {"mlp_out": {"module": "mlp"}}, "carry its input on"),
    "part of the MLP": ("phi3", {"mlp_out": {"module": "input_layernorm"}}, "its input"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", WRONG_DECLARATIONS)
def test_a_wrong_declaration_is_refused_with_the_place(declare, what, dtype):
    model_type, writes, said = WRONG_DECLARATIONS[what]
    model = build(model_type, dtype=dtype)
    declare(model_type, writes)
    for unit in UNIT_NAMES:
        with pytest.raises(UnsupportedModelError, match=rf"\.0 (is no sum|does not).*{said}"):
            direct_logit_attribution(model, example_ids(model_type), 5, 7, unit=unit)


def test_omitted_write_is_refused(declare):
    original = registry.adapter_for("llama")
    with pytest.MonkeyPatch.context() as patch:
        fewer = dataclasses.replace(original, writes=original.writes[:1])
        patch.setitem(registry._registered, "llama", fewer)
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0 is no sum.*its input"):
            direct_logit_attribution(build("llama"), example_ids("llama"), 5)


# What a model is asked: each answer made wrong, in one place


def wrong_fact(monkeypatch, **changes):
    measure = dla_hooks.calibration.scales._measure

    def wrong(stream):
        facts = measure(stream)
        return dataclasses.replace(facts, **{name: f(facts) for name, f in changes.items()})

    monkeypatch.setattr(dla_hooks.calibration.scales, "_measure", wrong)


def first_block(**changes):
    def change(facts):
        block = facts.blocks[0]
        first = dataclasses.replace(block, **{name: f(block) for name, f in changes.items()})
        return (first, *facts.blocks[1:])

    return change


WRONG_FACTS = {
    "write scale": (
        "granite",
        {"blocks": first_block(responses=lambda block: (None, *block.responses[1:]))},
        "0_attn_out enters the stream .* times",
    ),
    "skip gain": (
        "llama",
        {"blocks": first_block(gain=lambda block: torch.tensor(1.1).double())},
        r"model\.layers\.0: output = gain \* input",
    ),
    "constant": (
        "llama",
        {"blocks": first_block(constant=lambda block: torch.ones(40).double())},
        r"model\.layers\.0: output",
    ),
    "logit divisor": ("granite", {"logit_scale": lambda facts: 1.0}, "model's logits are"),
    "logit scale": ("cohere", {"logit_scale": lambda facts: 1.0}, "model's logits are"),
    "softcap": ("gemma2", {"softcap": lambda facts: None}, "model's logits are"),
    "another softcap": ("gemma2", {"softcap": lambda facts: 31.0}, "model's logits are"),
}


@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("what", WRONG_FACTS)
def test_wrong_logits_are_refused_in_every_unit(monkeypatch, what, unit):
    spec, changes, said = WRONG_FACTS[what]
    model = build(spec)
    if what == "constant":
        width = model.config.hidden_size
        changes = {"blocks": first_block(constant=lambda block: torch.ones(width).double())}
    wrong_fact(monkeypatch, **changes)
    with pytest.raises(DecompositionError, match=said):
        direct_logit_attribution(model, example_ids(spec), 5, 7, unit=unit)


def test_a_module_that_is_not_as_wide_as_the_stream_is_refused(declare):
    declare("llama", {"mlp_out": {"module": "mlp.gate_proj"}})
    with pytest.raises(UnsupportedModelError, match=r"mlp\.gate_proj puts out \d+ channels"):
        direct_logit_attribution(build("llama"), example_ids("llama"), 5)


def broken_probe(monkeypatch, **changes):
    probe = dla_hooks.modules.norms.probe

    def wrong(*args, **kwargs):
        norm = probe(*args, **kwargs)
        return dataclasses.replace(norm, **{name: f(norm) for name, f in changes.items()})

    monkeypatch.setattr(dla_hooks.modules.norms, "probe", wrong)


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
def test_wrong_norm_kind_is_refused(monkeypatch, spec, change):
    model = build(spec)
    broken_probe(monkeypatch, **change)
    with pytest.raises(DecompositionError):
        direct_logit_attribution(model, example_ids(spec), 5)


@pytest.mark.parametrize("spec", ["phi", "gptj"])
def test_omitted_unembedding_bias_is_refused(monkeypatch, spec):
    rows = dla_hooks.modules.linear.rows
    monkeypatch.setattr(
        dla_hooks.targets.tokens,
        "rows",
        lambda *args: (rows(*args)[0], torch.zeros_like(rows(*args)[1])),
    )
    with pytest.raises(DecompositionError, match="own logits"):
        direct_logit_attribution(build(spec), example_ids(spec), 5)


@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "gpt_oss", "olmo2-bias-tied", "llama-bias"])
def test_wrong_head_projection_is_refused(monkeypatch, spec):
    import dla_hooks.units.head_layer as head

    pull_back = dla_hooks.modules.linear.pull_back
    monkeypatch.setattr(head, "pull_back", lambda module, d: pull_back(module, d).roll(1, -1))
    with pytest.raises(DecompositionError, match="the heads in"):
        direct_logit_attribution(build(spec), example_ids(spec), 5, unit="head")


@pytest.mark.parametrize("spec", ["gpt2", "gpt_oss", "olmo2-bias-tied", "llama-bias"])
def test_omitted_output_bias_is_refused(monkeypatch, spec):
    import dla_hooks.units.head_layer as head

    monkeypatch.setattr(head, "bias_of", lambda module: None)
    with pytest.raises(DecompositionError, match="the heads in"):
        direct_logit_attribution(build(spec), example_ids(spec), 5, unit="head")


@pytest.mark.parametrize("field", ["num_key_value_heads", "vocab_size"])
def test_wrong_declared_head_count_gives_the_heads_of_the_oracle(declare, field):
    """Heads are counted in a run, since no sum could notice a wrong count."""
    model = build("llama")
    ids = example_ids("llama")
    truth = head_effects(model, ids, 5)
    heads = dataclasses.replace(registry.adapter_for("llama").writes[0].heads, count=field)
    declare("llama", {"attn_out": {"heads": heads}})
    right = direct_logit_attribution(model, ids, 5, unit="head", pos=None).attribution
    torch.testing.assert_close(right[:-1].reshape(truth.shape), truth, rtol=0, atol=1e-6)


def test_hook_that_adds_a_vector_is_a_part():
    """Steering keeps the stream a sum of one term more."""
    model = build("llama")
    ids = example_ids("llama")
    before = direct_logit_attribution(model, ids, 5)
    steering = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: out * 1.5 + steering)
    for unit in UNIT_NAMES:
        steered = direct_logit_attribution(model, ids, 5, unit=unit)
        with torch.no_grad():
            truth = model(ids).logits[:, -1, 5]
        torch.testing.assert_close(steered.logit, truth, rtol=0, atol=1e-6)
    assert "1_hook" in direct_logit_attribution(model, ids, 5).labels
    handle.remove()
    assert torch.equal(direct_logit_attribution(model, ids, 5).attribution, before.attribution)


def test_block_that_is_no_sum_is_refused_with_the_place():
    model = build("llama")
    ids = example_ids("llama")
    direct_logit_attribution(model, ids, 5)
    block = model.model.layers[1]
    alter_output(block, lambda out: out + 0.1 * out**2)
    with pytest.raises((UnsupportedModelError, DecompositionError), match=r"model\.layers\.1"):
        direct_logit_attribution(model, ids, 5)
    del block.forward
    direct_logit_attribution(model, ids, 5)


def test_addition_that_depends_on_the_tokens_is_located():
    """Zeros in, zeros out. Only the check on real tokens can see it."""
    model = build("llama")
    ids = example_ids("llama")
    attention = model.model.layers[1].self_attn
    seen = []
    alter_output(attention, lambda out: seen.append(out) or out)
    block = model.model.layers[1]
    # Half of what attention wrote is added once more, behind every module's back, if it is not 0.
    alter_output(block, lambda out: out + 0.5 * seen[-1] * (out.shape[0] < 5))
    with pytest.raises(
        DecompositionError, match=r"First break: model\.layers\.1.*1_attn_out enters"
    ):
        direct_logit_attribution(model, ids, 5)
    report = verify(model, show=False)
    assert [line.ok for line in report.lines[:2]] == [True, False]


def test_weights_changed_through_data_are_remeasured():
    """Gains are asked once; writing through ``.data`` leaves no trace, but the check fails."""
    model = build("llama")
    ids = example_ids("llama")
    model.model.layers[0].register_buffer("gain", torch.tensor(2.0).double())
    alter_output(model.model.layers[0], lambda out: out * model.model.layers[0].gain)
    direct_logit_attribution(model, ids, 5)
    model.model.layers[0].gain.data.fill_(3.0)
    again = direct_logit_attribution(model, ids, 5)
    with torch.no_grad():
        torch.testing.assert_close(again.logit, model(ids).logits[:, -1, 5], rtol=0, atol=1e-6)


def test_hook_that_ablates_a_head_is_followed():
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


def test_one_module_for_two_writes_is_refused(declare):
    declare("mixtral", {"mlp_out": {"module": "self_attn"}})
    with pytest.raises(UnsupportedModelError, match="said to make two writes of one block"):
        direct_logit_attribution(build("mixtral"), example_ids("mixtral"), 5)


def test_a_module_that_runs_twice_is_refused():
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda m, a, out: out + 0 * m.mlp(out))
    with pytest.raises(HookError, match=r"model\.layers\.0\.mlp ran 2 times"):
        direct_logit_attribution(model, example_ids("llama"), 5)


def test_a_module_that_two_blocks_share_is_a_part_of_each():
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    ids = example_ids("llama")
    result = direct_logit_attribution(model, ids, 5)
    with torch.no_grad():
        truth = model(ids).logits[:, -1, 5]
    torch.testing.assert_close(result.attribution.sum(0) + result.bias, truth, rtol=0, atol=1e-6)
    first, second = (result.attribution[result.labels.index(f"{i}_mlp_out")] for i in (0, 1))
    assert not torch.allclose(first, second)


def test_a_module_that_is_bypassed_is_refused():
    model = build("bloom")
    mlp = model.transformer.h[0].mlp
    mlp.forward = lambda x, residual: residual + x
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0 is no sum"):
        direct_logit_attribution(model, example_ids("bloom"), 5)


def test_tap_that_never_fires_is_named():
    """What ran when the model was asked, and does not run on the prompt."""
    model = build("llama")
    attention = model.model.layers[0].self_attn
    project = attention.o_proj.forward
    call = attention.o_proj.__class__.__call__

    class SometimesFused(torch.nn.Linear):
        def __call__(self, z):
            asked = z.shape[1] < 3  # a few tokens go through the module, long prompts past it
            return call(self, z) if asked else project(z)

    attention.o_proj.__class__ = SometimesFused
    with pytest.raises(HookError, match=r"layers\.0\.self_attn\.o_proj never ran"):
        direct_logit_attribution(model, example_ids("llama"), 5, unit="head")


def test_check_false_returns_unchecked_numbers(monkeypatch):
    wrong_fact(monkeypatch, blocks=first_block(gain=lambda block: torch.tensor(1.1).double()))
    result = direct_logit_attribution(build("llama"), example_ids("llama"), 5, check=False)
    assert result.gap > 1e-6
    assert result.logit_gap != result.logit_gap  # nothing was compared: NaN
