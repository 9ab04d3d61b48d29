"""Under a caller's autocast the model rounds to 16 bits; what is made of its writes does not."""

from __future__ import annotations

import contextlib

import pytest
import torch
from alter import alter_output
from zoo import build, example_ids, supports

from dla_hooks import (
    AttentionScore,
    DecompositionError,
    Direction,
    direct_logit_attribution,
    upstream,
)

NAMES = ["gpt2", "gemma2", "phi", "llama"]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_heads_under_autocast_keep_model_precision():
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    seen = {}
    layers, norm = model.model.layers, model.model.norm
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, at=at: seen.__setitem__(at, args[0][:, -1].double())
        )
        for at, layer in enumerate(layers)
    ]
    handles.append(
        norm.register_forward_pre_hook(lambda _, args: seen.__setitem__("x", args[0][:, -1]))
    )
    with autocast():
        found = direct_logit_attribution(model, ids, 5, 7, unit="head", check=False).attribution
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        rows = model.lm_head.weight.double()
        d = norm.weight.double() * (rows[5] - rows[7])
        scale = (seen["x"].double().square().mean(-1) + norm.variance_epsilon).sqrt()
        expected = []
        for at, layer in enumerate(layers):
            n_heads = model.config.num_attention_heads
            products = seen[at] * (layer.self_attn.o_proj.weight.double().T @ d)
            expected.append(products.unflatten(-1, (n_heads, -1)).sum(-1).T / scale)
    expected = torch.cat(expected)
    torch.testing.assert_close(found[:-1].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_bias_under_autocast_is_unchanged(name):
    model = build(name, dtype=torch.float32)
    ids = example_ids(name)

    def bias():
        return direct_logit_attribution(model, ids, ids.roll(-1), pos=None, check=False).bias

    expected = bias()
    assert bool(expected.all())
    with autocast():
        assert torch.equal(bias(), expected)


def test_constants_under_autocast_are_compared_in_full_precision():
    """Two steering vectors are divided by the same scale: how they compare is up to weights."""
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers[:2]:
        vector = torch.randn(model.config.hidden_size, generator=generator)
        alter_output(layer, lambda out, vector=vector: out + vector)

    def compared():
        result = direct_logit_attribution(model, ids, 5, check=False)
        rows = [result.labels.index(f"{layer}_constant") for layer in (0, 1)]
        return result.attribution[rows[0]] / result.attribution[rows[1]]

    expected = compared()
    with autocast():
        torch.testing.assert_close(compared(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "layer"},
        {"unit": "head", "fold_value_biases": True},
        {"chunk_size": 3},
        {"attention_mask": "left"},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.parametrize("name", NAMES)
def test_first_call_under_autocast_leaves_later_calls_exact(name, options):
    """What a model is asked is kept for calls outside of autocast."""
    options = dict(options)
    ids = example_ids(name)
    if "attention_mask" in options:
        options["attention_mask"] = torch.ones_like(ids)
        options["attention_mask"][0, :2] = 0
    # This attention rounds chunks otherwise than the whole, which the eager one here does not.
    attn = "sdpa" if supports(name, "sdpa") else "eager"
    fresh, model = (build(name, dtype=torch.float32, attn=attn) for _ in range(2))
    expected = direct_logit_attribution(fresh, ids, 5, **options).attribution
    with autocast():
        coarse = direct_logit_attribution(model, ids, 5, check=False, **options).attribution
    torch.testing.assert_close(coarse, expected, rtol=0, atol=0.1 * float(expected.abs().max()))
    found = direct_logit_attribution(model, ids, 5, **options).attribution
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_check_under_autocast_fails_with_reason():
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    with autocast(), pytest.raises(DecompositionError, match="Autocast is on.* check=False"):
        direct_logit_attribution(model, ids, 5)
    assert direct_logit_attribution(model, ids, 5).gap < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama-bias", "gemma2", "qwen3", "olmo2", "mixtral"])
def test_readings_ahead_of_the_end_under_autocast_stay_close(name):
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    vector = torch.ones(model.config.hidden_size)
    targets = [AttentionScore(1, 1, -1, 4, side) for side in ("query", "key")]
    for target in (Direction(vector, "1_mid"), *targets):
        plain = direct_logit_attribution(model, ids, target)
        with autocast():
            found = direct_logit_attribution(model, ids, target, check=False)
            close = 3e-2 * float(plain.attribution.abs().sum(0).max())
            torch.testing.assert_close(found.logit, plain.logit, rtol=0, atol=close)
            with contextlib.suppress(DecompositionError):
                direct_logit_attribution(model, ids, target)
    plain = upstream(model, ids, 3, 5, part="L1H1<2")
    with autocast():
        found = upstream(model, ids, 3, 5, part="L1H1<2", check=False)
    torch.testing.assert_close(found.logit, plain.logit, rtol=5e-2, atol=5e-3)


def test_check_of_a_reading_under_autocast_fails_with_reason():
    model, ids = build("gemma2", dtype=torch.float32), example_ids("gemma2")
    with autocast(), pytest.raises(DecompositionError, match="Autocast is on"):
        direct_logit_attribution(model, ids, AttentionScore(1, 1, -1, 4))
