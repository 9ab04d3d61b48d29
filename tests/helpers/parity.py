"""What a parity test is made of: the argument forms, the reference's answer, the comparison.

Everything is asked of the reference live; no number is stored. Prompts have `LENGTH` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

LENGTH = 7
UNITS = ("component", "layer", "head")  # those of the reference
TOLERANCE = 1e-5  # the reference rounds to float32 on its way, for float64 models too

_MASK = torch.tensor([0, 1, 1, 0, 0, 1, 0]).bool()
POSITIONS: dict[str, Any] = {
    "last": -1,
    "first": 0,
    "third": 2,
    "numpy int": np.int64(3),
    "0-d tensor": torch.tensor(-2),
    "0-d array": np.array(4),
    "all": None,
    "(stop)": (3,),
    "(start,stop)": (1, 5),
    "(start,stop,step)": (1, 7, 2),
    "(start,None)": (-3, None),
    "(None)": (None,),
    "slice": slice(2, 5),
    "slice of one": slice(-1, None),
    "slice with a step": slice(None, None, 3),
    "list": [0, -1],
    "list of one": [3],
    "list with repeats": [2, 2, 5, 0],
    "tensor": torch.tensor([1, -1, 4]),
    "array": np.array([6, 0, 3]),
    "mask": _MASK,
    "array mask": _MASK.numpy(),
    "empty slice": (9, 12),
    "empty list of a mask": torch.zeros(LENGTH, dtype=torch.bool),
}
FEW_POSITIONS = ("last", "third", "all", "(start,stop)", "list")


def kept(pos: Any) -> int | None:
    """How many positions `pos` keeps of a prompt; None where it drops the axis."""
    if pos is None:
        return LENGTH
    index = slice(*pos) if isinstance(pos, tuple) else pos
    picked = np.arange(LENGTH)[index.numpy() if isinstance(index, torch.Tensor) else index]
    return None if picked.ndim == 0 else len(picked)


def answer_shapes(batch: int, kept: int | None) -> dict[str, tuple[int, ...]]:
    """Every shape of answers that the rule gives a meaning to."""
    shapes: dict[str, tuple[int, ...]] = {"[]": (), "[1]": (1,), "[1,1]": (1, 1)}
    if batch > 1:
        shapes["[batch]"] = (batch,)
    if kept is None:
        shapes["[1,batch]"] = (1, batch)
        if batch == 1:
            shapes["[n]"] = (3,)  # one column of the result for each
    elif kept > 0:
        shapes |= {"[1,pos']": (1, kept), "[batch,1]": (batch, 1), "[batch,pos']": (batch, kept)}
        if kept != batch:  # else it means one per row
            shapes["[pos']"] = (kept,)
        if kept == 1:
            shapes["[n]"] = (batch + 2,)
    return shapes


def answers(batch: int, kept: int | None) -> Iterator[tuple[str, Any, Any]]:
    """(name, answer, incorrect) in every form; the ids fit every model and the tokenizer."""
    yield "int", 5, 7
    yield "str", " Paris", " Berlin"
    yield "int32 tensor", torch.tensor(9, dtype=torch.int32), torch.tensor(11, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for name, shape in answer_shapes(batch, kept).items():
        ids = torch.randint(3, 35, (2, *shape), generator=generator)
        yield name, ids[0], ids[1]


def cells(positions: Any = POSITIONS, batches: tuple[int, ...] = (1, 2, 3)) -> list[tuple]:
    """(id, batch, pos, answer, incorrect) for every pair of a position and an answer form."""
    return [
        (f"{batch} rows, {place}, {name}{' less another' * difference}", batch, pos, correct, wrong)
        for batch in batches
        for place, pos in ((place, POSITIONS[place]) for place in positions)
        for name, correct, incorrect in answers(batch, kept(pos))
        for difference, wrong in enumerate((None, incorrect))
    ]


def theirs(
    model: Any,
    input: Any = None,
    answer: Any = None,
    incorrect: Any = None,
    *,
    unit: str = "component",
    pos: Any = -1,
    cache: Any = None,
) -> Any:
    """What the reference says; where its two versions differ, what 4.3.0 says."""
    from transformer_lens.tools.analysis import direct_logit_attribution

    if isinstance(pos, np.integer):
        pos = int(pos)  # which 3.9.0 refuses
    rows = _rows(input, cache)
    answer, incorrect = _one_per_row(answer, rows, pos), _one_per_row(incorrect, rows, pos)
    try:
        return direct_logit_attribution(
            model, input, answer, incorrect, unit=unit, pos=pos, cache=cache
        )
    except KeyError as error:
        if unit != "layer" or "hook_resid_mid" not in str(error):
            raise
        return _without_mid(model, input, answer, incorrect, pos, cache)


def _one_per_row(ids: Any, rows: int, pos: Any) -> Any:
    """3.9.0 reads [batch] as positions when several are kept; [batch, 1] is read alike by both."""
    one_axis = isinstance(ids, torch.Tensor) and ids.ndim == 1
    per_row = one_axis and len(ids) == rows > 1 and kept(pos) is not None
    return ids[:, None] if per_row else ids


def _rows(input: Any, cache: Any) -> int:
    if cache is not None:
        return len(cache["ln_final.hook_scale"]) if cache.has_batch_dim else 1
    if isinstance(input, torch.Tensor):
        return len(input) if input.ndim == 2 else 1
    return len(input) if isinstance(input, list) else 1


def _without_mid(model: Any, input: Any, answer: Any, incorrect: Any, pos: Any, cache: Any) -> Any:
    """Parallel blocks have no stream between attention and MLP, which the reference asks for."""
    from transformer_lens.tools.analysis.direct_logit_attribution import DirectLogitAttribution

    if cache is None:
        _, cache = model.run_with_cache(input)
    stack, labels = cache.accumulated_resid(apply_ln=False, pos_slice=pos, return_labels=True)
    attribution = cache.logit_attrs(
        stack, answer, incorrect, pos_slice=pos, has_batch_dim=cache.has_batch_dim
    )
    return DirectLogitAttribution(attribution, labels, "layer")


def hold(ours: Callable[[], Any], reference: Callable[[], Any]) -> None:
    """Both give the same result, or both raise the same builtin error.

    An assertion of the reference's is a ValueError of ours.
    """
    expected = _outcome(reference)
    if isinstance(expected, Exception):
        kind = ValueError if isinstance(expected, AssertionError) else type(expected)
        given = _outcome(ours)
        assert isinstance(given, kind), f"the reference raises {expected!r}, ours {given!r}"
        return
    assert_same(ours(), expected)


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return error


def assert_same(ours: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Equal in labels, unit, shape, dtype and, relative to the largest part, in every value."""
    assert ours.labels == list(expected.labels)
    assert ours.unit == expected.unit
    assert ours.attribution.shape == expected.attribution.shape
    assert ours.attribution.dtype == expected.attribution.dtype
    if not expected.attribution.numel():
        return
    size = max(1.0, float(expected.attribution.abs().max()))
    torch.testing.assert_close(
        ours.attribution, expected.attribution, rtol=0, atol=tolerance * size
    )
    for (label, value), (label_there, value_there) in zip(
        ours.top(3), expected.top(3), strict=True
    ):
        assert label == label_there
        assert abs(value - value_there) <= tolerance * size
