"""The oracle and the zoo are checked first: what they say must be the models' own numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracle import (
    FAMILIES,
    ablation_effects,
    head_effects,
    last_stream,
    logit_of,
    logit_parts,
    logits_from_stream,
    projection_bias_effects,
    stream_parts,
)
from torch import Tensor
from zoo import BY_NAME, SMALLEST_VOCAB, ZOO, Spec, build, example_ids, supports, tiny_tokenizer

ANSWER, INCORRECT = 7, 11
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for their threads, by the minute on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ZOO, ids=lambda spec: spec.name, scope="module")
def spec(request: pytest.FixtureRequest) -> Spec:
    return request.param


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}", scope="module")
def case(request: pytest.FixtureRequest, spec: Spec) -> tuple[torch.nn.Module, Tensor]:
    """A model and ids; the tests share it, so each also checks that the one before cleaned up."""
    seed = request.param
    return build(spec, seed), example_ids(spec, seed=seed)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the size of what is expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_parts_sum_to_the_last_stream(case):
    model, ids = case
    parts = stream_parts(model, ids)
    assert error(sum(parts.values()), last_stream(model, ids)) < 1e-6
    assert all(part.shape == (*ids.shape, model.config.hidden_size) for part in parts.values())
    assert all(part.abs().max() > 0.05 for part in parts.values())  # none is negligible


@torch.no_grad()
def test_logits_are_reproduced(case):
    model, ids = case
    logits = model(ids, use_cache=False).logits
    assert error(logits_from_stream(model, last_stream(model, ids)), logits.double()) < 1e-5


@torch.no_grad()
def test_logit_parts_sum_to_the_model_s_own_logits(case):
    model, ids = case
    logits = model(ids, use_cache=False).logits.double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.atanh(logits / cap)
    for incorrect in (None, INCORRECT):
        total = sum(logit_parts(model, ids, ANSWER, incorrect).values())
        assert error(total, logit_of(logits, ANSWER, incorrect)) < 1e-5


def test_heads_and_projection_bias_sum_to_attn_out(case):
    model, ids = case
    parts = logit_parts(model, ids, ANSWER, INCORRECT)
    expected = torch.stack(
        [part for label, part in parts.items() if label.endswith("_attn_out")]  # in layer order
    )
    heads = head_effects(model, ids, ANSWER, INCORRECT)
    biases = projection_bias_effects(model, ids, ANSWER, INCORRECT)
    assert heads.shape == (len(expected), model.config.num_attention_heads, *ids.shape)
    assert error(heads.sum(1) + biases, expected) < 1e-6


def test_head_effects_do_not_depend_on_the_size_of_the_change(case):
    model, ids = case
    doubled = head_effects(model, ids, ANSWER, eps=1.0)
    ablated = head_effects(model, ids, ANSWER, eps=-1.0)
    assert error(ablated, doubled) < 1e-9


def test_the_last_layer_s_mean_total_effect_is_near_its_direct_effect():
    # Only the final norm stands after the last layer's attention when the block is parallel: with
    # a scale that barely moves, ablation gives the direct effect.
    model, ids = build("gptj"), example_ids("gptj")
    total = ablation_effects(model, ids, ANSWER, INCORRECT)
    direct = head_effects(model, ids, ANSWER, INCORRECT)[..., -1]
    assert total.shape == direct.shape
    correlation = torch.corrcoef(torch.stack([total[-1].flatten(), direct[-1].flatten()]))[0, 1]
    assert correlation > 0.8


@torch.no_grad()
def test_the_oracle_leaves_the_model_as_it_was(spec):
    model, ids = build(spec), example_ids(spec)
    before = model(ids, use_cache=False).logits
    modules = {id(module): dict(vars(module)) for module in model.modules()}
    head_effects(model, ids, ANSWER)
    projection_bias_effects(model, ids, ANSWER)
    ablation_effects(model, ids, ANSWER)
    assert torch.equal(before, model(ids, use_cache=False).logits)
    for module in model.modules():
        assert vars(module).keys() == modules[id(module)].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "llama", "gemma3_text", "falcon-rw"])
def test_padding_on_the_left_is_passed_on(name):
    attn = "sdpa" if supports(BY_NAME[name], "sdpa") else "eager"
    dtype = torch.float64 if attn == "sdpa" else torch.float32  # see `build`
    model, ids = build(name, dtype=dtype, attn=attn), example_ids(name)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    parts = stream_parts(model, ids, attention_mask=mask)
    stream = last_stream(model, ids, attention_mask=mask)
    real = mask.bool()
    assert error(sum(parts.values())[real], stream[real]) < 1e-6
    assert error(stream[0, 2:], last_stream(model, ids)[0, 2:]) > 1e-3  # the mask was felt


@torch.no_grad()
def test_results_are_float64_for_a_model_in_float32():
    exact, ids = build("gemma2"), example_ids("gemma2")
    model = build("gemma2", dtype=torch.float32)
    heads = head_effects(model, ids, ANSWER, INCORRECT)
    assert heads.dtype == torch.float64
    assert error(heads, head_effects(exact, ids, ANSWER, INCORRECT)) < 1e-4
    assert sum(logit_parts(model, ids, ANSWER).values()).dtype == torch.float64


def test_answers_may_differ_by_row_and_position():
    model, ids = build("llama"), example_ids("llama")
    one_by_one = torch.stack(
        [sum(logit_parts(model, ids, answer).values())[row] for row, answer in enumerate((5, 9))]
    )
    together = sum(logit_parts(model, ids, torch.tensor([[5], [9]])).values())
    assert error(together, one_by_one) < 1e-12


# The zoo


def test_every_family_is_in_the_zoo_and_in_the_oracle():
    assert {spec.model_type for spec in ZOO} == set(FAMILIES)
    assert len({spec.name for spec in ZOO}) == len(ZOO)


def test_no_parameter_is_left_at_a_default(spec):
    model = build(spec)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float64, name
        assert parameter.isfinite().all(), name
        assert parameter.std() > 0.05, name
        assert 0.005 < (parameter - 1).abs().mean() < 5, name


def test_a_seed_is_a_model_and_the_global_random_state_is_untouched():
    state = torch.get_rng_state()
    first, again, other = build("llama", 3), build("llama", 3), build("llama", 4)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_eager_and_sdpa_agree_where_both_are_supported(spec):
    if not supports(spec, "sdpa"):
        with pytest.raises(ValueError, match=spec.name):
            build(spec, attn="sdpa")
        return
    if spec.name == "falcon-rw":
        pytest.skip("transformers adds Falcon's alibi twice in eager attention")
    ids = example_ids(spec)
    eager, sdpa = (
        build(spec, attn=attn)(ids, use_cache=False).logits.double() for attn in ("eager", "sdpa")
    )
    assert error(sdpa, eager) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_hold_the_same_weights(spec, dtype):
    model, exact = build(spec, dtype=dtype), build(spec)
    for low, high in zip(model.parameters(), exact.parameters(), strict=True):
        assert low.dtype == dtype
        assert torch.equal(low, high.to(dtype))
    if dtype == torch.float32:
        ids = example_ids(spec)
        found = model(ids, use_cache=False).logits.double()
        assert error(found, exact(ids, use_cache=False).logits.double()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "mixtral-tied", "phi3-mha-tied", "llama"])
def test_sliding_window_changes_logits(name):
    model, ids = build(name), example_ids(name, length=12)
    changed = ids.clone()
    changed[:, 0] = 3 + (ids[:, 0] - 2) % 58
    before, after = (model(x, use_cache=False).logits[:, -1] for x in (ids, changed))
    # Two layers with a window of 4 reach back 6 positions.
    assert torch.equal(before, after) == (name != "llama")


def test_tokenizer_keeps_leading_spaces_and_fits_the_zoo():
    tokenizer = tiny_tokenizer()
    text = "When Mary and John went to the store, John gave a drink to"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["When", "ĠMary"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.encode("Mary") != tokenizer.encode(" Mary")
    assert len(tokenizer) < SMALLEST_VOCAB
    assert tokenizer.encode(" zebra") == [tokenizer.unk_token_id]


def test_tokenizer_can_add_bos():
    tokenizer = tiny_tokenizer(add_bos=True)
    plain = tiny_tokenizer().encode("The cat")
    assert tokenizer.encode("The cat") == [tokenizer.bos_token_id, *plain]
    assert tokenizer.encode("The cat", add_special_tokens=False) == plain
