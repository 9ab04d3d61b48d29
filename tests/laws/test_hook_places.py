"""Hooks at places that few models have: the rows against algebra on what plain hooks recorded."""

from __future__ import annotations

import pytest
import torch
from mapping_zoo import MODEL_TYPES, build_any, example_ids_any
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
@pytest.mark.skipif("blt" not in MODEL_TYPES, reason="this transformers lacks it")
@pytest.mark.parametrize("seed", [0, 1])
def test_hook_on_a_block_whose_output_the_model_doubles_is_doubled(seed):
    """BLT's cross-attention returns its input with what it wrote, and is added to that input."""
    model = build_any("blt", seed=seed)
    ids, layers = example_ids_any(model), model.model.local_decoder.layers
    assert model.config.decoder_config.cross_attn_all_layers
    for layer in range(len(layers)):
        vector = noise(model.config.decoder_config.hidden_size, seed)
        handle = layers[layer].register_forward_hook(adds(vector))
        found = direct_logit_attribution(model, ids, TOKEN, pos=None)
        logits = model(ids, use_cache=False).logits[..., TOKEN]
        torch.testing.assert_close(found.logit, logits.to(found.logit), rtol=0, atol=1e-5)
        stack, labels = dla_hooks.decompose_resid(model, ids, pos_slice=-1, return_labels=True)
        written = stack[labels.index(f"{layer}_hook"), 0].double()
        doubled = vector * 2 ** (len(layers) - 1 - layer)
        torch.testing.assert_close(written, doubled, rtol=0, atol=1e-5)
        handle.remove()


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


BETWEEN = [
    ("gpt2", "transformer.h.1.attn.resid_dropout"),
    ("gpt_bigcode", "transformer.h.1.attn.resid_dropout"),
    ("gptj", "transformer.h.1.attn.resid_dropout"),
    ("gpt_neo", "transformer.h.1.attn.attention.resid_dropout"),
]
"""Modules between the projection of z and what attention writes: it is in no row of a head."""


def held(model: nn.Module, ids: Tensor, unit: str):
    """A result, held against the model's own logits."""
    found = direct_logit_attribution(model, ids, TOKEN, unit=unit, pos=None)
    logits = model(ids, use_cache=False).logits[..., TOKEN]
    torch.testing.assert_close(found.logit, logits.to(found.logit), rtol=0, atol=1e-5)
    own = found.total() + found.bias
    torch.testing.assert_close(own, found.logit, rtol=0, atol=1e-8)
    return found


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("at_input", [True, False])
@pytest.mark.parametrize(("model_type", "path"), [*BETWEEN, ("gpt_neo", "transformer.h.1.attn")])
def test_hook_between_z_and_the_write_is_a_row_beside_the_heads(model_type, path, at_input, seed):
    model = build_any(model_type, seed=seed)
    ids, vector = example_ids_any(model), noise(model.config.hidden_size, seed)
    module = model.get_submodule(path)
    if path.endswith("attn"):
        module, at_input = module.attention, False
    if at_input:
        module.register_forward_pre_hook(adds_at_input(vector))
    else:
        module.register_forward_hook(adds(vector))
    found = held(model, ids, "head")
    due = layer_norm_readout(model, model.transformer.ln_f, ids, vector)
    due[:, :3] = 0
    row = found.attribution[found.labels.index("L1hook")]
    torch.testing.assert_close(row, due, rtol=0, atol=1e-5)


class Steers(nn.Module):
    """A wrapper around attention, which adds a vector from one position on."""

    def __init__(self, inner: nn.Module, vector: Tensor, start: int = 3) -> None:
        super().__init__()
        self.inner, self.vector, self.start = inner, vector, start

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        x = out[0].clone()
        x[:, self.start :] += self.vector.to(x)
        return (x, *out[1:])


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "granite", "mixtral"])
def test_wrapper_around_attention_that_steers_is_a_row_beside_the_heads(model_type, seed):
    model = build_any(model_type, seed=seed)
    ids, vector = example_ids_any(model), noise(model.config.hidden_size, seed)
    block, name = (
        (model.transformer.h[1], "attn")
        if model_type == "gpt2"
        else (model.model.layers[1], "self_attn")
    )
    setattr(block, name, Steers(getattr(block, name), 0 * vector).eval())
    plain = direct_logit_attribution(model, ids, TOKEN, unit="head", pos=None)
    assert "L1hook" not in plain.labels
    getattr(block, name).vector = vector
    found = direct_logit_attribution(model, ids, TOKEN, unit="head", pos=None)
    logits = model(ids, use_cache=False).logits[..., TOKEN]
    if found.softcap is not None:
        logits = found.softcap * torch.atanh(logits / found.softcap)
    torch.testing.assert_close(found.logit, logits.to(found.logit), rtol=0, atol=1e-5)
    row = found.attribution[found.labels.index("L1hook")]
    assert row[:, 3:].abs().min() > 0
    assert not row[:, :3].any()
    if model_type == "gpt2":
        due = layer_norm_readout(model, model.transformer.ln_f, ids, vector)
        torch.testing.assert_close(row[:, 3:], due[:, 3:], rtol=0, atol=1e-5)


BEHIND_NEURONS = [
    ("gpt2", "transformer.h.1.mlp.dropout"),
    ("gptj", "transformer.h.1.mlp.dropout"),
    ("stablelm", "model.layers.1.dropout"),
    ("phi3", "model.layers.1.resid_mlp_dropout"),
]


@torch.no_grad()
@pytest.mark.parametrize("at_input", [True, False])
@pytest.mark.parametrize(("model_type", "path"), BEHIND_NEURONS)
def test_hook_between_neurons_and_the_stream_is_in_the_remainder(model_type, path, at_input):
    model = build_any(model_type)
    ids, vector = example_ids_any(model), noise(model.config.hidden_size, 0)
    module = model.get_submodule(path)
    if at_input:
        module.register_forward_pre_hook(adds_at_input(vector))
    else:
        module.register_forward_hook(adds(vector))
    held(model, ids, "neuron")
