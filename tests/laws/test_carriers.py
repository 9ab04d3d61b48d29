"""Hooks on modules that carry the stream on: they add the residual, or stand behind a write.

The truth is a plain run: what a hook of ours adds, through the final norm at its real scale.
"""

from __future__ import annotations

import pytest
import torch
from mapping_zoo import build_any, example_ids_any
from torch import nn

import dla_hooks
from dla_hooks import direct_logit_attribution

CARRIERS = [
    ("bloom", "transformer.h.0.self_attention"),
    ("bloom", "transformer.h.1.mlp"),
    ("mpt", "transformer.blocks.0.ffn"),
    ("mpt", "transformer.blocks.1.resid_attn_dropout"),
    ("dbrx", "transformer.blocks.0.norm_attn_norm"),
    ("cpmant", "cpmant.encoder.layers.1.self_att"),
    ("cpmant", "cpmant.encoder.layers.0.ffn"),
    ("gpt_neox", "gpt_neox.layers.1.post_attention_dropout"),
]
INPUTS = [
    ("dbrx", "transformer.blocks.1.norm_attn_norm"),
    ("cpmant", "cpmant.encoder.layers.1.ffn"),
    ("gpt_neox", "gpt_neox.layers.0.post_mlp_dropout"),
]
SEEDS = [0, 1]


def made(name, seed):
    return build_any(name, seed=seed), example_ids_any(name, batch=2, length=7)


def hidden(out):
    return out[0] if isinstance(out, tuple) else out


def adds(vector, start=-4):
    def hook(module, args, out):
        x = hidden(out).clone()
        x[:, start:] += vector
        return (x, *out[1:]) if isinstance(out, tuple) else x

    return hook


def adds_at_input(vector, start=-4):
    def hook(module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[:, start:] += vector
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    return hook


class Seen:
    """What a plain run of the model shows, hooks and all."""

    def __init__(self, model, ids):
        model = getattr(model, "model", model)
        norm = _final_norm(model)
        kept = []
        handle = norm.register_forward_pre_hook(lambda m, args: kept.append(args[0].double()))
        with torch.no_grad():
            self.logits = model(ids).logits.double()
        handle.remove()
        x = kept[-1]
        eps = next(v for k, v in vars(norm).items() if "eps" in k)
        self.centred = isinstance(norm, nn.LayerNorm)
        centre = x - x.mean(-1, keepdim=True) if self.centred else x
        # CPM-Ant puts positions before the prompt.
        self.scale = (centre.square().mean(-1) + eps).sqrt()[:, -ids.shape[1] :]
        self.gamma = norm.weight.double()
        self.unembed = model.get_output_embeddings().weight.double()

    def added(self, vector, token, incorrect):
        """What a vector in the last stream adds to the logits' difference [batch, pos]."""
        vector = vector - vector.mean(-1, keepdim=True) if self.centred else vector
        direction = self.unembed[token] - self.unembed[incorrect]
        return (vector * self.gamma) @ direction / self.scale


def _final_norm(model):
    names = ("transformer.ln_f", "transformer.norm_f", "cpmant.encoder.output_layernorm")
    names += ("gpt_neox.final_layer_norm",)
    return next(m for path, m in model.named_modules() if path in names)


def holds(result, truth):
    """The rows and the bias make up the model's own number, hooks and all."""
    whole = result.attribution[-1] if result.unit == "layer" else result.attribution.sum(0)
    due = truth.logits[..., 5] - truth.logits[..., 7]
    torch.testing.assert_close((whole + result.bias).double(), due, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "place", "at_input"),
    [*((*at, False) for at in CARRIERS), *((*at, True) for at in INPUTS)],
)
def test_vector_added_where_a_block_carries_the_stream_is_a_row(name, place, at_input, seed):
    model, ids = made(name, seed)
    module = model.get_submodule(place)
    layer = int(next(part for part in place.split(".") if part.isdigit()))
    vector = torch.randn(model.get_input_embeddings().weight.shape[-1], dtype=torch.float64)
    vector = vector.to(next(model.parameters()).dtype)
    plan = dla_hooks.prepare(model, 5, 7, unit=("component", "layer", "head"))
    clean = plan(ids, pos=None)["component"]
    if at_input:
        module.register_forward_pre_hook(adds_at_input(vector), with_kwargs=True)
    else:
        module.register_forward_hook(adds(vector))
    truth = Seen(model, ids)
    found = plan(ids, pos=None)
    for result in found.values():
        holds(result, truth)
    result = found["component"]
    label = f"{layer}_hook"
    assert label in result.labels
    assert label not in clean.labels
    due = truth.added(vector.double(), 5, 7)
    due[:, :3] = 0
    torch.testing.assert_close(result[label].double(), due, rtol=1e-5, atol=1e-6)
    # Heads: it stands behind what attention wrote, so that no head holds it.
    assert not [label for label in found["head"].labels if label.endswith("hook")]


