"""A run over many prompts: windows of them are read, sorted, run, stored and given out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dla_hooks.bars import bar, shown
from dla_hooks.errors import DLAError, InputError
from dla_hooks.many import fingerprint
from dla_hooks.many.batches import Runner, freed
from dla_hooks.many.names import Names
from dla_hooks.many.prompts import Reader
from dla_hooks.many.rows import Row, Rows
from dla_hooks.many.store import Shards
from dla_hooks.results.ranked import Result


@dataclass(frozen=True)
class Share:
    """Which of the prompts one of several jobs runs: every ``of``-th, beginning with ``number``."""

    number: int = 0
    of: int = 1

    @classmethod
    def given(cls, shard: Any) -> Share:
        """Read ``shard=(i, n)``.

        Raises:
            InputError: for anything else.
        """
        pair = tuple(shard) if isinstance(shard, (tuple, list)) else ()
        ints = [one for one in pair if isinstance(one, int) and not isinstance(one, bool)]
        if len(pair) != 2 or len(ints) != 2 or not 0 <= ints[0] < ints[1]:
            raise InputError(
                "shard must be (i, n), the i-th of n jobs with i from 0 to n - 1, as in (0, 8); "
                f"got {shard!r:.80}"
            )
        return cls(*ints)

    @property
    def name(self) -> str:
        """The folder of the job, in the one that all jobs are given."""
        return f"shard-{self.number}-of-{self.of}"

    def has(self, index: int) -> bool:
        """Whether the job runs a prompt."""
        return index % self.of == self.number

    def count(self, total: int | None) -> int | None:
        """How many of all prompts the job runs."""
        return None if total is None else len(range(self.number, total, self.of))


@dataclass
class Work:
    """A run whose arguments were checked.

    Attributes:
        rows: prompts and answers.
        reader: of them.
        runner: of the model.
        shards: the folder of finished results, or None.
        window: how many prompts are read, sorted and run at once.
        progress: see :func:`dla_hooks.attribute_many`.
        share: the prompts that are run.
    """

    rows: Rows
    reader: Reader
    runner: Runner
    shards: Shards | None
    window: int
    progress: bool | None
    share: Share

    def results(self) -> Generator[Result | DLAError, None, None]:
        """Yield the outcome of each prompt of the share, in their order."""
        backend, tokenizer = self.reader.backend, self.reader.tokenizer
        names = Names(tokenizer, backend.answer_tokenizer(tokenizer))
        unread = (row for row in self.rows if self.share.has(row.index))
        n_done = n_failed = 0
        total = self.share.count(self.rows.total)
        with bar(total, "prompt", progress=self.progress) as over:
            failure: Exception | None = None
            while failure is None:
                batch, failure = _read(unread, self.window)
                if not batch:
                    break
                with shown(False):
                    outcomes = self._of_window(batch, names, over.update)
                n_done += len(outcomes)
                n_failed += sum(isinstance(one, DLAError) for one in outcomes.values())
                for index in sorted(outcomes):
                    yield outcomes.pop(index)
        if failure is not None:
            raise failure
        if self.rows.mismatch is not None:
            raise self.rows.mismatch
        if self.shards is not None:
            self.shards.finish(n_done, n_failed)

    def _of_window(
        self, batch: Sequence[Row], names: Names, count: Callable[[int], Any]
    ) -> dict[int, Result | DLAError]:
        """Return the outcome of every prompt of a window, by index, after storing them."""
        reader, runner, shards = self.reader, self.runner, self.shards
        outcomes: dict[int, Result | DLAError] = {}
        stored = {} if shards is None else shards.load(batch[0].index, batch[-1].index)
        todo = []
        for row in batch:
            kept = stored.pop(row.index, None)
            try:
                item = reader.read(row)
                if kept is None:
                    todo.append(reader.check(item, runner.stream))
            except DLAError as error:
                outcomes[row.index] = freed(error)
            if kept is not None:
                digest, result = kept
                if row.index in outcomes or fingerprint.of_item(item) != digest:
                    raise InputError(
                        f"prompt {row.index} or its answer is not the one whose result is stored "
                        "in the folder to resume; give the same prompts and answers, or another "
                        "folder"
                    )
                outcomes[row.index] = names.put_on(result, reader.settled(item))
        count(len(outcomes))

        new = []
        try:
            for item, outcome in runner.outcomes(todo):
                if isinstance(outcome, Result):
                    new.append((item, outcome))
                    names.put_on(outcome, item)
                outcomes[item.index] = outcome
                count(1)
        finally:  # finished results are stored, also after an interrupt
            if shards is not None:
                shards.write([(item.index, fingerprint.of_item(item), one) for item, one in new])
        for index, outcome in outcomes.items():
            if isinstance(outcome, DLAError):
                outcome.prompt_index = index
        return outcomes


def _read(unread: Iterator[Row], count: int) -> tuple[list[Row], Exception | None]:
    """Read the next rows. Also return an error of their source; rows before it still run."""
    batch: list[Row] = []
    try:
        for row in islice(unread, count):
            batch.append(row)
    except Exception as error:
        return batch, error
    return batch, None
