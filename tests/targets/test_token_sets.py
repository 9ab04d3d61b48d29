"""Weighted sets of tokens, means, and several answers, against sums of single attributions."""

from __future__ import annotations

import pytest
import torch
from oracle import logit_parts
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import Each, InputError, Mean, ShapeMismatchError, TokenError, Tokens
from dla_hooks import direct_logit_attribution as attribute

SPECS = ["gpt2", "llama", "gemma2", "granite", "gpt_neox-parallel", "mixtral"]
SETS = [
    {5: 1.0, 7: -0.5, 11: -0.5},
    {3: 2.5},
    {5: 0.25, 6: 0.25, 7: 0.25, 8: 0.25},
    {9: 100.0, 2: -40.0, 1: 3.0},
]


def f64(spec, seed=0):
    return build(spec, dtype=torch.float64, seed=seed)


def close(found, expected, scale=1.0):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-9, atol=1e-9 * scale)


def weighted(model, ids, weights, **options):
    """The weighted sum of the attributions of single tokens."""
    parts = [(w, attribute(model, ids, token, **options)) for token, w in weights.items()]
    return [
        sum(w * getattr(one, name) for w, one in parts) for name in ("attribution", "bias", "logit")
    ]


def assert_is_sum(found, model, ids, weights, **options):
    expected = weighted(model, ids, weights, **options)
    scale = max(1.0, *map(abs, weights.values())) * 10
    for name, value in zip(("attribution", "bias", "logit"), expected, strict=True):
        close(getattr(found, name), value, scale)


