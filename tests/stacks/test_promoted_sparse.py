"""Tokens that the strongest experts and features promote, against vectors built by other means."""

from __future__ import annotations

import json

import pytest
import torch
from mapping_variants import BY_TYPE
from mapping_zoo import MODEL_TYPES, build_any, example_ids_any
from oracle_families import family_of, final_norm, frozen_norm, module_at, norm_scale
from zoo import build, example_ids

import dla_hooks
from dla_hooks import (
    DecompositionError,
    Experts,
    Features,
    InputError,
    UnsupportedModelError,
    direct_logit_attribution,
    promoted_tokens,
)
from dla_hooks.stacks import expert_vectors, feature_vectors, token_ranks

WIDTHS = {"gpt2": 36, "llama-bias": 40, "gemma2": 40, "olmo2": 40, "granite": 40}
MOE = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoeshared", "gemma4_text"]
MORE = ["llama4_text", "longcat_flash", "zaya", "nemotron_h", "dbrx", "cohere2_moe", "axk2"]
CHANGES = {"gemma4_text": BY_TYPE["gemma4_text"]["experts"]}
N, ACTIVE = 57, 9


class Made:
    """A random dictionary with a few features at each position."""

    def __init__(self, width, seed=0):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2 * N + 1, width, generator=generator, dtype=torch.float64)
        self.W_enc, self.W_dec, self.b_dec = noise[:N].T, noise[N : 2 * N] / 6, noise[-1]

    def encode(self, x):
        values, index = ((x - self.b_dec) @ self.W_enc).topk(ACTIVE)
        return torch.zeros(len(x), N, dtype=x.dtype).scatter_(-1, index, values.relu() + 1)

    def decode(self, f):
        return f @ self.W_dec + self.b_dec


def moe(model_type, seed=0, **options):
    if model_type not in MODEL_TYPES:
        pytest.skip("this transformers lacks it")
    return build_any(model_type, seed, **CHANGES.get(model_type, {}), **options)


def check_by_attribution(model, ids, found, every, rtol=1e-6):
    """Each row's first token up less its first down is the verb's number for the two tokens.

    The verb folds the tokens' rows of W_U through what follows, and builds no vector.
    """
    n = len(found.labels) - 2
    for row in [*range(n), n + 1]:
        up, down = found.up_ids[row, ..., 0], found.down_ids[row, ..., 0]
        there = up >= 0
        up, down = up.where(there, 5), down.where(there, 6)
        verb = direct_logit_attribution(model, ids, up, down, unit=every, pos=None)
        own = verb.attribution.masked_fill(verb.index != found.index[row], 0).sum(0)
        value = own if row < n else verb.remainder
        gap = (found.up - found.down)[row, ..., 0]
        torch.testing.assert_close(gap[there], value[there], rtol=rtol, atol=rtol)


# --- features --------------------------------------------------------------------------------


def places(name):
    return ("1_mlp_out", "1_z", "1_pre") if name != "gpt2" else ("1_mid", "final_post")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", WIDTHS)
def test_features_are_the_attribution_of_their_own_tokens(name, seed):
    model, ids = build(name, seed), example_ids(name, seed=seed)
    for place in places(name):
        made = Made(WIDTHS[name] if place.endswith("z") else model.config.hidden_size, seed)
        unit = Features({place: made}, top=4)
        found = promoted_tokens(model, ids, unit=unit, pos=None, k=2)
        assert found.labels == ["#1", "#2", "#3", "#4", "rest", "remainder"]
        check_by_attribution(model, ids, found, Features({place: made}, top=None))
        assert found.gap < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-bias", "granite"])
