"""Tensors and strings of odd kinds: the right numbers, or a refusal that says which kind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import (
    CheckpointError,
    InputError,
    TokenError,
    attribute_many,
    direct_logit_attribution,
    wrap,
)

ODD = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "meta": lambda x: x.to("meta"),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.quint8),
    "masked": lambda x: torch.masked.masked_tensor(x.float(), x > 0),
}
ODD_TOO = {"csr": lambda x: x.to_sparse_csr()}
ARGUMENTS = {
    "input": lambda model, x, ids: direct_logit_attribution(model, x, 5),
    "answer_tokens": lambda model, x, ids: direct_logit_attribution(model, ids, x),
    "incorrect_tokens": lambda model, x, ids: direct_logit_attribution(model, ids, 5, x),
    "attention_mask": lambda model, x, ids: direct_logit_attribution(
        model, ids, 5, attention_mask=x
    ),
    "pos": lambda model, x, ids: direct_logit_attribution(model, ids, 5, pos=x),
    "prompts": lambda model, x, ids: list(attribute_many(model, x, 5)),
    "tokens": lambda model, x, ids: wrap(model, tokenizer=tiny_tokenizer()).to_string(x),
}


@pytest.mark.filterwarnings("ignore")  # of torch's, about what is a prototype
@pytest.mark.parametrize("kind", [*ODD, *ODD_TOO])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_tensor_without_plain_values_is_refused_by_argument_and_kind(argument, kind):
    model, ids = build("llama"), example_ids("llama")
    odd = {**ODD, **ODD_TOO}[kind](ids)
    said = "sparse" if kind == "csr" else kind
    with pytest.raises(InputError, match=f"{argument} must be a plain tensor, got a {said} one"):
        ARGUMENTS[argument](model, odd, ids)


class Subclass(torch.Tensor):
    pass


EVEN = {
    "int32": lambda ids: ids.int(),
    "uint8": lambda ids: ids.to(torch.uint8),
    "not contiguous": lambda ids: ids.t().contiguous().t(),
    "a subclass": lambda ids: ids.as_subclass(Subclass),
    "a parameter": lambda ids: nn.Parameter(ids, requires_grad=False),
}


@pytest.mark.parametrize("kind", EVEN)
def test_ids_of_another_integer_kind_give_the_same_numbers(kind):
    for seed in (0, 1):
        model, ids = build("llama", seed=seed), example_ids("llama", seed=seed)
        found = direct_logit_attribution(model, EVEN[kind](ids), EVEN[kind](ids)[:, 0])
        expected = direct_logit_attribution(model, ids, ids[:, 0])
        assert torch.equal(found.attribution, expected.attribution)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_ids_that_are_no_integers_are_refused(dtype):
    model, ids = build("llama"), example_ids("llama")
    with pytest.raises(InputError, match="must be integers"):
        direct_logit_attribution(model, ids.to(dtype), 5)


HALF = "the \ud800 cat"
TEXTS = {
    "prompt": lambda model, tok: direct_logit_attribution(model, HALF, 5, tokenizer=tok),
    "answer_tokens": lambda model, tok: direct_logit_attribution(
        model, "the cat", HALF, tokenizer=tok
    ),
    "input": lambda model, tok: wrap(model, tokenizer=tok).to_tokens(HALF),
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_with_half_a_character_is_refused(what):
    with pytest.raises(TokenError, match="lone surrogate"):
        TEXTS[what](build("llama"), tiny_tokenizer())


def test_text_with_half_a_character_among_many_is_an_error_in_its_place():
    tokenizer = tiny_tokenizer()
    found = list(attribute_many(build("llama"), ["the cat", HALF], 5, tokenizer=tokenizer))
    assert isinstance(found[0], dla_hooks.DirectLogitAttribution)
    assert isinstance(found[1], TokenError)


@pytest.mark.parametrize("path", ["a\ud800", "a\0b"])
def test_path_that_no_file_can_have_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = direct_logit_attribution(build("llama"), example_ids("llama"), 5)
    with pytest.raises(CheckpointError, match="cannot be read"):
        dla_hooks.load(path)
    if "\0" not in path:  # safetensors cuts such a name off
        with pytest.raises(CheckpointError, match="cannot be written"):
            result.save(path)
    with pytest.raises(InputError, match="cannot write"):
        result.to_json(path)


@pytest.mark.filterwarnings("ignore")  # of torch's, about what is a prototype
@pytest.mark.parametrize("place", ["lm_head", "model.layers.1.self_attn.o_proj"])
@pytest.mark.parametrize("form", ["to_sparse", "to_sparse_csr"])
def test_sparse_weight_is_attributed(place, form):
    for seed in (0, 1):
        model = build("llama", dtype=torch.float32, seed=seed)
        ids, plain = example_ids("llama", seed=seed), copy.deepcopy(model)
        module = model.get_submodule(place)
        weight = getattr(module.weight.detach(), form)()
        module.weight = nn.Parameter(weight, requires_grad=False)
        for unit in ("component", "head"):
            found, expected = (
                direct_logit_attribution(m, ids, 5, unit=unit) for m in (model, plain)
            )
            torch.testing.assert_close(found.attribution, expected.attribution, rtol=0, atol=1e-5)


def test_number_of_rows_may_be_any_integer():
    np = pytest.importorskip("numpy")
    result = direct_logit_attribution(build("llama"), example_ids("llama"), 5)
    assert result.top(np.int64(3)) == result.top(3)
    for wrong in (True, 2.5, -1, "3"):
        with pytest.raises(InputError, match="must be an int"):
            result.top(wrong)
