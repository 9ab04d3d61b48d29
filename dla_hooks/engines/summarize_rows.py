"""Rows of a sweep as a summary, wherever they are."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dla_hooks.engines.columns import plain
from dla_hooks.engines.question import RANKED, ROWS, Question
from dla_hooks.engines.sums import RowSums
from dla_hooks.errors import CheckpointError, InputError, MissingExtraError
from dla_hooks.results.summary import Summary


def summarize_rows(
    rows: Any,
    *,
    by: str | None = None,
    contrast: tuple[str, Any, Any] | None = None,
    pair: str | None = None,
) -> Any:
    """Means over the rows that an :class:`Attributor` wrote, with standard errors.

    In one pass and constant memory, whatever holds the rows. Each row is one sample, as a prompt
    is for :func:`summarize`; rows that failed are counted in ``n_failed``. Any split and any order
    of the rows gives the same, up to rounding.

    Example:
        >>> from dla_hooks import Attributor, demo, summarize_rows
        >>> attributor = Attributor(demo.path(), incorrect=" is", answer=" are")
        >>> rows = attributor({
        ...     "prompt": ["The keys", "The key", "The dogs", "The dog"],
        ...     "number": ["plural", "singular"] * 2,
        ...     "noun": ["key", "key", "dog", "dog"],
        ... })
        >>> sorted(summarize_rows(rows, by="number"))
        ['plural', 'singular']
        >>> summarize_rows(rows, contrast=("number", "plural", "singular"), pair="noun").n
        2

    Args:
        rows: a Ray ``Dataset``, which is summed where its blocks are; a ``Dataset`` of
            ``datasets``; an Arrow table, or a data set of pyarrow's; the path of a folder or file
            of Parquet, or of a data set that ``save_to_disk`` wrote; one batch (a mapping of
            columns), or any iterable of rows as dictionaries.
        by: a column: one summary for each of its values.
        contrast: ``(column, side, side that is subtracted)``: each pair of rows is one sample, the
            difference of the two, so that the standard errors are those of paired differences.
        pair: with ``contrast``: the column that says which two rows are a pair. The halves of pairs
            wait in memory for their partners, so partners should be near each other.

    Returns:
        A :class:`Summary`, or with ``by`` a dictionary of them.

    Raises:
        InputError: when there is no row, a column is missing, a row of a pair has no partner, or
            rows of several models, units or conventions are mixed; it names them.
        CheckpointError: when a file cannot be read.
        MissingExtraError: for a path without pyarrow.
    """
    question = Question(by, contrast, pair)
    if _is_of_ray(rows):
        from dla_hooks.engines.ray_data import summed

        sums = summed(rows, question)
    else:
        sums = RowSums(question)
        for columns in _batches(rows, question):
            sums.add(columns)
    found: dict[Hashable, Summary] = sums.summaries()
    return found if by is not None else found[None]


def _is_of_ray(rows: Any) -> bool:
    """Whether it is a data set of Ray's; what iterates over one is not."""
    ours = any(one.__module__.startswith("ray.data") for one in type(rows).__mro__)
    return ours and hasattr(rows, "map_batches")


def _batches(rows: Any, question: Question) -> Iterator[Mapping[str, Any]]:
    """Batches of columns, of any holder of rows."""
    if isinstance(rows, (str, os.PathLike)):
        if not os.fspath(rows):
            raise InputError("the path of the rows is empty; give a folder or a file")
        yield from _of_path(Path(rows), question)
    elif hasattr(rows, "to_batches"):
        yield from _of_arrow(rows, question)
    elif hasattr(rows, "iter") and hasattr(rows, "features"):  # of datasets
        yield from rows.with_format(None).iter(batch_size=ROWS)
    elif isinstance(rows, Mapping):
        if any(hasattr(value, "features") for value in rows.values()):
            raise InputError(f"these are several data sets, {sorted(rows)}; give one of them")
        yield rows
    elif hasattr(rows, "columns") and hasattr(rows, "to_dict"):  # of pandas
        yield {name: rows[name].tolist() for name in rows.columns}
    elif isinstance(rows, Iterable):
        yield from _of_dictionaries(iter(rows))
    else:
        raise InputError(
            "rows must be a data set, a table, a path or an iterable of dictionaries; got "
            f"{type(rows).__name__}: {rows!r:.80}"
        )


def _of_arrow(rows: Any, question: Question) -> Iterator[Mapping[str, Any]]:
    """Batches of a table, or of a data set of pyarrow's."""
    wanted = [one for one in rows.schema.names if one in (*question.columns, *RANKED)]
    if hasattr(rows, "scanner"):
        batches = rows.to_batches(columns=wanted, batch_size=ROWS)
    else:
        batches = rows.select(wanted).to_batches(ROWS)
    return (batch.to_pydict() for batch in batches if batch.num_rows)


def _of_dictionaries(rows: Iterator[Any]) -> Iterator[Mapping[str, Any]]:
    while batch := list(islice(rows, ROWS)):
        for row in batch:
            if not isinstance(row, Mapping):
                raise InputError(
                    f"a row must be a dictionary, got {type(row).__name__}: {row!r:.80}; results "
                    "are averaged by dla_hooks.summarize"
                )
        for names in dict.fromkeys(tuple(row) for row in batch):
            alike = [row for row in batch if tuple(row) == names]
            yield {name: [plain(row[name]) if name in ("error",) else row[name]
                          for row in alike] for name in names}  # fmt: skip


def _of_path(path: Path, question: Question) -> Iterator[Mapping[str, Any]]:
    """Batches of a folder or a file.

    Raises:
        CheckpointError: when there is none, or it cannot be read.
    """
    if not path.exists():
        raise CheckpointError(f"there is no {path}")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        try:
            from datasets import load_from_disk
        except ImportError:
            raise MissingExtraError(f"reading {path}", "datasets") from None
        yield from _batches(load_from_disk(str(path)), question)
        return
    try:
        import pyarrow
        from pyarrow import dataset
    except ImportError:
        raise MissingExtraError(f"reading {path}", "datasets") from None
    kind = "parquet" if path.is_dir() or path.suffix == ".parquet" else "ipc"
    try:
        yield from _of_arrow(dataset.dataset(path, format=kind), question)
    except (OSError, pyarrow.ArrowException) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read: {first}") from None
