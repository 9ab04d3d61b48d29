"""Sums of a Ray data set, made where its blocks are."""

from __future__ import annotations

import pickle
from typing import Any

from dla_hooks.engines.question import RANKED, ROWS, Question
from dla_hooks.engines.sums import RowSums
from dla_hooks.errors import DLAError, InputError

_SUMS = "sums"
_CPUS = 0.01  # summing is little work, and must not wait for CPUs that the actors hold


def summed(rows: Any, question: Question) -> RowSums:
    """The sums of a Ray data set's rows: each block becomes its moments, which are merged here.

    Args:
        rows: a ``ray.data.Dataset``, which is run where it is not yet.
        question: what is summed.

    Raises:
        InputError: as :meth:`RowSums.add`.
    """
    known = rows.schema(fetch_if_missing=False)  # to learn it, Ray would run the sweep's first rows
    if known is not None:
        wanted = (*question.columns, *RANKED)
        rows = rows.select_columns([name for name in known.names if name in wanted])
    parts = rows.map_batches(
        _of_block,
        fn_kwargs={"question": question},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=_CPUS,
    )
    whole = RowSums(question)
    for row in parts.iter_rows():
        part = pickle.loads(row[_SUMS])
        if isinstance(part, DLAError):
            raise InputError(str(part))
        whole.merge(part)
    return whole


def _of_block(table: Any, question: Question) -> dict[str, list[bytes]]:
    """The sums of a block; its error, which the caller's process says in one line."""
    part: Any = RowSums(question)
    wanted = (*question.columns, *RANKED)
    table = table.select([name for name in table.column_names if name in wanted])
    try:
        for start in range(0, table.num_rows, ROWS):
            part.add(table.slice(start, ROWS).to_pydict())
    except DLAError as error:
        part = error.with_traceback(None)
    return {_SUMS: [pickle.dumps(part)]}
