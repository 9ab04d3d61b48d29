"""What the rows of a result are: a record for each, and the words of the unit that made them.

A unit brings both. A result carries them, ``save`` writes them, and every view reads them; so no
view knows a unit by name, and no label is ever parsed back.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of a result.

    Attributes:
        label: its name, unique in the result: ``embed``, ``3_mlp_out``, ``L3H0``, ``L3.1H0``.
        kind: what it is: ``embed``, ``attn_out``, ``pre``, ``head``, ``remainder``, …
        layer: the block that it belongs to, or None.
        sub: which of several of its kind in that block, from 0: ``L3.1H0`` is the head 0 of block
            3's second attention, sub 1. None where rows of this kind are not counted.
        index: its number among its kind in that block (a head's number), or None.
    """

    label: str
    kind: str
    layer: int | None = None
    sub: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class Words:
    """What a unit says of its rows.

    Attributes:
        name: the unit's name, as ``unit=`` takes it.
        title: a heading: ``Heads``.
        sentence: one line on what the rows are.
        index: what ``Row.index`` counts, and the name of its column in tables (``head``); "" where
            rows have no number.
        chart: how rows are drawn: ``bars``, ``line`` (rows in order) or ``heatmap`` (layer by
            index).
        cumulative: whether each row is a running sum, so that the last one is the whole; otherwise
            the rows sum to it.
        remainder: the label of the row that holds what is no row of this unit, which takes no part
            in a ranking; "" where there is none.
        remainder_is: what that row holds, in a few words.
    """

    name: str
    title: str
    sentence: str
    index: str = ""
    chart: str = "bars"
    cumulative: bool = False
    remainder: str = ""
    remainder_is: str = ""
