"""Parts of a result: one row, one prompt of the batch, one position, the heads as a grid."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dla_hooks.errors import ArgumentTypeError, InputError, LabelError, PositionError
from dla_hooks.results.data import EntryData, ResultData, located, names_of_entries, real_entries
from dla_hooks.results.seen import Seen

_Data = TypeVar("_Data", bound=EntryData)
_Result = TypeVar("_Result", bound=ResultData)
_NEAR = 3


def row_named(data: ResultData, label: Any) -> Tensor:
    """The numbers [*batch_and_pos] of one row.

    Raises:
        LabelError: (a KeyError) for a label that no row has; it names those most like it.
        ArgumentTypeError: for what is no string.
    """
    check_label(label, next(iter(data.labels), "embed"))
    try:
        return data.attribution[data.labels.index(label)]
    except ValueError:
        raise unknown_label(data.unit, label, data.labels, "result.labels") from None


def check_label(label: Any, example: str) -> None:
    """Refuse what is no label.

    Raises:
        ArgumentTypeError: for what is no string.
    """
    if not isinstance(label, str):
        raise ArgumentTypeError(
            f"a row is looked up by its label, a string like {example!r}; "
            f"got {label!r:.80}. By its number it is result.attribution[number]."
        )


def unknown_label(unit: str, label: str, labels: Sequence[str], where: str) -> LabelError:
    """The error for a label that no row has; it names those most like it.

    Args:
        unit: of the result.
        label: that was given.
        labels: that there are, or some of them.
        where: all of them are.
    """
    near = difflib.get_close_matches(label, labels, _NEAR, 0.0)
    like = f"; near it are {', '.join(map(repr, near))}" if near else ""
    return LabelError(
        f"no row of this {unit} result is called {label!r:.80}{like}. All names are in {where}."
    )


def one_prompt(data: _Data, index: Any) -> _Data:
    """The result of one row of the batch, whose axis is kept with one entry.

    Raises:
        PositionError: (an IndexError) when the batch has no such row.
        ArgumentTypeError: when ``index`` is no int.
    """
    first_axis = data.shape[0] if data.shape else 1
    n_prompts = len(data.tokens) or first_axis
    row = counted(index, n_prompts, "the batch", "rows")
    if n_prompts == 1:  # one prompt with several answers, or without a batch axis, is whole
        return _cut(data, ())
    if n_prompts != first_axis:
        raise InputError(
            f"the result has tokens of {n_prompts} prompts and {first_axis} rows of the batch; "
            "a single prompt can be taken from it where they are as many"
        )
    part = _cut(data, (slice(row, row + 1),))
    part.tokens = data.tokens[row : row + 1]
    part.of_row(row)
    if data.generated is not None and data.generated_ids is not None:
        part.generated = data.generated[row : row + 1]
        part.generated_ids = data.generated_ids[row : row + 1]
    for own in part.tokens:
        part.of_tokens(len(own))
    return part


def one_position(data: _Data, index: Any) -> _Data:
    """The result at one of the selected positions, without the axis of positions.

    Raises:
        InputError: when the result has no axis of positions behind its batch axis.
        PositionError: (an IndexError) when no such position was selected.
        ArgumentTypeError: when ``index`` is no int.
    """
    if len(data.shape) - data.several != 2:
        raise InputError(
            "one position can be taken from a result with the axes [row, batch, position]; this "
            f"one has the shape {list(data.attribution.shape)}: a single position was selected, "
            "or there is no axis for the batch"
        )
    place = counted(index, data.shape[1], "the selected positions", "entries")
    part = _cut(data, (slice(None), place))
    if data.generated is not None and data.generated_ids is not None:
        part.generated = [row[place : place + 1] for row in data.generated]
        part.generated_ids = data.generated_ids[:, place : place + 1]
    return part


def one_answer(data: _Data, index: Any) -> _Data:
    """The result for one of several answers, without their axis.

    Raises:
        InputError: when there is one answer only.
        PositionError: (an IndexError) when there are fewer.
        ArgumentTypeError: when ``index`` is no int.
    """
    if not data.several:
        raise InputError("this result has no axis of several answers; dla_hooks.Each gives it one")
    place = counted(index, data.shape[-1], "the answers", "entries")
    part = _cut(data, (*[slice(None)] * (len(data.shape) - 1), place))
    part.several = False
    return part


def summed(data: _Result) -> _Result:
    """The sum over positions of rows, bias and logit: one entry for each prompt.

    Raises:
        InputError: when there is no axis of positions.
    """
    if len(data.shape) - data.several != 2:
        raise InputError(
            "there is no axis of positions to sum over; a Continuation, or several positions, give "
            "one"
        )
    axis = len(data.shape) - 1 - data.several  # behind the rows' axis it is one more
    real = real_entries(data)[0]
    part = data.at(())
    part.attribution = data.attribution.nansum(axis + 1)
    part.bias, part.logit = data.bias.nansum(axis), data.logit.nansum(axis)
    part.beside = {name: own.nansum(axis + 1) for name, own in data.beside.items()}
    last = data.positions.masked_fill(~real, -1).amax(axis) if located(data) else data.positions
    part.positions = last
    part.answer, part.incorrect = _joined(data, data.answer), None
    if data.incorrect is not None:
        part.incorrect = _joined(data, data.incorrect)
    part.target = part.seen = None
    if data.seen is not None:
        log_p = data.seen.log_probability
        known = log_p.nansum(axis).masked_fill(
            (log_p.isnan() & real.to(log_p.device)).any(axis), torch.nan
        )
        nothing = Seen.nothing(known.shape)
        part.seen = replace(nothing, log_probability=known)
    return part


def _joined(data: EntryData, names: list[str]) -> list[str]:
    """The names of each prompt's entries, one after the other; of several answers, of each."""
    every = names_of_entries(data, names)
    index = torch.arange(len(every), device="cpu").reshape(data.shape)
    real = real_entries(data)[0].cpu()
    if data.several:
        index, real = index.movedim(-1, 1), real.movedim(-1, 1)
    index, real = index.reshape(-1, index.shape[-1]), real.reshape(-1, real.shape[-1])
    pairs = zip(index.tolist(), real.tolist(), strict=True)
    texts = [
        [every[i] or "" for i, is_real in zip(*pair, strict=True) if is_real] for pair in pairs
    ]
    joined = ["".join(own) if len(set(own)) > 1 else "".join(own[:1]) for own in texts]
    return joined[:1] if len(set(joined)) == 1 else joined


