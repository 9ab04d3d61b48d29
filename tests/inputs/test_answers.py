"""Every form of ``answer_tokens`` and ``incorrect_tokens``, and what wrong ones get."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from units import UNIT_NAMES
from zoo import build, tiny_tokenizer

from dla_hooks import (
    InputError,
    ShapeMismatchError,
    TokenError,
    TokenizerMissingError,
    direct_logit_attribution,
)

BATCH, WIDTH = 3, 5
IDS = torch.randint(61, (BATCH, WIDTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


@pytest.fixture(scope="module")
def truth(model):
    """Attribution [component, batch, pos] of any one token, from the plainest call there is."""
    kept = {}

    def of(token: int) -> torch.Tensor:
        if token not in kept:
            kept[token] = direct_logit_attribution(model, IDS, token, pos=None).attribution
        return kept[token]

    return of


@pytest.mark.parametrize(
    "answer",
    [5, np.int64(5), torch.tensor(5), torch.tensor([5]), torch.tensor([[5]]), [5]],
    ids=repr,
)
@pytest.mark.parametrize("pos", [-1, None], ids=["last", "all"])
def test_one_token_broadcasts_to_all_entries(model, truth, answer, pos):
    result = direct_logit_attribution(model, IDS, answer, pos=pos).attribution
    torch.testing.assert_close(result, truth(5) if pos is None else truth(5)[..., -1])


@pytest.mark.parametrize("as_list", [False, True])
def test_answers_per_row_fit_one_position(model, truth, as_list):
    tokens = [4, 9, 4]
    answer = tokens if as_list else torch.tensor(tokens)
    result = direct_logit_attribution(model, IDS, answer, pos=2).attribution
    assert result.shape[1:] == (BATCH,)
    for row, token in enumerate(tokens):
        torch.testing.assert_close(result[:, row], truth(token)[:, row, 2])


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)])
def test_answers_per_row_broadcast_over_positions(model, truth, shape):
    tokens = torch.tensor([4, 9, 11])
    result = direct_logit_attribution(model, IDS, tokens.reshape(shape), pos=None).attribution
    for row, token in enumerate(tokens.tolist()):
        torch.testing.assert_close(result[:, row], truth(token)[:, row])


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH)])
def test_answers_per_position_broadcast_over_rows(model, truth, shape):
    tokens = torch.tensor([4, 9, 11, 2, 9])
    result = direct_logit_attribution(model, IDS, tokens.reshape(shape), pos=None).attribution
    for column, token in enumerate(tokens.tolist()):
        torch.testing.assert_close(result[:, :, column], truth(token)[:, :, column])


def test_ambiguous_axis_is_read_as_rows(model, truth):
    tokens = torch.tensor([4, 9, 11])
    result = direct_logit_attribution(model, IDS, tokens, pos=[0, 1, 2]).attribution
    for row, token in enumerate(tokens.tolist()):
        torch.testing.assert_close(result[:, row], truth(token)[:, row, :3])


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_next_token_at_every_position_is_exact(model, unit):
    after = IDS[:, 1:]
    result = direct_logit_attribution(model, IDS, after, unit=unit, pos=(None, -1))
    assert result.attribution.shape[1:] == (BATCH, WIDTH - 1)
    with torch.no_grad():
        logits = model(IDS).logits[:, :-1].gather(-1, after[..., None])[..., 0]
    whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
    torch.testing.assert_close(whole + result.bias, logits)
    for row, column in [(0, 0), (2, 3)]:
        one = direct_logit_attribution(
            model, IDS[row], int(after[row, column]), unit=unit, pos=column
        )
        torch.testing.assert_close(
            result.attribution[:, row, column], one.attribution[:, 0], rtol=0, atol=1e-5
        )


def test_many_answers_fit_one_position_of_one_prompt(model, truth):
    tokens = torch.tensor([4, 9, 11, 2])
    for answer in (tokens, tokens[None], tokens.tolist()):
        result = direct_logit_attribution(model, IDS[:1], answer)
        assert result.attribution.shape[1:] == (4,)
        for column, token in enumerate(tokens.tolist()):
            torch.testing.assert_close(
                result.attribution[:, column], truth(token)[:, 0, -1], rtol=0, atol=1e-5
            )


def test_many_answers_fit_one_kept_position(model, truth):
    tokens = torch.tensor([4, 9, 11, 2])
    result = direct_logit_attribution(model, IDS[:1], tokens, pos=[-1]).attribution
    assert result.shape[1:] == (1, 4)
    torch.testing.assert_close(result[:, 0, 1], truth(9)[:, 0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_logit_difference_equals_difference_of_results(model, unit):
    right, wrong = torch.tensor([4, 9, 11]), torch.tensor([8, 7, 4])
    both = direct_logit_attribution(model, IDS, right, wrong, unit=unit)
    one = direct_logit_attribution(model, IDS, right, unit=unit)
    other = direct_logit_attribution(model, IDS, wrong, unit=unit)
    torch.testing.assert_close(both.attribution, one.attribution - other.attribution)
    torch.testing.assert_close(both.bias, one.bias - other.bias)
    torch.testing.assert_close(both.logit, one.logit - other.logit)


@pytest.mark.parametrize(
    ("answer", "pos", "said"),
    [
        (torch.arange(4), -1, r"\[4\] do not fit .* \[batch\] = \[3\]"),
        (torch.arange(4), None, r"\[4\] do not fit .* \[batch, pos'\] = \[3, 5\]"),
        (torch.zeros(3, 4, dtype=int), None, r"\[3, 4\] do not fit .* \[3, 5\]"),
        (torch.zeros(3, 5, dtype=int), -1, r"\[3, 5\] do not fit .* \[3\]"),
        (torch.zeros(3, 5, 1, dtype=int), None, r"\[3, 5, 1\] do not fit"),
        (torch.zeros(2, 5, dtype=int), None, r"\[2, 5\] do not fit"),
    ],
)
def test_shapes_that_do_not_broadcast_are_both_named(model, answer, pos, said):
    with pytest.raises(ShapeMismatchError, match=said) as caught:
        direct_logit_attribution(model, IDS, answer, pos=pos)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("right", "wrong"), [(5, torch.tensor([7])), (torch.tensor([1, 2, 3]), 7), ([1, 2, 3], [1, 2])]
)
def test_unequal_answer_shapes_are_refused(model, right, wrong):
    with pytest.raises(InputError, match="incorrect_tokens has shape"):
        direct_logit_attribution(model, IDS, right, wrong)


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (None, InputError, "answer_tokens is required"),
        (5.0, InputError, "float"),
        (True, InputError, "bool"),
        (np.array([5, 6, 7]), InputError, "torch.as_tensor"),
        (np.float64(5), InputError, "float64"),
        ([], InputError, "empty"),
        ([[5]], InputError, "list"),
        (torch.tensor([]), InputError, "integer"),
        (torch.tensor([], dtype=torch.long), InputError, "empty"),
        (torch.tensor(5.0), InputError, "float32"),
        (torch.tensor(True), InputError, "bool"),
        (-1, TokenError, r"-1, which is outside the model's vocabulary \(0 to 62\)"),
        (63, TokenError, "63, which is outside"),
        (torch.tensor([1, 2, 99]), TokenError, "99"),
        (" Mary", TokenizerMissingError, "answer_tokens is a string"),
    ],
)
def test_wrong_answers_are_refused(model, answer, error, said):
    with pytest.raises(error, match=said):
        direct_logit_attribution(model, IDS, answer)


def test_wrong_incorrect_tokens_are_named_as_such(model):
    with pytest.raises(TokenError, match="incorrect_tokens holds token id 63"):
        direct_logit_attribution(model, IDS, 5, 63)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def some_words(tokenizer) -> tuple[str, str]:
    words = [t.replace("Ġ", " ") for t in tokenizer.get_vocab() if t.startswith("Ġ") and len(t) > 2]
    return words[0], words[1]


def test_strings_match_their_token_ids(model, tokenizer):
    one, two = some_words(tokenizer)
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in (one, two)]
    by_text = direct_logit_attribution(model, IDS, one, two, tokenizer=tokenizer)
    by_id = direct_logit_attribution(model, IDS, *ids)
    assert torch.equal(by_text.attribution, by_id.attribution)
    assert (by_text.answer, by_text.incorrect) == ([one], [two])
    listed = direct_logit_attribution(model, IDS, [one, two, one], tokenizer=tokenizer)
    per_row = direct_logit_attribution(model, IDS, torch.tensor([ids[0], ids[1], ids[0]]))
    assert torch.equal(listed.attribution, per_row.attribution)


def test_model_tokenizer_is_used(model, tokenizer):
    one, _ = some_words(tokenizer)
    model.tokenizer = tokenizer
    try:
        assert direct_logit_attribution(model, IDS, one).answer == [one]
    finally:
        del model.tokenizer


def test_answer_of_several_tokens_is_refused_with_pieces(model, tokenizer):
    one, two = some_words(tokenizer)
    with pytest.raises(TokenError, match="is 2 tokens") as caught:
        direct_logit_attribution(model, IDS, one + two, tokenizer=tokenizer)
    assert repr(one) in str(caught.value)
    assert repr(two) in str(caught.value)


@pytest.mark.parametrize("answer", ["", "zzzz", " zzzz"])
def test_unknown_strings_are_refused(model, tokenizer, answer):
    with pytest.raises(TokenError, match="no token at all|not in the tokenizer's vocabulary"):
        direct_logit_attribution(model, IDS, answer, tokenizer=tokenizer)


def test_a_missing_leading_space_is_hinted_at(model, tokenizer):
    vocabulary = tokenizer.get_vocab()
    bare = next(
        t[1:] for t in vocabulary if t.startswith("Ġ") and len(t) > 2 and t[1:] not in vocabulary
    )
    with pytest.raises(TokenError, match=f"' {bare}' is a single token: mind the leading space"):
        direct_logit_attribution(model, IDS, bare, tokenizer=tokenizer)
