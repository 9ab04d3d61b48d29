"""What a call may compute and hold, counted operation by operation: no clock, no flicker."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from units import UNIT_NAMES

import dla_hooks.projection.directions
import dla_hooks.projection.tiles
import dla_hooks.units.head_layer
from dla_hooks import direct_logit_attribution
from dla_hooks.projection.directions import Directions

pytestmark = pytest.mark.lowest

LENGTH = 384
ALL = {"pos": None}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    """Wide enough for its products to outweigh what is counted besides."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = GPT2Config(
            n_embd=128, n_head=8, n_layer=3, vocab_size=500, n_positions=LENGTH, n_inner=512
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=500,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(500, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def plain(model, ids):
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made, views of others left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf) and leaf.data_ptr() not in given:
                self.elements = max(self.elements, leaf.numel())
        return out


def largest(call) -> int:
    with Largest() as seen:
        call()
    return seen.elements


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_cost_at_one_position_is_negligible(model, ids, unit):
    def ours():
        direct_logit_attribution(model, ids, 5, 7, unit=unit)

    ours()  # asks its questions
    assert flops(ours) <= 1.01 * flops(lambda: plain(model, ids))


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_cost_at_all_positions_is_one_dot_product_per_part(model, ids, unit):
    """Of d_model numbers at each position, beside whole matrices of the model's own."""

    def ours():
        direct_logit_attribution(model, ids, 5, 7, unit=unit, **ALL)

    ours()
    assert flops(ours) <= 1.03 * flops(lambda: plain(model, ids))


def test_cost_of_target_per_position_is_one_more_output_projection(model, ids):
    def ours():
        direct_logit_attribution(model, ids, ids.roll(-1), unit="head", **ALL)

    ours()
    width, layers = 128, 3
    projections = 2 * LENGTH * width * width * layers
    assert flops(ours) - flops(lambda: plain(model, ids)) <= 1.2 * projections


@pytest.mark.parametrize("answers", ["one", "next"])
@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_largest_tensor_is_no_larger_than_the_models_own(model, ids, unit, answers):
    """With a target at every position, positions x d_model x heads would be the largest by far."""
    answer = 5 if answers == "one" else ids.roll(-1)

    def ours():
        direct_logit_attribution(model, ids, answer, unit=unit, **ALL)

    ours()
    assert largest(ours) <= largest(lambda: plain(model, ids))


def test_target_per_position_is_looked_up_by_tiles(model, ids, monkeypatch):
    """Nothing is kept of the directions, which together are as large as an activation."""
    rows_in_a_tile, width = 32, 128
    monkeypatch.setattr(dla_hooks.projection.directions, "_HELD_ELEMENTS", rows_in_a_tile * width)
    monkeypatch.setattr(
        dla_hooks.projection.tiles, "_TILE_ELEMENTS", {"cpu": rows_in_a_tile * width}
    )
    made, kept = [], []
    then, pull_back = Directions.then, dla_hooks.units.head_layer.pull_back

    def remembered(self, change):
        kept.append(then(self, change))
        return kept[-1]

    def counted(module, d):
        made.append(len(d))
        return pull_back(module, d)

    monkeypatch.setattr(Directions, "then", remembered)
    monkeypatch.setattr(dla_hooks.units.head_layer, "pull_back", counted)
    direct_logit_attribution(model, ids, ids.roll(-1), unit="head", **ALL)
    assert made
    assert max(made) <= rows_in_a_tile
    assert len(kept) >= 3
    assert not any(directions._on for directions in kept)
    kept.clear()
    direct_logit_attribution(model, ids, 5, unit="head", **ALL)
    assert all(len(directions) == 1 for directions in kept)


def test_projection_in_16_bits_is_folded_by_pieces(ids):
    """Not cast to the dtype of the contractions as a whole."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
        vocab_size=500,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()

    def ours():
        direct_logit_attribution(model, ids[:, :8], 5, 7, unit="head")

    ours()
    assert largest(ours) <= 1024 * 1024 / 2


def test_projection_is_folded_once_per_call(model, ids, monkeypatch):
    pull_back = dla_hooks.units.head_layer.pull_back
    folded = []

    def counted(module, d):
        folded.append((module, len(d)))
        return pull_back(module, d)

    monkeypatch.setattr(dla_hooks.units.head_layer, "pull_back", counted)
    for options in ({}, ALL, {"pos": [3, 200, 300], "chunk_size": 100}, {**ALL, "chunk_size": 50}):
        folded.clear()
        direct_logit_attribution(model, ids, 5, 7, unit="head", **options)
        assert [rows for _, rows in folded] == [1, 1, 1]
        assert len({id(module) for module, _ in folded}) == 3


def test_unembedding_is_read_by_needed_rows_only(model, ids, monkeypatch):
    """The logits of the last position are the model's; ours are a few rows."""
    seen = []
    index_select = torch.Tensor.index_select

    def counted(tensor, dim, index):
        if tensor.shape[0] == 500:
            seen.append(len(index))
        return index_select(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counted)
    direct_logit_attribution(model, ids, 5, 7, unit="head")
    assert 0 < sum(seen) <= 8
