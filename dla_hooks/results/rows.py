"""What the rows of a result are: a record for each, and the words of the unit that made them.

A unit brings both. A result carries them, ``save`` writes them, and every view reads them; so no
view knows a unit by name, and no label is ever parsed back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from dla_hooks.errors import InputError


@dataclass(frozen=True)
class Row:
    """One row of a result.

    Attributes:
        label: its name, unique in the result: ``embed``, ``3_mlp_out``, ``L3H0``, ``L3.1H0``.
        kind: what it is: ``embed``, ``attn_out``, ``pre``, ``head``, ``cross_head`` (of those that
            read an encoder), ``remainder``, …
        layer: the block that it belongs to, or None.
        sub: which of several of its kind in that block, from 0: ``L3.1H0`` is the head 0 of block
            3's second attention, sub 1. None where rows of this kind are not counted.
        index: its number among its kind in that block (a head's number), or None.
        source: the position of the token that it reads, among its prompt's real tokens, or None.
            Of a row that reads an encoder, it is that encoder's position.
    """

    label: str
    kind: str
    layer: int | None = None
    sub: int | None = None
    index: int | None = None
    source: int | None = None

    @property
    def reads_encoder(self) -> bool:
        """Whether its ``source`` is a position of an encoder, and no token of the prompt."""
        return reads_encoder(self.kind)


def reads_encoder(kind: str) -> bool:
    """Whether rows of a kind read positions of an encoder: ``cross_head`` and the like."""
    return kind in _OF_ENCODER


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
        sources: whether rows say which token of the prompt they read.
        beside: further numbers that stand beside each row, and the names of their columns in
            tables: ``("weight", "vote")``.
    """

    name: str
    title: str
    sentence: str
    index: str = ""
    chart: str = "bars"
    cumulative: bool = False
    remainder: str = ""
    remainder_is: str = ""
    sources: bool = False
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "beside", tuple(self.beside))  # files hold it as a list


# Files of format 1, and results that are made by hand, bring neither rows nor words. They are of
# the three units that there were then, whose labels are read here, and nowhere else.
_OLD_WORDS = {
    "component": Words(
        "component", "Components", "components: embeddings, and what each sublayer wrote"
    ),
    "layer": Words(
        "layer",
        "Layers, running sum of the components",
        "layers: the running sum of the components",
        chart="line",
        cumulative=True,
    ),
    "head": Words(
        "head",
        "Heads",
        "heads: what each attention head wrote",
        index="head",
        chart="heatmap",
        remainder="remainder",
        remainder_is="what no head wrote",
    ),
}
_HEAD = re.compile(r"L([0-9]+)(?:\.([0-9]+))?([HX])([0-9]+)")
_OF_ENCODER = {"cross_head", "cross_layer", "cross_source"}
_IN_LAYER = re.compile(r"([0-9]+)_(.+)")


def words_of(unit: str) -> Words:
    """The words of a unit by its name alone; a name that is not known stands for itself."""
    other = Words(unit, unit, unit, remainder="remainder", remainder_is="what is no row")
    return _OLD_WORDS.get(unit, other)


@lru_cache(maxsize=8)  # many results of one model have the same labels
def rows_of(labels: tuple[str, ...]) -> tuple[Row, ...]:
    """The records of rows by their labels alone.

    ``L3H0`` and ``L3.1H0`` are heads; ``3_mlp_out`` belongs to layer 3; every other label names
    its own kind.
    """
    return tuple(map(_row_of, labels))


def _row_of(label: str) -> Row:
    head = _HEAD.fullmatch(label)
    if head:
        layer, sub, index = (int(head[place] or 0) for place in (1, 2, 4))
        return Row(label, "head" if head[3] == "H" else "cross_head", layer, sub, index)
    in_layer = _IN_LAYER.fullmatch(label)
    if in_layer:
        return Row(label, in_layer[2], int(in_layer[1]))
    return Row(label, label)


NO_WORDS = Words("", "", "")
"""Stands for words that were not given."""


def filled(labels: list[str], unit: str, rows: list[Row], words: Words) -> tuple[list[Row], Words]:
    """Rows and words as they were given, or from the table where they were not.

    Raises:
        InputError: when rows are given that are not those of the labels.
    """
    if words == NO_WORDS:
        words = words_of(unit)
    if not rows:
        return list(rows_of(tuple(labels))), words
    if len(rows) != len(labels):
        raise InputError(f"there are {len(rows)} rows and {len(labels)} labels; give one for each")
    for row, label in zip(rows, labels, strict=True):
        if row.label != label:
            raise InputError(f"the row {row.label!r} stands at the label {label!r}")
    return rows, words
