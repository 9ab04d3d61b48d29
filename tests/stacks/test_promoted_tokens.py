"""Promoted tokens, held against the full computation over the vocabulary in float64."""

from __future__ import annotations

import json
import re

import pytest
import torch
from mapping_zoo import build_any as build_mapped
from mapping_zoo import example_ids_any
from oracle import (
    family_of,
    final_norm,
    frozen_norm,
    head_effects,
    last_stream,
    norm_scale,
    stream_parts,
)
from oracle_families import module_at
from quantised import torchao_model
from torch import nn
from zoo import ZOO, build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import (
    ArgumentTypeError,
    DecompositionError,
    DLAError,
    InputError,
    LabelError,
    PositionError,
    UnsupportedModelError,
    promoted_tokens,
)
from dla_hooks.modules import vocabulary
from dla_hooks.stacks import token_ranks

UNITS = ("component", "layer", "head")


@torch.no_grad()
def full_logits(model, ids):
    """Every component's logits for every token, by brute force: [component, batch, pos, vocab]."""
    parts, stream = stream_parts(model, ids), last_stream(model, ids)
    family, norm = family_of(model), final_norm(model)
    scale = norm_scale(family.norm, norm, stream)
    nothing = frozen_norm(family.norm, norm, torch.zeros_like(stream), scale)
    W_U = module_at(model, family.head).weight.double()
    logits = [
        (frozen_norm(family.norm, norm, part, scale) - nothing) @ W_U.T for part in parts.values()
    ]
    return torch.stack(logits) * family.logit_scale(model.config)


def assert_ranked(found, logits, k):
    """``found`` has the k largest and smallest of logits [row, ..., vocabulary], less the mean."""
    centred = logits - logits.mean(-1, keepdim=True)
    ranked, order = centred.sort(-1, descending=True)
    torch.testing.assert_close(found.up.double(), ranked[..., :k], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.down.double(), ranked.flip(-1)[..., :k], rtol=1e-5, atol=1e-6)
    for ids, numbers in ((found.up_ids, found.up), (found.down_ids, found.down)):
        picked = centred.gather(-1, ids)
        torch.testing.assert_close(picked, numbers.double(), rtol=1e-5, atol=1e-6)
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all(), "a token is listed twice"
    torch.testing.assert_close(found.mean.double(), logits.mean(-1), rtol=1e-5, atol=1e-6)
    assert found.n_tokens == logits.shape[-1]
    del order


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", ZOO, ids=str)
def test_components_promote_what_the_full_computation_ranks_first(spec, seed):
    model, ids = build(spec, seed), example_ids(spec, seed=seed)
    found = promoted_tokens(model, ids, pos=None, k=4)
    logits = full_logits(model, ids)
    assert found.labels == list(stream_parts(model, ids))
    assert_ranked(found, logits, 4)
    assert found.gap < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("spec", ZOO, ids=str)