def head_grid(data: ResultData) -> Tensor:
    """The heads as [layer, head, *batch_and_pos].

    NaN stands where a layer has fewer heads, or none. Heads of a block's second attention follow
    those of its first.

    Raises:
        InputError: when the rows are no heads.
    """
    numbers: list[int] = []  # of the rows that are heads
    places: list[tuple[int, int, tuple[int | None, str]]] = []  # layer, head, which attention
    for number, row in enumerate(data.rows):
        if row.layer is not None and row.index is not None:
            numbers.append(number)
            places.append((row.layer, row.index, (row.sub, row.kind)))
    if data.words.index != "head" or not numbers:
        raise InputError(
            f"this result has no rows that are heads: its unit is {data.unit!r}. Attribute to "
            "heads."
        )
    counts: dict[tuple[int, tuple[int | None, str]], int] = {}
    for layer, head, attention in places:
        counts[layer, attention] = max(counts.get((layer, attention), 0), head + 1)
    starts: dict[tuple[int, tuple[int | None, str]], int] = {}
    widths: dict[int, int] = {}
    for (layer, attention), n_heads in counts.items():
        starts[layer, attention] = widths.get(layer, 0)
        widths[layer] = starts[layer, attention] + n_heads
    shape = (max(widths) + 1, max(widths.values()), *data.shape)
    grid = data.attribution.new_full(shape, torch.nan)
    layers = torch.tensor([layer for layer, _, _ in places], device="cpu")
    heads = torch.tensor(
        [starts[layer, attention] + head for layer, head, attention in places], device="cpu"
    )
    grid[layers, heads] = data.attribution[torch.tensor(numbers, device="cpu")]
    return grid


def _cut(data: _Data, place: tuple[slice | int, ...]) -> _Data:
    """The entries at a place of the batch and the positions."""
    whole = torch.arange(data.shape.numel(), device="cpu").reshape(data.shape)
    part = data.at(place)
    part.answer, part.incorrect = _own_names(data, whole[place].flatten().tolist())
    part.target = None
    return part


def _own_names(data: EntryData, entries: list[int]) -> tuple[list[str], list[str] | None]:
    """The answers of some entries: one name where they are all the same, else one for each."""
    answers = names_of_entries(data, data.answer)
    incorrects = names_of_entries(data, data.incorrect)
    real = real_entries(data)[0].flatten().tolist()
    pairs = [(answers[entry], incorrects[entry]) for entry in entries]
    distinct = {pair for pair, entry in zip(pairs, entries, strict=True) if real[entry]}
    if len(distinct) == 1:
        pairs = list(distinct)
    known = [answer or "" for answer, _ in pairs] if data.answer else []
    return known, None if data.incorrect is None else [wrong or "" for _, wrong in pairs]


def counted(index: Any, size: int, where: str, what: str) -> int:
    """An index from either end as one from the start."""
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise ArgumentTypeError(f"an index into {where} must be an int, got {index!r:.80}")
    number = operator.index(index)
    if not -size <= number < size:
        raise PositionError(f"index {number} is out of range: {where} has {size} {what}")
    return number % size