def test_the_strongest_features_have_the_largest_vectors(name):
    model, ids = build(name), example_ids(name)
    made, family, norm = Made(40), family_of(model), final_norm(model)
    seen = {}
    block = module_at(model, family.layers)[1]
    handles = [
        block.mlp.register_forward_hook(lambda m, args, out: seen.update(x=out)),
        norm.register_forward_hook(lambda m, args, out: seen.update(end=args[0])),
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    f = made.encode(seen["x"].reshape(-1, 40)).reshape(*ids.shape, N)
    error = seen["x"] - made.decode(f)
    rows = [f[..., n, None] * made.W_dec[n] for n in range(N)]
    vectors = torch.stack([*rows, made.b_dec.expand_as(error), error])
    vectors = vectors * family.write_scale(model.config)
    vectors = frozen_norm(family.norm, norm, vectors, norm_scale(family.norm, norm, seen["end"]))
    sizes = vectors.norm(dim=-1)
    found = promoted_tokens(model, ids, unit=Features({"1_mlp_out": made}, top=20), pos=None, k=3)
    index, n = found.index[: ACTIVE + 2], ACTIVE + 2
    largest = sizes.sort(0, descending=True).values[:n]
    torch.testing.assert_close(sizes.gather(0, index), largest, rtol=1e-5, atol=1e-7)
    # Fewer rows than places: the last are empty, and nothing is left.
    assert bool((found.index[n:] == -1).all())
    assert bool(found.up[n:20].isnan().all())
    assert bool((found.up_ids[n:20] == -1).all())
    assert not found.up[20].any()
    assert {line["label"] for line in found.records()} == {
        *(found.rows[number].label for number in index.unique().tolist()),
        *("rest", "remainder"),
    }


def test_several_dictionaries_and_prompts_share_the_strongest_rows(tmp_path):
    model, ids = build("llama-bias"), example_ids("llama-bias")
    unit = Features({"0_mlp_out": Made(40), "1_mlp_out": Made(40, 1)}, top=6)
    found = promoted_tokens(model, ids, unit=unit, pos=None, k=2)
    assert {row.layer for row in (found.rows[i] for i in found.index[:6].unique())} == {0, 1}
    check_by_attribution(
        model, ids, found, Features({"0_mlp_out": Made(40), "1_mlp_out": Made(40, 1)}, None)
    )
    last = promoted_tokens(model, ids[1], unit=unit, k=2)
    torch.testing.assert_close(last.up[:, 0], found.up[:, 1, -1])
    label = found.rows[int(found.index[0, 0, -1])].label
    assert found[label].up_ids.shape == (1, *found.shape, 2)
    found.save(tmp_path / "found.safetensors")
    again = dla_hooks.load(tmp_path / "found.safetensors")
    assert torch.equal(again.index, found.index)
    assert "llama" in repr(found)
    json.dumps(found.records())


def test_features_that_do_not_make_up_their_place_are_noticed(monkeypatch):
    model, ids = build("llama-bias"), example_ids("llama-bias")
    unit = Features({"1_mlp_out": Made(40)}, top=3)
    own = feature_vectors._Place._columns

    def wrong(self):
        W_FI, sizes = own(self)
        return 1.01 * W_FI, sizes

    monkeypatch.setattr(feature_vectors._Place, "_columns", wrong)
    with pytest.raises(DecompositionError, match="features, b_dec and error at 1_mlp_out"):
        promoted_tokens(model, ids, unit=unit)


# --- experts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model_type", MOE)
def test_experts_are_the_attribution_of_their_own_tokens(model_type, seed):
    model = moe(model_type, seed)
    ids = example_ids_any(model, seed=seed)
    found = promoted_tokens(model, ids, unit="expert", pos=None, k=2)
    assert found.labels[-2:] == ["rest", "remainder"]
    check_by_attribution(model, ids, found, Experts(top=1000))
    assert not found.up[-2].any(), "all that a position went to are listed"
    few = promoted_tokens(model, ids, unit=Experts(top=2), pos=None, k=2)
    assert torch.equal(few.index[:2], found.index[:2])
    torch.testing.assert_close(few.up[:2], found.up[:2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model_type", [t for t in MORE if t in MODEL_TYPES])
def test_experts_of_other_families_are_the_attribution_of_their_own_tokens(model_type, seed):
    model = moe(model_type, seed)
    ids = example_ids_any(model, seed=seed)
    unit = Experts(top=5)
    found = promoted_tokens(model, ids, unit=unit, pos=None, k=2)
    check_by_attribution(model, ids, found, Experts(top=1000))


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_hold_to_rounding_however_they_are_computed(way, dtype):
    model = moe("qwen2_moe", dtype=dtype)
    model.set_experts_implementation(way)
    ids = example_ids_any(model, batch=3, length=9)
    found = promoted_tokens(model, ids, unit="expert", pos=None, k=3)
    assert bool(found.up.isfinite().all())
    exact = promoted_tokens(moe("qwen2_moe"), ids, unit="expert", pos=None, k=3)
    if dtype == torch.float32:
        torch.testing.assert_close(found.up.double(), exact.up, rtol=1e-3, atol=1e-4)


def test_experts_of_some_layers_and_tiles_of_any_size(monkeypatch):
    model = moe("mixtral")
    ids = example_ids_any(model)
    whole = promoted_tokens(model, ids, unit=Experts(layers=1), pos=None, k=2)
    assert {row.layer for row in whole.rows} == {1}
    monkeypatch.setattr(token_ranks, "_VECTORS_AT_ONCE", 7)
    tiled = promoted_tokens(model, ids, unit=Experts(layers=1), pos=None, k=2)
    assert torch.equal(tiled.index, whole.index)
    torch.testing.assert_close(tiled.up, whole.up, rtol=1e-9, atol=1e-9)
    label = whole.rows[int(whole.index[0, 0, -1])].label
    assert label.startswith("L1E")
    assert whole.prompt(0).position(-1).top(label)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_that_do_not_make_up_their_sublayer_are_noticed(model_type, monkeypatch):
    model = moe(model_type)
    own = expert_vectors._Layer._experts

    def wrong(self, place):
        index, weights, outputs = own(self, place)
        return index, 1.01 * weights, outputs

    monkeypatch.setattr(expert_vectors._Layer, "_experts", wrong)
    with pytest.raises(DecompositionError, match="the experts of"):
        promoted_tokens(model, example_ids_any(model), unit="expert")


def test_what_hooks_write_behind_experts_is_in_the_remainder():
    model = moe("mixtral")
    ids = example_ids_any(model)
    block = model.model.layers[-1]
    block.mlp.register_forward_hook(lambda m, args, out: out * 1.2)
    found = promoted_tokens(model, ids, unit="expert", pos=None, k=1)
    check_by_attribution(model, ids, found, Experts(top=1000))


# --- what is refused -------------------------------------------------------------------------


def test_what_cannot_be_listed_is_refused():
    model, ids = build("llama-bias"), example_ids("llama-bias")
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        promoted_tokens(model, ids, unit="expert")
    with pytest.raises(InputError, match="need dictionaries"):
        promoted_tokens(model, ids, unit="feature")
    with pytest.raises(InputError, match="how many: top=16"):
        promoted_tokens(model, ids, unit=Features({"1_mlp_out": Made(40)}, top=None))
    with pytest.raises(InputError, match="48 wide|40 wide"):
        promoted_tokens(model, ids, unit=Features({"1_mlp_out": Made(48)}))
    with pytest.raises(InputError, match="layers with experts are"):
        promoted_tokens(moe("mixtral"), ids, unit=Experts(layers=7))


def test_rows_that_are_nowhere_are_not_drawn():
    model, ids = build("llama-bias"), example_ids("llama-bias")
    found = promoted_tokens(model, ids, unit=Features({"1_mlp_out": Made(40)}, top=20), k=2)
    assert "#12" not in found.plot().to_svg()
    with pytest.raises(InputError, match="none of these rows"):
        found.plot(rows=["#12"])
