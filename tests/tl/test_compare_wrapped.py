"""Comparisons of TransformerLens models, and of what `wrap` makes of a raw one."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example_ids

import dla_hooks
from dla_hooks import compare, direct_logit_attribution


@pytest.mark.tl
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_two_prompts_of_a_bridge_differ_as_its_attributions_do(references, unit):
    pytest.importorskip("transformer_lens")
    model = references.bridged("gpt2")
    clean, corrupted = example_ids("gpt2"), example_ids("gpt2", seed=3)
    found = compare(model, None, clean, 5, 7, other_input=corrupted, unit=unit, pos=None)
    one, other = (
        direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=None)
        for ids in (clean, corrupted)
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.attribution, one.attribution - other.attribution, **close)
    torch.testing.assert_close(found.attribution, found.written + found.read, **close)


def test_conventions_are_those_of_the_first_model_for_both():
    one, other, ids = build("gpt2", 0), build("gpt2", 1), example_ids("gpt2")
    both = compare(dla_hooks.wrap(one), dla_hooks.wrap(other), ids, 5, unit="head")
    first = compare(dla_hooks.wrap(one), other, ids, 5, unit="head")
    plain = compare(one, dla_hooks.wrap(other), ids, 5, unit="head")
    torch.testing.assert_close(both.attribution, first.attribution)
    torch.testing.assert_close(
        plain.attribution, compare(one, other, ids, 5, unit="head").attribution
    )
    assert not torch.allclose(both.attribution, plain.attribution)
