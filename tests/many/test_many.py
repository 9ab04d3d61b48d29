"""Many prompts: each result is that of its prompt alone, and no prompt hurts another."""

from __future__ import annotations

import gc
import io
import itertools
import sys
import weakref

import pytest
import torch
from many_prompts import RECURRENT, assert_same, made, random_prompts
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from zoo import build, tiny_tokenizer

from dla_hooks import (
    ArgumentTypeError,
    DirectLogitAttribution,
    DLAError,
    InputError,
    NonFiniteError,
    PositionError,
    ShapeMismatchError,
    TokenError,
    TokenizerMissingError,
    TrainingModeError,
    UnsupportedModelError,
    attribute_many,
    direct_logit_attribution,
    wrap,
)
from dla_hooks.many.order import batches_of

pytestmark = pytest.mark.lowest


# Attention that pads well in float64, that turns padding into NaN there, and layers that read it.
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2 eager", "bloom eager", *RECURRENT])
@pytest.mark.parametrize("pos", [-1, None, [0, -1], slice(-3, None)], ids=repr)
def test_results_match_prompts_run_alone(name, pos):
    model, tokenizer = made(name, seed=1), tiny_tokenizer()
    prompts = random_prompts(seed=1, vocabulary=len(tokenizer))
    for unit in ("component", "layer", *(["head"] if name not in ("mamba", "rwkv") else [])):
        options = {"unit": unit, "pos": pos, "tokenizer": tokenizer}
        results = attribute_many(model, iter(prompts), 5, 7, max_tokens=20, **options)
        for prompt, result in zip(prompts, results, strict=True):
            assert_same(result, direct_logit_attribution(model, prompt, 5, 7, **options))


def test_compatible_prompts_share_a_batch(ran, model):
    list(attribute_many(model, random_prompts(), 5, max_tokens=27))
    assert ran == [(1, 4), (3, 9), (3, 7), (2, 2)]  # the first is a trial


def test_models_that_read_padding_batch_equal_lengths_only():
    model = made("recurrent_gemma")
    shapes = []
    prompts = random_prompts((4, 6, 4, 4))
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    list(attribute_many(model, prompts, 5))
    hook.remove()
    assert shapes[-2:] == [(1, 6), (3, 4)]


def test_batches_fill_up_to_max_tokens():
    lengths = [3, 50, 8, 8, 1, 20]
    batches = batches_of(lengths, 24)
    assert batches == [[1], [5], [2, 3, 0], [4]]
    assert batches_of(lengths, 24, same_length=True) == [[1], [5], [2, 3], [0], [4]]
    assert batches_of([], 24) == []


def test_answers_of_every_form_match_prompts_alone(model):
    tokenizer = tiny_tokenizer()
    prompts = random_prompts(vocabulary=len(tokenizer))
    words = [" Mary", 5, torch.tensor([9]), torch.tensor(9), [11], " cat", 13, 17]
    results = attribute_many(model, prompts, words, iter(range(20, 28)), tokenizer=tokenizer)
    for prompt, word, wrong, result in zip(prompts, words, range(20, 28), results, strict=True):
        one = word if isinstance(word, str) else int(torch.as_tensor(word))
        alone = direct_logit_attribution(model, prompt, one, wrong, tokenizer=tokenizer)
        assert_same(result, alone)


@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_next_token_at_every_position_matches_prompts_alone(name, unit):
    model = made(name)
    prompts = random_prompts((6, 9, 2, 4, 4))
    inputs, answers = [ids[:-1] for ids in prompts], [ids[1:] for ids in prompts]
    results = attribute_many(model, inputs, answers, unit=unit, pos=None)
    for ids, result in zip(prompts, results, strict=True):
        alone = direct_logit_attribution(model, ids[:-1], ids[1:], unit=unit, pos=None)
        assert_same(result, alone)
        assert result.attribution.shape[1:] == (1, len(ids) - 1)


