"""Sums of a Ray data set, made where its blocks are."""

from __future__ import annotations

import pickle
from typing import Any

from dla_hooks.engines.sums import Question, RowSums
from dla_hooks.errors import DLAError, InputError

_NAME = "sums"


def summed(rows: Any, question: Question) -> RowSums:
    """The sums of a Ray data set's rows.

    Args:
        rows: a ``ray.data.Dataset``.
        question: what is summed.

    Raises:
        InputError: as :meth:`RowSums.add`.
    """
    from ray.data.aggregate import AggregateFnV2
    from ray.data.block import BlockAccessor

    class Sums(AggregateFnV2):  # type: ignore[misc]
        """Moments of blocks; an accumulator travels as bytes."""

        def __init__(self) -> None:
            super().__init__(_NAME, lambda: b"", on=None, ignore_nulls=False)

        def aggregate_block(self, block: Any) -> bytes:
            own = RowSums(question)
            table = BlockAccessor.for_block(block).to_arrow()
            if table.num_rows:
                try:
                    own.add(table.to_pydict())
                except DLAError as error:  # said by the caller's process, in one line
                    return pickle.dumps(error)
            return pickle.dumps(own)

        def combine(self, current_accumulator: bytes, new: bytes) -> bytes:
            if not current_accumulator or not new:
                return current_accumulator or new
            pair = pickle.loads(current_accumulator), pickle.loads(new)
            return pickle.dumps(_merged(*pair))

        def finalize(self, accumulator: bytes) -> bytes:
            return accumulator

    wanted = {*question.columns, "kept", "means", "remainder"}
    names = rows.schema().names
    found = rows.select_columns([name for name in names if name in wanted]).aggregate(Sums())
    sums = pickle.loads(found[_NAME]) if found and found.get(_NAME) else RowSums(question)
    if isinstance(sums, DLAError):
        raise InputError(str(sums))
    whole: RowSums = sums
    return whole


def _merged(one: Any, other: Any) -> Any:
    if isinstance(one, DLAError) or isinstance(other, DLAError):
        return one if isinstance(one, DLAError) else other
    try:
        return one.merge(other)
    except DLAError as error:
        return error
