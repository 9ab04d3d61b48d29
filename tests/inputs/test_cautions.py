"""Prompts that look like something else than what was meant: a warning, and no other number."""

from __future__ import annotations

import warnings

import pytest
import torch
from mapping_zoo import build_any
from zoo import build, tiny_tokenizer

from dla_hooks import (
    DLAWarning,
    InputError,
    attribute_many,
    demo,
    direct_logit_attribution,
    prepare,
)

PAD = 7
LOOKS_PADDED, TWO_BOS = "look padded", "begins with two BOS"


def model_with(pad=PAD, bos=0, eos=1, spec="llama", **config):
    model = build(spec, dtype=torch.float32)
    model.config.pad_token_id, model.config.bos_token_id = pad, bos
    model.config.eos_token_id = eos
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def warned(call) -> list[str]:
    """The texts of the warnings of a call, all at a line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.category is DLAWarning and one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


SPECIAL = {"pad": 1, "eos": 1}  # GPT-2's custom: one token for both
PADDED = [
    ([[0, 5, 9, 8], [0, 9, 7, 7]], {}),
    ([[0, 5, 9, 8], [7, 0, 9, 6]], {}),
    ([[0, 5, 9, 7]], {}),
    ([[0, 5, 9, 8], [0, 9, 1, 1]], SPECIAL),
    ([[0, 5, 9, 8], [1, 1, 0, 9]], SPECIAL),
    ([[0, 5, 9, 8], [0, 9, 1, 1]], {"pad": None}),
    ([[0, 5, 9, 8], [0, 9, 1, 1]], {"pad": None, "eos": [1, 2]}),
    ([[0, 5, 9, 8], [0, 0, 9, 6]], {"pad": 0}),  # of two rows one begins with it
    ([[0, 0, 0, 6]], {"pad": 0}),
]
PLAIN = [
    ([[0, 5, 7, 8], [0, 9, 7, 6]], {}),  # in the middle
    ([[0, 5, 9, 8], [0, 5, 9, 1]], SPECIAL),  # a text ends with one EOS
    ([[1, 5, 9, 8], [1, 5, 9, 3]], SPECIAL),
    ([[7, 7, 7]], {}),  # nothing else: that is the prompt
    ([[0, 5, 9, 8]], {"pad": None, "bos": None, "eos": None}),
    ([[0, 5, 9, 8]], {"pad": -1}),
]


@pytest.mark.parametrize(("rows", "tokens"), PADDED)
def test_ids_that_look_padded_warn_without_a_mask(rows, tokens):
    model, ids = model_with(**tokens), torch.tensor(rows)
    (said,) = warned(lambda: direct_logit_attribution(model, ids, 5))
    assert LOOKS_PADDED in said
    assert "attention_mask" in said
    mask = torch.ones_like(ids)
    both = {"input_ids": ids, "attention_mask": mask}
    for input, options in ((ids, {"attention_mask": mask}), (both, {})):
        found = warned(lambda i=input, o=options: direct_logit_attribution(model, i, 5, **o))
        assert not any(LOOKS_PADDED in said for said in found)


@pytest.mark.parametrize(("rows", "tokens"), PLAIN)
def test_plain_ids_do_not_warn(rows, tokens):
    model = model_with(**tokens)
    assert warned(lambda: direct_logit_attribution(model, torch.tensor(rows), 5)) == []


def test_pad_token_of_a_given_tokenizer_counts():
    model, tokenizer = model_with(pad=None, eos=None), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.unk_token
    ids = torch.tensor([[0, 5, 9, tokenizer.pad_token_id]])
    (said,) = warned(lambda: direct_logit_attribution(model, ids, 5, tokenizer=tokenizer))
    assert LOOKS_PADDED in said
    assert warned(lambda: direct_logit_attribution(model, ids, 5)) == []


def test_rows_that_are_padded_here_do_not_warn():
    model = model_with(pad=0, bos=None)
    assert warned(lambda: direct_logit_attribution(model, [[4, 5, 9], [8]], 5)) == []


def test_plans_and_sweeps_warn_of_padding():
    model, ids = model_with(), torch.tensor([[0, 5, 9, 7]])
    plan = prepare(model, 5)
    assert [LOOKS_PADDED in said for said in warned(lambda: plan(ids))] == [True]
    found = warned(lambda: list(attribute_many(model, [[0, 5], [0, 5, 9, 7], [0, 5, 9]], 5)))
    assert [LOOKS_PADDED in said for said in found] == [True]


def test_warning_shows_once_for_each_line_of_the_caller():
    model = model_with()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for last in (5, 6, 8):
            direct_logit_attribution(model, torch.tensor([[0, last, 9, 7]]), 5)
    assert len(caught) == 1


def test_two_bos_warn():
    model, tokenizer = model_with(), tiny_tokenizer(add_bos=True)
    text = f"{tokenizer.bos_token}The cat"

    def ask(input, **options):
        return warned(lambda: direct_logit_attribution(model, input, 5, **options))

    (said,) = ask(text, tokenizer=tokenizer)
    assert TWO_BOS in said
    assert "prepend_bos=False" in said
    assert ask(text, tokenizer=tokenizer, prepend_bos=False) == []
    assert ask("The cat", tokenizer=tokenizer) == []
    assert len(ask(["The cat sat", text], tokenizer=tokenizer)) == 1
    assert len(ask(torch.tensor([[5, 9, 8], [0, 0, 9]]))) == 1
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    assert len(ask(torch.tensor([[0, 5, 9, 8], [3, 0, 0, 9]]), attention_mask=mask)) == 1
    assert ask(torch.tensor([[0, 5, 9, 8], [0, 0, 5, 9]]), attention_mask=mask) == []
    assert ask(torch.tensor([[0, 0, 0]])) == []  # nothing else: that is the prompt


def test_one_token_for_bos_and_pad_is_told_by_its_number():
    model = model_with(pad=0, bos=0, eos=0)
    texts = {2: TWO_BOS, 3: LOOKS_PADDED}
    for count, text in texts.items():
        said = warned(
            lambda n=count: direct_logit_attribution(model, torch.tensor([*[0] * n, 5, 9]), 5)
        )
        assert [text in one for one in said] == [True]


@pytest.mark.parametrize(
    ("spec", "config", "limit"),
    [
        ("llama", {}, 8),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 16),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 4,
                }
            },
            16,
        ),
        ("falcon-rw", {}, None),
    ],
)
def test_prompts_beyond_the_trained_positions_warn(spec, config, limit):
    model = model_with(spec=spec, max_position_embeddings=8, **config)

    def ask(length, **options):
        ids = torch.randint(8, 60, (1, length), generator=torch.Generator().manual_seed(length))
        return warned(lambda: direct_logit_attribution(model, ids, 5, **options))

    if limit is None:
        assert ask(40) == []
        return
    assert ask(limit) == []
    (said,) = ask(limit + 1)
    assert "max_position_embeddings" in said
    mask = torch.ones(1, limit + 1, dtype=torch.long)
    mask[0, 0] = 0
    assert ask(limit + 1, attention_mask=mask) == []  # padding takes no position


def test_chunks_with_hooks_of_the_caller_warn():
    model, ids = model_with(), torch.tensor([[0, 5, 9, 8, 3]])
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)

    def ask(**options):
        return warned(lambda: direct_logit_attribution(model, ids, 5, **options))

    (said,) = ask(chunk_size=2)
    assert "a hook of yours sees each chunk by itself" in said
    assert ask(chunk_size=5) == ask() == []  # at once
    handle.remove()
    assert ask(chunk_size=2) == []


def test_forward_that_fails_beyond_its_positions_is_refused_with_both_lengths():
    model = build_any("mpt", max_seq_len=16)
    longest = model.config.max_seq_len
    with pytest.raises(InputError, match=f"prompt of {longest + 1} tokens.*for {longest}; shorten"):
        direct_logit_attribution(model, [5] * (longest + 1), 7)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_error_of_a_callers_hook_passes_at_a_trained_length():
    model = build_any("mpt", max_seq_len=16)

    def fail(module, args):
        raise IndexError("mine")

    model.transformer.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(IndexError, match="^mine$"):
        direct_logit_attribution(model, [5, 6], 7)


def test_a_word_that_the_tokenizer_does_not_know_is_said():
    model, tokenizer = demo.load()

    def ask(text):
        return warned(lambda: direct_logit_attribution(model, text, " are", tokenizer=tokenizer))

    assert ask("The keys near the cabinet") == []
    (said,) = ask(["The keys near the cabinet", "The zebras near the cabinet"])
    assert "does not know" in said
    assert "<|unk|>" in said
    assert ask("The<|unk|> near the cabinet") == []  # it was meant
    (said,) = warned(
        lambda: list(attribute_many(model, ["The zebras"], " are", tokenizer=tokenizer))
    )
    assert "does not know" in said