def test_one_incorrect_token_broadcasts_over_positions(model):
    prompts = random_prompts((6, 3))
    answers = [ids.flip(0) for ids in prompts]
    for ids, result in zip(
        prompts, attribute_many(model, prompts, answers, 7, pos=None), strict=True
    ):
        wrong = torch.full_like(ids, 7)
        assert_same(result, direct_logit_attribution(model, ids, ids.flip(0), wrong, pos=None))


def test_prompt_forms_give_same_results(model):
    tokenizer = tiny_tokenizer(add_bos=True)
    texts = ["When Mary and John went to the store", "The capital of France is", "the cat sat"]
    ids = [tokenizer.encode(text) for text in texts]
    by_text = list(attribute_many(model, texts, " Paris", tokenizer=tokenizer))
    assert "".join(by_text[1].tokens[0]) == "<bos>The capital of France is"
    for prompts in (ids, (row for row in ids), [torch.tensor(row).numpy() for row in ids]):
        for one, other in zip(
            by_text, attribute_many(model, prompts, " Paris", tokenizer=tokenizer), strict=True
        ):
            assert_same(one, other, atol=0)
    without = next(attribute_many(model, texts, 5, tokenizer=tokenizer, prepend_bos=False))
    assert without.tokens[0][0] == "When"


def test_wrapped_model_keeps_its_conventions(model):
    wrapped = wrap(model, tiny_tokenizer())
    (result,) = attribute_many(wrapped, ["the cat sat"], 5, unit="head")
    assert_same(result, direct_logit_attribution(wrapped, "the cat sat", 5, unit="head"))


BAD = [
    ([], 5, InputError, "empty"),
    ("", 5, InputError, "empty"),
    ("\ud800", 5, TokenError, "lone surrogate"),
    ([3, 63], 5, TokenError, "token id 63"),
    ([3, 4], 63, TokenError, "token id 63"),
    (list(range(3, 40)) * 2, 5, InputError, "has 74 tokens"),
    ([3, 4], " Mary John", TokenError, "is 2 tokens"),
    ([3, 4], [5, 6], ShapeMismatchError, r"shape \[2\]"),
    ([3, 4], None, InputError, "NoneType"),
    ([3], 5, PositionError, "out of range"),
    (None, 5, InputError, "NoneType"),
    ([0.5, 1.5], 5, InputError, "float32"),
    ([[3, 4], [5, 6]], 5, InputError, "one row"),
    (["a", "b"], 5, InputError, "token ids"),
    (3.5, 5, InputError, "float"),
]


