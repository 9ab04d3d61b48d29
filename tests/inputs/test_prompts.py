"""Every form of ``input``, batches of different lengths, and what a wrong prompt gets."""

from __future__ import annotations

import pytest
import torch
from units import UNIT_NAMES
from zoo import ZOO, Spec, build, supports, tiny_tokenizer

from dla_hooks import (
    DLAWarning,
    InputError,
    ShapeMismatchError,
    TokenError,
    TokenizerMissingError,
    direct_logit_attribution,
)

pytestmark = pytest.mark.lowest


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build("gpt2", dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Three prompts of 5, 2 and 8 tokens."""
    words = [t.replace("Ġ", " ") for t in tokenizer.get_vocab() if t.startswith("Ġ") and len(t) > 2]
    texts = ["".join(words[:5]), "".join(words[5:7]), "".join(words[7:15])]
    assert [len(tokenizer.encode(text)) for text in texts] == [5, 2, 8]
    return texts


def test_string_and_its_ids_give_same_result(model, tokenizer, prompts):
    ids = torch.tensor(tokenizer.encode(prompts[0]))
    by_text = direct_logit_attribution(model, prompts[0], 5, tokenizer=tokenizer)
    encoded = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    for other in (ids, ids[None], ids.int(), [prompts[0]], encoded):
        result = direct_logit_attribution(model, other, 5, tokenizer=tokenizer)
        assert torch.equal(result.attribution, by_text.attribution)
    assert "".join(by_text.tokens[0]) == prompts[0]
    assert direct_logit_attribution(model, ids, 5).tokens == [[str(i) for i in ids.tolist()]]


# Families that differ in how positions and masks reach attention.
@pytest.mark.parametrize("spec", ZOO, ids=repr)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_batch_equals_the_row_alone(spec: Spec, side: str):
    attn = "sdpa" if supports(spec, "sdpa") else "eager"
    model = build(spec, dtype=torch.float32, attn=attn)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(61, (n,), generator=generator) for n in (4, 7, 2)]
    ids, mask = torch.full((3, 7), 3), torch.zeros(3, 7, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(7 - len(tokens), 7) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    answer = torch.tensor([5, 9, 11])
    for unit in UNIT_NAMES:
        batch = direct_logit_attribution(model, ids, answer, unit=unit, attention_mask=mask)
        size = float(batch.attribution.abs().max())
        for row, tokens in enumerate(rows):
            alone = direct_logit_attribution(model, tokens, int(answer[row]), unit=unit)
            torch.testing.assert_close(
                batch.attribution[:, row], alone.attribution[:, 0], rtol=0, atol=1e-4 * size
            )


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_list_of_strings_is_padded(model, tokenizer, prompts, unit):
    batch = direct_logit_attribution(model, prompts, 5, unit=unit, tokenizer=tokenizer)
    everywhere = direct_logit_attribution(
        model, prompts, 5, unit=unit, tokenizer=tokenizer, pos=None
    )
    assert everywhere.attribution.shape[1:] == (3, 8)
    for row, text in enumerate(prompts):
        alone = direct_logit_attribution(model, text, 5, unit=unit, tokenizer=tokenizer)
        torch.testing.assert_close(
            batch.attribution[:, row], alone.attribution[:, 0], rtol=0, atol=1e-4
        )
        n_tokens = len(tokenizer.encode(text))
        assert everywhere.attribution[0, row].isnan().sum() == 8 - n_tokens
        torch.testing.assert_close(everywhere.attribution[:, row, -1], batch.attribution[:, row])
        assert "".join(batch.tokens[row]) == text


def test_prepend_bos_puts_exactly_one_bos(model, prompts):
    plain, with_bos = tiny_tokenizer(), tiny_tokenizer(add_bos=True)
    ids = plain.encode(prompts[0])
    bos = plain.bos_token_id

    def tokens_of(tokenizer, prepend_bos):
        result = direct_logit_attribution(
            model, prompts[0], 5, tokenizer=tokenizer, prepend_bos=prepend_bos, pos=None
        )
        return result.attribution.shape[-1], result.tokens[0][0]

    bos_text = plain.decode([bos])
    assert tokens_of(plain, None) == (len(ids), plain.decode(ids[:1]))
    assert tokens_of(plain, True) == (len(ids) + 1, bos_text)
    assert tokens_of(plain, False) == (len(ids), plain.decode(ids[:1]))
    assert tokens_of(with_bos, None) == (len(ids) + 1, bos_text)
    assert tokens_of(with_bos, True) == (len(ids) + 1, bos_text)  # one, not two
    assert tokens_of(with_bos, False) == (len(ids), plain.decode(ids[:1]))


def test_tokenizer_is_unchanged_after_call(model, tokenizer, prompts):
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side)
    direct_logit_attribution(model, prompts, 5, tokenizer=tokenizer)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side) == before


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("input", "mask", "error", "said"),
    [
        (None, None, InputError, "either `input`"),
        ([], None, InputError, "non-empty list of strings"),
        ([[1, 2], []], None, InputError, "row 1 of input is empty"),
        ([[1, 2], [1.5]], None, InputError, "float32"),
        ([[1, 2], "text"], None, InputError, "row 1 of input cannot be read"),
        ([1, "text"], None, InputError, "cannot be read"),
        ([[1, 2], [3]], [[1, 1], [0]], ShapeMismatchError, "leave it out"),
        ([[[1, 2]]], None, InputError, "row 0 of input must be a list"),
        ([2**70], None, InputError, "cannot be read"),
        (5, None, InputError, "int"),
        (IDS.float(), None, InputError, "float32"),
        (IDS > 2, None, InputError, "bool"),
        (IDS[None], None, InputError, r"\[1, 2, 3\]"),
        (torch.tensor(5), None, InputError, r"got \[\]"),
        (torch.zeros(1, 0, dtype=torch.long), None, InputError, "empty"),
        (torch.tensor([1, 63]), None, TokenError, "token id 63 is outside .*0 to 62"),
        (torch.tensor([1, -1]), None, TokenError, "token id -1"),
        (torch.zeros(1, 65, dtype=int), None, InputError, "has 65 tokens, .* for 64 only"),
        (IDS, torch.ones(2, 4), ShapeMismatchError, r"\[2, 4\], the token ids \[2, 3\]"),
        (IDS, torch.tensor([[1, 1, 2], [1, 1, 1]]), InputError, "1 at real tokens"),
        (IDS, torch.tensor([[1, 1, 1], [0, 0, 0]]), InputError, "row 1 .* all padding"),
        ({"ids": IDS}, None, InputError, "without 'input_ids'"),
        ("some text", None, TokenizerMissingError, "input is a string"),
        (["some", "text"], None, TokenizerMissingError, "AutoTokenizer"),
    ],
)
def test_wrong_prompts_are_refused(model, input, mask, error, said):
    with pytest.raises(error, match=said):
        direct_logit_attribution(model, input, 5, attention_mask=mask)


def test_wrong_strings_are_refused(model, tokenizer, prompts):
    with pytest.raises(InputError, match="is empty"):
        direct_logit_attribution(model, "", 5, tokenizer=tokenizer)
    with pytest.raises(InputError, match="is empty"):
        direct_logit_attribution(model, [prompts[0], ""], 5, tokenizer=tokenizer)
    with pytest.raises(InputError, match="strings are padded for you"):
        direct_logit_attribution(
            model, prompts, 5, tokenizer=tokenizer, attention_mask=torch.ones(3, 8)
        )


def test_padding_may_hold_any_id(model):
    ids, mask = IDS.clone(), torch.tensor([[0, 1, 1], [1, 1, 1]])
    ids[0, 0] = -100
    masked = direct_logit_attribution(model, ids, 5, attention_mask=mask)
    ids[0, 0] = 7
    assert torch.equal(
        masked.attribution, direct_logit_attribution(model, ids, 5, attention_mask=mask).attribution
    )


def test_rotary_models_may_run_past_their_configured_length():
    model = build("llama")
    limit = model.config.max_position_embeddings
    with pytest.warns(DLAWarning, match="longer than the model's max_position_embeddings"):
        result = direct_logit_attribution(model, torch.zeros(1, limit + 3, dtype=torch.long), 5)
    assert result.gap < 1e-9


def test_mask_reaches_a_forward_without_a_signature():
    model = build("llama", attn="sdpa")
    ids, mask = torch.tensor([[3, 3, 0, 5, 17]]), torch.tensor([[0, 0, 1, 1, 1]])
    expected = direct_logit_attribution(model, ids, 7, attention_mask=mask)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    result = direct_logit_attribution(model, ids, 7, attention_mask=mask)
    assert torch.equal(result.attribution, expected.attribution)


@pytest.mark.parametrize("pad", [10_000, -1])
def test_pad_token_without_an_embedding_is_no_matter(prompts, pad: int):
    tokenizer, model = tiny_tokenizer(), build("gpt2", dtype=torch.float32)
    expected = direct_logit_attribution(model, prompts, 5, tokenizer=tokenizer).attribution
    type_of = type(tokenizer)
    patched = type("Padded", (type_of,), {"pad_token_id": property(lambda self: pad)})
    tokenizer.__class__ = patched
    result = direct_logit_attribution(model, prompts, 5, tokenizer=tokenizer)
    assert torch.equal(result.attribution, expected)
