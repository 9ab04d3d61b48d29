"""The model's own tokens and the text's next ones, against calls that name them."""

from __future__ import annotations

import pytest
import torch
from units import UNIT_NAMES
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import NEXT, RUNNER_UP, TOP, Each, InputError, Mean, Tokens
from dla_hooks import direct_logit_attribution as attribute

SPECS = ["gpt2", "llama", "gemma2", "granite", "gpt_neox-parallel", "mixtral"]


def best(model, ids, place=0, **inputs):
    """The model's token at a place, at every position [batch, pos]."""
    with torch.no_grad():
        return model(ids, **inputs).logits.topk(2).indices[..., place]


def assert_same(found, expected):
    for name in ("attribution", "bias", "logit"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9, equal_nan=True
        )
    assert found.answer == expected.answer
    assert found.incorrect == expected.incorrect


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("seed", [0, 1])
class TestTop:
    def test_top_is_the_models_token_at_every_position(self, spec, seed):
        model, ids = build(spec, seed), example_ids(spec, seed=seed)
        found = attribute(model, ids, TOP, unit="head", pos=None)
        assert_same(found, attribute(model, ids, best(model, ids), unit="head", pos=None))
        assert bool((found.rank == 1).all())

    def test_top_against_the_runner_up_at_the_last_position(self, spec, seed):
        model, ids = build(spec, seed), example_ids(spec, seed=seed)
        found = attribute(model, ids, TOP, RUNNER_UP)
        first, second = (best(model, ids, place)[:, -1] for place in (0, 1))
        assert_same(found, attribute(model, ids, first, second))
        assert bool((found.logit >= 0).all())


