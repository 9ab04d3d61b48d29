"""Directions in the streams of TransformerLens models, run and from a cache."""

from __future__ import annotations

import pytest
import tl_models
import torch

import dla_hooks
from dla_hooks import Direction

pytest.importorskip("transformer_lens")
pytestmark = pytest.mark.tl


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, tmp_path_factory):
    raw = tl_models.raw(request.param)
    return tl_models.bridged(raw, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@pytest.mark.parametrize("at", ["1_pre", "1_mid", "final_post"])
def test_direction_is_the_cached_streams_own_projection(model, at, unit):
    ids = tl_models.ids_for(model)
    v = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(ids)
    hook = {"1_pre": "blocks.1.hook_resid_pre", "1_mid": "blocks.1.hook_resid_mid"}
    x = cache[hook.get(at, f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")]
    run = dla_hooks.direct_logit_attribution(model, ids, Direction(v, at), unit=unit, pos=None)
    assert torch.allclose(run.logit, x @ v, atol=1e-4)
    assert torch.allclose(run.total() + run.bias, x @ v, atol=1e-4)
    stored = dla_hooks.direct_logit_attribution(
        model, None, Direction(v, at), unit=unit, pos=None, cache=cache
    )
    assert torch.allclose(stored.attribution, run.attribution, atol=1e-5)


@pytest.mark.parametrize("at", ["1_pre", "1_mid", "final_post"])
def test_direction_through_a_norm_is_the_same_from_a_cache(model, at):
    ids = tl_models.ids_for(model)
    v = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    _, cache = model.run_with_cache(ids)
    target = Direction(v, at, through_norm=True)
    run = dla_hooks.direct_logit_attribution(model, ids, target, pos=None)
    assert run.logit_gap < 1e-4
    stored = dla_hooks.direct_logit_attribution(model, None, target, pos=None, cache=cache)
    assert torch.allclose(stored.attribution, run.attribution, atol=1e-4)
