"""Many prompts with questions that are no plain tokens, against calls of single prompts."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from zoo import build, example_ids

import dla_hooks
from dla_hooks import (
    NEXT,
    RUNNER_UP,
    TOP,
    Continuation,
    DLAError,
    Each,
    InputError,
    Mean,
    PerRow,
    Span,
    Tokens,
    attribute_many,
)
from dla_hooks import direct_logit_attribution as attribute


@pytest.fixture(scope="module")
def prompts():
    ids = torch.cat([example_ids("llama", seed=seed, length=9) for seed in (0, 1)])
    return [own[:n].tolist() for own, n in zip(ids, (9, 5, 7, 5), strict=True)]


@pytest.fixture(scope="module")
def model():
    return build("llama", attn="sdpa")


def assert_same(found, expected, n=4):
    assert len(found) == len(expected) == n
    for one, own in zip(found, expected, strict=True):
        assert not isinstance(one, DLAError), one
        for name in ("attribution", "bias", "logit", "positions"):
            torch.testing.assert_close(
                getattr(one, name), getattr(own, name), rtol=1e-9, atol=1e-9, equal_nan=True
            )
        assert (one.answer, one.incorrect, one.tokens) == (own.answer, own.incorrect, own.tokens)
        assert one.several == own.several


FOR_ALL = [
    (Tokens({5: 1, 7: -0.5, 8: -0.5}), None),
    (5, Mean([7, 8])),
    (Mean([7, 8, 9]), 5),
    (Each([5, 6, 7]), None),
    (Each([5, 6, 7]), Mean([8, 9])),
    (TOP, None),
    (TOP, RUNNER_UP),
    (5, TOP),
    (TOP, Mean([7, 8])),
    (Each([5, 6]), TOP),
]


@pytest.mark.parametrize("unit", ["component", "neuron"])
@pytest.mark.parametrize("pos", [-1, None, [0, 2]])
@pytest.mark.parametrize(("answer", "wrong"), FOR_ALL)
def test_question_for_all_prompts(model, prompts, answer, wrong, pos, unit):
    found = list(attribute_many(model, prompts, answer, wrong, pos=pos, unit=unit))
    expected = [attribute(model, [one], answer, wrong, pos=pos, unit=unit) for one in prompts]
    assert_same(found, expected)


@pytest.mark.parametrize("pos", [None, slice(0, -1), 1])
@pytest.mark.parametrize("wrong", [None, 5, TOP, Mean([5, 6])])
def test_next_tokens(model, prompts, pos, wrong):
    found = list(attribute_many(model, prompts, NEXT, wrong, pos=pos))
    assert_same(found, [attribute(model, [one], NEXT, wrong, pos=pos) for one in prompts])


def test_next_of_the_last_position_is_refused_at_once(model, prompts):
    with pytest.raises(InputError, match="nothing follows"):
        attribute_many(model, prompts, NEXT)


@pytest.mark.parametrize("pos", [-1, None])
def test_each_prompt_has_its_own_set(model, prompts, pos):
    sets = [Tokens({5: 1}), Tokens({6: 2, 7: -1}), Mean([3, 4, 5]), 8]
    wrong = [Mean([1, 2]), 3, 4, Tokens({5: 1, 6: 1})]
    found = list(attribute_many(model, prompts, sets, wrong, pos=pos))
    expected = [
        attribute(model, [one], *pair, pos=pos)
        for one, *pair in zip(prompts, sets, wrong, strict=True)
    ]
    assert_same(found, expected)


@pytest.mark.parametrize("pos", [-1, None])
def test_each_prompt_has_its_own_answers(model, prompts, pos):
    lines = [[5, 6], [7, 8], [9, 10], [11, 12]]
    found = list(attribute_many(model, prompts, Each(lines), 3, pos=pos))
    expected = [
        attribute(model, [one], Each(line), 3, pos=pos)
        for one, line in zip(prompts, lines, strict=True)
    ]
    assert_same(found, expected)


@pytest.mark.parametrize("wrong", [None, 3, Mean([3, 4]), RUNNER_UP])
def test_continuations_follow_their_prompts(model, prompts, wrong):
    pieces = [[5, 6], [7], [8, 9, 10], [11]]
    found = list(attribute_many(model, prompts, Continuation(pieces), wrong))
    expected = [
        attribute(model, [one], Continuation(piece), wrong)
        for one, piece in zip(prompts, pieces, strict=True)
    ]
    assert_same(found, expected)
    same = list(attribute_many(model, prompts, [Continuation(one) for one in pieces], wrong))
    assert_same(same, expected)


@pytest.mark.parametrize("rows", [[2, -1, 0, 3], [[2, 3], [0, -1], [1, 1], [-2, -1]]])
@pytest.mark.parametrize(
    ("answer", "wrong"), [(5, None), (5, 7), (Tokens({5: 1, 6: 1}), 3), (TOP, None)]
)
def test_positions_of_each_prompt(model, prompts, rows, answer, wrong):
    found = list(attribute_many(model, prompts, answer, wrong, pos=PerRow(rows)))
    expected = [
        attribute(model, [one], answer, wrong, pos=own)
        for one, own in zip(prompts, rows, strict=True)
    ]
    assert_same(found, expected)


def test_positions_of_other_prompts_are_refused(model, prompts):
    with pytest.raises(InputError, match="3 prompts"):
        attribute_many(model, prompts, 5, pos=PerRow([1, 2, 3]))
    found = list(attribute_many(model, prompts, 5, pos=PerRow([1, 99, 2, 3])))
    assert [isinstance(one, DLAError) for one in found] == [False, True, False, False]


def test_span_of_each_text():
    model, tokenizer = dla_hooks.demo.load()
    texts = ["The keys near the cabinet", "The dogs near the cars near", "The dogs near the car"]
    found = list(attribute_many(model, texts, " are", pos=Span("near the"), tokenizer=tokenizer))
    for one, text in zip(found, texts, strict=True):
        own = attribute(model, text, " are", pos=Span("near the"), tokenizer=tokenizer)
        torch.testing.assert_close(one.attribution, own.attribution, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.positions, own.positions)
    lacking = list(attribute_many(model, texts, " are", pos=Span("cabinet"), tokenizer=tokenizer))
    assert [isinstance(one, DLAError) for one in lacking] == [False, True, True]


@pytest.mark.parametrize(
    ("answer", "wrong", "pos"),
    [
        (5, None, -1),
        (5, 7, None),
        (Each([5, 6]), TOP, None),
        (Each([5, 6]), None, -1),
        (TOP, RUNNER_UP, None),
        (NEXT, None, None),
        (Continuation([5, 6]), None, -1),
        (Tokens({5: 1, 6: 2}), None, PerRow([0, 1, 2, 3])),
    ],
)
@pytest.mark.parametrize("unit", ["component", "neuron"])
def test_resumed_results_are_those_of_the_first_run(
    model, prompts, answer, wrong, pos, unit, tmp_path
):
    def run():
        return list(
            attribute_many(
                model, prompts, answer, wrong, pos=pos, unit=unit, resume=tmp_path / "run"
            )
        )

    first = run()
    forward, runs = type(model).forward, []
    with mock.patch.object(
        type(model), "forward", lambda *given, **named: runs.append(1) or forward(*given, **named)
    ):
        second = run()
    assert not runs
    assert_same(second, first)
    assert [one.seen == own.seen for one, own in zip(second, first, strict=True)] == [True] * 4


def test_other_positions_are_another_run(model, prompts, tmp_path):
    list(attribute_many(model, prompts, 5, pos=PerRow([0, 1, 2, 3]), resume=tmp_path / "run"))
    with pytest.raises(InputError, match="not the one whose result is stored"):
        list(attribute_many(model, prompts, 5, pos=PerRow([0, 1, 2, 2]), resume=tmp_path / "run"))


def test_results_say_ranks_and_probabilities(model, prompts):
    for one, ids in zip(attribute_many(model, prompts, 5, 7), prompts, strict=True):
        logits = model(torch.tensor([ids])).logits[0, -1]
        assert one.rank.tolist() == [int((logits > logits[5]).sum()) + 1]
        torch.testing.assert_close(
            one.log_probability[0], logits.log_softmax(-1)[5], rtol=1e-6, atol=1e-6
        )
        assert one.top_tokens[0][0][0] == str(int(logits.argmax()))


def test_summaries_of_questions(model, prompts):
    found = list(attribute_many(model, prompts, Each([5, 6]), NEXT, pos=None))
    summary = dla_hooks.summarize(found)
    expected = torch.stack([one.attribution.flatten(1).mean(-1) for one in found]).mean(0)
    torch.testing.assert_close(summary.mean, expected)
