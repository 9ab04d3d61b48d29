"""The tokens that heads read, on TransformerLens models: by their own hook points."""

from __future__ import annotations

import pytest
import torch
from tl_models import has_hooked

import dla_hooks
from dla_hooks import CacheEntryError, DecompositionError, SourceTokens, direct_logit_attribution

pytest.importorskip("transformer_lens")
pytestmark = pytest.mark.tl

IDS = torch.tensor([[5, 9, 4, 30, 12, 8, 21], [3, 44, 17, 6, 28, 50, 11]])
KINDS = ("bridged", "hooked") if has_hooked() else ("bridged",)


@pytest.fixture(params=KINDS)
def model(request, references):
    return getattr(references, request.param)


@torch.no_grad()
def by_hand(model, cache, answer, incorrect):
    """Weights times values through W_O and the folded unembedding [head, source, batch]."""
    direction = (model.W_U[:, answer] - model.W_U[:, incorrect]).double()
    rows = []
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, -1].double()
        v = cache[f"blocks.{layer}.attn.hook_v"].double()
        v = v.flatten(2).unflatten(-1, (-1, model.cfg.d_head))
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
        along = torch.einsum("hdm,m->hd", model.blocks[layer].attn.W_O.double(), direction)
        rows.append(torch.einsum("bhs,bshd,hd->hsb", pattern, v, along))
    scale = cache["ln_final.hook_scale"][:, -1, 0].double()
    return torch.cat(rows) / scale


def dense(result):
    found = torch.zeros(len(result.rows), *result.attribution.shape[1:], dtype=torch.float64)
    found.scatter_(0, result.index.clamp_min(0), result.attribution.double())
    return found.unflatten(0, (-1, result.rows.runs[0].n))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_are_those_by_hand_from_a_run_and_from_a_cache(model, name):
    model = model(name)
    _, cache = model.run_with_cache(IDS)
    unit = SourceTokens(top=None)
    result = direct_logit_attribution(model, IDS, 5, 7, unit=unit)
    assert bool((result.index >= 0).all())  # the last token reads all
    expected = by_hand(model, cache, 5, 7)
    size = float(expected.abs().max())
    torch.testing.assert_close(dense(result), expected, rtol=0, atol=1e-5 * size)
    stored = direct_logit_attribution(model, None, 5, 7, unit=unit, cache=cache)
    torch.testing.assert_close(dense(stored), dense(result), rtol=1e-4, atol=1e-5)


def test_cache_needs_what_is_named_and_no_more(model):
    model = model("gpt2")
    names = dla_hooks.cache_names(model, "source")
    _, cache = model.run_with_cache(IDS, names_filter=lambda name: name in names)
    direct_logit_attribution(model, None, 5, 7, unit="source", cache=cache)
    kept = [name for name in names if name != "blocks.1.attn.hook_pattern"]
    _, cache = model.run_with_cache(IDS, names_filter=lambda name: name in kept)
    with pytest.raises(CacheEntryError, match="hook_pattern"):
        direct_logit_attribution(model, None, 5, 7, unit="source", cache=cache)


def test_changed_pattern_in_a_cache_is_refused(model):
    model = model("gpt2")
    _, cache = model.run_with_cache(IDS)
    cache.cache_dict["blocks.1.attn.hook_pattern"] = cache["blocks.1.attn.hook_pattern"].flip(-1)
    with pytest.raises(DecompositionError, match="the tokens that L1H0 reads"):
        direct_logit_attribution(model, None, 5, 7, unit="source", cache=cache)


def test_hook_on_z_is_in_the_remainder_and_one_on_the_pattern_in_the_rows(model):
    model = model("gpt2")
    unit = SourceTokens(top=None, layers=[1])
    clean = direct_logit_attribution(model, IDS, 5, 7, unit=unit)
    with model.hooks([("blocks.1.attn.hook_z", lambda z, hook: z * 0)]):
        ablated = direct_logit_attribution(model, IDS, 5, 7, unit=unit)
    ratio = dense(ablated) / dense(clean)  # the final norm's scale is another
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-3, atol=0)

    def to_the_first(pattern, hook):
        pattern = torch.zeros_like(pattern)
        pattern[..., 0] = 1
        return pattern

    with model.hooks([("blocks.1.attn.hook_pattern", to_the_first)]):
        first = direct_logit_attribution(model, IDS, 5, 7, unit=unit)
    assert bool((dense(first)[:, 1:] == 0).all())
