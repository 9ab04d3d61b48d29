"""Rows beside longer ones, in models that compute otherwise for a long prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from mapping_zoo import MODEL_TYPES, build_any
from rotary import LIMIT, length_dependent

from dla_hooks import UnsupportedModelError, attribute_many, direct_logit_attribution
from dla_hooks.many.order import batches_of

KINDS = ["dynamic", "longrope"]


def ragged(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 40, (n,), generator=generator) for n in lengths]


def padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return ids, mask


def alone(model, ids):
    """The last logits of a prompt on its own, in a model that ran nothing before."""
    return copy.deepcopy(model)(ids[None], use_cache=False).logits[0, -1].detach()


@pytest.mark.parametrize("kind", KINDS)
def test_row_beside_a_longer_one_where_positions_depend_on_length_is_refused(kind):
    model = length_dependent(kind)
    ids, mask = padded(ragged([10, 40]))
    with pytest.raises(UnsupportedModelError, match=f"rotary positions \\({kind}\\) depend on how"):
        direct_logit_attribution(model, ids, 7, attention_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_row_beside_a_longer_one_within_the_limit_is_the_row_alone(kind):
    model = length_dependent(kind)
    rows = ragged([10, LIMIT])
    ids, mask = padded(rows)
    found = direct_logit_attribution(model, ids, 7, attention_mask=mask)
    due = torch.stack([alone(model, row)[7] for row in rows])
    torch.testing.assert_close(found.logit, due.to(found.logit), rtol=0, atol=1e-5)


def test_rows_that_are_all_beyond_the_limit_of_longrope_are_the_rows_alone():
    model = length_dependent("longrope")
    rows = ragged([30, 40])
    ids, mask = padded(rows)
    found = direct_logit_attribution(model, ids, 7, attention_mask=mask)
    due = torch.stack([alone(model, row)[7] for row in rows])
    torch.testing.assert_close(found.logit, due.to(found.logit), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_many_prompts_on_both_sides_of_the_limit_are_each_as_alone(kind):
    model = length_dependent(kind)
    rows = ragged([10, 40, 12, 35, 8, 40], seed=1)
    dues = [alone(model, row)[7] for row in rows]
    for result, due in zip(attribute_many(model, rows, 7, max_tokens=400), dues, strict=True):
        torch.testing.assert_close(result.logit[0], due.to(result.logit), rtol=0, atol=1e-5)


def test_batches_beyond_a_limit_hold_prompts_of_one_length():
    batches = batches_of([3, 50, 8, 50, 9, 20], 1000, longest_padded=9)
    assert batches == [[1, 3], [5], [4, 2, 0]]


@pytest.mark.skipif("deepseek_v32" not in MODEL_TYPES, reason="this transformers lacks it")
def test_row_beside_a_longer_one_where_attention_picks_tokens_is_refused():
    model = build_any("deepseek_v32")
    picked = model.config.index_topk
    ids, mask = padded(ragged([picked - 1, picked + 5]))
    with pytest.raises(UnsupportedModelError, match=f"picks {picked} tokens"):
        direct_logit_attribution(model, ids, 7, attention_mask=mask)
    rows = ragged([picked - 1, picked])
    ids, mask = padded(rows)
    found = direct_logit_attribution(model, ids, 7, attention_mask=mask)
    due = torch.stack([alone(model, row)[7] for row in rows])
    torch.testing.assert_close(found.logit, due.to(found.logit), rtol=0, atol=1e-5)
