"""The primitives against the methods of the reference's own cache (extra ``tl``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tl_models import has_hooked, ids_for

import dla_hooks

pytest.importorskip("transformer_lens")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.tl]

KINDS = ("bridged", "hooked") if has_hooked() else ("bridged",)
NAMES = ("gpt2", "llama", "gpt_neox-sequential", "qwen2")
LAYERS = (None, 1, 2)


def cases() -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for layer in LAYERS:
        for apply_ln in (False, True):
            for pos in (None, -1, (1, 4)):
                common = {"layer": layer, "apply_ln": apply_ln, "pos_slice": pos}
                rest = {"incl_remainder": True}
                found += [
                    ("decompose_resid", common),
                    ("accumulated_resid", {**common, "incl_mid": True}),
                    ("stack_head_results", {**common, **rest}),
                    ("stack_neuron_results", {**common, **rest, "neuron_slice": (2, 6)}),
                    ("stack_neuron_results", {**common, **rest, "project_output_onto": 1}),
                    ("stack_neuron_results", {**common, "project_output_onto": 2}),
                ]
    found += [("decompose_resid", {"mode": m, "incl_embeds": False}) for m in ("mlp", "attn")]
    found.append(("decompose_resid", {"layer": 1, "mlp_input": True, "apply_ln": True}))
    found.append(("accumulated_resid", {"layer": 1, "mlp_input": True, "apply_ln": True}))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_primitives_match_reference(references, kind, name):
    model = getattr(references, kind)(name)
    ids = ids_for(references.raw(name))
    _, cache = model.run_with_cache(ids)
    generator = torch.Generator().manual_seed(0)
    onto = {
        1: torch.randn(model.cfg.d_model, generator=generator),
        2: torch.randn(model.cfg.d_model, 3, generator=generator),
    }
    for method, given in cases():
        options = dict(given)
        if "project_output_onto" in options:
            options["project_output_onto"] = onto[options["project_output_onto"]]
        theirs, their_labels = getattr(cache, method)(return_labels=True, **options)
        for source in ({"input": ids}, {"cache": cache}):
            ours, labels = getattr(dla_hooks, method)(
                model, return_labels=True, **options, **source
            )
            assert labels == their_labels, (method, given)
            assert ours.shape == theirs.shape, (method, given)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=f"{method} {given}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("incorrect", [None, 7])
@pytest.mark.parametrize("tokens", [5, torch.tensor([[5], [9]])], ids=["one", "per row"])
def test_logit_attrs_from_the_model_its_cache_and_the_raw_model(
    references, kind, name, tokens, incorrect
):
    raw, model = references.raw(name), getattr(references, kind)(name)
    ids = ids_for(raw)
    if incorrect is not None:
        incorrect = incorrect * torch.ones_like(torch.as_tensor(tokens))
    _, cache = model.run_with_cache(ids)
    stack = cache.decompose_resid()
    theirs = cache.logit_attrs(stack, tokens, incorrect)
    live = dla_hooks.logit_attrs(model, ids, stack, tokens, incorrect)
    stored = dla_hooks.logit_attrs(model, None, stack, tokens, incorrect, cache=cache)
    own = dla_hooks.decompose_resid(raw, ids)
    plain = dla_hooks.logit_attrs(raw, ids, own, tokens, incorrect, center_unembed=True)
    for ours in (live, stored, plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_whose_entries_were_changed_is_refused(references, kind):
    model = getattr(references, kind)("gpt2")
    _, cache = model.run_with_cache(ids_for(references.raw("gpt2")))
    cache.cache_dict["blocks.0.hook_mlp_out"] = 2 * cache["blocks.0.hook_mlp_out"]
    for primitive in (dla_hooks.decompose_resid, dla_hooks.stack_neuron_results):
        with pytest.raises(dla_hooks.DecompositionError, match="entries were changed"):
            primitive(model, cache=cache)
    stack = dla_hooks.decompose_resid(model, cache=cache, check=False)
    assert bool(torch.isfinite(stack).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_with_the_rows_alone_is_enough(references, kind):
    model = getattr(references, kind)("gpt2")
    ids = ids_for(references.raw("gpt2"))
    _, cache = model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_mlp_out"))
    options = {"mode": "mlp", "incl_embeds": False}
    stack = dla_hooks.decompose_resid(model, cache=cache, **options)
    torch.testing.assert_close(stack, dla_hooks.decompose_resid(model, ids, **options))
