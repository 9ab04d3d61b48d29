"""Models whose weights are elsewhere between uses (extra ``offload``: accelerate)."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example_ids

from dla_hooks import direct_logit_attribution, verify

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "llama-bias", "phi", "granite"])
def test_offloaded_models_give_the_same_numbers(spec, where, tmp_path):
    ids = example_ids(spec)
    options = {"center_unembed": True, "fold_value_biases": True, "pos": None}
    here = build(spec, dtype=torch.float32)
    away = build(spec, dtype=torch.float32)
    if where == "memory":
        accelerate.cpu_offload(away, execution_device=CPU)
    else:
        accelerate.disk_offload(away, str(tmp_path), execution_device=CPU)
    assert next(away.parameters()).is_meta
    for unit in ("component", "layer", "head"):
        expected = direct_logit_attribution(here, ids, 5, unit=unit, **options)
        found = direct_logit_attribution(away, ids, 5, unit=unit, **options)
        assert torch.equal(found.attribution, expected.attribution)
        assert torch.equal(found.logit, expected.logit)
    assert verify(away, show=False).ok
    assert next(away.parameters()).is_meta  # left as it was found


def test_a_device_map_is_followed(tmp_path):
    """As ``from_pretrained(..., device_map=...)`` sets it up, from a folder."""
    from transformers import AutoModelForCausalLM

    build("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    ids = example_ids("llama")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2"), "cpu")
    places |= {"model.layers.1": "disk", "lm_head": "disk"}
    places |= {"model.rotary_emb": "cpu", "model.norm": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        device_map=places,
        offload_folder=str(tmp_path / "offload"),
    ).eval()
    for unit in ("component", "head"):
        expected = direct_logit_attribution(plain, ids, 5, 7, unit=unit)
        found = direct_logit_attribution(spread, ids, 5, 7, unit=unit)
        torch.testing.assert_close(found.attribution, expected.attribution)
