"""Answers of several tokens, against calls on the joined text."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import RUNNER_UP, Continuation, InputError, Mean, ShapeMismatchError, TokenError
from dla_hooks import direct_logit_attribution as attribute

SPECS = ["gpt2", "llama", "gemma2", "granite", "gpt_neox-parallel", "mixtral"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("unit", ["component", "head"])
def test_each_piece_is_attributed_where_it_is_predicted(spec, unit):
    model, ids = build(spec), example_ids(spec)
    found = attribute(model, ids[:, :4], Continuation(ids[0, 4:]), unit=unit)
    joined = torch.cat((ids[:, :4], ids[:1, 4:].expand(2, 3)), 1)
    expected = attribute(model, joined, joined[:, 4:], unit=unit, pos=[3, 4, 5])
    torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.logit, expected.logit, rtol=1e-9, atol=1e-9)
    total = found.summed()
    assert total.attribution.shape == expected.attribution.shape[:-1]
    torch.testing.assert_close(total.attribution, expected.attribution.sum(-1))
    torch.testing.assert_close(total.attribution.sum(0) + total.bias, total.logit)
    torch.testing.assert_close(total.logit, expected.logit.sum(-1))


@pytest.mark.parametrize("spec", ["gpt2", "llama", "gemma2"])
def test_prompts_and_continuations_of_different_lengths(spec):
    model, ids = build(spec, attn="sdpa" if spec == "llama" else "eager"), example_ids(spec)
    if spec == "gemma2":
        model = build(spec, dtype=torch.float32)
    prompts = [ids[0, :4].tolist(), ids[1, :2].tolist()]
    pieces = [ids[0, 4:5].tolist(), ids[1, 2:5].tolist()]
    found = attribute(model, prompts, Continuation(pieces))
    assert found.attribution.shape[1:] == (2, 3)
    assert bool(found.attribution[:, 0, 1:].isnan().all())
    assert found.positions.tolist() == [[3, -1, -1], [1, 2, 3]]
    for row in range(2):
        own = attribute(model, [prompts[row]], Continuation(pieces[row]))
        n = len(pieces[row])
        torch.testing.assert_close(found.attribution[:, row, :n], own.attribution[:, 0])
        torch.testing.assert_close(
            found.summed().attribution[:, row], own.summed().attribution[:, 0]
        )
    listed = attribute(model, prompts, [Continuation(one) for one in pieces])
    assert torch.equal(listed.logit[1], found.logit[1])


def test_log_probability_of_the_whole():
    model, ids = build("gpt2"), example_ids("gpt2")
    found = attribute(model, ids[:1, :4], Continuation(ids[0, 4:]))
    shares = model(ids[:1]).logits.log_softmax(-1)
    own = shares[0, 3:6].gather(1, ids[0, 4:, None])[:, 0]
    torch.testing.assert_close(found.log_probability[0], own, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.summed().log_probability[0], own.sum(), rtol=1e-6, atol=1e-6)


def test_strings_are_the_tokenizers_pieces():
    model, tokenizer = build("gpt2"), tiny_tokenizer()
    found = attribute(model, "The cat", Continuation(" dog cat"), tokenizer=tokenizer)
    assert found.answer == [" dog", " cat"]
    assert found.summed().answer == [" dog cat"]
    joined = attribute(model, "The cat dog cat", [" dog", " cat"], pos=[1, 2], tokenizer=tokenizer)
    torch.testing.assert_close(found.attribution, joined.attribution)


def test_against_other_tokens():
    model, ids = build("gemma2"), example_ids("gemma2")
    joined, right = ids[:1], ids[:1, 4:]
    for wrong in (Mean([3, 4]), RUNNER_UP, 3):
        found = attribute(model, ids[:1, :4], Continuation(ids[0, 4:]), wrong)
        if wrong is RUNNER_UP:
            wrong = model(joined).logits[:, 3:6].topk(2).indices[..., 1]
        elif wrong == 3:
            wrong = torch.full_like(right, 3)
        expected = attribute(model, joined, right, wrong, pos=[3, 4, 5])
        torch.testing.assert_close(found.attribution, expected.attribution)


def test_in_chunks_and_in_a_prepared_plan():
    model, ids = build("llama"), example_ids("llama", length=9)
    plan = dla_hooks.prepare(model, Continuation(ids[0, 7:]))
    whole = attribute(model, ids[:, :7], Continuation(ids[0, 7:]))
    torch.testing.assert_close(plan(ids[:, :7], chunk_size=4).attribution, whole.attribution)
    assert torch.equal(plan(ids[:, :7]).attribution, whole.attribution)


def test_single_piece_is_a_plain_answer():
    model, ids = build("gpt2"), example_ids("gpt2")
    found = attribute(model, ids, Continuation([5]))
    torch.testing.assert_close(found.attribution[..., 0], attribute(model, ids, 5).attribution)


def test_kept_rows_cannot_be_summed():
    model, ids = build("gpt2"), example_ids("gpt2")
    found = attribute(model, ids, Continuation([5, 6]), unit="neuron")
    with pytest.raises(InputError, match="keeps the strongest"):
        found.summed()
    with pytest.raises(InputError, match="no axis of positions"):
        attribute(model, ids, 5).summed()


class TestRefusals:
    def refused(self, error, match, *args, **options):
        model, ids = build("gpt2"), example_ids("gpt2")
        runs = []
        model.register_forward_pre_hook(lambda *_: runs.append(1))
        with pytest.raises(error, match=match):
            attribute(model, ids, *args, **options)
        assert not runs

    def test_other_positions(self):
        for pos in (None, 0, [1, 2]):
            self.refused(InputError, "says its positions itself", Continuation([5]), pos=pos)

    def test_continuation_as_the_incorrect_one(self):
        self.refused(InputError, "incorrect_tokens cannot be", 5, Continuation([5]))

    def test_another_number_of_continuations(self):
        self.refused(ShapeMismatchError, "3 continuations", Continuation([[5], [6], [7]]))

    def test_ids_outside_the_vocabulary(self):
        self.refused(TokenError, "999", Continuation([5, 999]))

    def test_beside_other_answers(self):
        self.refused(InputError, "one kind", [Continuation([5]), 6])

    def test_longer_than_the_model_has_positions(self):
        self.refused(InputError, "shorten", Continuation([5] * 2000))

    @pytest.mark.parametrize("pieces", [[], "", None, 5, [[]], [["a"]], [1.5]])
    def test_what_is_no_text(self, pieces):
        with pytest.raises(InputError):
            Continuation(pieces)

    def test_pieces_outside_the_tokenizers_vocabulary(self):
        with pytest.raises(TokenError, match="vocabulary"):
            attribute(build("gpt2"), "The cat", Continuation(" zzz"), tokenizer=tiny_tokenizer())
