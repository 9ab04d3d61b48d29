"""Scores of heads, against queries and keys as the model multiplies them, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from zoo import build, example_ids

import dla_hooks
from dla_hooks import (
    AttentionScore,
    InputError,
    PositionError,
    UnsupportedModelError,
    direct_logit_attribution,
)
from dla_hooks.modules.attention_interface import why_unseen

if why_unseen() is not None:
    pytest.skip("this transformers shows no attention function", allow_module_level=True)

FAMILIES = (
    *("gpt2", "gpt_neox-parallel", "opt", "llama", "llama-bias", "mistral", "qwen2", "qwen3"),
    *("gemma2", "gemma3_text", "olmo", "olmo2", "cohere", "granite", "phi", "phi-qknorm", "phi3"),
    *("gpt_oss", "mixtral", "stablelm-qknorm", "starcoder2"),
)
LAYER, HEAD, QUERY, KEY = 1, 1, 5, 4


class Scores(TorchFunctionMode):
    """Keeps every product of queries with keys, in eager attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("matmul", "__matmul__"):
            first, second = args[:2]
            if first.ndim == 4 and out.shape[-1] == out.shape[-2] and second.shape[-1] > 1:
                self.seen.append(out.detach())
        return out


def own_scores(model, ids):
    """Of each layer, queries times keys before scaling [batch, head, query, key]."""
    with torch.no_grad(), Scores() as scores:
        model(ids, use_cache=False)
    return [one for one in scores.seen if one.shape[-1] == ids.shape[1]]


def scaling(model):
    if model.config.model_type == "opt":
        return 1.0  # its queries are scaled before they are multiplied
    attention = next(m for m in model.modules() if hasattr(m, "scaling"))
    return attention.scaling


@pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_score_that_the_model_multiplies(family, side, seed):
    model, ids = build(family, seed), example_ids(family, seed=seed)
    score = AttentionScore(LAYER, HEAD, QUERY, KEY, side=side)
    result = direct_logit_attribution(model, ids, score)
    scores = own_scores(model, ids)
    assert len(scores) == model.config.num_hidden_layers
    expected = scores[LAYER][:, HEAD, QUERY, KEY] * scaling(model)
    torch.testing.assert_close(result.logit, expected.double(), rtol=1e-5, atol=1e-5)
    whole = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(whole, result.logit, rtol=0, atol=1e-9)
    at = QUERY if side == "query" else KEY
    assert result.positions.tolist() == [at, at]


