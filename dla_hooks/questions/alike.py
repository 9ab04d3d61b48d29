"""Can two runs be compared? What is not alike is refused before either runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.errors import InputError, ShapeMismatchError, UnsupportedModelError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Row
from dla_hooks.targets.base import Target
from dla_hooks.units.base import Unit
from dla_hooks.units.plan import Plan

MOST_NUMBERS = 2**24
"""Of ranked rows, in both runs and on both runs' directions, that are kept together."""
_WAYS, _SHOWN = 4, 3
_NOT_IN_BOTH = {"hook", "constant"}
"""Kinds of rows that one of two runs may have alone: there they count nothing in the other."""


def check_streams(first: Stream, second: Stream) -> None:
    """Refuse two models whose streams do not have the same shape.

    Raises:
        UnsupportedModelError: with both numbers.
    """
    numbers = {
        "d_model": (first.d_model, second.d_model),
        "the number of blocks": (len(first.blocks), len(second.blocks)),
        "the number of logits": (first.vocabulary, second.vocabulary),
    }
    for what, (one, other) in numbers.items():
        if one != other:
            why = {
                "d_model": "their streams are vectors of different widths",
                "the number of blocks": "no block of one is that of the other",
                "the number of logits": "an id need not be the same token in both",
            }[what]
            raise UnsupportedModelError(
                f"{first.backend.name} and {second.backend.name} cannot be compared row by row: "
                f"{what} is {one} in the first and {other} in the second, so that {why}. Compare "
                "models of one shape"
            )


def check_prompts(first: Prompt, second: Prompt, *, same: bool, aligned: bool) -> None:
    """Refuse prompts whose positions are not each other's.

    Args:
        first: of the first run.
        second: of the second.
        same: whether both were read from the same input.
        aligned: whether positions are given for each of the two.

    Raises:
        ShapeMismatchError: with both lengths.
        InputError: where the two models read one input as different tokens.
    """
    batches = len(first.mask), len(second.mask)
    if batches[0] != batches[1]:
        raise ShapeMismatchError(
            f"input has {batches[0]} rows and other_input {batches[1]}; compare row by row"
        )
    if same and not (
        torch.equal(first.input_ids, second.input_ids) and torch.equal(first.mask, second.mask)
    ):
        raise InputError(
            "the two models read the input as different tokens; give token ids as input"
        )
    lengths = [mask.sum(-1).tolist() for mask in (first.mask, second.mask)]
    if aligned or lengths[0] == lengths[1]:
        return
    row = next(n for n, (one, other) in enumerate(zip(*lengths, strict=True)) if one != other)
    raise ShapeMismatchError(
        f"the prompts have {lengths[0][row]} and {lengths[1][row]} tokens in row {row}, so that "
        "it is open which position is compared with which. Give prompts of one length, or the "
        "second's positions as other_pos (other_pos=-1 with pos=-1 compares the last tokens)"
    )


def check_selections(first: Selection, second: Selection) -> None:
    """Refuse positions that do not pair up.

    Raises:
        ShapeMismatchError: with both shapes.
    """
    shapes = tuple(first.cols.shape), tuple(second.cols.shape)
    if shapes[0] != shapes[1]:
        raise ShapeMismatchError(
            f"pos selects entries of shape {list(shapes[0])} in the first run, and "
            f"{list(shapes[1])} in the second; select as many in both"
        )
    if not torch.equal(first.valid, second.valid):
        raise ShapeMismatchError(
            "the two batches have padding at different places of the selected positions; pad both "
            "on the same side"
        )


def check_plans(
    first: Plan, second: Plan, units: Mapping[str, Unit], entries: tuple[Entries, Entries]
) -> None:
    """Refuse plans whose rows are not each other's, or too many to be kept.

    Args:
        first: of the first run.
        second: of the second.
        units: by key, as the caller gave them.
        entries: of both runs, without their doubling.

    Raises:
        UnsupportedModelError: naming rows that only one of the two has.
        InputError: when all rows of a ranked unit are too many numbers; it says what fits.
    """
    names = first.stream.backend.name, second.stream.backend.name
    _check_rows(names, first.parts.rows, second.parts.rows)
    for key, unit in units.items():
        mine, theirs = (
            plan.units[key].known_rows(own)
            for plan, own in zip((first, second), entries, strict=True)
        )
        if mine is not None and theirs is not None:
            _check_rows(names, mine, theirs)
            if hasattr(unit, "top"):
                _check_number(unit, len(mine), len(entries[0]))
        if unit.words.cumulative and mid_streams(first.stream.whole) != mid_streams(
            second.stream.whole
        ):
            raise UnsupportedModelError(
                f"{names[0]} and {names[1]} add up their blocks in different orders (one "
                "in parallel), so that their running sums do not pair up. Compare components"
            )


def _check_rows(names: tuple[str, str], first: Sequence[Row], second: Sequence[Row]) -> None:
    if first is second or (type(first) is type(second) and first == second):
        return
    labels = [
        {row.label: None for row in rows if row.kind not in _NOT_IN_BOTH}
        for rows in (first, second)
    ]
    only = [[label for label in labels[n] if label not in labels[1 - n]] for n in (0, 1)]
    for which, mine in zip(("first", "second"), only, strict=True):
        if mine:
            shown = ", ".join(mine[:_SHOWN]) + (", …" if len(mine) > _SHOWN else "")
            raise UnsupportedModelError(
                f"{names[0]} and {names[1]} cannot be compared row by row: only the {which} has "
                f"{shown} (they have {len(labels[0])} and {len(labels[1])} rows). Compare models "
                "of one shape, or a unit whose rows both have"
            )


def _check_number(unit: Unit, n_rows: int, n_entries: int) -> None:
    most = MOST_NUMBERS // _WAYS
    if n_rows * n_entries > most:
        raise InputError(
            f"all {n_rows} rows of the unit {unit.words.name!r} at {n_entries} entries would be "
            f"{_WAYS * n_rows * n_entries:,} numbers in both runs, and a comparison keeps up to "
            f"{MOST_NUMBERS:,}: its strongest differences need not be among the strongest rows of "
            f"either. {max(1, most // n_rows)} entries fit; select fewer positions, or fewer layers"
        )


def check_target(target: Target, what: str, asked: Any) -> None:
    """Refuse a target whose directions depend on the run: two runs would be asked different things.

    Args:
        target: of a run.
        what: the verb that was called.
        asked: what the caller gave as ``answer_tokens``.

    Raises:
        InputError: naming it.
    """
    if target.of_prompt:
        raise InputError(
            f"{what} asks two runs for the same reading, and {asked!r:.80} is "
            "another one in each: what a head looks for depends on the other token. Attribute it "
            "in each run by itself"
        )
