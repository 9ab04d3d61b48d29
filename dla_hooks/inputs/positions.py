"""The positions of each prompt that are attributed.

Positions are counted among a row's real tokens. So -1 is the last token of every prompt, with
padding on either side. ``pos=None`` keeps the columns of the batch as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import ArgumentTypeError, InputError, PositionError, ShapeMismatchError
from dla_hooks.inputs.masks import is_kept, is_whole, whole_mask
from dla_hooks.inputs.plain import check_dense
from dla_hooks.inputs.rows_of_positions import PerRow, Span

PositionSpec = int | slice | list[int] | None


@dataclass(frozen=True)
class Selection:
    """The selected entries of a batch.

    Attributes:
        rows: batch rows, [batch] for a single position, else [batch, pos'].
        cols: columns of the prompt, same shape.
        valid: False where a row has no token for this entry, same shape.
        mask: True at the real tokens [batch, pos].
    """

    rows: Tensor
    cols: Tensor
    valid: Tensor
    mask: Tensor


def parse(pos: Any, width: int) -> PositionSpec:
    """Bring every accepted form of ``pos`` to one of four.

    Args:
        pos: an int (or numpy integer, or array or tensor without axes): one position, and no
            position axis in the result; None: all; a tuple: ``slice(*pos)``; a slice; a list or
            one-axis array or tensor of ints, or a boolean mask of that form.
        width: number of columns of the prompt, which a mask must have too.

    Raises:
        ArgumentTypeError: for a tuple that ``slice`` would not take.
        InputError: for anything else.
    """
    if pos is None or isinstance(pos, slice):
        _check_slice(pos)
        return pos
    if isinstance(pos, (PerRow, Span)):
        raise InputError(f"{pos!r:.80} cannot be used here; give an int, a slice or a list")
    check_dense(pos, "pos")
    if isinstance(pos, tuple):
        if not 1 <= len(pos) <= 3:
            raise ArgumentTypeError(
                f"pos as a tuple means slice(*pos) and takes 1 to 3 items, got {len(pos)}: {pos!r}"
            )
        return parse(slice(*pos), width)
    if hasattr(pos, "tolist") and hasattr(pos, "ndim"):  # a tensor, an array or a numpy scalar
        if pos.ndim > 1:
            raise InputError(
                f"pos takes at most one axis, got shape {tuple(pos.shape)}; positions of each "
                "prompt's own go in dla_hooks.PerRow([...])"
            )
        is_mask = str(pos.dtype).removeprefix("torch.") == "bool"
        pos = pos.tolist()
        if is_mask and isinstance(pos, list):
            if len(pos) != width:
                raise InputError(f"pos is a mask of {len(pos)} for a prompt of {width} positions")
            return [i for i, wanted in enumerate(pos) if wanted]
    if isinstance(pos, list):
        return [_as_int(item, pos) for item in pos]
    return _as_int(pos, pos)


def select(pos: Any, mask: Tensor) -> Selection:
    """Find the selected entries in a batch that may be padded.

    Args:
        pos: any form that :func:`parse` takes.
        mask: True at the real tokens [batch, pos], on the CPU.

    Raises:
        InputError: for any other form.
        PositionError: when a row has no such position.
    """
    if isinstance(pos, PerRow):
        return _select_rows(pos, mask)
    spec = parse(pos, mask.shape[1])
    if spec is None:
        rows, cols = torch.meshgrid(
            *(torch.arange(n, device="cpu") for n in mask.shape), indexing="ij"
        )
        return Selection(rows, cols, mask, mask)
    if isinstance(spec, int) and is_kept(mask):
        return _one_of_each(spec, *mask.shape)
    full = is_whole(mask)  # then all rows are alike, and one is looked at for all
    every = torch.arange(mask.shape[1], device="cpu")
    if isinstance(spec, int):
        if full:
            cols = _pick(spec, 0, every).expand(len(mask))
        else:
            cols = torch.stack(
                [_pick(spec, r, real.nonzero()[:, 0]) for r, real in enumerate(mask)]
            )
        return Selection(torch.arange(len(mask), device="cpu"), cols, _all_true(cols), mask)
    if full:
        cols = _pick(spec, 0, every).expand(len(mask), -1)
        rows = torch.arange(len(mask), device="cpu")[:, None].expand_as(cols)
        return Selection(rows, cols, _all_true(cols), mask)
    picked = [_pick(spec, row, real.nonzero()[:, 0]) for row, real in enumerate(mask)]
    return _side_by_side(picked, mask)


@lru_cache(maxsize=256)
def _one_of_each(position: int, batch: int, width: int) -> Selection:
    """One position of each row, where there is no padding: one object for each shape."""
    cols = _pick(position, 0, torch.arange(width, device="cpu")).expand(batch)
    rows = torch.arange(batch, device="cpu")
    return Selection(rows, cols, _all_true(cols), whole_mask(batch, width))


def select_each(
    rows: Sequence[Sequence[int]], mask: Tensor, *, from_the_left: bool = False
) -> Selection:
    """Select positions of each row's own, any number of them.

    Args:
        rows: positions of each row, counted among its real tokens.
        mask: True at the real tokens [batch, pos], on the CPU.
        from_the_left: fill up on the right, on whichever side the batch is padded.

    Raises:
        PositionError: when a row has no such position.
    """
    pairs = enumerate(zip(rows, mask, strict=True))
    picked = [_pick(list(own), row, real.nonzero()[:, 0]) for row, (own, real) in pairs]
    return _side_by_side(picked, mask, on_the_left=False if from_the_left else None)


def _select_rows(pos: PerRow, mask: Tensor) -> Selection:
    """Positions that were given row by row."""
    if len(pos) != len(mask):
        raise ShapeMismatchError(
            f"PerRow holds positions of {len(pos)} prompts, and there are {len(mask)}; give one "
            "int, or one list, for each"
        )
    if not pos.one_position:
        return select_each([row for row in pos.rows if isinstance(row, list)], mask)
    pairs = enumerate(zip(pos.rows, mask, strict=True))
    cols = torch.stack([_pick(own, row, real.nonzero()[:, 0]) for row, (own, real) in pairs])
    return Selection(torch.arange(len(mask), device="cpu"), cols, _all_true(cols), mask)


def _side_by_side(
    picked: Sequence[Tensor], mask: Tensor, on_the_left: bool | None = None
) -> Selection:
    """Columns of each row, any number of them, as one selection.

    Rows of different lengths are filled up on the side on which the batch is padded, or on the left
    or the right.
    """
    width = max(len(cols) for cols in picked)
    if on_the_left is None:
        on_the_left = not bool(mask[:, 0].all())
    cols = torch.zeros(len(mask), width, dtype=torch.long, device="cpu")
    valid = torch.zeros(len(mask), width, dtype=torch.bool, device="cpu")
    for row, found in enumerate(picked):
        place = slice(width - len(found), width) if on_the_left else slice(0, len(found))
        cols[row, place] = found
        valid[row, place] = True
    return Selection(
        torch.arange(len(mask), device="cpu")[:, None].expand_as(cols), cols, valid, mask
    )


@contextmanager
def said_first(pos: Any, mask: Tensor) -> Iterator[None]:
    """Where positions are wrong, and so is something else, say what is wrong with the positions.

    Args:
        pos: any form of positions; of one that a tokenizer must read, nothing is said.
        mask: True at the real tokens [batch, pos].
    """
    try:
        yield
    except InputError:
        if not isinstance(pos, Span):
            select(pos, mask)
        raise


def spread_over(count: int, most: int) -> Tensor:
    """At most so many of the first ``count`` integers, evenly spread; both ends are among them."""
    ends = torch.linspace(0, count - 1, min(count, most), dtype=torch.float64, device="cpu")
    return ends.round().long()


def _all_true(cols: Tensor) -> Tensor:
    return torch.ones(cols.shape, dtype=torch.bool, device="cpu")


def _pick(spec: int | slice | list[int], row: int, real: Tensor) -> Tensor:
    """Columns of one row: an int, a slice or a list, counted among its real tokens."""
    if isinstance(spec, slice):
        return torch.tensor(real.tolist()[spec], dtype=torch.long, device="cpu")
    for position in [spec] if isinstance(spec, int) else spec:
        if not -len(real) <= position < len(real):
            raise PositionError(
                f"position {position} is out of range: row {row} of the input has {len(real)} "
                f"tokens, so positions go from {-len(real)} to {len(real) - 1}"
            )
    if isinstance(spec, int):
        return real[spec]
    return real[torch.tensor(spec, dtype=torch.long, device="cpu")]


def _as_int(item: Any, pos: Any) -> int:
    if isinstance(item, bool):
        raise InputError(
            f"pos takes ints, None, tuples, slices, lists, or 1-d arrays; got the bool in {pos!r} "
            "(a mask is given as a tensor or array of bools)"
        )
    try:
        return operator.index(item)
    except TypeError:
        raise InputError(
            f"pos must be an int, None, a tuple (meaning slice(*pos)), a slice, a list of ints or "
            f"a 1-d tensor or array of ints or bools, or dla_hooks.PerRow([...]) for positions of "
            f"each prompt's own; got {type(pos).__name__}: {pos!r}"
        ) from None


def _check_slice(pos: slice | None) -> None:
    if pos is None:
        return
    for item in (pos.start, pos.stop, pos.step):
        if item is not None:
            _as_int(item, pos)
    if pos.step == 0:
        raise InputError("pos as a slice cannot have step 0")