@pytest.mark.parametrize("at", range(3))
def test_bad_prompts_leave_others_unchanged(model, at):
    tokenizer = tiny_tokenizer()
    good = random_prompts((4, 6, 3, 5, 2) * 3, vocabulary=len(tokenizer))
    pairs = []
    for prompt, bad in zip(good, BAD, strict=True):
        pair = [(prompt, 5), (prompt, 5), (prompt, 5)]
        pair[at] = bad[:2]
        pairs += pair
    prompts, answers = zip(*pairs, strict=True)
    results = list(attribute_many(model, prompts, answers, pos=-2, tokenizer=tokenizer))
    assert len(results) == len(pairs)
    for index, result in enumerate(results):
        if index % 3 == at:
            _, _, error, said = BAD[index // 3]
            assert type(result) is error
            assert result.prompt_index == index
            with pytest.raises(error, match=said):
                raise result
        else:
            prompt = good[index // 3]
            alone = direct_logit_attribution(model, prompt, 5, pos=-2, tokenizer=tokenizer)
            assert_same(result, alone)


def test_errors_found_while_reading_split_no_batch(ran, model):
    too_long, without_the_position, good = random_prompts((65, 1, 5))
    prompts = [good, too_long, good, without_the_position, good, good]
    results = list(attribute_many(model, prompts, [5, 5, 5, 5, 5, 63], pos=-2))
    assert [isinstance(one, DLAError) for one in results] == [False, True, False, True, False, True]
    assert ran == [(1, 4), (3, 5)]  # the first is a trial


def test_a_batch_that_fails_is_halved_until_the_bad_prompt_stands_alone():
    model = made("llama")
    prompts = random_prompts((4, 5, 6, 7, 8, 3, 5, 6), vocabulary=40)
    prompts[5][1] = 50

    def break_token_50(_, args, out):
        return out.masked_fill((args[0] == 50)[..., None], float("nan"))

    model.get_input_embeddings().register_forward_hook(break_token_50)
    results = list(attribute_many(model, prompts, 5))
    assert isinstance(results[5], NonFiniteError)
    assert results[5].prompt_index == 5
    # What an error holds on to would stay alive for as long as the error is kept.
    assert results[5].__traceback__ is None
    assert results[5].__context__ is None
    for index in set(range(8)) - {5}:
        assert_same(results[index], direct_logit_attribution(model, prompts[index], 5))


def test_out_of_memory_shrinks_batches(ran, model):
    def small_machine(_, args, kwargs):
        if kwargs["input_ids"].numel() > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    handle = model.register_forward_pre_hook(small_machine, with_kwargs=True)
    prompts = random_prompts((8, 8, 8, 8, 20, 4, 4, 4, 4))
    results = list(attribute_many(model, prompts, 5))
    handle.remove()
    assert type(results[4]) is DLAError
    assert "20 tokens runs out of memory by itself (CUDA out of memory. Tried to allo" in str(
        results[4]
    )
    for index in set(range(9)) - {4}:
        assert_same(results[index], direct_logit_attribution(model, prompts[index], 5))
    tried = [rows * width for rows, width in ran if (rows, width) != (1, 4)]
    assert sum(size > 16 for size in tried) <= 4  # and it is not tried again and again
    assert "give a chunk_size" in str(results[4])


def test_long_prompts_run_in_chunks(ran, model):
    prompts = random_prompts()
    list(attribute_many(model, prompts, 5, chunk_size=4))  # asks whether pieces are the same
    ran.clear()
    results = list(attribute_many(model, prompts, 5, pos=None, chunk_size=4))
    assert max(width for _, width in ran) == 4
    for prompt, result in zip(prompts, results, strict=True):
        assert_same(result, direct_logit_attribution(model, prompt, 5, pos=None))
    with pytest.raises(UnsupportedModelError, match="in chunks"):
        attribute_many(made("mamba"), prompts, 5, chunk_size=2)


def test_other_exceptions_propagate_and_leave_no_hooks(model):
    def stop(*_):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(stop)
    handle.remove()
    results = attribute_many(model, random_prompts(), 5, window=2)
    next(results)
    next(results)
    handle = model.lm_head.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    handle.remove()
    assert no_hooks(model)


def no_hooks(model) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_closing_early_leaves_no_hooks(model):
    state = torch.random.get_rng_state()
    results = attribute_many(model, random_prompts(), 5, window=3)
    for _ in range(2):
        next(results)
        assert no_hooks(model)
    results.close()
    assert no_hooks(model)
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(StopIteration):
        next(results)


def test_prompts_are_read_a_window_at_a_time(model):
    def endless():
        for index in itertools.count():
            assert index < 2 * 4, "read beyond the second window"
            yield random_prompts((1 + index % 5,))[0]

    results = attribute_many(model, endless(), 5, window=4)
    for _ in range(8):
        assert isinstance(next(results), DirectLogitAttribution)
    with pytest.raises(AssertionError, match="beyond the second"):
        next(results)


def test_results_and_batches_are_freed(model):
    seen = []
    for result in attribute_many(model, random_prompts((4, 6) * 4), 5, window=4, pos=None):
        gc.collect()
        assert all(one() is None for one in seen)
        seen.append(weakref.ref(result))
        values = result.attribution
        assert values.untyped_storage().nbytes() == values.numel() * values.element_size()
        del result, values


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"unit": "neurons"}, InputError, "unit must be"),
        ({"answer_tokens": None}, InputError, "answer_tokens is required"),
        ({"answer_tokens": 63}, TokenError, "token id 63"),
        ({"answer_tokens": 5.5}, InputError, "float"),
        ({"answer_tokens": " Mary"}, TokenizerMissingError, "tokenizer"),
        ({"incorrect_tokens": -1}, TokenError, "incorrect_tokens"),
        ({"answer_tokens": [5, 6, 7]}, InputError, "3 for 8 prompts"),
        ({"incorrect_tokens": range(9)}, InputError, "9 for 8 prompts"),
        ({"pos": "last"}, InputError, "pos must be"),
        ({"pos": ()}, ArgumentTypeError, "1 to 3"),
        ({"max_tokens": 0}, InputError, "max_tokens must be an int of at least 1"),
        ({"max_tokens": 4.5}, InputError, "max_tokens"),
        ({"window": True}, InputError, "window"),
        ({"progress": "yes"}, InputError, "progress"),
        ({"tokenizer": "gpt2"}, InputError, "tokenizer must be"),
        ({"prompts": "a string"}, InputError, "one string"),
        ({"prompts": 5}, InputError, "got int"),
        ({"prompts": torch.tensor([1, 2])}, InputError, "one row of ids"),
        ({"prompts": {(1, 2), (3, 4)}}, InputError, "a set, whose order means nothing"),
        ({"answer_tokens": set(range(3, 11))}, InputError, "answer_tokens must be .* a set has"),
        ({"incorrect_tokens": frozenset({5})}, InputError, "a frozenset has none"),
        ({"answer_tokens": dict.fromkeys(range(8), 5)}, InputError, "a dict has none"),
        ({"chunk_size": 0}, InputError, "chunk_size must be an int of at least 1"),
        ({"chunk_size": "2"}, InputError, "chunk_size"),
        ({"prompts": {"input_ids": [[1]]}}, InputError, "of \\['input_ids'\\]"),
        ({"model": "gpt2"}, InputError, "model must be"),
    ],
)
def test_error_of_all_prompts_raises_at_call(model, given, error, said):
    usual = {"model": model, "prompts": random_prompts(), "answer_tokens": 5}
    with pytest.raises(error, match=said):
        attribute_many(**{**usual, **given})


