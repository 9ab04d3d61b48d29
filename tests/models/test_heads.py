"""Heads are those that the model computes, whatever its config says; wrappers do not hide them."""

from __future__ import annotations

import pytest
import torch
from alter import alter_output
from mapping_zoo import build_any, example_ids_any
from torch import nn

import dla_hooks
from dla_hooks import (
    TrainingModeError,
    UnsupportedModelError,
    direct_logit_attribution,
    stack_head_results,
    verify,
)

FAMILIES = ("llama", "qwen2", "gemma2")


class Shell(nn.Module):
    """A wrapper that does nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class TwoHeads(nn.Module):
    """Attention of one's own: two heads, whatever the config says; maybe written as (d h)."""

    def __init__(self, d_model, across):
        super().__init__()
        self.qkv = nn.Linear(d_model, 3 * d_model, dtype=torch.float64)
        self.o_proj = nn.Linear(d_model, d_model, bias=False, dtype=torch.float64)
        self.across = across

    def forward(self, hidden_states, **_):
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(hidden_states).chunk(3, -1)
        )
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = z.permute(0, 2, 3, 1) if self.across else z.transpose(1, 2)
        return self.o_proj(z.flatten(-2)), None


def heads_of(model, ids, **options):
    result = direct_logit_attribution(model, ids, 5, 7, unit="head", pos=None, **options)
    return {
        label: values
        for label, values in zip(result.labels, result.attribution, strict=True)
        if label != "remainder"
    }


