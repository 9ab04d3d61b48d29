"""Hooks at places that few models have: the rows against algebra on what plain hooks recorded."""

from __future__ import annotations

import pytest
import torch
from mapping_zoo import build_any, example_ids_any
from torch import Tensor, nn

import dla_hooks
from dla_hooks import direct_logit_attribution

TOKEN = 7


def adds(vector: Tensor, start: int = 3):
    def hook(module: nn.Module, args, out):
        x = (out if isinstance(out, Tensor) else out[0]).clone()
        x[:, start:] += vector.to(x)
        return x if isinstance(out, Tensor) else (x, *out[1:])

    return hook


def adds_at_input(vector: Tensor, start: int = 3):
    def hook(module: nn.Module, args):
        x = args[0].clone()
        x[:, start:] += vector.to(x)
        return (x, *args[1:])

    return hook


def noise(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def layer_norm_readout(model: nn.Module, norm: nn.Module, ids: Tensor, vector: Tensor) -> Tensor:
    """What a vector in the last stream adds to the token's logit at each position [batch, pos]."""
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    model(ids, use_cache=False)
    handle.remove()
    scale = (seen[0].var(-1, unbiased=False) + norm.eps).sqrt()
    row = model.get_output_embeddings().weight[TOKEN].double() * norm.weight.double()
    return (vector - vector.mean()) @ row / scale


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("layer", "factor"), [(0, 0.5), (1, 0.5), (2, 1.0)])
def test_hook_on_a_block_whose_output_the_model_halves_is_halved(layer, factor, seed):
    """RWKV halves its stream behind every second block of these."""
    model = build_any("rwkv", seed=seed)
    assert model.config.rescale_every == 2
    ids = example_ids_any(model)
    vector = noise(model.config.hidden_size, seed)
    model.rwkv.blocks[layer].register_forward_hook(adds(vector))
    found = direct_logit_attribution(model, ids, TOKEN, pos=None)
    logits = model(ids, use_cache=False).logits[..., TOKEN]
    torch.testing.assert_close(found.logit, logits, rtol=0, atol=1e-5)
    due = layer_norm_readout(model, model.rwkv.ln_out, ids, factor * vector)
    due[:, :3] = 0
    row = found.attribution[found.labels.index(f"{layer}_hook")]
    torch.testing.assert_close(row, due, rtol=0, atol=1e-5)
    stack, labels = dla_hooks.decompose_resid(model, ids, pos_slice=-1, return_labels=True)
    written = stack[labels.index(f"{layer}_hook"), 0].double()
    torch.testing.assert_close(written, factor * vector, rtol=0, atol=1e-6)


@torch.no_grad()
def test_hook_ahead_of_a_stream_that_starts_in_its_first_block_is_within_embed():
    """RWKV's first block norms the embeddings before anything is added to them."""
    model = build_any("rwkv")
    ids = example_ids_any(model)
    vector = noise(model.config.hidden_size, 1)
    model.rwkv.blocks[0].register_forward_pre_hook(adds_at_input(vector))
    found = direct_logit_attribution(model, ids, TOKEN, pos=None)
    assert "0_hook" not in found.labels
    logits = model(ids, use_cache=False).logits[..., TOKEN]
    torch.testing.assert_close(found.logit, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.total() + found.bias, found.logit, rtol=0, atol=1e-8)
