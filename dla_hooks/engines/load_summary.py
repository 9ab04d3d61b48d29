"""The summary of what jobs have left in folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dla_hooks.engines.summarize_rows import summarize_rows
from dla_hooks.errors import CheckpointError, InputError
from dla_hooks.many.store import FINISHED, RUN, SHARD, read_results
from dla_hooks.results.files import checked
from dla_hooks.results.ranked import Result
from dla_hooks.results.summarize import summarize
from dla_hooks.results.summary import Summary

_JOB = re.compile(r"shard-(\d+)-of-(\d+)")
_OWN = ("shard",)  # what jobs of one sweep do not have in common


def load_summary(*folders: str | Path, partial: bool = False) -> Summary:
    """The means over all prompts of a sweep, of what its jobs have left.

    Example:
        >>> import tempfile, dla_hooks
        >>> model, tokenizer = dla_hooks.demo.load()
        >>> folder = tempfile.TemporaryDirectory()
        >>> for job in range(2):  # each of them a process of its own, on any machine
        ...     results = dla_hooks.attribute_many(
        ...         model, ["The keys", "The dog", "The cars"], " are", " is",
        ...         tokenizer=tokenizer, resume=folder.name, shard=(job, 2),
        ...     )
        ...     _ = list(results)
        >>> dla_hooks.load_summary(folder.name).n
        3
        >>> folder.cleanup()

    Args:
        folders: one or more of: the ``resume`` folder of :func:`attribute_many`, with the shards
            in it or without any; a folder that an :class:`Attributor`'s rows were written to, in
            Parquet or by ``save_to_disk``; a summary that was saved.
        partial: take what there is of jobs that did not come to their end.

    Raises:
        InputError: when the folders are of several models or options, which it names, or a job of
            a sweep is missing or did not come to its end, which it names, too.
        CheckpointError: when a folder is not there, or cannot be read.
    """
    if not folders:
        raise InputError("give the folders of a sweep: load_summary('runs/agreement')")
    whole, first = Summary.empty(), None
    for folder in map(checked, folders):
        for job in _jobs(folder, partial):
            stamp = _stamp(job)
            if stamp is not None:
                first = first or (job, stamp)
                _check_same(first, (job, stamp))
            found = _summary(job, partial)
            try:
                whole = whole.merge(found)
            except InputError as error:
                raise InputError(f"{job} does not go with the others: {error}") from None
    if not whole.n:
        raise InputError(
            f"there are no results in {', '.join(map(str, folders))}"
            f"{f', all {whole.n_failed} prompts failed' if whole.n_failed else ''}"
        )
    return whole


def _jobs(folder: Path, partial: bool) -> Iterator[Path]:
    """The folders of a sweep's jobs; the folder itself where it had one job."""
    if not folder.exists():
        raise CheckpointError(f"there is no {folder}")
    if folder.is_file() or (folder / RUN).exists():
        yield folder
        return
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _JOB.fullmatch(path.name)
        if match is not None:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        yield folder
        return
    if len(found) > 1:
        raise InputError(
            f"{folder} holds sweeps of {' and of '.join(map(str, sorted(found)))} jobs, which have "
            "the same prompts; keep one of them"
        )
    ((n, jobs),) = found.items()
    missing = [f"shard-{i}-of-{n}" for i in range(n) if i not in jobs]
    if missing and not partial:
        raise InputError(
            f"{folder} lacks {len(missing)} of {n} jobs ({', '.join(missing[:3])}); run them, or "
            "take what there is: partial=True"
        )
    for number in sorted(jobs):
        yield jobs[number]


def _stamp(job: Path) -> dict[str, Any] | None:
    """Options and model of a job; None for files of another kind."""
    if not (job / RUN).is_file():
        return None
    try:
        stamp = json.loads((job / RUN).read_text(encoding="utf-8"))["run"]
        return {name: value for name, value in stamp.items() if name not in _OWN}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{job / RUN} is damaged: {error}") from None


def _check_same(first: tuple[Path, dict[str, Any]], other: tuple[Path, dict[str, Any]]) -> None:
    names = [name for name in first[1] if first[1][name] != other[1].get(name)]
    if names:
        said = "; ".join(f"{n} is {first[1][n]!r} and {other[1].get(n)!r}" for n in names)
        raise InputError(f"{first[0]} and {other[0]} are not of one sweep: {said}")


def _summary(job: Path, partial: bool) -> Summary:
    if job.is_file():
        return summarize_rows(job) if job.suffix == ".parquet" else Summary.load(job)
    if not (job / RUN).exists():
        if not (job / "dataset_info.json").is_file() and not any(job.rglob("*.parquet")):
            raise InputError(
                f"{job} holds neither the results of attribute_many nor an Attributor's rows, in "
                "Parquet or as save_to_disk writes them"
            )
        found: Summary = summarize_rows(job)
        return found
    n_failed, n = _end(job, partial)
    names = sorted(path for path in job.iterdir() if SHARD.fullmatch(path.name))
    if not names:
        return Summary.empty(n_failed)
    kept = _Counted(one for path in names for one in read_results(path))
    made = summarize(kept).merge(Summary.empty(n_failed))
    if n is not None and kept.n + n_failed != n:
        raise CheckpointError(
            f"{job} holds {kept.n} results, and it had {n} prompts of which {n_failed} failed; run "
            "the same call again, which makes those that are lost"
        )
    return made


class _Counted:
    """An iterable that counts what it gives."""

    def __init__(self, items: Iterator[Result]) -> None:
        self._items, self.n = items, 0

    def __iter__(self) -> Iterator[Result]:
        for item in self._items:
            self.n += 1
            yield item


def _end(job: Path, partial: bool) -> tuple[int, int | None]:
    """How many prompts of a job failed, and how many there were; None where it did not end."""
    try:
        end = json.loads((job / FINISHED).read_text(encoding="utf-8"))
        return int(end["failed"]), int(end["prompts"])
    except FileNotFoundError:
        if partial:
            return 0, None
        raise InputError(
            f"{job} did not come to its end; run the same call again, which goes on where it "
            "stopped, or take what there is: partial=True"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{job / FINISHED} is damaged: {error}") from None