def effects(model, ids, layer, width, wanted=(5, 7)):
    """Each slice's direct effect on the logit difference, by the last norm's own scale."""
    projection = model.model.layers[layer].self_attn.o_proj
    seen = {}
    norm = model.model.norm
    hooks = [
        projection.register_forward_pre_hook(lambda _, args: seen.update(z=args[0].clone())),
        norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].clone())),
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        gamma = norm.weight
        scale = (seen["x"].square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        d = (model.lm_head.weight[wanted[0]] - model.lm_head.weight[wanted[1]]) * gamma
        slices = seen["z"].split(width, -1)
        weights = projection.weight.split(width, -1)
        return [(z @ w.T @ d) / scale[..., 0] for z, w in zip(slices, weights, strict=True)]


def prune(model, layer, keep):
    """Keep some heads of one layer, as structured pruning does; grouped keys keep their groups."""
    attention = model.model.layers[layer].self_attn
    d = attention.head_dim
    rows = torch.cat([torch.arange(head * d, (head + 1) * d) for head in keep])
    for name, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
        linear = getattr(attention, name)
        kept = linear.weight.data.index_select(axis, rows)
        linear.weight = nn.Parameter(kept)
        if linear.bias is not None and axis == 0:
            linear.bias = nn.Parameter(linear.bias.data[rows])
        linear.out_features, linear.in_features = kept.shape


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_pruned_layer_shows_the_heads_that_are_left(model_type, attn):
    model = build_any(model_type, num_key_value_heads=4, attn=attn)
    ids = example_ids_any(model)
    prune(model, 0, (0, 2))
    width = model.model.layers[0].self_attn.head_dim
    found = heads_of(model, ids)
    assert [label for label in found if label.startswith("L0")] == ["L0H0", "L0H1"]
    assert len([label for label in found if label.startswith("L1")]) == 4
    for head, effect in enumerate(effects(model, ids, 0, width)):
        torch.testing.assert_close(found[f"L0H{head}"], effect, rtol=1e-6, atol=1e-6)


def test_pruned_layer_whose_width_the_declared_count_does_not_divide_is_right():
    model = build_any("llama", num_key_value_heads=4, head_dim=6)
    ids = example_ids_any(model)
    prune(model, 1, (0, 1, 3))
    found = heads_of(model, ids)
    assert [label for label in found if label.startswith("L1")] == ["L1H0", "L1H1", "L1H2"]
    for head, effect in enumerate(effects(model, ids, 1, 6)):
        torch.testing.assert_close(found[f"L1H{head}"], effect, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_edited_count_in_the_config_changes_no_head(model_type):
    model = build_any(model_type)
    ids = example_ids_any(model)
    before = heads_of(build_any(model_type), ids)
    model.config.num_attention_heads = 2
    after = heads_of(model, ids)
    assert list(after) == list(before)
    for label, values in before.items():
        torch.testing.assert_close(after[label], values)


def test_differential_attention_has_half_as_many_heads_of_twice_the_width():
    model = build_any("diffllama")
    ids = example_ids_any(model)
    width = 2 * model.config.head_dim
    found = heads_of(model, ids)
    assert [label for label in found if label.startswith("L0")] == ["L0H0", "L0H1"]
    for head, effect in enumerate(effects(model, ids, 0, width)):
        torch.testing.assert_close(found[f"L0H{head}"], effect, rtol=1e-6, atol=1e-6)


def with_own_attention(model_type, across):
    model = build_any(model_type)
    torch.manual_seed(0)
    model.model.layers[1].self_attn = TwoHeads(model.config.hidden_size, across)
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_attention_of_ones_own_shows_its_own_heads(model_type):
    model = with_own_attention(model_type, across=False)
    ids = example_ids_any(model)
    found = heads_of(model, ids)
    assert [label for label in found if label.startswith("L1")] == ["L1H0", "L1H1"]
    for head, effect in enumerate(effects(model, ids, 1, model.config.hidden_size // 2)):
        torch.testing.assert_close(found[f"L1H{head}"], effect, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_channels_laid_out_across_heads_are_refused_for_heads_only(model_type):
    model = with_own_attention(model_type, across=True)
    ids = example_ids_any(model)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.1\.self_attn.*one after"):
        heads_of(model, ids)
    assert direct_logit_attribution(model, ids, 5, 7).gap < 1e-9
    report = verify(model, show=False)
    assert report.ok
    assert "one after the other" in str(report)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("part", ["self_attn", "mlp", "block"])
@pytest.mark.parametrize("depth", [1, 2])
def test_wrapped_part_gives_the_numbers_of_the_plain_model(model_type, part, depth):
    model = build_any(model_type)
    ids = example_ids_any(model)
    before = heads_of(model, ids)
    for _ in range(depth):  # in training mode, as new modules are: it makes no difference
        if part == "block":
            model.model.layers[1] = Shell(model.model.layers[1])
        else:
            block = model.model.layers[1]
            setattr(block, part, Shell(getattr(block, part)))
    after = heads_of(model, ids)
    assert list(after) == list(before)
    for label, values in before.items():
        torch.testing.assert_close(after[label], values)
    assert verify(model, show=False).ok


def test_heads_that_cannot_be_seen_are_refused_with_their_layer():
    model = build_any("llama")
    ids = example_ids_any(model)
    attention = model.model.layers[1].self_attn
    attention.projection = attention.o_proj
    attention.o_proj = None
    del attention._modules["o_proj"]
    object.__setattr__(attention, "o_proj", attention.projection.forward)
    with pytest.raises(UnsupportedModelError, match=r"^there is no model\.layers\.1\.self_attn\.o"):
        heads_of(model, ids)
    assert direct_logit_attribution(model, ids, 5, 7).gap < 1e-9
    assert "attention runs here" in str(verify(model, show=False))


def test_layers_without_attention_are_no_hidden_heads():
    model = build_any("jamba")
    labels = list(heads_of(model, example_ids_any(model)))
    assert 0 < len({label.split("H")[0] for label in labels}) < model.config.num_hidden_layers


def test_stacked_heads_are_the_measured_ones():
    model = build_any("diffllama")
    stack, labels = stack_head_results(model, example_ids_any(model), return_labels=True)
    assert labels[:3] == ["L0H0", "L0H1", "L1H0"]
    assert len(stack) == len(labels)


def test_wrapped_model_says_the_measured_heads():
    model = build_any("diffllama")
    wrapped = dla_hooks.wrap(model)
    assert (wrapped.cfg.n_heads, wrapped.cfg.d_head) == (2, 2 * model.config.head_dim)


def test_heads_cost_one_run_more_and_only_once():
    model = build_any("llama")
    ids = example_ids_any(model)
    runs = []
    alter_output(model.model.embed_tokens, lambda out: runs.append(1) or out)
    direct_logit_attribution(model, ids, 5, 7)
    runs.clear()
    direct_logit_attribution(model, ids, 5, 7, unit="head", fold_value_biases=False)
    assert len(runs) == 2
    runs.clear()
    direct_logit_attribution(model, ids, 5, 7, unit="head", fold_value_biases=False)
    assert len(runs) == 1


def test_missing_block_parts_are_named_first():
    model = build_any("llama")
    model.model.layers[1] = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.1 has none of") as caught:
        direct_logit_attribution(model, example_ids_any(model), 5, 7)
    assert len(str(caught.value)) < 250


class Noisy(nn.Module):
    """Asks for its mode in a method of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        self.check()
        return self.inner(*args, **kwargs)

    def check(self):
        return self.training


def test_wrapper_that_reads_its_training_mode_is_refused_in_it():
    model = build_any("llama")
    model.model.layers[1].mlp = Noisy(model.model.layers[1].mlp)
    with pytest.raises(TrainingModeError, match=r"layers\.1\.mlp"):
        direct_logit_attribution(model, example_ids_any(model), 5, 7)
    model.eval()
    assert direct_logit_attribution(model, example_ids_any(model), 5, 7).gap < 1e-9
