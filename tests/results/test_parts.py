"""Parts of a result: a row by its label, a prompt, a position, the heads as a grid."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
import re

import pytest
import torch
from zoo import build, tiny_tokenizer

from dla_hooks import (
    ArgumentTypeError,
    DirectLogitAttribution,
    InputError,
    LabelError,
    PositionError,
    RankedAttribution,
    Summary,
    direct_logit_attribution,
    load,
)

PROMPTS = ["The cat sat on the mat", "When Mary", "The cat sat"]
ANSWERS = [" Paris", " mat", " cat"]


@pytest.fixture(scope="module")
def attribute():
    model, tokenizer = build("gpt2", dtype=torch.float64), tiny_tokenizer()

    def call(input=PROMPTS, answer=" Paris", incorrect=None, **kwargs):
        return direct_logit_attribution(
            model, input, answer, incorrect, tokenizer=tokenizer, **kwargs
        )

    return call


def made(labels, values=None, **fields):
    if values is None:
        values = torch.arange(1.0, len(labels) + 1)[:, None]
    rest = torch.zeros(values.shape[1:])
    fields = {"unit": "head", "bias": rest, "logit": rest.clone(), "gap": 0.0, **fields}
    return DirectLogitAttribution(values, labels, **fields)


class TestRows:
    def test_a_label_gives_that_row(self, attribute):
        result = attribute(unit="head", pos=None)
        row = result.labels.index("L1H2")
        torch.testing.assert_close(result["L1H2"], result.attribution[row], equal_nan=True)
        assert "L1H2" in result
        assert "L9H9" not in result

    def test_an_unknown_label_names_the_nearest(self, attribute):
        result = attribute(unit="head")
        with pytest.raises(LabelError, match="called 'L1h2'; near it are 'L1H2'"):
            result["L1h2"]
        with pytest.raises(KeyError):
            result["0_mlp_out"]
        with pytest.raises(InputError):
            result[""]

    @pytest.mark.parametrize("label", [0, -1, slice(2), None, ("L0H0",)])
    def test_a_label_that_is_no_string_is_refused(self, attribute, label):
        with pytest.raises(ArgumentTypeError, match=r"a string like 'L0H0'; got"):
            attribute(unit="head")[label]

    def test_length_and_iteration_are_of_rows(self, attribute):
        result = attribute(unit="head", pos=None)
        pairs = list(result)
        assert len(result) == len(result.labels) == len(pairs)
        assert [row for row, _ in pairs] == result.rows
        torch.testing.assert_close(
            torch.stack([numbers for _, numbers in pairs]), result.attribution, equal_nan=True
        )

    def test_a_notebook_completes_labels(self, attribute):
        result = attribute()
        assert result._ipython_key_completions_() == result.labels

    def test_a_result_without_rows_is_still_true(self):
        assert made([])
        assert len(made([])) == 0


class TestPrompt:
    @pytest.mark.parametrize("pos", [-1, None, slice(0, 2)])
    def test_each_prompt_is_that_of_its_own_call(self, attribute, pos):
        result = attribute(answer=ANSWERS, incorrect=ANSWERS[::-1], pos=pos)
        for index, text in enumerate(PROMPTS):
            one = result.prompt(index)
            assert type(one) is DirectLogitAttribution
            assert one.attribution.shape[1] == 1
            wrong = ANSWERS[::-1][index]
            alone = attribute(text, ANSWERS[index], wrong, pos=pos)
            assert repr(one).splitlines()[0] == repr(alone).splitlines()[0]
            assert (one.answer, one.incorrect) == ([ANSWERS[index]], [wrong])
            torch.testing.assert_close(one.mean(), alone.mean(), rtol=0, atol=1e-6)
            ours = [{**line, "attribution": None} for line in one.records()]
            assert ours == [{**line, "attribution": None} for line in alone.records()]

    def test_answers_of_each_position_stay_with_it(self, attribute):
        ids = torch.tensor([[7, 8], [9, 10], [9, 9]])
        result = attribute(answer=ids, pos=(0, 2))
        names = [tiny_tokenizer().decode([i]) for i in range(11)]
        assert result.prompt(1).answer == [names[9], names[10]]
        assert result.prompt(2).answer == [names[9]]
        assert result.position(1).answer == [names[8], names[10], names[9]]

    def test_an_index_counts_from_either_end(self, attribute):
        result = attribute()
        assert result.prompt(-1).tokens == result.prompt(2).tokens == result.tokens[2:]

    @pytest.mark.parametrize("index", [3, -4])
    def test_an_index_out_of_range_is_refused(self, attribute, index):
        with pytest.raises(PositionError, match=f"index {index} is out of range.*3 rows"):
            attribute().prompt(index)

    @pytest.mark.parametrize("index", ["0", 1.0, None, True, slice(1)])
    def test_an_index_that_is_no_int_is_refused(self, attribute, index):
        with pytest.raises(ArgumentTypeError, match="must be an int"):
            attribute().prompt(index)

    def test_several_answers_of_one_prompt_stay_together(self, attribute):
        result = attribute(PROMPTS[0], ANSWERS)
        assert result.prompt(0).records() == result.records()
        with pytest.raises(PositionError):
            result.prompt(1)

    def test_a_result_made_by_hand_has_the_batch_on_its_first_axis(self):
        result = made(["L0H0"], torch.tensor([[1.0, 2.0]]), answer=["a", "b"])
        one = result.prompt(1)
        assert one.attribution.tolist() == [[2.0]]
        assert one.answer == ["b"]

    def test_tokens_that_are_not_of_the_batch_are_refused(self):
        result = made(["L0H0"], torch.ones(1, 3), tokens=[["a"], ["b"]])
        with pytest.raises(InputError, match="2 prompts and 3 rows"):
            result.prompt(0)


class TestPosition:
    def test_each_position_is_that_of_its_own_call(self, attribute):
        result = attribute(answer=ANSWERS, pos=[0, 1], unit="head")
        for index in (0, 1):
            one = result.position(index)
            alone = attribute(answer=ANSWERS, pos=index, unit="head")
            torch.testing.assert_close(one.attribution, alone.attribution)
            torch.testing.assert_close(one.total() + one.bias, one.logit, rtol=0, atol=1e-6)
            assert repr(one).splitlines()[0] == repr(alone).splitlines()[0]
            assert one.answer == alone.answer

    def test_padding_leaves_those_prompts_that_have_it(self, attribute):
        result = attribute(pos=None).position(0)
        assert {line["row"] for line in result.records()} == {0}

    def test_without_an_axis_of_positions_it_is_refused(self, attribute):
        with pytest.raises(InputError, match=r"\[row, batch, position\].*single position"):
            attribute().position(0)

    def test_an_index_out_of_range_is_refused(self, attribute):
        with pytest.raises(PositionError, match="has 6 entries"):
            attribute(pos=None).position(6)


class TestHeads:
    def test_the_grid_is_layer_by_head(self, attribute):
        result = attribute(unit="head", pos=None)
        grid = result.heads
        assert grid.shape == (3, 4, *result.logit.shape)
        for layer in range(3):
            for head in range(4):
                torch.testing.assert_close(
                    grid[layer, head], result[f"L{layer}H{head}"], equal_nan=True
                )

    def test_layers_without_heads_and_with_fewer_are_nan(self):
        grid = made(["L1H0", "L1H1", "L3H0", "remainder"]).heads[..., 0]
        nan = float("nan")
        expected = torch.tensor([[nan, nan], [1.0, 2.0], [nan, nan], [3.0, nan]])
        torch.testing.assert_close(grid, expected, equal_nan=True)

    def test_a_second_attention_follows_the_first_of_its_block(self):
        labels = ["L0H0", "L0H1", "L0.1H0", "L0.1H1", "L1H0", "L1H1"]
        grid = made(labels).heads[..., 0]
        assert grid[0].tolist() == [1.0, 2.0, 3.0, 4.0]
        assert grid[1, :2].tolist() == [5.0, 6.0]
        assert bool(grid[1, 2:].isnan().all())

    def test_other_rows_are_refused(self, attribute):
        with pytest.raises(InputError, match="unit is 'component'.*Attribute to heads"):
            attribute().heads  # noqa: B018


class TestTargets:
    def test_each_entry_has_the_answer_that_it_is_indexed_to(self):
        # As many answers as the batch has rows, and not in their order.
        target = torch.tensor([[1, 0], [0, -1]])
        result = made(
            ["L0H0"],
            torch.ones(1, 2, 2),
            answer=["a", "b"],
            incorrect=["c", "d"],
            tokens=[["x", "y"], ["z"]],
            positions=torch.tensor([[0, 1], [0, -1]]),
            target=target,
        )
        found = [(line["answer"], line["incorrect"]) for line in result.records()]
        assert found == [("b", "d"), ("a", "c"), ("a", "c")]
        assert result.prompt(0).answer == ["b", "a"]
        assert result.prompt(1).incorrect == ["c"]
        assert result.position(0).answer == ["b", "a"]

    def test_targets_are_saved(self, tmp_path):
        result = made(["L0H0"], torch.ones(1, 2), answer=["a", "b"], target=torch.tensor([1, 0]))
        loaded = load(result.save(tmp_path / "r.safetensors"))
        assert loaded.target.tolist() == [1, 0]
        assert [line["answer"] for line in loaded.records()] == ["b", "a"]

    def test_a_target_of_another_shape_is_refused(self):
        with pytest.raises(InputError, match=r"target has shape \[3\].*\[2\]"):
            made(["L0H0"], torch.ones(1, 2), target=torch.zeros(3, dtype=torch.long))


def test_labels_that_are_not_as_many_as_rows_are_refused():
    with pytest.raises(InputError, match="2 rows, and there are 1 labels"):
        made(["L0H0"], torch.ones(2, 1))


def test_public_classes_say_the_module_that_users_import_from(attribute):
    for one in (DirectLogitAttribution, RankedAttribution, Summary):
        assert one.__module__ == "dla_hooks"
    result = attribute(unit="head")
    for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert type(other) is DirectLogitAttribution
        assert repr(other) == repr(result)


@pytest.mark.parametrize("subject", [DirectLogitAttribution, RankedAttribution, Summary, load])
def test_examples_in_docstrings_hold(subject):
    examples = [
        test
        for test in doctest.DocTestFinder().find(subject, module=False, globs={})
        if test.examples
    ]
    assert examples
    runner = doctest.DocTestRunner()
    assert all(runner.run(example).failed == 0 for example in examples)


def test_every_field_is_documented():
    from dataclasses import fields

    for one in (DirectLogitAttribution, RankedAttribution, Summary):
        named = re.findall(r"^    (\w+): ", inspect.getdoc(one), re.MULTILINE)
        assert named == [field.name for field in fields(one)]
