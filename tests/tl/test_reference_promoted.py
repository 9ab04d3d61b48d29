"""Promoted tokens of TransformerLens' models, run and from a cache (extra ``tl``)."""

from __future__ import annotations

import pytest
import torch
from tl_models import has_hooked, ids_for

import dla_hooks

pytest.importorskip("transformer_lens")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.tl]

KINDS = ("bridged", "hooked") if has_hooked() else ("bridged",)


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox-sequential", "qwen2"])
def test_rows_of_a_run_and_of_a_cache_are_those_of_the_verb(references, name, kind, unit):
    model, ids = getattr(references, kind)(name), ids_for(references.raw(name))
    _, cache = model.run_with_cache(ids)
    run = dla_hooks.promoted_tokens(model, ids, unit=unit, pos=(1, 4), k=2)
    stored = dla_hooks.promoted_tokens(model, unit=unit, pos=(1, 4), k=2, cache=cache)
    torch.testing.assert_close(stored.up, run.up, rtol=1e-4, atol=1e-5)
    assert stored.labels == run.labels
    for row in (0, len(run) // 2, len(run) - 1):
        up, down = run.up_ids[row, ..., 0], run.down_ids[row, ..., 0]
        result = dla_hooks.direct_logit_attribution(model, ids, up, down, unit=unit, pos=(1, 4))
        assert run.labels == result.labels
        gap = (run.up - run.down)[row, ..., 0]
        torch.testing.assert_close(gap, result.attribution[row].to(gap), rtol=1e-4, atol=1e-5)
