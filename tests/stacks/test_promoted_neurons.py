"""Tokens that the strongest neurons promote, against vectors that are built one by one."""

from __future__ import annotations

import json

import pytest
import torch
from oracle import _clean_run
from oracle_families import (
    family_of,
    final_norm,
    frozen_norm,
    layer_at,
    module_at,
    norm_scale,
    post_norms,
)
from torch import nn
from zoo import ZOO, build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import (
    DecompositionError,
    InputError,
    LabelError,
    Neurons,
    UnsupportedModelError,
    promoted_tokens,
)
from dla_hooks.stacks import neuron_vectors, token_ranks
from dla_hooks.stacks.final_norm import FinalNorm

EXPERTS = {"mixtral", "mixtral-tied", "qwen3_moe", "gpt_oss", "gpt_oss-mha-tied"}
DENSE = [spec for spec in ZOO if spec.name not in EXPERTS]
FAMILIES = ["gpt2", "llama", "gemma2", "olmo2"]
MAPS = ("mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "fc2", "mlp.fc2", "mlp.down_proj")


def last_map(model, layer):
    block = layer_at(model, layer)
    names = {name for name, _ in block.named_modules()}
    found = next((path for path in MAPS if path in names), None)
    return None if found is None else block.get_submodule(found)  # experts have none


@torch.no_grad()
def by_hand(model, ids):
    """All neurons behind the final norm [neuron, batch, pos, d_model], and the last stream."""
    entered, layers = {}, [n for n in range(model.config.num_hidden_layers) if last_map(model, n)]

    def keep(layer):
        def hook(module, args):
            entered[layer] = args[0].detach().reshape(*ids.shape, -1).double()

        return hook

    handles = [last_map(model, n).register_forward_pre_hook(keep(n)) for n in layers]
    clean = _clean_run(model, ids, {})
    for handle in handles:
        handle.remove()
    family, norm = family_of(model), final_norm(model)
    scale = norm_scale(family.norm, norm, clean.last_stream)
    zero = torch.zeros_like(clean.last_stream)

    def read(x):
        end = (frozen_norm(family.norm, norm, y, scale) for y in (x, zero))
        return next(end) - next(end)

    rows = []
    for layer in layers:
        linear, label = last_map(model, layer), f"{layer}_mlp_out"
        columns = linear.weight.T if isinstance(linear, nn.Linear) else linear.weight
        post = post_norms(model).get(label)
        for neuron, column in enumerate(columns):
            write = entered[layer][..., neuron, None] * column.double()
            if post is not None:
                at = norm_scale(family.norm, post, clean.post_norm_inputs[label])
                both = (frozen_norm(family.norm, post, x, at) for x in (write, zero))
                write = next(both) - next(both)
            rows.append(read(write * family.write_scale(model.config)))
    return torch.stack(rows), read(clean.last_stream)


def logits_of(model, vectors):
    family = family_of(model)
    W_U = module_at(model, family.head).weight.double()
    return vectors @ W_U.T * family.logit_scale(model.config)


def centred(logits):
    return logits - logits.mean(-1, keepdim=True)


def assert_lists(found, row, logits):
    """One row's tokens are those of logits [..., vocabulary] with the largest and smallest."""
    ranked, near = centred(logits).sort(-1, descending=True).values, {"rtol": 1e-5, "atol": 1e-6}
    for numbers, ids, expected in (
        (found.up[row], found.up_ids[row], ranked),
        (found.down[row], found.down_ids[row], ranked.flip(-1)),
    ):
        torch.testing.assert_close(numbers.double(), expected[..., : found.k], **near)
        torch.testing.assert_close(centred(logits).gather(-1, ids), numbers.double(), **near)
    torch.testing.assert_close(found.mean[row].double(), logits.mean(-1), **near)


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", DENSE, ids=str)
def test_the_strongest_neurons_promote_what_the_full_computation_ranks_first(spec, seed):
    model, ids = build(spec, seed), example_ids(spec, seed=seed)
    found = promoted_tokens(model, ids, unit=Neurons(top=4), pos=None, k=3)
    vectors, whole = by_hand(model, ids)
    assert found.labels == ["#1", "#2", "#3", "#4", "rest", "remainder"]
    assert len(found.rows) == len(vectors)
    sizes, index = vectors.norm(dim=-1), found.index[:4]
    largest = sizes.sort(0, descending=True).values[:4]
    torch.testing.assert_close(sizes.gather(0, index), largest, rtol=1e-5, atol=1e-7)
    assert bool((index.sort(0).values.diff(dim=0) > 0).all()), "a neuron is listed twice"
    assert bool((found.index[4:] == -1).all())
    kept = vectors.gather(0, index[..., None].expand(*index.shape, vectors.shape[-1]))
    rest = vectors.sum(0) - kept.sum(0)
    rows = [*kept, rest, whole - vectors.sum(0)]
    for row, vector in enumerate(rows):
        assert_lists(found, row, logits_of(model, vector))
    assert found.gap < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_bias_make_up_the_logits_of_the_model(name, seed):
    model, ids = build(name, seed), example_ids(name, seed=seed)
    every = model.config.vocab_size
    found = promoted_tokens(model, ids, unit=Neurons(top=5), k=every)
    by_id = torch.empty_like(found.up).scatter_(-1, found.up_ids, found.up) + found.mean[..., None]
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    bias = logits - by_id.sum(0)  # the same for every prompt
    torch.testing.assert_close(bias[0], bias[1], rtol=1e-4, atol=1e-5)
    token = dla_hooks.direct_logit_attribution(model, ids, 7)
    torch.testing.assert_close(bias[:, 7], token.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_are_the_attribution_of_their_own_tokens(name):
    """The verb folds the tokens' rows of W_U through the last maps: it shares no product."""
    model, ids = build(name), example_ids(name)
    found = promoted_tokens(model, ids, unit=Neurons(top=2), k=1)
    for row in range(4):
        up, down = found.up_ids[row, :, 0], found.down_ids[row, :, 0]
        every = Neurons(top=None)
        expected = dla_hooks.direct_logit_attribution(model, ids, up, down, unit=every)
        gap = found.up[row, :, 0] - found.down[row, :, 0]
        if row < 2:
            own = expected.index == found.index[row]
            value = expected.attribution.masked_fill(~own, 0).sum(0)
        elif row == 2:
            kept = [expected.index == number for number in found.index[:2]]
            value = expected.attribution.masked_fill(kept[0] | kept[1], 0).sum(0)
        else:
            value = expected.remainder
        torch.testing.assert_close(gap, value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_of_some_layers_leave_the_others_to_the_remainder(name):
    model, ids = build(name), example_ids(name)
    found = promoted_tokens(model, ids, unit=Neurons(top=3, layers=1), k=2)
    assert {row.layer for row in found.rows} == {1}
    vectors, whole = by_hand(model, ids)
    first, width = last_map(model, 0).weight.numel() // vectors.shape[-1], len(found.rows)
    own = vectors[first : first + width]
    assert_lists(found, 4, logits_of(model, (whole - own.sum(0))[:, -1]))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_every_neuron_may_be_listed_and_leaves_no_rest(name):
    model, ids = build(name), example_ids(name)
    found = promoted_tokens(model, ids, unit=Neurons(top=10**6), k=1)
    n = len(found.rows)
    assert found.labels[-3:] == [f"#{n}", "rest", "remainder"]
    assert torch.equal(found.index[:n, 0].sort().values, torch.arange(n))
    assert not found.up[n].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_hold_to_rounding_in_every_dtype(name, dtype):
    model, ids = build(name, dtype=dtype), example_ids(name, batch=4, length=16)
    found = promoted_tokens(model, ids, unit=Neurons(top=5), pos=None, k=3)
    assert found.up.dtype == torch.float32
    assert bool(torch.isfinite(found.up).all())


# --- positions and tiles ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "olmo2"])
def test_tiles_of_any_size_give_the_same_ranks(name, monkeypatch):
    model, ids = build(name), example_ids(name)
    whole = promoted_tokens(model, ids, unit=Neurons(top=3), pos=None, k=3)
    monkeypatch.setattr(token_ranks, "_VECTORS_AT_ONCE", 7)
    monkeypatch.setattr(neuron_vectors, "_COLUMNS_AT_ONCE", 5)
    tiled = promoted_tokens(model, ids, unit=Neurons(top=3), pos=None, k=3)
    assert torch.equal(tiled.index, whole.index)
    assert torch.equal(tiled.up_ids, whole.up_ids)
    torch.testing.assert_close(tiled.up, whole.up, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pos", [-1, 0, (1, 4), [0, 2], (0, 0)], ids=str)
def test_each_position_has_neurons_of_its_own(pos):
    model, ids = build("llama"), example_ids("llama")
    whole = promoted_tokens(model, ids, unit=Neurons(top=3), pos=None, k=2)
    found = promoted_tokens(model, ids, unit=Neurons(top=3), pos=pos, k=2)
    assert found.index.shape == found.mean.shape
    for flat, position in enumerate(found.positions.reshape(len(ids), -1)[0].tolist()):
        here = found.index.reshape(5, len(ids), -1)[:, :, flat]
        assert torch.equal(here, whole.index[:, :, position])
    assert len(whole.index[0].unique()) > 1


def test_only_the_chosen_neurons_are_built_as_vectors(monkeypatch):
    model, ids = build("llama"), example_ids("llama", batch=2, length=64)
    unit = Neurons(top=1)
    promoted_tokens(model, ids, unit=unit, pos=None, k=1)
    sizes, at = [], neuron_vectors._Mlp.wrote

    def watched(self, out):
        sizes.append(out.numel())
        return at(self, out)

    monkeypatch.setattr(neuron_vectors._Mlp, "wrote", watched)
    promoted_tokens(model, ids, unit=unit, pos=None, k=1)
    d_model, width = model.config.hidden_size, model.config.intermediate_size
    assert max(sizes) <= d_model * max(width, ids.numel())


def test_padding_has_no_neuron():
    model, tokenizer = build("llama", dtype=torch.float32), tiny_tokenizer()
    texts, unit = ["the cat", "the dog sat on the cat"], Neurons(top=3)
    both = promoted_tokens(model, texts, unit=unit, pos=None, k=2, tokenizer=tokenizer)
    alone = promoted_tokens(model, texts[0], unit=unit, pos=None, k=2, tokenizer=tokenizer)
    n = alone.shape[1]
    here = both.prompt(0)
    assert torch.equal(here.index[:, :, -n:], alone.index)
    assert bool((here.index[:, :, :-n] == -1).all())
    assert len(both.records()) == 5 * sum(map(len, both.tokens)) * 4


# --- hooks and the check ---------------------------------------------------------------------


def hook_at(model, name, place):
    block = layer_at(model, 1)
    module = {"map": last_map(model, 1), "mlp": block.mlp, "block": block}.get(place)
    if place == "norm":
        module = block.post_feedforward_layernorm
    if place == "into norm":
        module = block.post_feedforward_layernorm
        return module.register_forward_pre_hook(lambda m, args: (args[0] + 0.3 * args[0].flip(-1),))

    def change(m, args, out):
        if isinstance(out, tuple):
            return (out[0] + out[0].flip(-1), *out[1:])
        return out + out.flip(-1)

    return module.register_forward_hook(change)


@pytest.mark.parametrize("place", ["map", "mlp", "block", "norm", "into norm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_hooks_write_behind_neurons_is_in_the_remainder(name, place):
    if "norm" in place and name in ("gpt2", "llama"):
        pytest.skip("no norm behind its MLP")
    model, ids = build(name), example_ids(name)
    hook_at(model, name, place)
    found = promoted_tokens(model, ids, unit=Neurons(top=3), k=1)
    up, down = found.up_ids[-1, :, 0], found.down_ids[-1, :, 0]
    every = Neurons(top=None)
    expected = dla_hooks.direct_logit_attribution(model, ids, up, down, unit=every)
    gap = (found.up - found.down)[-1, :, 0]
    torch.testing.assert_close(gap, expected.remainder, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_that_do_not_make_up_their_mlp_are_noticed(name, monkeypatch):
    model, ids = build(name), example_ids(name)
    promoted_tokens(model, ids, unit="neuron", k=1)
    monkeypatch.setattr(
        neuron_vectors._Mlp,
        "columns",
        lambda self: (
            1.01 * self._site.linear.weight.detach()
            if isinstance(self._site.linear, nn.Linear)
            else 1.01 * self._site.linear.weight.detach().T
        ),
    )
    with pytest.raises(DecompositionError, match="the neurons of 0_mlp_out miss"):
        promoted_tokens(model, ids, unit="neuron", k=1)


def test_the_gain_of_the_final_norm_decides_which_are_strongest(monkeypatch):
    model, ids = build("llama"), example_ids("llama")
    with torch.no_grad():
        model.model.norm.weight[::2] = 1e-3
    unit = Neurons(top=4)
    found = promoted_tokens(model, ids, unit=unit, pos=None, k=1)
    sizes = by_hand(model, ids)[0].norm(dim=-1)
    assert torch.equal(found.index[:4], sizes.argsort(0, descending=True)[:4])
    monkeypatch.setattr(FinalNorm, "size", lambda self, x: x.norm(dim=-1))
    other = promoted_tokens(model, ids, unit=unit, pos=None, k=1)
    assert not torch.equal(found.index, other.index)


# --- arguments -------------------------------------------------------------------------------


def test_wrong_units_are_refused_before_the_model_runs():
    model, ids = build("gpt2"), example_ids("gpt2")
    promoted_tokens(model, ids)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for unit, says in (
        (Neurons(top=None), "keeps all. Give how many"),
        (Neurons(layers=9), "layers=9 is not there"),
        ("adapter", "no vectors for the rows of unit 'adapter'"),
        ("source", "no vectors for the rows of unit 'source'"),
    ):
        with pytest.raises(InputError, match=says):
            promoted_tokens(model, ids, unit=unit)


def test_models_of_experts_have_no_neurons():
    with pytest.raises(UnsupportedModelError, match="no MLP whose output one linear map makes"):
        promoted_tokens(build("mixtral"), example_ids("mixtral"), unit="neuron")


# --- the result ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = dla_hooks.demo.load()
    texts = ["The keys near the cabinet", "The dog"]
    return promoted_tokens(model, texts, unit=Neurons(top=3), pos=None, k=2, tokenizer=tokenizer)


def test_records_name_the_neurons_of_each_position(demo):
    lines = [line for line in demo.records() if line["row"] == 0]
    for position in range(5):
        labels = [
            line["label"] for line in lines if line["position"] == position and line["rank"] == 1
        ]
        numbers = demo.index[:3, 0, position].tolist()
        assert sorted(labels) == sorted(
            [*(demo.rows[number].label for number in numbers), "rest", "remainder"]
        )


def test_a_neuron_is_looked_up_by_place_and_by_label(demo):
    one = demo.prompt(0).position(-1)
    label = one.records()[0]["label"]
    assert label in one
    assert one.top(label) == one.top("#1")
    assert one[label].labels == [label]
    there = demo.index.eq(demo.rows.number_of(label)).any(0)
    row = demo[label]
    assert torch.equal(row.up_ids[0, ..., 0] >= 0, there)
    assert torch.equal(row.mean[0].isnan(), ~there)
    assert {line["label"] for line in row.records()} == {label}
    with pytest.raises(LabelError, match="no row of this neuron result"):
        demo["L0N100000"]


def test_saved_results_are_read_back(demo, tmp_path):
    back = dla_hooks.load(demo.save(tmp_path / "neurons.safetensors"))
    assert back.rows == demo.rows
    assert torch.equal(back.index, demo.index)
    assert back.records() == demo.records()
    assert repr(back) == repr(demo)
    assert json.loads(demo.to_json())["index"] == demo.index.tolist()


def test_text_and_html_name_the_neurons(demo):
    one = demo.prompt(0).position(-1)
    label = one.records()[0]["label"]
    assert label in repr(one)
    assert label in one._repr_html_()
    assert "#1" not in repr(one)


def test_an_index_that_does_not_fit_is_refused():
    ones, ids = torch.ones(1, 1, 2), torch.zeros(1, 1, 2, dtype=torch.long)
    given = {"labels": ["#1"], "unit": "neuron", "up": ones, "up_ids": ids, "down": ones}
    given |= {"down_ids": ids, "mean": ones[..., 0], "names": {}, "n_tokens": 2}
    with pytest.raises(InputError, match="index and rows go together"):
        dla_hooks.PromotedTokens(**given, index=ids[..., 0])