def test_rows_of_every_unit_are_the_attribution_of_their_own_tokens(spec, unit, seed):
    """The verb folds each token's row of W_U into a direction: it shares no product with this."""
    model, ids = build(spec, seed), example_ids(spec, seed=seed)
    try:
        result = dla_hooks.direct_logit_attribution(model, ids, 5, unit=unit)
    except UnsupportedModelError:
        with pytest.raises(UnsupportedModelError):
            promoted_tokens(model, ids, unit=unit)
        return
    found = promoted_tokens(model, ids, unit=unit, k=2)
    assert found.labels == result.labels
    capped = getattr(model.config, "final_logit_softcapping", None) is not None
    for row in (0, len(found.labels) // 2, len(found.labels) - 1):
        for numbers, listed in ((found.up, found.up_ids), (found.down, found.down_ids)):
            answer, other = listed[row, :, 0], listed[row, :, 1]
            expected = dla_hooks.direct_logit_attribution(model, ids, answer, other, unit=unit)
            gap = numbers[row, :, 0] - numbers[row, :, 1]
            torch.testing.assert_close(gap, expected.attribution[row], rtol=1e-6, atol=1e-8)
            if not capped:
                one = dla_hooks.direct_logit_attribution(
                    model, ids, answer, unit=unit, center_unembed=True
                )
                torch.testing.assert_close(
                    numbers[row, :, 0], one.attribution[row], rtol=1e-6, atol=1e-8
                )


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2"])
def test_heads_promote_what_scaling_them_promotes(name):
    model, ids = build(name), example_ids(name)
    found = promoted_tokens(model, ids, unit="head", pos=None, k=1)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    for row in (0, layers * heads - 1):
        up, down = found.up_ids[row, ..., 0], found.down_ids[row, ..., 0]
        effect = head_effects(model, ids, up, down)[row // heads, row % heads]
        gap = found.up[row, ..., 0] - found.down[row, ..., 0]
        torch.testing.assert_close(gap, effect, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "granite", "cohere", "opt"])
def test_rows_and_bias_make_up_the_logits_of_the_model(name, unit):
    model, ids = build(name), example_ids(name)
    every = model.config.vocab_size
    found = promoted_tokens(model, ids, unit=unit, k=every)
    by_id = torch.empty_like(found.up).scatter_(-1, found.up_ids, found.up) + found.mean[..., None]
    total = by_id[-1] if unit == "layer" else by_id.sum(0)
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    bias = logits - total  # the same for every prompt
    torch.testing.assert_close(bias[0], bias[1], rtol=1e-4, atol=1e-5)
    token = dla_hooks.direct_logit_attribution(model, ids, 7)
    torch.testing.assert_close(bias[:, 7], token.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2", "granite", "mixtral"])
def test_rows_hold_to_rounding_in_every_dtype(name, dtype):
    model, ids = build(name, dtype=dtype), example_ids(name, batch=4, length=16)
    for unit in UNITS:
        found = promoted_tokens(model, ids, unit=unit, pos=None, k=3)
        assert found.up.dtype == torch.float32
        assert bool(torch.isfinite(found.up).all())


# --- tiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
def test_tiles_of_any_size_give_the_same_ranks(unit, monkeypatch):
    model, ids = build("gemma2"), example_ids("gemma2")
    whole = promoted_tokens(model, ids, unit=unit, pos=None, k=5)
    for logits, vectors in ((1, 1), (64, 7), (2**20, 30)):
        monkeypatch.setattr(vocabulary, "_LOGITS", logits)
        monkeypatch.setattr(token_ranks, "_VECTORS_AT_ONCE", vectors)
        tiled = promoted_tokens(model, ids, unit=unit, pos=None, k=5)
        assert torch.equal(tiled.up_ids, whole.up_ids)
        assert torch.equal(tiled.down_ids, whole.down_ids)
        torch.testing.assert_close(tiled.up, whole.up, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tiled.mean, whole.mean, rtol=1e-9, atol=1e-9)


def test_no_tile_is_of_the_size_of_rows_times_vocabulary(monkeypatch):
    model, ids = build("llama"), example_ids("llama")
    monkeypatch.setattr(vocabulary, "_LOGITS", 200)
    monkeypatch.setattr(token_ranks, "_VECTORS_AT_ONCE", 20)
    seen, made = [], vocabulary.logit_tiles

    def watched(unembed, y_RM):
        for tile in made(unembed, y_RM):
            seen.append(tile[2].numel())
            yield tile

    monkeypatch.setattr(token_ranks, "logit_tiles", watched)
    promoted_tokens(model, ids, pos=None, k=2)
    assert max(seen) <= 200


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_equal_logits_rank_by_id(step, monkeypatch):
    model, ids = build("llama"), example_ids("llama")
    with torch.no_grad():
        W_U = model.lm_head.weight
        W_U[10:40] = W_U[3]
        W_U[5] = -W_U[3]
        W_U[50:60] = -W_U[3]
    rows = len(promoted_tokens(model, ids, k=1).labels)
    monkeypatch.setattr(vocabulary, "_LOGITS", step * (rows + 3))
    found = promoted_tokens(model, ids[:1], k=model.config.vocab_size)
    for listed, numbers in ((found.up_ids, found.up), (found.down_ids, found.down)):
        equal = numbers.diff(dim=-1) == 0
        assert int(equal.sum()) > 20
        assert bool((listed.diff(dim=-1)[equal] > 0).all())
    few = promoted_tokens(model, ids[:1], k=6)
    assert torch.equal(few.up_ids, found.up_ids[..., :6])
    assert torch.equal(few.down_ids, found.down_ids[..., :6])


# --- vocabulary ------------------------------------------------------------------------------


def test_ids_that_the_tokenizer_lacks_are_in_neither_ranks_nor_mean():
    model, ids, tokenizer = build("gpt2"), example_ids("gpt2"), tiny_tokenizer()
    real = len(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[real:] *= 50
    ids = ids.clamp(max=real - 1)
    found = promoted_tokens(model, ids, pos=None, k=4, tokenizer=tokenizer)
    assert_ranked(found, full_logits(model, ids)[..., :real], 4)
    every = promoted_tokens(model, ids, pos=None, k=4)
    assert every.n_tokens > real
    assert int(every.up_ids.max()) >= real


def test_an_id_that_a_tokenizer_skips_is_left_out():
    model, ids, tokenizer = build("gpt2"), example_ids("gpt2"), tiny_tokenizer()
    known = tokenizer.get_vocab()
    skipped = known.pop(next(name for name, i in known.items() if i == 7))
    tokenizer.get_vocab = lambda: known
    found = promoted_tokens(model, ids, k=1000, tokenizer=tokenizer)
    kept = [i for i in range(len(known) + 1) if i != skipped]
    assert found.up_ids[0, 0].sort().values.tolist() == kept
    logits = full_logits(model, ids)[:, :, -1, kept]
    torch.testing.assert_close(found.mean, logits.mean(-1), rtol=1e-5, atol=1e-6)


def test_a_tokenizer_of_other_ids_is_refused():
    model, tokenizer = build("gpt2"), tiny_tokenizer()
    tokenizer.get_vocab = lambda: {"one": 3, "other": 10**6}
    with pytest.raises(InputError, match="scores 1 of the tokens"):
        promoted_tokens(model, example_ids("gpt2"), tokenizer=tokenizer)


def test_k_beyond_the_vocabulary_lists_every_token():
    model, ids = build("llama"), example_ids("llama")
    found = promoted_tokens(model, ids, k=10**6)
    assert found.k == model.config.vocab_size
    assert torch.equal(found.up_ids.flip(-1), found.down_ids)


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_tokens_that_the_model_masks_are_not_compared_and_ranked_as_all_others(mask):
    model, ids = build("llama"), example_ids("llama")
    plain = promoted_tokens(model, ids, k=3)
    forward = type(model).forward

    def masked(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits[..., 20:30] = mask
        return out

    class Masking(type(model)):
        pass

    Masking.forward = masked
    Masking.__module__ = type(model).__module__
    model.__class__ = Masking
    found = promoted_tokens(model, ids, k=3)
    assert torch.equal(found.up_ids, plain.up_ids)


# --- positions and inputs --------------------------------------------------------------------


@pytest.mark.parametrize(
    "pos", [None, -1, 0, (1, 4), [0, 2], slice(None, None, 2), (0, 0)], ids=str
)
@pytest.mark.parametrize("unit", UNITS)
def test_positions_are_those_of_the_verb(unit, pos):
    model, ids = build("gpt2"), example_ids("gpt2")
    result = dla_hooks.direct_logit_attribution(model, ids, 5, unit=unit, pos=pos)
    found = promoted_tokens(model, ids, unit=unit, pos=pos, k=3)
    assert found.up.shape == (*result.attribution.shape, 3)
    assert found.mean.shape == result.attribution.shape
    assert torch.equal(found.positions, result.positions)
    assert found.tokens == result.tokens
    whole = promoted_tokens(model, ids, unit=unit, pos=None, k=3)
    for flat, position in enumerate(found.positions.reshape(len(ids), -1)[0].tolist()):
        here = found.up.reshape(len(found), len(ids), -1, 3)[:, :, flat]
        torch.testing.assert_close(here, whole.up[:, :, position], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("unit", UNITS)
def test_strings_of_different_lengths_are_padded_and_each_as_by_itself(unit):
    model, tokenizer = build("llama", dtype=torch.float32), tiny_tokenizer()
    texts = ["the cat", "the dog sat on the cat"]
    both = promoted_tokens(model, texts, unit=unit, pos=None, k=3, tokenizer=tokenizer)
    for row, text in enumerate(texts):
        alone = promoted_tokens(model, text, unit=unit, pos=None, k=3, tokenizer=tokenizer)
        n = alone.shape[1]
        here = both.prompt(row)
        torch.testing.assert_close(here.up[:, :, -n:], alone.up, rtol=1e-4, atol=1e-5)
        assert torch.equal(here.up_ids[:, :, -n:], alone.up_ids)
        assert bool(here.up[:, :, :-n].isnan().all())
        assert bool((here.up_ids[:, :, :-n] == -1).all())
    lines = both.records()
    real = sum(len(tokens) for tokens in both.tokens)
    assert len(lines) == len(both) * real * 6
    assert {line["row"] for line in lines} == {0, 1}


def test_masks_mappings_and_lists_are_read_as_the_verb_reads_them():
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    alone = promoted_tokens(model, ids[:1, 3:], k=3)
    forms = [
        promoted_tokens(model, ids, k=3, attention_mask=mask),
        promoted_tokens(model, {"input_ids": ids, "attention_mask": mask}, k=3),
        promoted_tokens(model, [ids[0, 3:].tolist(), ids[1].tolist()], k=3),
    ]
    for form in forms:
        torch.testing.assert_close(form.prompt(0).up, alone.up, rtol=1e-4, atol=1e-5)


# --- hooks, adapters, other unembeddings -----------------------------------------------------


def steered(model, where):
    steer = torch.randn(model.config.hidden_size, dtype=torch.float64) * 3
    places = {
        "block": model.model.layers[1],
        "end": model.model.norm,
        "behind": model.model.norm,
        "embedding": model.model.embed_tokens,
        "projection": model.model.layers[1].self_attn.o_proj,
        "attention": model.model.layers[0].mlp,
    }
    if where == "end":
        return places[where].register_forward_pre_hook(lambda m, args: (args[0] + steer,))
    return places[where].register_forward_hook(lambda m, args, out: out + steer)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("where", ["block", "end", "behind", "embedding", "projection"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_what_hooks_write_has_the_rows_that_the_verb_has(name, where, unit):
    model, ids = build(name), example_ids(name)
    steered(model, where)
    found = promoted_tokens(model, ids, unit=unit, pos=None, k=2)
    result = dla_hooks.direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
    assert found.labels == result.labels
    for row in range(len(found)):
        up, down = found.up_ids[row, ..., 0], found.down_ids[row, ..., 0]
        expected = dla_hooks.direct_logit_attribution(model, ids, up, down, unit=unit, pos=None)
        gap = found.up[row, ..., 0] - found.down[row, ..., 0]
        torch.testing.assert_close(gap, expected.attribution[row], rtol=1e-5, atol=1e-7)


def test_hooks_behind_a_post_norm_have_a_row_of_heads():
    model, ids = build("gemma2"), example_ids("gemma2")
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda m, args, out: out + out.flip(-1))
    found = promoted_tokens(model, ids, unit="head", k=1)
    row = found.labels.index("L1hook")
    up, down = found.up_ids[row, :, 0], found.down_ids[row, :, 0]
    result = dla_hooks.direct_logit_attribution(model, ids, up, down, unit="head")
    assert found.labels == result.labels
    gap = (found.up - found.down)[row, :, 0]
    torch.testing.assert_close(gap, result["L1hook"], rtol=1e-5, atol=1e-7)


def test_what_hooks_write_to_logits_is_refused_and_had_with_check_off():
    model, ids = build("llama"), example_ids("llama")
    plain = promoted_tokens(model, ids, k=3)
    model.lm_head.register_forward_hook(lambda m, args, out: out + 3 * out.roll(1, -1))
    with pytest.raises(DecompositionError, match="the last stream's logits miss"):
        promoted_tokens(model, ids, k=3)
    found = promoted_tokens(model, ids, k=3, check=False)
    assert torch.equal(found.up_ids, plain.up_ids)
    assert found.gap != found.gap


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adapted_unembeddings_are_read_as_merged_ones(unit, dtype):
    peft = pytest.importorskip("peft")
    base = build("llama", dtype=dtype)
    targets = ["lm_head", "o_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape))
    ids = example_ids("llama")
    found = promoted_tokens(model, ids, unit=unit, k=3)
    answer, other = found.up_ids[-1, :, 0], found.down_ids[-1, :, 0]
    expected = dla_hooks.direct_logit_attribution(model, ids, answer, other, unit=unit)
    gap = (found.up - found.down)[-1, :, 0]
    torch.testing.assert_close(gap, expected.attribution[-1].to(gap), rtol=1e-2, atol=1e-3)
    if dtype is torch.float64:
        merged = promoted_tokens(model.merge_and_unload().eval(), ids, unit=unit, k=3)
        torch.testing.assert_close(found.up, merged.up, rtol=1e-6, atol=1e-7)
        assert torch.equal(found.up_ids, merged.up_ids)


@pytest.mark.parametrize("unit", UNITS)
def test_quantised_unembeddings_are_read_as_what_they_compute(unit):
    def head_too(module, name):
        return isinstance(module, nn.Linear) and name.endswith(("lm_head", "mlp.down_proj"))

    model = torchao_model("Int8WeightOnlyConfig", head_too)
    ids = torch.tensor([[3, 5, 17, 33], [9, 8, 7, 6]])
    found = promoted_tokens(model, ids, unit=unit, k=3)
    with torch.no_grad():
        W_U = model.lm_head(torch.eye(64)).T
        stream = {}
        handle = model.model.norm.register_forward_hook(lambda m, a, out: stream.update(y=out))
        model(ids)
        handle.remove()
        logits = (stream["y"][:, -1] @ W_U.T).double()
    if unit == "layer":
        assert_ranked(found["final_post"], logits[None], 3)
    assert found.gap < 1e-3


def test_wide_unembeddings_are_run_in_few_vectors_at_a_time(monkeypatch):
    class Odd(nn.Linear):
        """No plain linear module, though it computes as one."""

        largest = 0

        def forward(self, x):
            Odd.largest = max(Odd.largest, x.shape[0])
            return super().forward(x)

    model, ids = build("llama"), example_ids("llama")
    whole = promoted_tokens(model, ids, pos=None, k=3)
    odd = Odd(*reversed(model.lm_head.weight.shape), bias=False).to(torch.float64)
    odd.weight = model.lm_head.weight
    model.lm_head = odd.eval()
    promoted_tokens(model, ids, k=3)  # what is measured once
    Odd.largest = 0
    monkeypatch.setattr(vocabulary, "_LOGITS", 16 * model.config.vocab_size)
    found = promoted_tokens(model, ids, pos=None, k=3)
    assert torch.equal(found.up_ids, whole.up_ids)
    torch.testing.assert_close(found.up, whole.up, rtol=1e-9, atol=1e-9)
    assert Odd.largest <= 16


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_offloaded_models_give_the_numbers_of_those_in_memory(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    expected = promoted_tokens(model, ids, unit="head", k=3)
    accelerate.disk_offload(model, str(tmp_path))
    found = promoted_tokens(model, ids, unit="head", k=3)
    assert torch.equal(found.up_ids, expected.up_ids)
    torch.testing.assert_close(found.up, expected.up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["zaya", "gpt_neox_japanese", "longcat_flash", "mamba"])
@pytest.mark.parametrize("unit", UNITS)
def test_constants_gains_and_second_attentions_have_the_rows_of_the_verb(model_type, unit):
    try:
        model = build_mapped(model_type)
    except Exception as error:
        pytest.skip(str(error))
    ids = example_ids_any(model)
    try:
        result = dla_hooks.direct_logit_attribution(model, ids, 5, 7, unit=unit)
    except UnsupportedModelError:
        with pytest.raises(UnsupportedModelError):
            promoted_tokens(model, ids, unit=unit)
        return
    found = promoted_tokens(model, ids, unit=unit, k=10**6)
    assert found.labels == result.labels
    by_id = torch.empty_like(found.up).scatter_(-1, found.up_ids, found.up)
    gap = by_id[..., 5] - by_id[..., 7]
    torch.testing.assert_close(gap, result.attribution.to(gap), rtol=1e-5, atol=1e-6)


def test_folded_value_biases_are_in_the_remainder():
    model, ids = build("gpt2"), example_ids("gpt2")
    unit = dla_hooks.Heads(fold_value_biases=True)
    found = promoted_tokens(model, ids, unit=unit, k=1)
    plain = promoted_tokens(model, ids, unit="head", k=1)
    assert not torch.allclose(found.up, plain.up, atol=1e-3)
    for row in (0, -1):
        up, down = found.up_ids[row, :, 0], found.down_ids[row, :, 0]
        expected = dla_hooks.direct_logit_attribution(model, ids, up, down, unit=unit)
        gap = (found.up - found.down)[row, :, 0]
        torch.testing.assert_close(gap, expected.attribution[row], rtol=1e-6, atol=1e-8)
    wrapped = promoted_tokens(dla_hooks.wrap(model), ids, unit="head", k=1)
    torch.testing.assert_close(wrapped.up, found.up)


def test_labels_of_a_classifier_are_ranked():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, num_labels=5, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    found = promoted_tokens(model, torch.tensor([[3, 5, 8]]), k=2, tokenizer=tiny_tokenizer())
    assert found.n_tokens == 5
    assert set(found.names.values()) <= {f"LABEL_{i}" for i in range(5)}
    config.num_labels = 1
    with pytest.raises(UnsupportedModelError, match="ranks need two"):
        promoted_tokens(GPT2ForSequenceClassification(config).eval(), torch.tensor([[3, 5, 8]]))


# --- the check -------------------------------------------------------------------------------


def test_a_wrong_row_of_the_unembedding_is_noticed(monkeypatch):
    """Of all tokens, those in no row's list included."""
    model, ids = build("llama"), example_ids("llama")
    made = vocabulary.logit_tiles

    def wrong(unembed, y_RM):
        for vectors, tokens, values in made(unembed, y_RM):
            values = values.clone()
            values[:, 17] += 1e-2
            yield vectors, tokens, values

    promoted_tokens(model, ids, k=1)
    monkeypatch.setattr(token_ranks, "logit_tiles", wrong)
    with pytest.raises(DecompositionError, match="the last stream's logits|the rows' logits"):
        promoted_tokens(model, ids, k=1)
    promoted_tokens(model, ids, k=1, check=False)


@pytest.mark.parametrize("unit", UNITS)
def test_a_row_that_is_built_wrong_is_noticed(unit, monkeypatch):
    from dla_hooks.stacks import row_vectors

    model, ids = build("llama"), example_ids("llama")
    kind = {
        "component": row_vectors.ComponentVectors,
        "layer": row_vectors.LayerVectors,
        "head": row_vectors.HeadVectors,
    }[unit]
    made = kind.at

    def wrong(self, place):
        rows = made(self, place).clone()
        rows[-1] *= 1.01
        return rows

    monkeypatch.setattr(kind, "at", wrong)
    with pytest.raises(DecompositionError, match="the rows' logits miss"):
        promoted_tokens(model, ids, unit=unit, k=1)


def test_activations_that_the_model_does_not_write_are_refused():
    model, ids = build("llama"), example_ids("llama")
    promoted_tokens(model, ids)
    first = model.model.layers[1].forward

    def more(hidden, *args, **kwargs):
        return first(hidden, *args, **kwargs) + 1.0 * (hidden.shape[1] > 4)

    model.model.layers[1].forward = more
    with pytest.raises(DLAError):
        promoted_tokens(model, ids)
    assert bool(torch.isfinite(promoted_tokens(model, ids, check=False).up).all())


@pytest.mark.parametrize("unit", UNITS)
def test_products_under_autocast_keep_their_precision(unit):
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    promoted_tokens(model, ids, unit=unit)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(DecompositionError, match="Autocast is on"):
            promoted_tokens(model, ids, unit=unit)
        found = promoted_tokens(model, ids, unit=unit, k=1, check=False)
        up, down = found.up_ids[-1, :, 0], found.down_ids[-1, :, 0]
        result = dla_hooks.direct_logit_attribution(model, ids, up, down, unit=unit, check=False)
    gap = (found.up - found.down)[-1, :, 0]
    torch.testing.assert_close(gap, result.attribution[-1], rtol=1e-4, atol=1e-5)


def test_the_model_is_as_found():
    model, ids = build("gemma2"), example_ids("gemma2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state = torch.get_rng_state()
    for unit in UNITS:
        promoted_tokens(model, ids, unit=unit, pos=None)
    assert torch.equal(state, torch.get_rng_state())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"k": 0}, InputError, "k must be a positive int"),
        ({"k": -3}, InputError, "k must be a positive int"),
        ({"k": True}, InputError, "k must be a positive int"),
        ({"k": 2.5}, InputError, "k must be a positive int"),
        ({"k": "5"}, InputError, "k must be a positive int"),
        ({"pos": 99}, PositionError, "99"),
        ({"pos": "last"}, InputError, "pos must be"),
        ({"unit": "neurone"}, InputError, "unit must be one of"),
        ({"unit": ("component", "head")}, InputError, "one unit at a time"),
        ({"unit": {"mine": "head"}}, InputError, "one unit at a time"),
        ({"tokenizer": "gpt2"}, InputError, "tokenizer must be a tokenizer"),
        ({"input": None}, InputError, "either `input`"),
        ({"input": "text"}, InputError, "tokenizer"),
        ({"model": None}, InputError, "model must be"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_the_model_runs(options, error, says):
    model = build("gpt2")
    promoted_tokens(model, example_ids("gpt2"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    given = {"model": model, "input": example_ids("gpt2"), **options}
    with pytest.raises(error, match=says):
        promoted_tokens(given.pop("model"), given.pop("input"), **given)


def test_a_unit_without_vectors_is_refused_by_name():
    class Halves(dla_hooks.Components):
        words = dla_hooks.Components.words.__class__("halves", "Halves", "halves")

    with pytest.raises(
        InputError, match="no vectors for the rows of unit 'halves'; it takes 'comp"
    ):
        promoted_tokens(build("gpt2"), example_ids("gpt2"), unit=Halves())


# --- the result ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = dla_hooks.demo.load()
    texts = ["The keys near the cabinet", "The dog"]
    return promoted_tokens(model, texts, pos=None, k=3, tokenizer=tokenizer)


def test_records_are_ranked_lines(demo):
    lines = demo.records()
    assert list(lines[0]) == ["label", "row", "position", "rank", "token_id", "token", "logit"]
    first = [line for line in lines if line["label"] == "0_mlp_out" and line["row"] == 1]
    last = [line for line in first if line["position"] == 1]
    assert [line["rank"] for line in last] == [1, 2, 3, -1, -2, -3]
    one = demo["0_mlp_out"].prompt(1).position(-1)
    assert [(line["token"], line["logit"]) for line in last[:3]] == one.top("0_mlp_out")
    assert [(line["token"], line["logit"]) for line in last[3:]] == one.bottom("0_mlp_out")
    assert demo.to_csv().count("\n") == len(lines) + 1


def test_tokens_of_one_row_need_one_entry(demo):
    with pytest.raises(InputError, match="10 entries"):
        demo.top("embed")
    with pytest.raises(LabelError, match="near it are '0_mlp_out'"):
        demo["0_mlp"]
    with pytest.raises(ArgumentTypeError, match="by its label"):
        demo[0]
    with pytest.raises(PositionError, match="index 5"):
        demo.position(5)
    one = demo.position(-1).prompt(0)
    assert one.top("embed", 0) == []
    for k in (-1, True, 1.5):
        with pytest.raises(InputError, match="k must be an int"):
            one.top("embed", k)


def test_saved_results_are_read_back(demo, tmp_path):
    path = demo.save(tmp_path / "promoted.safetensors")
    for back in (dla_hooks.load(path), dla_hooks.PromotedTokens.load(path)):
        assert type(back) is dla_hooks.PromotedTokens
        assert back.records() == demo.records()
        assert repr(back) == repr(demo)
        assert back.names == demo.names
        assert back.words == demo.words
    with pytest.raises(InputError, match="saved list of promoted tokens"):
        dla_hooks.Summary.load(path)


def test_json_holds_everything(demo, tmp_path):
    read = json.loads(demo.to_json())
    assert read["format"] == "dla_hooks.promoted"
    assert read["labels"] == demo.labels
    assert read["up"][0][1][0] == [None, None, None]  # padding
    assert read["up_ids"] == demo.up_ids.tolist()
    assert json.loads(demo.to_json(tmp_path / "a.json").read_text("utf-8")) == read


def test_data_frames_have_the_records(demo):
    pandas = pytest.importorskip("pandas")
    frame = demo.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.to_dict("records") == demo.records()


def test_text_and_html_show_rows_with_tokens_up_and_down(demo):
    text = repr(demo)
    assert len(text.splitlines()) <= 25
    assert "0_mlp_out" in text
    (shown,) = re.findall(r"^ *3_attn_out .*?↑ ('.+?') ([-+][\d.]+)", text, re.MULTILINE)
    first = [one for one in demo.records() if one["label"] == "3_attn_out" and one["rank"] == 1]
    assert shown in [(repr(one["token"]), f"{one['logit']:+.2f}") for one in first]
    assert "one of 10 entries [2, 5]" in text
    html = demo._repr_html_()
    assert html.count("<tr") == len(demo) + 1
    assert "0_mlp_out" in html


def test_text_and_html_of_tokens_with_markup_are_escaped():
    one = torch.ones(1, 1, 1)
    ids = torch.zeros(1, 1, 1, dtype=torch.long)
    result = dla_hooks.PromotedTokens(
        ["<b>"], "component", one, ids, -one, ids, one[..., 0], {0: "<script>\ud800"}, 2
    )
    html = result._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    assert html.encode("utf-8")
    assert repr(result).encode("utf-8")


def test_results_of_no_entry_say_so():
    found = promoted_tokens(build("gpt2"), example_ids("gpt2"), pos=(0, 0))
    assert found.records() == []
    assert "no token is selected" in repr(found)
    assert "no token is selected" in found._repr_html_()


def test_results_whose_shapes_do_not_fit_are_refused():
    one, ids = torch.ones(1, 1, 2), torch.zeros(1, 1, 2, dtype=torch.long)
    with pytest.raises(InputError, match="down has shape"):
        dla_hooks.PromotedTokens(
            ["a"], "component", one, ids, one[..., :1], ids, one[..., 0], {}, 2
        )
    with pytest.raises(InputError, match="for 2 labels"):
        dla_hooks.PromotedTokens(["a", "b"], "component", one, ids, one, ids, one[..., 0], {}, 2)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@pytest.mark.parametrize(
    "paths", [["self_attention"], ["mlp", ""], ["self_attention", "mlp"]], ids=" and ".join
)
def test_hooks_in_blocks_stand_where_the_verb_has_them(paths, unit, seed):
    """Behind the first write they are in the middle of the block, and several are one row."""
    model, ids = build("bloom", seed), example_ids("bloom")
    n_tokens, block = model.config.vocab_size, model.transformer.h[1]
    handles = []
    for number, path in enumerate(paths, start=1):
        added = number * torch.arange(model.config.hidden_size, dtype=torch.float64).sin()

        def add(module, args, output, added=added):
            if isinstance(output, tuple):
                return (output[0] + added, *output[1:])
            return output + added

        handles.append(block.get_submodule(path).register_forward_hook(add))
    verb = dla_hooks.direct_logit_attribution(model, ids, 5, 7, unit=unit)
    found = promoted_tokens(model, ids, unit=unit, k=n_tokens)
    for handle in handles:
        handle.remove()
    assert found.labels == verb.labels
    for row, ids_BK, logits_BK in zip(verb.attribution, found.up_ids, found.up, strict=True):
        every = torch.zeros_like(logits_BK).scatter(1, ids_BK, logits_BK)
        torch.testing.assert_close(every[:, 5] - every[:, 7], row, rtol=0, atol=1e-9)
