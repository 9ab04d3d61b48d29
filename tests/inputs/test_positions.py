"""Every form of ``pos``, on whole and on padded batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import build

from dla_hooks import ArgumentTypeError, InputError, PositionError, direct_logit_attribution

WIDTH = 7
IDS = torch.randint(61, (2, WIDTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


@pytest.fixture(scope="module")
def everything(model):
    return direct_logit_attribution(model, IDS, 5, pos=None).attribution


INDEXES = {
    "last": -1,
    "first": 0,
    "int": 3,
    "negative": -4,
    "numpy int": np.int64(2),
    "0-d tensor": torch.tensor(2),
    "0-d array": np.array(2),
    "all": slice(None),
    "slice": slice(1, 5),
    "backwards": slice(None, None, -1),
    "steps": slice(0, None, 3),
    "empty slice": slice(5, 2),
    "beyond": slice(3, 100),
    "list": [0, 2, -1],
    "empty list": [],
    "repeated": [1, 1],
    "tensor": torch.tensor([4, 0]),
    "array": np.array([4, 0]),
    "mask": torch.tensor([True, False] * 3 + [True]),
    "numpy mask": np.array([True, False] * 3 + [True]),
}


@pytest.mark.parametrize("pos", INDEXES.values(), ids=INDEXES)
def test_pos_indexes_the_position_axis(model, everything, pos):
    result = direct_logit_attribution(model, IDS, 5, pos=pos).attribution
    as_list = pos.tolist() if hasattr(pos, "tolist") else pos
    expected = everything.numpy()[:, :, as_list]
    if isinstance(pos, slice) and (pos.step or 1) < 0:
        expected = expected.copy()
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)
    assert result.shape == expected.shape


BOUND = st.none() | st.integers(-9, 9)


@given(BOUND, BOUND, st.none() | st.integers(-4, 4).filter(bool))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_slices_follow_python(model, everything, start, stop, step):
    pos = slice(start, stop, step)
    result = direct_logit_attribution(model, IDS, 5, pos=pos).attribution
    columns = list(range(WIDTH))[pos]
    torch.testing.assert_close(result, everything[:, :, columns])


@pytest.mark.parametrize("pos", [(3,), (1, 4), (None, 4), (0, None, 2), (None,), (-3, None)])
def test_tuple_is_read_as_slice(model, everything, pos):
    result = direct_logit_attribution(model, IDS, 5, pos=pos).attribution
    torch.testing.assert_close(result, everything[:, :, slice(*pos)])


def test_none_is_every_position(model, everything):
    assert everything.shape == (6, 2, WIDTH) or everything.shape[1:] == (2, WIDTH)
    last = direct_logit_attribution(model, IDS, 5).attribution
    torch.testing.assert_close(last, everything[..., -1])


@pytest.mark.parametrize(
    ("pos", "error", "said"),
    [
        ((), ArgumentTypeError, "1 to 3 items, got 0"),
        ((1, 2, 3, 4), ArgumentTypeError, "1 to 3 items, got 4"),
        (WIDTH, PositionError, "position 7 is out of range: row 0 of the input has 7 tokens"),
        (-WIDTH - 1, PositionError, "positions go from -7 to 6"),
        ([0, 9], PositionError, "position 9"),
        (torch.tensor([0, 9]), PositionError, "position 9"),
        ("last", InputError, "str"),
        (1.0, InputError, "float"),
        (np.array([0.5]), InputError, "ndarray|list"),
        (True, InputError, "bool"),
        ([True, False], InputError, "mask is given as a tensor"),
        (torch.zeros(2, 2, dtype=torch.long), InputError, r"at most one axis.*PerRow"),
        (slice(0, 4, 0), InputError, "step 0"),
        (("a", None), InputError, "pos must be"),
        ({1}, InputError, "set"),
    ],
)
def test_wrong_positions_are_refused(model, pos, error, said):
    with pytest.raises(error, match=said):
        direct_logit_attribution(model, IDS, 5, pos=pos)


@pytest.mark.parametrize("error", [(PositionError, IndexError), (ArgumentTypeError, TypeError)])
def test_position_errors_are_builtin_errors(error):
    assert issubclass(*error)


# Rows of 3, 6 and 1 tokens, padded on either side.
LENGTHS = (3, 6, 1)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(61, (n,), generator=generator) for n in LENGTHS]
    ids = torch.full((3, 6), 60)
    mask = torch.zeros(3, 6, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(6 - len(tokens), 6) if side == "left" else slice(0, len(tokens))
        ids[row, place] = tokens
        mask[row, place] = 1
    return ids, mask, rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pos", [-1, 0])
def test_positions_are_counted_among_real_tokens(model, side, pos):
    ids, mask, rows = padded(side)
    batch = direct_logit_attribution(model.float(), ids, 5, pos=pos, attention_mask=mask)
    for row, tokens in enumerate(rows):
        alone = direct_logit_attribution(model, tokens, 5, pos=pos)
        torch.testing.assert_close(
            batch.attribution[:, row], alone.attribution[:, 0], rtol=0, atol=2e-5
        )
        assert int(batch.positions[row]) == (len(tokens) - 1 if pos == -1 else 0)
    model.double()


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_positions_of_a_padded_batch_hold_nan_at_padding(model, side):
    ids, mask, rows = padded(side)
    batch = direct_logit_attribution(model.float(), ids, 5, pos=None, attention_mask=mask)
    model.double()
    assert torch.equal(batch.attribution[0].isnan(), mask == 0)
    assert torch.equal(batch.logit.isnan(), mask == 0)
    assert torch.equal(batch.positions == -1, mask == 0)
    for row, tokens in enumerate(rows):
        real = batch.attribution[:, row][:, mask[row] == 1]
        alone = direct_logit_attribution(model.float(), tokens, 5, pos=None).attribution[:, 0]
        model.double()
        torch.testing.assert_close(real, alone, rtol=0, atol=2e-5)
    assert batch.top(1)[0][1] == batch.top(1)[0][1]  # means leave padding out


def test_ragged_slices_are_filled_on_the_padded_side(model):
    ids, mask, _ = padded("left")
    left = direct_logit_attribution(model.float(), ids, 5, pos=(-2, None), attention_mask=mask)
    ids, mask, _ = padded("right")
    right = direct_logit_attribution(model, ids, 5, pos=(-2, None), attention_mask=mask)
    model.double()
    nan = [[False, False], [False, False], [True, False]]
    assert left.bias.isnan().tolist() == nan
    assert right.bias.isnan().tolist() == [row[::-1] for row in nan]


def test_a_position_that_a_short_row_lacks_is_refused(model):
    ids, mask, _ = padded("right")
    with pytest.raises(PositionError, match="row 2 of the input has 1 tokens"):
        direct_logit_attribution(model, ids, 5, pos=1, attention_mask=mask)


def test_positions_are_said_first_where_tokens_are_wrong_too(model):
    with pytest.raises(PositionError, match="position 7 is out of range"):
        direct_logit_attribution(model, IDS, [[5], [6]], pos=WIDTH)
