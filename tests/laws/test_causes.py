"""Refusals and warnings that name their cause; and the numbers where there is none."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle_families import family_of, final_norm, frozen_norm, norm_scale
from zoo import build, example_ids

import dla_hooks
from dla_hooks import DecompositionError, UnsupportedModelError, direct_logit_attribution

SEEDS = [0, 1]


def asks(model, ids):
    stack = dla_hooks.decompose_resid(model, ids)
    return {
        "component": lambda: direct_logit_attribution(model, ids, 5, pos=None),
        "head": lambda: direct_logit_attribution(model, ids, 5, 7, unit="head"),
        "unchecked": lambda: direct_logit_attribution(model, ids, 5, check=False),
        "decompose_resid": lambda: dla_hooks.decompose_resid(model, ids),
        "logit_attrs": lambda: dla_hooks.logit_attrs(model, ids, stack, 5),
    }


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2", "stablelm-parallel"])
def test_soft_prompt_through_a_hook_on_the_embeddings_is_refused_by_its_cause(name, seed):
    model, ids = build(name, seed=seed), example_ids(name, batch=2, length=5)
    ways = asks(model, ids)
    embedding = model.get_input_embeddings()
    soft = torch.randn(1, 3, embedding.weight.shape[-1], dtype=torch.float64)
    embedding.register_forward_hook(
        lambda module, args, out: torch.cat([soft.expand(len(out), -1, -1), out], 1)
    )
    for ask in ways.values():
        with pytest.raises(UnsupportedModelError, match="hook of yours on .* soft prompt"):
            ask()
    assert len(embedding._forward_hooks) == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_soft_prompt_that_enters_the_decoder_is_refused_by_its_cause(name, seed):
    model, ids = build(name, seed=seed), example_ids(name, batch=2, length=5)
    soft = torch.randn(2, 3, model.config.hidden_size, dtype=torch.float64)

    def before(module, args, kwargs):
        embeds = model.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
        embeds = torch.cat([soft, embeds], 1)
        return (), {**kwargs, "input_ids": None, "inputs_embeds": embeds}

    model.base_model.register_forward_pre_hook(before, with_kwargs=True)
    with pytest.raises(dla_hooks.DLAError, match="hook of yours on the model .* soft prompt"):
        direct_logit_attribution(model, ids, 5, pos=None)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_all_stand_at_their_cap_are_refused_by_their_cause(dtype, seed):
    model, ids = build("gemma2", dtype=dtype, seed=seed), example_ids("gemma2")
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach()[:1].repeat(len(head.weight), 1) * 1e8)
    with pytest.raises(UnsupportedModelError, match="stand at their cap of 5") as refused:
        direct_logit_attribution(model, ids, 5)
    assert "nan" not in str(refused.value)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_logits_that_a_hook_makes_equal_are_refused_by_their_cause(name, seed):
    model, ids = build(name, seed=seed), example_ids(name)
    ways = asks(model, ids)
    model.lm_head.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    with pytest.raises(DecompositionError, match="all logits are the same"):
        ways["component"]()
    with pytest.raises(DecompositionError, match=r"nothing like their size \(0\)"):
        ways["logit_attrs"]()


@pytest.mark.parametrize("seed", SEEDS)
def test_silenced_stream_before_a_norm_with_a_bias_is_divided_by_the_root_of_its_epsilon(seed):
    """In 16 bits the bias hides what small vectors leave of the epsilon."""
    model = build("falcon-7b", dtype=torch.bfloat16, seed=seed)
    ids, seen = example_ids("falcon-7b"), {}
    blocks, norm = model.transformer.h, final_norm(model)
    blocks[0].register_forward_pre_hook(lambda module, args: seen.update(embed=args[0].double()))
    blocks[-1].register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), *out[1:]))
    result = direct_logit_attribution(model, ids, 5, 7, pos=None, check=False)
    with torch.no_grad():
        kind, x = family_of(model).norm, seen["embed"]
        zero = torch.zeros_like(x)
        scale = norm_scale(kind, norm, zero)
        effect = frozen_norm(kind, norm, x, scale) - frozen_norm(kind, norm, zero, scale)
        due = effect @ (model.lm_head.weight[5] - model.lm_head.weight[7]).double()
    torch.testing.assert_close(result["embed"].double(), due, rtol=0.02, atol=0.1)


def cast_by_hooks(module, dtype):
    back = next(module.parameters()).dtype
    module.to(dtype)
    module.register_forward_pre_hook(lambda m, args: (args[0].to(dtype), *args[1:]))
    module.register_forward_hook(lambda m, args, out: out.to(back))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ask", ["once", "plan", "stack"])
def test_hook_that_acts_once_beside_a_cast_is_spent_on_the_callers_run(ask, seed):
    """Only the cast stays on where the model is measured: it does not run without."""
    model, ids = build("llama", dtype=torch.float32, seed=seed), example_ids("llama")
    cast_by_hooks(model.model.layers[1].mlp, torch.float64)
    runs = []

    def once(module, args, out):
        runs.append(tuple(out.shape[:2]))
        return torch.zeros_like(out) if len(runs) == 1 else None

    model.model.layers[0].mlp.register_forward_hook(once)
    with torch.no_grad():
        due = model(ids).logits[:, -1, 5]
    runs.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", dla_hooks.DLAWarning)
        if ask == "stack":
            stack, labels = dla_hooks.decompose_resid(model, ids, return_labels=True)
            assert not stack[labels.index("0_mlp_out")].any()
            return
        if ask == "plan":
            result = dla_hooks.prepare(model, 5)(ids)
        else:
            result = direct_logit_attribution(model, ids, 5)
    assert runs == [tuple(ids.shape)]
    assert not result["0_mlp_out"].any()
    torch.testing.assert_close(result.logit.float(), due, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_hooks_that_stay_on_beyond_a_cast_are_warned_of(seed):
    model, ids = build("llama", dtype=torch.float32, seed=seed), example_ids("llama")
    mlp = model.model.layers[1].mlp
    cast_by_hooks(mlp, torch.float64)
    mlp.register_forward_hook(lambda module, args, out: None)
    with pytest.warns(dla_hooks.DLAWarning, match="model.layers.1.mlp .* on made-up tokens"):
        direct_logit_attribution(model, ids, 5)
