"""Member by member, the numbers and tokens of a HookedTransformer (extra ``tl``)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tl_models import has_hooked
from zoo import build, example_ids, tiny_tokenizer

from dla_hooks import TokenError, wrap

pytest.importorskip("transformer_lens")
if not has_hooked():
    pytest.skip("HookedTransformer was removed in 4.0", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
]

SPECS = ("gpt2", "gptj", "gpt_neox-parallel", "gpt_neox-sequential", "opt", "llama", "mixtral",
         "qwen2", "qwen3", "phi3")  # fmt: skip
RAW = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)
FIELDS = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "d_vocab_out", "act_fn",
          "eps", "original_architecture", "normalization_type", "positional_embedding_type",
          "parallel_attn_mlp", "attn_only", "output_logits_soft_cap", "dtype", "device",
          "default_prepend_bos")  # fmt: skip


@pytest.fixture(scope="module", params=SPECS)
def spec(request):
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["processed", "raw"])
def pair(request, spec, tmp_path_factory):
    from tl_models import hooked, log_probabilities_agree

    model = build(spec, dtype=torch.float32)
    ids = example_ids(spec)
    folder = tmp_path_factory.mktemp("reference")
    reference = hooked(model, folder, **({} if request.param else RAW))
    assert log_probabilities_agree(reference, model, ids)
    return wrap(model, None, **({} if request.param else RAW)), reference, ids


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["W_U", "b_U", "W_E", "W_O", "b_O"])
def test_weights_match_reference(pair, name):
    ours, theirs, _ = pair
    close(getattr(ours, name), getattr(theirs, name))


def test_position_embeddings_match_reference(pair):
    ours, theirs, _ = pair
    assert hasattr(ours, "W_pos") == (theirs.cfg.positional_embedding_type == "standard")
    if hasattr(ours, "W_pos"):
        close(ours.W_pos, theirs.W_pos)


def test_one_layer_matches_reference(pair):
    ours, theirs, _ = pair
    assert len(ours.blocks) == len(theirs.blocks)
    for our_block, their_block in zip(ours.blocks, theirs.blocks, strict=True):
        close(our_block.attn.W_O, their_block.attn.W_O)
        close(our_block.attn.b_O, their_block.attn.b_O)


@pytest.mark.parametrize("field", FIELDS)
def test_cfg_matches_reference(pair, field):
    ours, theirs, _ = pair
    assert getattr(ours.cfg, field) == getattr(theirs.cfg, field)


def test_key_value_heads_match_reference(pair):
    ours, theirs, _ = pair
    count = theirs.cfg.n_key_value_heads
    assert ours.cfg.n_key_value_heads == (None if count == theirs.cfg.n_heads else count)


def test_directions_match_reference(pair):
    ours, theirs, ids = pair
    for tokens in (5, torch.tensor(5), torch.tensor([[5]]), ids[0], ids):
        close(
            ours.tokens_to_residual_directions(tokens), theirs.tokens_to_residual_directions(tokens)
        )


@torch.no_grad()
def test_calls_match_reference(pair):
    ours, theirs, ids = pair
    # Two implementations of one model, in float32, and logits of a size of ten.
    same = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(ours(ids), theirs(ids), **same)
    torch.testing.assert_close(ours(ids[0]), theirs(ids[0]), **same)
    for per_token in (False, True):
        torch.testing.assert_close(
            ours(ids, return_type="loss", loss_per_token=per_token),
            theirs(ids, return_type="loss", loss_per_token=per_token),
            **same,
        )
    logits, loss = ours(ids, return_type="both")
    theirs_both = theirs(ids, return_type="both")
    torch.testing.assert_close(logits, theirs_both.logits, **same)
    torch.testing.assert_close(loss, theirs_both.loss, **same)
    assert ours(ids, return_type=None) is None


# Tokens

TEXTS = ("the cat", " the cat sat, and Mary gave a book to John.", "When", "", "the cat nonsense")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "adds-bos"])
def tokens(request, tmp_path_factory):
    """(ours, theirs) with a tokenizer; the reference loads its own copy from a folder."""
    from tl_models import hooked
    from transformers import AutoTokenizer

    model = build("gpt2", dtype=torch.float32)
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(add_bos=request.param).save_pretrained(folder)
    reference = hooked(model, tmp_path_factory.mktemp("reference"))
    reference.set_tokenizer(AutoTokenizer.from_pretrained(folder))
    return wrap(model, tiny_tokenizer(add_bos=request.param)), reference


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_to_tokens_matches_reference(tokens, text, prepend_bos):
    ours, theirs = tokens
    expected = theirs.to_tokens(text, **says(prepend_bos))
    assert torch.equal(ours.to_tokens(text, prepend_bos=prepend_bos), expected.long())
    if expected.numel():  # of no tokens the reference makes one empty text
        theirs_text = theirs.to_str_tokens(text, **says(prepend_bos))
        assert ours.to_str_tokens(text, prepend_bos) == theirs_text


def says(prepend_bos):
    return {} if prepend_bos is None else {"prepend_bos": prepend_bos}


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_match_reference(tokens, side, prepend_bos):
    ours, theirs = tokens
    texts = [text for text in TEXTS if text]
    expected = theirs.to_tokens(texts, padding_side=side, **says(prepend_bos))
    assert torch.equal(ours.to_tokens(texts, prepend_bos, side), expected)
    assert ours.to_string(expected) == theirs.to_string(expected)
    assert ours.to_str_tokens(texts) == theirs.to_str_tokens(texts)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_calls_with_text_match_reference(tokens, side):
    ours, theirs = tokens
    for text in (TEXTS[1], [TEXTS[1], TEXTS[0], TEXTS[2]]):
        expected = theirs(text, padding_side=side, return_type="both")
        logits, loss = ours(text, padding_side=side, return_type="both")
        real = ours._pad(ours._encode(text, None, True), side)[1]
        torch.testing.assert_close(logits[real], expected.logits[real], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_long_texts_match_reference(tokens, truncate, prepend_bos):
    ours, theirs = tokens
    text = "the" + " cat" * 80
    expected = theirs.to_tokens(text, prepend_bos=prepend_bos, truncate=truncate)
    assert torch.equal(ours.to_tokens(text, prepend_bos, truncate=truncate), expected)


def test_text_from_tokens_matches_reference(tokens):
    ours, theirs = tokens
    row = theirs.to_tokens(TEXTS[1])
    for form in (row, row[0], row[0].tolist(), row.numpy(), row[0, 3], np.array(5)):
        assert ours.to_string(form) == theirs.to_string(form)
    for form in (row, row[0], row.numpy(), row[0].numpy(), row[0, 3], [row, row[0]]):
        assert ours.to_str_tokens(form) == theirs.to_str_tokens(form)
    for i in row[0].tolist():
        assert ours.to_single_str_token(i) == theirs.to_single_str_token(i)


@pytest.mark.parametrize("text", [" cat", "cat", "When", ",", "<bos>"])
def test_single_tokens_match_reference(tokens, text):
    ours, theirs = tokens
    assert ours.to_single_token(text) == theirs.to_single_token(text)


def test_several_tokens_are_an_error_in_both(tokens):
    ours, theirs = tokens
    with pytest.raises(AssertionError):
        theirs.to_single_token("the cat")
    with pytest.raises(TokenError):
        ours.to_single_token("the cat")


@pytest.mark.parametrize("mode", ["first", "last"])
@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_token_positions_match_reference(tokens, mode, prepend_bos):
    ours, theirs = tokens
    text = "the cat, the cat, the dog."
    for token in (" cat", ",", torch.tensor(ours.to_single_token(" cat"))):
        expected = theirs.get_token_position(token, text, mode=mode, **says(prepend_bos))
        assert ours.get_token_position(token, text, mode, prepend_bos) == expected
    row = theirs.to_tokens(text)
    for form in (row, row[0]):
        assert ours.get_token_position(" cat", form, mode) == theirs.get_token_position(
            " cat", form, mode
        )


def test_directions_of_strings_match_reference(tokens):
    ours, theirs = tokens
    close(ours.tokens_to_residual_directions(" cat"), theirs.tokens_to_residual_directions(" cat"))
