"""Masks on the vocabulary: no softcap, and nothing that a broken sum can hide behind."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo import build, example_ids

import dla_hooks
from dla_hooks import DecompositionError, direct_logit_attribution

IDS = torch.tensor([[4, 9, 17, 33, 8], [7, 21, 5, 40, 12]])
MASKS = (-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf)


def _mask_by_bias(model, value: float) -> None:
    """Hold the last ten tokens down by the unembedding's bias, as padding rows of it are."""
    bias = torch.zeros(model.lm_head.weight.shape[0], dtype=model.lm_head.weight.dtype)
    bias[-10:] = value
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)


def _mask_in_forward(model, value: float) -> None:
    """Hold them down in the model's own code, as Chameleon does with its image tokens."""
    inner = model.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits[..., -10:] = value
        return out

    model.forward = functools.wraps(inner)(forward)


def _break_last_position(model, by: float) -> None:
    block = model.model.layers[1]
    inner = block.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        x = (out[0] if isinstance(out, tuple) else out).clone()
        if x.shape[1] == IDS.shape[1]:
            noise = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0))
            x[:, -1] += by * x[:, -1].norm() * (noise / noise.norm()).to(x)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    block.forward = forward


@pytest.mark.parametrize("mask", [_mask_by_bias, _mask_in_forward])
@pytest.mark.parametrize("value", MASKS[:3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_finite_mask_is_no_softcap(family: str, value: float, mask):
    model = build(family, dtype=torch.float32)
    mask(model, value)
    result = direct_logit_attribution(model, IDS, 3, 7)
    own = model(IDS).logits[:, -1]
    assert result.softcap is None
    assert torch.allclose(
        result.attribution.sum(0) + result.bias, own[:, 3] - own[:, 7], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("mask", [_mask_by_bias, _mask_in_forward])
@pytest.mark.parametrize("value", MASKS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_broken_sum_behind_a_mask_is_refused(family: str, value: float, mask):
    model = build(family, dtype=torch.float32)
    if mask is _mask_by_bias and value == -torch.inf:
        pytest.skip("weights that are not finite are refused by themselves")
    mask(model, value)
    _break_last_position(model, 0.05)
    with pytest.raises(DecompositionError):
        direct_logit_attribution(model, IDS, 3, 7)


@pytest.mark.parametrize("n_rows", [2, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_sum_beside_logits_that_are_no_numbers_is_refused(value: float, n_rows: int):
    model, ids = build("llama", dtype=torch.float32), IDS.repeat(n_rows // 2, 1)
    bias = torch.full((model.lm_head.weight.shape[0],), 1000.0)  # no measure of the spread
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    _mask_in_forward(model, value)
    direct_logit_attribution(model, ids, 3, 7)
    _break_last_position(model, 0.01)
    with pytest.raises(DecompositionError):
        direct_logit_attribution(model, ids, 3, 7)


@pytest.mark.parametrize("n_allowed", [2, 30])
def test_broken_sum_is_refused_where_few_tokens_are_allowed(n_allowed: int):
    model = build("llama", dtype=torch.float32)
    bias = torch.full((model.lm_head.weight.shape[0],), -1e9)
    bias[3 : 3 + n_allowed] = 0
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    own = model(IDS).logits[:, -1, 3]
    result = direct_logit_attribution(model, IDS, 3)
    assert torch.allclose(result.attribution.sum(0) + result.bias, own, atol=1e-4, rtol=1e-4)
    _break_last_position(model, 0.05)
    with pytest.raises(DecompositionError):
        direct_logit_attribution(model, IDS, 3)


def test_softcap_is_measured_beside_a_mask():
    model = build("gemma2", dtype=torch.float32)
    cap = model.config.final_logit_softcapping
    _mask_in_forward(model, -1e9)
    result = direct_logit_attribution(model, IDS, 3)
    assert result.softcap == pytest.approx(cap)
    own = model(IDS).logits[:, -1, 3]
    total = result.attribution.sum(0) + result.bias
    assert torch.allclose(cap * torch.tanh(total / cap), own, atol=1e-4, rtol=1e-4)


def test_logits_that_never_move_are_refused_with_the_reason():
    model = build("llama", dtype=torch.float32)
    model.lm_head.weight.data.zero_()
    with pytest.raises(NotImplementedError, match="nothing to attribute"):
        direct_logit_attribution(model, IDS, 3)


def _mask_in_a_hook(model, value: float) -> None:
    def mask(module, args, out):
        out = out.clone()
        out[..., -10:] = value
        return out

    model.lm_head.register_forward_hook(mask)


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mask", [_mask_in_forward, _mask_in_a_hook])
@pytest.mark.parametrize("name", ["llama", "gpt2-untied", "phi", "granite"])
def test_centred_logit_beside_tokens_masked_with_infinity_is_less_the_mean_of_the_others(
    name, mask, seed
):
    model, ids = build(name, seed=seed), example_ids(name)
    mask(model, -torch.inf)
    logits = model(ids, use_cache=False).logits.double()
    due = logits[..., 5] - logits[..., :-10].mean(-1)
    found = direct_logit_attribution(model, ids, 5, pos=None, center_unembed=True)
    torch.testing.assert_close(found.logit, due, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.total() + found.bias, found.logit, rtol=0, atol=1e-8)


def test_token_that_a_hook_masks_is_refused_by_its_name():
    model, ids = build("llama"), example_ids("llama")
    _mask_in_a_hook(model, -torch.inf)
    with pytest.raises(dla_hooks.NonFiniteError, match=r"asked about infinite \(logit_hook\)"):
        direct_logit_attribution(model, ids, model.config.vocab_size - 1)
