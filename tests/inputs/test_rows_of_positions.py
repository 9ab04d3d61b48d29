"""Positions that differ from prompt to prompt, against calls of single prompts."""

from __future__ import annotations

import pytest
import torch
from units import UNIT_NAMES
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import InputError, PerRow, PositionError, ShapeMismatchError, Span
from dla_hooks import direct_logit_attribution as attribute

SPECS = ["gpt2", "llama", "gemma2", "granite", "gpt_neox-parallel", "mixtral"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [[2, -1], [[0, 3], [-2, 1]]])
def test_each_row_is_that_of_its_own_call(spec, rows):
    model, ids = build(spec), example_ids(spec)
    found = attribute(model, ids, [5, 6] if rows == [2, -1] else 5, pos=PerRow(rows))
    for row, own in enumerate(rows):
        answer = [5, 6][row] if rows == [2, -1] else 5
        single = attribute(model, ids[row : row + 1], answer, pos=own)
        torch.testing.assert_close(
            found.attribution[:, row], single.attribution[:, 0], rtol=1e-9, atol=1e-9
        )
        assert torch.equal(found.positions[row], single.positions[0])


@pytest.mark.parametrize("place", [slice(0, 3), slice(4, 7)])
def test_positions_count_among_real_tokens(place):
    model, ids = build("llama", attn="sdpa"), example_ids("llama")
    mask = torch.ones_like(ids)
    mask[1, place] = 0
    found = attribute(model, ids, 5, pos=PerRow([1, 2]), attention_mask=mask, unit=UNIT_NAMES)
    alone = attribute(model, ids[1:, mask[1].bool()], 5, pos=2, unit=UNIT_NAMES)
    for unit in UNIT_NAMES:
        torch.testing.assert_close(found[unit].attribution[:, 1], alone[unit].attribution[:, 0])


def test_rows_may_be_any_integers():
    model, ids = build("gpt2"), example_ids("gpt2")
    expected = attribute(model, ids, 5, pos=PerRow([1, 2])).attribution
    for rows in (torch.tensor([1, 2]), iter([1, 2]), (1, 2)):
        assert torch.equal(attribute(model, ids, 5, pos=PerRow(rows)).attribution, expected)


def test_wrong_rows_are_refused_before_the_run():
    model, ids = build("gpt2"), example_ids("gpt2")
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    for rows, error in (([1], ShapeMismatchError), ([1, 9], PositionError)):
        with pytest.raises(error):
            attribute(model, ids, 5, pos=PerRow(rows))
    for rows in (5, "ab", [1.5, 2], [True, 1], [[1], [1.5]]):
        with pytest.raises(InputError):
            PerRow(rows)
    for rows in ([1, [2]], [[1], [2, 3]]):
        with pytest.raises(ShapeMismatchError):
            PerRow(rows)
    assert not runs


@pytest.fixture(scope="module")
def tokenizer():
    return dla_hooks.demo.load()[1]


@pytest.fixture(scope="module")
def model():
    return dla_hooks.demo.load()[0]


class TestSpan:
    @pytest.mark.parametrize("bos", [None, True, False])
    def test_piece_selects_the_tokens_that_it_covers(self, model, tokenizer, bos):
        if bos and tokenizer.bos_token_id is None:
            pytest.skip("no BOS")
        text = "The keys near the cabinet"
        found = attribute(
            model, text, " are", pos=Span("near the"), tokenizer=tokenizer, prepend_bos=bos
        )
        words = [found.tokens[0][place] for place in found.positions[0].tolist()]
        assert "".join(words).strip() == "near the"
        same = attribute(model, text, " are", pos=Span(9, 17), tokenizer=tokenizer, prepend_bos=bos)
        assert torch.equal(found.attribution, same.attribution)
        explicit = attribute(
            model,
            text,
            " are",
            pos=found.positions[0].tolist(),
            tokenizer=tokenizer,
            prepend_bos=bos,
        )
        assert torch.equal(found.attribution, explicit.attribution)

    def test_part_of_a_token_selects_it(self, model, tokenizer):
        found = attribute(
            model, "The keys near the cabinet", " are", pos=Span("binet"), tokenizer=tokenizer
        )
        assert found.positions.tolist() == [[4]]

    def test_one_of_several_is_named(self, model, tokenizer):
        text = "The keys near the cabinet near the door"
        with pytest.raises(InputError, match="2 times"):
            attribute(model, text, " are", pos=Span("near"), tokenizer=tokenizer)
        for nth, place in ((0, 2), (1, 5), (-1, 5)):
            found = attribute(model, text, " are", pos=Span("near", nth=nth), tokenizer=tokenizer)
            assert found.positions.tolist() == [[place]]
        with pytest.raises(InputError, match="nth goes from -2 to 1"):
            attribute(model, text, " are", pos=Span("near", nth=2), tokenizer=tokenizer)

    def test_rows_of_other_lengths_are_padded(self, model, tokenizer):
        texts = ["The keys near the cabinet", "The dogs near the cabinet near the door"]
        found = attribute(model, texts, " are", pos=Span(4, 25), tokenizer=tokenizer)
        for row, text in enumerate(texts):
            own = attribute(model, text, " are", pos=Span(4, 25), tokenizer=tokenizer)
            n = own.shape[1]
            kept = found.positions[row] >= 0
            assert int(kept.sum()) == n
            torch.testing.assert_close(found.attribution[:, row, kept], own.attribution[:, 0])

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            (("house",), "does not hold 'house'"),
            ((3, 99), "beyond the prompt"),
        ],
    )
    def test_what_the_text_lacks_is_refused(self, model, tokenizer, given, match):
        with pytest.raises(InputError, match=match):
            attribute(model, "The keys near", " are", pos=Span(*given), tokenizer=tokenizer)

    @pytest.mark.parametrize(
        "given", [("",), ("a", 3), (3,), (3, 3), (-1, 2), (1.5, 2), (None,), (0, True)]
    )
    def test_what_is_no_span_is_refused(self, given):
        with pytest.raises(InputError):
            Span(*given)

    def test_ids_have_no_text(self, model, tokenizer):
        with pytest.raises(InputError, match="prompts that are strings"):
            attribute(model, [[1, 2, 3]], 5, pos=Span("a"), tokenizer=tokenizer)

    def test_slow_tokenizers_are_refused(self, model):
        slow = _Slow(tiny_tokenizer())
        with pytest.raises(InputError, match="fast one"):
            attribute(build("gpt2"), "The cat", 5, pos=Span("cat"), tokenizer=slow)


class _Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, inside):
        self._inside = inside

    def __getattr__(self, name):
        return getattr(self._inside, name)