MIDDLE = [
    ("bloom", "transformer.h.1", "self_attention", "post_attention_layernorm"),
    ("mpt", "transformer.blocks.1", "resid_attn_dropout", "norm_2"),
    ("dbrx", "transformer.blocks.1", "norm_attn_norm", "norm_attn_norm.norm_2"),
    ("gpt_neox", "gpt_neox.layers.1", "post_attention_dropout", "post_attention_layernorm"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "block", "carrier", "norm"), MIDDLE)
def test_hook_beside_the_mlp_is_in_the_mid_stream_that_reads_it(name, block, carrier, norm, seed):
    changes = {"use_parallel_residual": False} if name == "gpt_neox" else {}
    model, ids = build_any(name, seed=seed, **changes), example_ids_any(name, batch=2, length=7)
    block, kept = model.get_submodule(block), []
    vector = torch.randn(model.get_input_embeddings().weight.shape[-1]).to(model.dtype)
    block.get_submodule(carrier).register_forward_hook(adds(vector))
    handle = block.get_submodule(norm).register_forward_pre_hook(
        lambda m, args: kept.append(args[0].detach().double())
    )
    truth = Seen(model, ids)
    handle.remove()
    found = direct_logit_attribution(model, ids, 5, 7, unit="layer", pos=None)
    due = truth.added(kept[0], 5, 7)
    torch.testing.assert_close(found["1_mid"].double(), due, rtol=1e-5, atol=1e-5)
    stack, labels = dla_hooks.accumulated_resid(model, ids, incl_mid=True, return_labels=True)
    torch.testing.assert_close(stack[labels.index("1_mid")].double(), kept[0], rtol=0, atol=1e-5)
    # The norm of Dbrx's MLP stands ahead of the hook.
    for layer, mlp_input in ((1, True), (2, False))[name == "dbrx" :]:
        stack, labels = dla_hooks.decompose_resid(
            model, ids, layer, mlp_input=mlp_input, return_labels=True
        )
        added = stack[labels.index("1_hook")].double()
        due = vector.double().expand_as(added).clone()
        due[:, :-4] = 0
        torch.testing.assert_close(added, due, rtol=0, atol=1e-5)
        if mlp_input:
            torch.testing.assert_close(stack.sum(0).double(), kept[0], rtol=0, atol=1e-5)
    assert "1_hook" not in dla_hooks.decompose_resid(model, ids, 1, return_labels=True)[1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "place"), [("bloom", "transformer.h.1.self_attention"), CARRIERS[4]]
)
def test_ablated_sublayer_that_adds_the_residual_is_attributed(name, place, seed):
    """At one position what it returns is put back to what went into it."""
    model, ids = made(name, seed)
    taken = []
    module = model.get_submodule(place)

    def keep(m, args, kwargs):
        taken.append(args[1] if len(args) > 1 else args[0] if args else kwargs["hidden_states"])

    def restore(m, args, out):
        x = hidden(out).clone()
        x[:, -2] = taken[-1][:, -2]
        return (x, *out[1:])

    module.register_forward_pre_hook(keep, with_kwargs=True)
    module.register_forward_hook(restore)
    found = direct_logit_attribution(model, ids, 5, 7, pos=None)
    holds(found, Seen(model, ids))
    layer = int(next(part for part in place.split(".") if part.isdigit()))
    rows = found[f"{layer}_hook"] + found[f"{layer}_attn_out"]
    assert rows[:, -2].abs().max() < 1e-5 < found[f"{layer}_attn_out"][:, -2].abs().min()


class Around(nn.Module):
    """A wrapper that the caller puts around a block."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize(
    ("name", "layers"), [("bloom", "transformer.h"), ("llama", "model.layers")]
)
def test_hook_on_a_block_inside_of_a_wrapper_is_its_row(name, layers, at_input, seed):
    wrapped, plain = made(name, seed), made(name, seed)
    found = []
    vector = torch.randn(wrapped[0].get_input_embeddings().weight.shape[-1])
    for (model, ids), is_wrapped in ((wrapped, True), (plain, False)):
        blocks = model.get_submodule(layers)
        inner = blocks[1]
        if is_wrapped:
            blocks[1] = Around(inner).eval()
        if at_input:
            inner.register_forward_pre_hook(adds_at_input(vector.to(model.dtype)), with_kwargs=True)
        else:
            inner.register_forward_hook(adds(vector.to(model.dtype)))
        found.append(direct_logit_attribution(model, ids, 5, 7, pos=None))
    assert found[0].labels == found[1].labels
    assert "1_hook" in found[0].labels
    torch.testing.assert_close(found[0].attribution, found[1].attribution, rtol=1e-5, atol=1e-6)


def test_hook_on_a_carrier_costs_no_further_run():
    model, ids = made("bloom", 0)
    direct_logit_attribution(model, ids, 5)
    runs = []
    handle = model.transformer.word_embeddings.register_forward_hook(lambda *_: runs.append(1))
    model.transformer.h[0].self_attention.register_forward_hook(adds(1.0))
    direct_logit_attribution(model, ids, 5)
    handle.remove()
    assert len(runs) == 1
