"""What a picture of a result is asked to show."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dla_hooks.errors import ArgumentTypeError, InputError
from dla_hooks.results.data import EntryData
from dla_hooks.results.plots.lines import MEAN

OF_UNITS = ("bars", "line", "heatmap")
KINDS = (*OF_UNITS, "waterfall", "strip", "lens")


@dataclass(frozen=True)
class Wish:
    """What a picture is asked to show; the arguments of ``plot``."""

    kind: str | None = None
    rows: int | Sequence[str] | None = None
    row: str | None = None
    sort: str | None = None
    pos: Any = None
    prompt: Any = None
    answer: str | None = None
    title: str | None = None
    width: float | None = None
    height: float | None = None


def check(data: EntryData, wish: Wish) -> None:
    """Refuse what cannot be drawn, and arguments without meaning.

    Raises:
        InputError: see above.
        ArgumentTypeError: for a prompt that is a word.
    """
    if not bool(data.attribution.isfinite().any()):
        raise InputError(
            "there is nothing to draw: no position is selected, no row is there, or nothing is "
            "finite"
        )
    if data.words.chart not in OF_UNITS:
        raise InputError(
            f"the unit {data.unit!r} wants a chart of the kind {data.words.chart!r}, which is none "
            f"of {', '.join(OF_UNITS)}"
        )
    check_look(wish.kind, KINDS, wish.rows, wish.sort, wish.width, wish.height)
    if wish.row is not None and wish.kind != "strip":
        raise InputError("row= is the row that colours a strip; draw one with kind='strip'")
    if wish.kind == "strip" and wish.pos == MEAN:
        raise InputError("kind='strip' shows positions; leave pos='mean' out")
    if isinstance(wish.prompt, str) and wish.prompt != MEAN:
        raise ArgumentTypeError(f"prompt must be a number or 'mean', got {wish.prompt!r:.80}")


def check_look(
    kind: Any, names: Sequence[str], rows: Any, sort: Any, width: Any, height: Any
) -> None:
    """Refuse what no picture can be asked for.

    Raises:
        InputError: for a kind, an order, a number of rows or a size that is none.
    """
    if kind is not None and kind not in names:
        raise InputError(f"kind must be one of {', '.join(names)}; got {kind!r:.80}")
    if sort not in (None, "size", "stream"):
        raise InputError(f"sort must be 'size' or 'stream', got {sort!r:.80}")
    for name, value in (("width", width), ("height", height)):
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 50
        if value is not None and not (good and math.isfinite(value)):
            raise InputError(f"{name} must be a number of pixels, at least 50; got {value!r:.80}")
    if isinstance(rows, str) or (
        rows is not None
        and isinstance(rows, Sequence)
        and not all(isinstance(x, str) for x in rows)
    ):
        raise InputError(f"rows must be how many, or a list of labels; got {rows!r:.80}")
    if rows is not None and not isinstance(rows, Sequence):
        try:
            count = operator.index(rows)
        except TypeError:
            count = 0
        if isinstance(rows, bool) or count < 1:
            raise InputError(f"rows must be how many, at least 1, or labels; got {rows!r:.80}")