class TestTopElsewhere:
    def test_top_against_a_token_and_a_mean(self):
        model, ids = build("gemma2"), example_ids("gemma2")
        top = best(model, ids)
        for wrong, pos in ((7, None), (Mean([7, 8]), -1), ([3, 4], -1)):
            right = top[:, -1] if pos == -1 else top
            found = attribute(model, ids, TOP, wrong, pos=pos)
            if wrong == 7:
                wrong = torch.full_like(right, 7)
            assert_same(found, attribute(model, ids, right, wrong, pos=pos))

    def test_a_token_against_top(self):
        model, ids = build("llama"), example_ids("llama")
        found = attribute(model, ids, [5, 6], TOP)
        assert_same(found, attribute(model, ids, torch.tensor([5, 6]), best(model, ids)[:, -1]))
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        own = logits.gather(1, torch.tensor([[5], [6]]))
        assert found.rank.tolist() == ((logits > own).sum(-1) + 1).tolist()

    def test_several_answers_against_top(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Each([[5, 6], [7, 8]]), TOP)
        top = best(model, ids)[:, -1]
        for number, own in enumerate(((5, 7), (6, 8))):
            single = attribute(model, ids, torch.tensor(own), top)
            torch.testing.assert_close(found.attribution[..., number], single.attribution)

    def test_batch_padded_on_either_side(self):
        model, every = build("llama", attn="sdpa"), example_ids("llama")
        mask = torch.ones_like(every)
        for place in (slice(0, 3), slice(4, 7)):
            mask[1] = 1
            mask[1, place] = 0
            found = attribute(model, every, TOP, pos=None, attention_mask=mask)
            real = mask[1].bool()
            alone = attribute(model, every[1:, real], TOP, pos=None)
            torch.testing.assert_close(found.attribution[:, 1, real], alone.attribution[:, 0])
            assert bool(found.attribution[:, 1, ~real].isnan().all())

    def test_every_unit(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, TOP, unit=UNIT_NAMES, pos=None)
        top = best(model, ids)
        for unit, result in found.items():
            expected = attribute(model, ids, top, unit=unit, pos=None)
            torch.testing.assert_close(result.attribution, expected.attribution)

    @pytest.mark.parametrize("spec", ["llama", "gemma2", "granite", "opt"])
    @pytest.mark.parametrize("chunk_size", [None, 5])
    def test_logits_in_pieces_give_the_same(self, spec, chunk_size, monkeypatch):
        from dla_hooks.measure import asked

        model, ids = build(spec), example_ids(spec, length=12)
        whole = attribute(model, ids, TOP, RUNNER_UP, pos=None)
        monkeypatch.setattr(asked, "_MOST_LOGITS", 1)
        monkeypatch.setattr(asked, "_AT_ONCE", 3 * model.config.vocab_size)
        found = attribute(model, ids, TOP, RUNNER_UP, pos=None, chunk_size=chunk_size)
        assert_same(found, whole)
        torch.testing.assert_close(found.log_probability, whole.log_probability)
        assert found.top_tokens[0][0][0] == whole.top_tokens[0][0][0]

    def test_hook_on_the_unembedding_decides(self, monkeypatch):
        from dla_hooks.measure import asked

        model, ids = build("llama"), example_ids("llama")
        bump = torch.zeros(model.config.vocab_size, dtype=torch.float64)
        bump[9] = 1e3
        handle = model.lm_head.register_forward_hook(lambda *given: given[2] + bump)
        monkeypatch.setattr(asked, "_MOST_LOGITS", 1)
        found = attribute(model, ids, TOP, pos=None)
        handle.remove()
        assert found.answer == ["9"]

    def test_prepared_plan_finds_the_token_of_each_prompt(self):
        model, ids = build("gpt2"), example_ids("gpt2", batch=4)
        plan = dla_hooks.prepare(model, TOP, RUNNER_UP)
        for row in (0, 1, 1, 3):
            one = ids[row : row + 1]
            assert_same(plan(one), attribute(model, one, TOP, RUNNER_UP))

    def test_prepared_plan_keeps_what_the_same_token_needs(self, monkeypatch):
        from dla_hooks import attribution

        made = []
        make = attribution.make_plan
        monkeypatch.setattr(attribution, "make_plan", lambda *args: made.append(1) or make(*args))
        model, ids = build("gpt2"), example_ids("gpt2")
        plan = dla_hooks.prepare(model, TOP)
        plan(ids)
        made.clear()
        plan(ids)
        assert not made

    def test_prepared_plan_follows_changed_weights(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        plan = dla_hooks.prepare(model, TOP)
        plan(ids)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        assert_same(plan(ids), attribute(model, ids, TOP))

    def test_without_a_check_the_probability_is_known(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, TOP, pos=None, check=False)
        with torch.no_grad():
            expected = model(ids).logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(found.log_probability, expected, rtol=1e-4, atol=1e-4)

    def test_no_answer_is_refused_with_top_named(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        for call in (
            lambda: attribute(model, ids),
            lambda: dla_hooks.prepare(model, None),
            lambda: dla_hooks.attribute_many(model, [ids[0]], None),
        ):
            with pytest.raises(InputError, match=r"dla_hooks\.TOP"):
                call()

    @pytest.mark.parametrize("question", [(TOP, RUNNER_UP), (NEXT, None), (5, TOP)])
    def test_no_position_gives_an_empty_result(self, question):
        model, ids = build("gpt2"), example_ids("gpt2")
        for pos in ([], slice(0, 0)):
            found = attribute(model, ids, *question, pos=pos)
            assert found.shape == (2, 0)
            assert found.top_tokens == []
            many = list(dla_hooks.attribute_many(model, list(ids), *question, pos=pos))
            assert [one.shape for one in many] == [(1, 0), (1, 0)]

    def test_own_tokens_in_lists_are_refused(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        with pytest.raises(InputError, match="TOP"):
            attribute(model, ids, [TOP, 5])


class TestNext:
    @pytest.mark.parametrize("spec", SPECS)
    def test_next_is_the_following_token_of_every_position(self, spec):
        model, ids = build(spec), example_ids(spec)
        found = attribute(model, ids, NEXT, unit="head", pos=None)
        expected = attribute(model, ids, ids[:, 1:], unit="head", pos=slice(0, -1))
        assert_same(found, expected)
        assert found.attribution.shape[-1] == ids.shape[1] - 1

    def test_next_against_top(self):
        model, ids = build("gemma2"), example_ids("gemma2")
        found = attribute(model, ids, NEXT, TOP, pos=None)
        expected = attribute(model, ids, ids[:, 1:], best(model, ids)[:, :-1], pos=slice(0, -1))
        assert_same(found, expected)
        logits = model(ids).logits[:, :-1]
        own = logits.gather(-1, ids[:, 1:, None])
        assert torch.equal(found.rank, (logits > own).sum(-1) + 1)

    @pytest.mark.parametrize("place", [slice(0, 3), slice(4, 7)])
    def test_padding_is_skipped(self, place):
        model, ids = build("llama", attn="sdpa"), example_ids("llama")
        mask = torch.ones_like(ids)
        mask[1, place] = 0
        real = mask[1].bool()
        found = attribute(model, ids, NEXT, pos=None, attention_mask=mask)
        alone = attribute(model, ids[1:, real], NEXT, pos=None)
        kept = found.positions[1] >= 0
        assert int(kept.sum()) == 3
        torch.testing.assert_close(found.attribution[:, 1, kept], alone.attribution[:, 0])

    def test_slices_and_single_positions(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, NEXT, pos=2)
        assert_same(found, attribute(model, ids, ids[:, 3], pos=2))
        found = attribute(model, ids, NEXT, pos=slice(4, None))
        assert_same(found, attribute(model, ids, ids[:, 5:], pos=slice(4, 6)))

    def test_last_position_is_refused_before_the_run(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        runs = []
        model.register_forward_pre_hook(lambda *_: runs.append(1))
        for pos in (-1, [6], slice(6, None)):
            with pytest.raises(InputError, match="nothing follows"):
                attribute(model, ids, NEXT, pos=pos)
        assert not runs

    def test_embeddings_have_no_next_token(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        embeds = model.get_input_embeddings()(ids).detach()
        with pytest.raises(InputError, match="NEXT"):
            attribute(model, {"inputs_embeds": embeds}, NEXT, pos=None)


class TestSeen:
    @pytest.mark.parametrize("spec", ["gpt2", "gemma2", "mixtral"])
    def test_rank_and_probability_are_the_models_own(self, spec):
        model, ids = build(spec), example_ids(spec)
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        found = attribute(model, ids, 5, 7)
        shares = logits.log_softmax(-1)
        torch.testing.assert_close(found.log_probability, shares[:, 5], rtol=1e-6, atol=1e-6)
        assert found.rank.tolist() == ((logits > logits[:, 5:6]).sum(-1) + 1).tolist()
        for row, listed in enumerate(found.top_tokens):
            expected = logits[row].topk(5).indices.tolist()
            assert [text for text, _ in listed] == [str(token) for token in expected]
            for (_, p), token in zip(listed, expected, strict=True):
                assert p == pytest.approx(float(shares[row, token].exp()), rel=1e-5)

    def test_only_where_it_was_looked_at(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, 5, pos=None)
        known = ~found.log_probability.isnan()
        assert torch.equal(known, found.rank > 0)
        assert 0 < int(known.sum()) < known.numel()
        assert [bool(one) for one in found.top_tokens] == known.flatten().tolist()
        unchecked = attribute(model, ids, 5, check=False)
        assert bool(unchecked.log_probability.isnan().all())
        assert unchecked.rank.tolist() == [-1, -1]
        assert unchecked.top_tokens == [[], []]

    def test_sets_have_no_rank(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Tokens({5: 1, 6: 1}))
        assert found.rank.tolist() == [-1, -1]
        assert bool(found.log_probability.isnan().all())
        assert len(found.top_tokens[0]) == 5
        assert attribute(model, ids, 5, Mean([6, 7])).rank.min() > 0

    def test_views_say_it_in_one_line(self):
        tokenizer = tiny_tokenizer()
        model = build("gpt2")
        found = attribute(model, "The cat", " dog", tokenizer=tokenizer)
        line = f"answer ' dog': rank {int(found.rank)}, p {float(found.log_probability.exp()):.2g}"
        assert line in repr(found)
        assert line.replace("'", "&#x27;") in found._repr_html_()

    @pytest.mark.parametrize("unit", ["component", "neuron"])
    def test_files_hold_it(self, unit, tmp_path):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, 5, unit=unit, pos=None)
        loaded = dla_hooks.load(found.save(tmp_path / "one.safetensors"))
        assert loaded.seen == found.seen
        assert loaded.top_tokens == found.top_tokens

    def test_parts_of_a_result_keep_their_own(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, TOP, pos=None)
        part = found.prompt(1).position(2)
        assert float(part.log_probability) == float(found.log_probability[1, 2])
        assert part.top_tokens == [found.top_tokens[7 + 2]]