class TestTokens:
    @pytest.mark.parametrize("spec", SPECS)
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("weights", SETS)
    def test_set_is_the_weighted_sum_of_its_tokens(self, spec, seed, weights):
        model, ids = f64(spec, seed), example_ids(spec, seed=seed)
        for unit in ("component", "head"):
            found = attribute(model, ids, Tokens(weights), unit=unit, pos=None)
            assert_is_sum(found, model, ids, weights, unit=unit, pos=None)

    @pytest.mark.parametrize("spec", ["gpt2", "gemma2"])
    def test_set_is_what_the_oracle_computes(self, spec):
        model, ids = f64(spec), example_ids(spec)
        found = attribute(model, ids, Tokens(SETS[0]), pos=None)
        parts = [(w, logit_parts(model, ids, token)) for token, w in SETS[0].items()]
        for label in found.labels:
            if label in parts[0][1]:
                expected = sum(w * own[label] for w, own in parts)
                torch.testing.assert_close(found[label], expected, rtol=1e-5, atol=1e-5)

    def test_logit_is_the_sum_of_the_models_own(self):
        model, ids = f64("gpt2"), example_ids("gpt2")
        with torch.no_grad():
            logits = model(ids).logits
        found = attribute(model, ids, Tokens(SETS[0]), pos=None)
        expected = sum(w * logits[..., token] for token, w in SETS[0].items())
        torch.testing.assert_close(found.logit, expected, rtol=1e-5, atol=1e-5)

    def test_pair_is_the_difference_of_two(self):
        model, ids = build("llama"), example_ids("llama")
        found = attribute(model, ids, Tokens({5: 1, 7: -1}), pos=None)
        pair = attribute(model, ids, 5, 7, pos=None)
        assert torch.equal(found.attribution, pair.attribution)
        assert torch.equal(found.logit, pair.logit)

    def test_each_prompt_may_have_its_own_set(self):
        model, ids = f64("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, [Tokens(SETS[0]), Tokens(SETS[1])], pos=None)
        for row in range(2):
            own = attribute(model, ids[row : row + 1], Tokens(SETS[row]), pos=None)
            close(found.prompt(row).attribution, own.attribution, 10)
            assert set(found.prompt(row).answer) == set(own.answer)

    @pytest.mark.parametrize("weights", SETS)
    def test_centring_moves_the_bias_and_the_parts_by_the_mean_row(self, weights):
        model, ids = f64("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Tokens(weights), pos=None, center_unembed=True)
        assert_is_sum(found, model, ids, weights, pos=None, center_unembed=True)
        plain = attribute(model, ids, Tokens(weights), pos=None)
        same = torch.allclose(found.attribution, plain.attribution, atol=1e-9)
        assert same == (abs(sum(weights.values())) < 1e-9)

    def test_prompt_in_chunks_gives_the_same(self):
        model, ids = f64("llama"), example_ids("llama", length=12)
        whole = attribute(model, ids, Tokens(SETS[0]), pos=None)
        pieces = attribute(model, ids, Tokens(SETS[0]), pos=None, chunk_size=5)
        close(pieces.attribution, whole.attribution, 10)

    def test_many_distinct_sets_are_folded_on_demand(self, monkeypatch):
        from dla_hooks.targets import tokens

        model, ids = f64("gpt2"), example_ids("gpt2")
        sets = torch.arange(14).reshape(2, 7)
        whole = attribute(model, ids, sets, Mean([20, 21]), pos=None)
        monkeypatch.setattr(tokens, "few", lambda *_: False)
        close(attribute(model, ids, sets, Mean([20, 21]), pos=None).attribution, whole.attribution)

    def test_large_set_is_the_mean_over_the_vocabulary(self):
        model, ids = f64("gpt2"), example_ids("gpt2")
        vocabulary = model.config.vocab_size
        found = attribute(model, ids, 5, Mean(list(range(vocabulary))), pos=None)
        centred = attribute(model, ids, 5, pos=None, center_unembed=True)
        close(found.attribution, centred.attribution)

    def test_strings_are_read_with_the_tokenizer(self):
        tokenizer = tiny_tokenizer()
        model = build("gpt2")
        found = attribute(model, "The cat", Tokens({" dog": 1, " cat": -1}), tokenizer=tokenizer)
        pair = attribute(model, "The cat", " dog", " cat", tokenizer=tokenizer)
        assert torch.equal(found.attribution, pair.attribution)
        assert found.answer == ["' dog' - ' cat'"]

    def test_weights_of_any_size_are_attributed(self):
        model, ids = build("gpt2", dtype=torch.float32), example_ids("gpt2")
        for scale in (1e-3, 1.0, 1e3):
            found = attribute(model, ids, Tokens({5: scale, 7: -scale}), pos=None)
            single = attribute(model, ids, 5, 7, pos=None)
            torch.testing.assert_close(
                found.attribution, scale * single.attribution, rtol=1e-4, atol=1e-5 * scale
            )

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_wrong_direction_is_refused_whatever_the_weights(self, scale, monkeypatch):
        from dla_hooks.targets.token_sets import TokenSets

        rows = TokenSets.rows
        model, ids = build("llama"), example_ids("llama")
        attribute(model, ids, Tokens({5: scale, 7: -0.5 * scale}))
        monkeypatch.setattr(
            TokenSets,
            "rows",
            lambda self, *given: tuple(1.01 * one for one in rows(self, *given)),
        )
        with pytest.raises(dla_hooks.DecompositionError):
            attribute(model, ids, Tokens({5: scale, 7: -0.5 * scale}))

    @pytest.mark.parametrize(
        ("weights", "match"),
        [
            ({}, "mapping"),
            ([5, 7], "mapping"),
            ({5: float("nan")}, "finite number"),
            ({5: "1"}, "finite number"),
            ({5: True}, "finite number"),
            ({5: 0.0}, "every weight"),
        ],
    )
    def test_wrong_weights_are_refused(self, weights, match):
        with pytest.raises(InputError, match=match):
            Tokens(weights)

    def test_id_outside_the_vocabulary_is_refused_before_the_run(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        runs = []
        model.register_forward_pre_hook(lambda *_: runs.append(1))
        for answer, wrong in (
            (Tokens({5: 1, 999: 1}), None),
            (5, Mean([1, 999])),
            (Each([[5, 999], [1, 2]]), None),
        ):
            with pytest.raises(TokenError, match="999"):
                attribute(model, ids, answer, wrong)
        assert not runs

    def test_string_of_two_tokens_is_refused(self):
        with pytest.raises(TokenError):
            attribute(build("gpt2"), "The cat", Tokens({" dog cat": 1}), tokenizer=tiny_tokenizer())


class TestMean:
    @pytest.mark.parametrize("spec", SPECS)
    def test_right_token_against_the_mean_of_wrong_ones(self, spec):
        model, ids = f64(spec), example_ids(spec)
        found = attribute(model, ids, 5, Mean([7, 8, 9]), pos=None)
        weights = {5: 1.0, 7: -1 / 3, 8: -1 / 3, 9: -1 / 3}
        assert_is_sum(found, model, ids, weights, pos=None)
        assert found.incorrect is not None

    def test_mean_as_the_answer(self):
        model, ids = f64("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Mean([7, 8]), 5)
        assert_is_sum(found, model, ids, {7: 0.5, 8: 0.5, 5: -1.0})

    def test_one_mean_goes_with_an_answer_for_each_prompt(self):
        model, ids = f64("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, [5, 6], Mean([7, 8]))
        for row, answer in enumerate((5, 6)):
            own = attribute(model, ids[row : row + 1], answer, Mean([7, 8]))
            close(found.attribution[:, row], own.attribution[:, 0])

    @pytest.mark.parametrize("tokens", [[], "ab", 5, [[1, 2]], None])
    def test_what_is_no_list_of_tokens_is_refused(self, tokens):
        with pytest.raises(InputError):
            Mean(tokens)


class TestEach:
    ANSWERS = ((5, 6, 7), (8, 9, 10))

    @pytest.mark.parametrize("spec", SPECS)
    @pytest.mark.parametrize("pos", [-1, None, [1, 3]])
    def test_each_answer_is_a_call_of_its_own(self, spec, pos):
        model, ids = f64(spec), example_ids(spec)
        found = attribute(model, ids, Each(self.ANSWERS), unit="head", pos=pos)
        assert found.attribution.shape[-1] == 3
        for number in range(3):
            own = torch.tensor([row[number] for row in self.ANSWERS])
            own = own if pos == -1 else own[:, None]
            single = attribute(model, ids, own, unit="head", pos=pos)
            for name in ("attribution", "bias", "logit"):
                close(getattr(found, name)[..., number], getattr(single, name))
            each = found.each(number)
            close(each.attribution, single.attribution)
            answered = [each.prompt(row).answer for row in range(2)]
            assert answered == [single.prompt(row).answer for row in range(2)]

    def test_against_another_each_and_against_one_for_all(self):
        model, ids = f64("gemma2"), example_ids("gemma2")
        wrong = [[1, 2, 3], [3, 2, 1]]
        pairs = attribute(model, ids, Each(self.ANSWERS), Each(wrong))
        plain = attribute(model, ids, Each(self.ANSWERS), [1, 3])
        mean = attribute(model, ids, Each(self.ANSWERS), Mean([1, 3]))
        for row in range(2):
            one = ids[row : row + 1]
            for number in range(3):
                right = self.ANSWERS[row][number]
                for found, against in (
                    (pairs, wrong[row][number]),
                    (plain, [1, 3][row]),
                    (mean, Mean([1, 3])),
                ):
                    single = attribute(model, one, right, against)
                    close(found.attribution[:, row, number], single.attribution[:, 0])

    def test_one_list_goes_for_all_prompts(self):
        model, ids = f64("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Each([5, 6]), pos=None)
        same = attribute(model, ids, Each([[5, 6], [5, 6]]), pos=None)
        assert torch.equal(found.attribution, same.attribution)

    def test_answers_may_be_sets(self):
        model, ids = f64("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Each([5, Tokens({6: 2}), Mean([7, 8, 9])]))
        expected = [attribute(model, ids, one) for one in (5, Tokens({6: 2}), Mean([7, 8, 9]))]
        for number, own in enumerate(expected):
            close(found.attribution[..., number], own.attribution)

    def test_padded_batch_has_nan_at_padding(self):
        model = f64("gpt2")
        rows = [example_ids("gpt2")[0].tolist(), example_ids("gpt2")[1, :4].tolist()]
        found = attribute(model, rows, Each(self.ANSWERS), pos=None)
        assert found.shape == (2, 7, 3)
        assert bool(found.attribution[:, 1, :3].isnan().all())
        single = attribute(model, [rows[1]], Each(self.ANSWERS[1:]), pos=None)
        close(found.attribution[:, 1, 3:], single.attribution[:, 0])

    def test_ranked_units_have_the_axis(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Each(self.ANSWERS), unit=dla_hooks.Neurons(top=5))
        for number in range(3):
            own = [row[number] for row in self.ANSWERS]
            single = attribute(model, ids, own, unit=dla_hooks.Neurons(top=5))
            torch.testing.assert_close(found.attribution[..., number], single.attribution)
            assert found.each(number).records()[0]["label"] == single.records()[0]["label"]

    def test_lines_of_a_table_name_the_answer_of_each_column(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Each(self.ANSWERS))
        lines = [line for line in found.records() if line["label"] == found.labels[0]]
        assert [(line["row"], line["answer"]) for line in lines] == [
            (row, str(token)) for row, own in enumerate(self.ANSWERS) for token in own
        ]
        assert [line["attribution"] for line in lines] == found.attribution[0].flatten().tolist()

    def test_views_and_files_have_all_answers(self, tmp_path):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Each(self.ANSWERS), pos=[0, 2])
        assert "each its own answer" in repr(found)
        assert "mean" in found._repr_html_()
        loaded = dla_hooks.load(found.save(tmp_path / "each.safetensors"))
        assert loaded.several
        assert torch.equal(loaded.attribution, found.attribution)
        assert torch.equal(loaded.each(1).rank, found.each(1).rank)
        assert found.position(1).attribution.shape == found.attribution[..., 1, :].shape
        summary = dla_hooks.summarize([found])
        torch.testing.assert_close(summary.mean, found.attribution.flatten(1).mean(-1))

    def test_answer_axis_is_no_axis_of_positions(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        found = attribute(model, ids, Each(self.ANSWERS))
        with pytest.raises(InputError):
            found.position(0)
        with pytest.raises(InputError, match="Each"):
            attribute(model, ids, 5).each(0)
        with pytest.raises(dla_hooks.PositionError):
            found.each(3)

    @pytest.mark.parametrize("answers", [[[5, 6], [7]], [[5], 6], []])
    def test_ragged_answers_are_refused(self, answers):
        with pytest.raises(InputError):
            Each(answers)

    def test_lines_for_other_prompts_are_refused(self):
        model = build("gpt2")
        for rows in (1, 2):
            with pytest.raises(ShapeMismatchError):
                attribute(model, example_ids("gpt2")[:rows], Each([[1, 2], [3, 4], [5, 6]]))


def test_bare_lists_that_do_not_fit_name_the_other_forms():
    model, ids = build("gpt2"), example_ids("gpt2")
    with pytest.raises(ShapeMismatchError, match=r"dla_hooks\.Each.*dla_hooks\.Tokens"):
        attribute(model, ids, [5, 6, 7])
    with pytest.raises(ShapeMismatchError, match=r"dla_hooks\.Each"):
        attribute(model, ids, [5, 6], 7)


def test_prepared_plan_asks_for_sets():
    model, ids = build("gpt2"), example_ids("gpt2")
    plan = dla_hooks.prepare(model, Tokens(SETS[0]), Mean([1, 2]))
    for prompt in (ids, ids[:, :4]):
        found = plan(prompt)
        assert torch.equal(
            found.attribution, attribute(model, prompt, Tokens(SETS[0]), Mean([1, 2])).attribution
        )