@pytest.mark.parametrize("side", ["query", "key"])
def test_shares_of_writes_are_what_their_vectors_give_by_hand(side):
    """GPT-2, from its weights: no code is shared with the library."""
    model, ids = build("gpt2"), example_ids("gpt2")
    block, stored = model.transformer.h[1], {}
    handles = [
        model.transformer.h[0].attn.register_forward_hook(
            lambda m, a, out: stored.update({"0_attn_out": out[0]})
        ),
        model.transformer.h[0].mlp.register_forward_hook(
            lambda m, a, out: stored.update({"0_mlp_out": out})
        ),
        block.register_forward_pre_hook(lambda m, args: stored.update(x=args[0])),
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    x, n = stored["x"].detach(), block.attn.num_heads
    W, b = block.attn.c_attn.weight.detach(), block.attn.c_attn.bias.detach()
    d = W.shape[0] // n
    q, k = (slice(i * n * d + HEAD * d, i * n * d + (HEAD + 1) * d) for i in (0, 1))
    normed = block.ln_1(x).detach()
    own, other, at, away = (q, k, QUERY, KEY) if side == "query" else (k, q, KEY, QUERY)
    frozen = normed[:, away] @ W[:, other] + b[other]
    direction = frozen @ W[:, own].T / d**0.5 * block.ln_1.weight.detach()
    spread = (x[:, at].var(-1, unbiased=False) + block.ln_1.eps).sqrt()
    asked = AttentionScore(LAYER, HEAD, QUERY, KEY, side)
    result = direct_logit_attribution(model, ids, asked)
    for label in ("0_attn_out", "0_mlp_out"):
        write = stored[label].detach()[:, at]
        share = ((write - write.mean(-1, keepdim=True)) * direction).sum(-1) / spread
        found = result.attribution[result.labels.index(label)]
        torch.testing.assert_close(found, share, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral"])
def test_every_unit_splits_the_same_score(family):
    model, ids = build(family), example_ids(family)
    units = ("component", "layer", "head", "neuron", "source")
    if family == "mixtral":
        units = ("component", "layer", "head", "expert", "source")
    found = direct_logit_attribution(model, ids, AttentionScore(1, 0, 6, 2), unit=units)
    for unit, result in found.items():
        sums = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        if hasattr(result, "rest"):
            sums = sums + result.rest + result.remainder
        torch.testing.assert_close(sums + result.bias, result.logit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_they_give_alone(side):
    model = build("llama", attn="sdpa")
    ids = example_ids("llama", batch=1, length=9)[0]
    rows = [ids[:5], ids]
    pad = torch.full((4,), 3)
    short = torch.cat((pad, rows[0]) if side == "left" else (rows[0], pad))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    score = AttentionScore(2, 3, -1, 1)
    both = direct_logit_attribution(
        model, torch.stack((short, ids)), score, attention_mask=mask, unit="head"
    )
    for number, row in enumerate(rows):
        alone = direct_logit_attribution(model, row[None], score, unit="head")
        torch.testing.assert_close(both.logit[number], alone.logit[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(
            both.attribution[:, number], alone.attribution[:, 0], rtol=0, atol=1e-6
        )


def test_a_plan_asks_many_prompts():
    model = build("llama")
    plan = dla_hooks.prepare(model, AttentionScore(1, 0, -1, 0))
    for seed in (0, 1):
        ids = example_ids("llama", seed=seed)
        alone = direct_logit_attribution(model, ids, AttentionScore(1, 0, -1, 0))
        torch.testing.assert_close(plan(ids).attribution, alone.attribution, rtol=0, atol=0)


def test_nothing_is_left_on_the_model():
    model, ids = build("qwen3"), example_ids("qwen3")
    before = model(ids).logits
    direct_logit_attribution(model, ids, AttentionScore(1, 0, -1, 0))
    with pytest.raises(InputError):  # in the middle of the first run
        direct_logit_attribution(model, ids, AttentionScore(1, 0, 1, 4))
    assert torch.is_grad_enabled()
    assert torch.equal(model(ids).logits, before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_hook_of_the_callers_that_changes_values_is_no_silent_number():
    model, ids = build("llama"), example_ids("llama")
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: out + torch.from_numpy(out.numpy() ** 2)
    )
    with pytest.raises(UnsupportedModelError, match="no linear reading"):
        direct_logit_attribution(model, ids, AttentionScore(1, 0, -1, 0))
    hook.remove()


def test_values_that_are_clipped_are_refused():
    model, ids = build("olmo-gqa-tied"), example_ids("olmo-gqa-tied")
    with pytest.raises(UnsupportedModelError, match="clipped"):
        direct_logit_attribution(model, ids, AttentionScore(1, 1, -1, 4))


@pytest.mark.parametrize("family", ["bloom", "falcon-new", "gpt_neo"])
def test_a_loop_of_its_own_is_refused(family):
    with pytest.raises(UnsupportedModelError, match="attention functions"):
        direct_logit_attribution(build(family), example_ids(family), AttentionScore(1, 1, -1, 4))


@pytest.mark.parametrize(
    ("score", "options", "error"),
    [
        ((9, 0, -1, 0), {}, InputError),
        ((1, 9, -1, 0), {}, InputError),
        ((1, 0, 99, 0), {}, PositionError),
        ((1, 0, -1, -9), {}, PositionError),
        ((1, 0, 2, 4), {}, InputError),
        ((1, 0, -1, 0), {"pos": 0}, InputError),
        ((1, 0, -1, 0), {"pos": None}, InputError),
        ((1, 0, -1, 0), {"incorrect_tokens": 3}, InputError),
    ],
)
def test_what_cannot_be_asked_is_said(score, options, error):
    with pytest.raises(error):
        direct_logit_attribution(
            build("llama"), example_ids("llama"), AttentionScore(*score), **options
        )


@pytest.mark.parametrize(
    "given", [(1.5, 0, 0, 0), (1, True, 0, 0), (-1, 0, 0, 0), (1, 0, 0, 0, "value")]
)
def test_what_is_no_score_is_refused_at_once(given):
    with pytest.raises(InputError):
        AttentionScore(*given)


def test_two_runs_are_not_asked_for_readings_of_their_own():
    model, ids = build("llama"), example_ids("llama")
    score = AttentionScore(1, 0, -1, 1)
    with pytest.raises(InputError, match="in each run by itself"):
        dla_hooks.compare(model, None, ids, score, other_input=ids.flip(1))
    with pytest.raises(InputError, match="in each run by itself"):
        dla_hooks.effects(model, ids, score)


def test_many_prompts_take_a_score():
    model = build("llama")
    prompts, score = [[5, 6, 7], [8, 9, 10, 11], [3, 4]], AttentionScore(1, 0, -1, 0)
    found = list(dla_hooks.attribute_many(model, prompts, score))
    for prompt, result in zip(prompts, found, strict=True):
        alone = dla_hooks.direct_logit_attribution(model, prompt, score)
        assert torch.allclose(result.attribution, alone.attribution, atol=1e-9)
        assert float(result.logit.abs().max()) > 0