def test_unsupported_model_raises_at_call():
    model = made("gpt2")
    model.transformer.h[1].train()
    with pytest.raises(TrainingModeError, match=r"h\.1"):
        attribute_many(model, random_prompts(), 5)
    with pytest.raises(UnsupportedModelError, match="no attention heads"):
        attribute_many(made("mamba"), random_prompts(), 5, unit="head")


@pytest.mark.parametrize(("n", "said"), [(5, "it holds 5, and"), (9, "more than the 8")])
def test_answer_count_mismatch_raises_at_end(model, n, said):
    results = attribute_many(model, iter(random_prompts()), iter([5] * n), window=3)
    got = [next(results) for _ in range(min(n, 8))]
    assert all(isinstance(result, DirectLogitAttribution) for result in got)
    with pytest.raises(InputError, match=said):
        next(results)


def test_no_prompts_give_no_results(model):
    assert list(attribute_many(model, [], 5)) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"),
    [
        (io.StringIO, None, False),
        (Terminal, None, True),
        (io.StringIO, True, True),
        (Terminal, False, False),
    ],
)
def test_progress_bar_shows_only_at_terminals(model, monkeypatch, capsys, stream, progress, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr("dla_hooks.bars._SOON", 0)
    list(attribute_many(model, random_prompts(), 5, progress=progress))
    assert ("8/8" in sys.stderr.getvalue()) is shown
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.filterwarnings("error::dla_hooks.DLAWarning")
def test_special_tokens_of_the_model_are_not_among_the_made_up_ones(auto):
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(build("llama").config).eval()
    for pad in range(model.config.vocab_size):
        model.config.pad_token_id = pad
        model.config.eos_token_id = [(pad + 1) % 61, (pad + 2) % 61]
        (found,) = attribute_many(model, [[(pad + 5) % 61, (pad + 7) % 61]], 1)
        assert not isinstance(found, Exception), (pad, found)
