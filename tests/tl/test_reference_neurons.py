"""Neurons of TransformerLens models: those of the raw model, live and from a cache."""

from __future__ import annotations

import pytest
import torch
from tl_models import has_hooked, ids_for

import dla_hooks
from dla_hooks import Neurons, UnsupportedModelError, direct_logit_attribution

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
]

NAMES = ("gpt2", "llama", "qwen3", "opt")
KINDS = ("bridged", "hooked") if has_hooked() else ("bridged",)
CASES = [(kind, name) for kind in KINDS for name in NAMES] + [("bridged", "gemma3_text")]
# TransformerLens keeps a hook of its own on the last map of a bridged OPT, which a cache lacks.
CACHED = [case for case in CASES if case != ("bridged", "opt")]
EVERY = Neurons(top=None)


def all_neurons(result):
    return result.attribution.gather(0, result.index.argsort(0))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_neurons_are_those_of_the_raw_model(references, kind, name):
    model, reference = references.raw(name), getattr(references, kind)(name)
    ids = ids_for(model)
    found, raw = (
        direct_logit_attribution(one, ids, 5, 7, unit=EVERY, pos=None) for one in (reference, model)
    )
    assert [run.label for run in found.rows.runs] == [run.label for run in raw.rows.runs]
    torch.testing.assert_close(all_neurons(found), all_neurons(raw), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), CACHED)
def test_a_cache_with_the_named_entries_is_enough(references, kind, name):
    reference = getattr(references, kind)(name)
    ids = ids_for(references.raw(name))
    _, cache = reference.run_with_cache(
        ids, names_filter=dla_hooks.cache_names(reference, "neuron")
    )
    found = direct_logit_attribution(
        reference, None, 5, 7, unit=EVERY, pos=None, cache=cache, check=False
    )
    live = direct_logit_attribution(reference, ids, 5, 7, unit=EVERY, pos=None)
    torch.testing.assert_close(all_neurons(found), all_neurons(live), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_have_none(references, kind):
    model = getattr(references, kind)("mixtral")
    with pytest.raises(UnsupportedModelError, match="experts"):
        direct_logit_attribution(model, ids_for(references.raw("mixtral")), 5, unit="neuron")
