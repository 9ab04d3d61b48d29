"""What rows of numbers are about, as one short string in each of them.

The first row of each batch holds all of it as JSON, the others its digest only. So a table says
what it holds without a file beside it, however its rows are split and put in order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dla_hooks.errors import InputError
from dla_hooks.results.ranked import RankedAttribution, Result
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.schema import row_columns, rows_from, words_as_json
from dla_hooks.results.subject import Subject, mismatch
from dla_hooks.results.summarize import all_rows

_FORMAT, _VERSION = "dla_hooks.rows", 1
_DIGITS = 16


@dataclass(frozen=True)
class About:
    """What some rows are about.

    Attributes:
        model: the model's class and type.
        unit: its name.
        rows: a record of each row; of a ranked unit of every row that there is.
        words: what the unit says of its rows.
        difference: whether the numbers are differences of two logits.
        softcap: of the model, or None.
        ranked: whether the strongest of many rows are kept only.
        run: what else the numbers depend on, by name: digests of the model, conventions.
        checkpoint: the name that the model was loaded by, which is shown only.
    """

    model: str
    unit: str
    rows: Sequence[Row]
    words: Words
    difference: bool
    softcap: float | None
    ranked: bool
    run: dict[str, Any]
    checkpoint: str = ""

    @classmethod
    def of(cls, result: Result, run: dict[str, Any], checkpoint: str) -> About:
        """What a result is about."""
        return cls(
            model=result.model,
            unit=result.unit,
            rows=result.rows,
            words=result.words,
            difference=result.incorrect is not None,
            softcap=result.softcap,
            ranked=isinstance(result, RankedAttribution),
            run=run,
            checkpoint=checkpoint,
        )

    def fits(self, result: Result) -> bool:
        """Whether another result of the same model and options is about the same."""
        return (
            self.difference == (result.incorrect is not None)
            and len(self.rows) == len(result.rows)
            and (self.rows is result.rows or self.rows == result.rows)
        )

    @cached_property
    def digest(self) -> str:
        """A digest of all but the checkpoint's name: 16 hexadecimal digits."""
        content = json.dumps(self._content(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]

    @cached_property
    def text(self) -> str:
        """All of it as JSON."""
        head = {"format": _FORMAT, "version": _VERSION, "digest": self.digest}
        return json.dumps({**head, "checkpoint": self.checkpoint, **self._content()})

    @cached_property
    def subject(self) -> Subject:
        """The same, as summaries say it."""
        rows = all_rows(self.rows, self.words.remainder) if self.ranked else self.rows
        return Subject(
            unit=self.unit,
            labels=[row.label for row in rows],
            difference=self.difference,
            rows=list(rows),
            words=self.words,
            softcap=self.softcap,
        )

    def differs(self, first: About) -> str:
        """What keeps rows about both from being averaged, in words; "" where nothing does."""
        names = [name for name in self.run if self.run[name] != first.run.get(name)]
        if self.model != first.model or {"config", "weights", "adapters"} & {*names}:
            return (
                f"some are of {first._named()}, others of {self._named()}; summarize each by itself"
            )
        said = [f"{name} is {self.run[name]!r} and {first.run.get(name)!r}" for name in names]
        return mismatch(self.subject, first.subject) or "; ".join(said)

    def _named(self) -> str:
        return f"{self.checkpoint} ({self.model}, weights {str(self.run.get('weights'))[:8]})"

    def _content(self) -> dict[str, Any]:
        names = ("model", "unit", "difference", "softcap", "ranked", "run")
        content = {name: getattr(self, name) for name in names}
        if not isinstance(self.rows, RowRuns):  # runs of rows say their labels themselves
            content["labels"] = [row.label for row in self.rows]
        columns = row_columns(self.rows)
        return {**content, "rows": columns, "words": words_as_json(self.words)}


def read_about(text: str) -> tuple[str, About | None]:
    """The digest that a row's ``about`` holds, and what it is about where that is told, too.

    Raises:
        InputError: for a string that no :class:`dla_hooks.Attributor` wrote.
    """
    if len(text) == _DIGITS:
        return text, None
    try:
        content = json.loads(text)
        version = content.pop("version")
        if content.pop("format") != _FORMAT:
            raise ValueError("it is of another format")
        if version > _VERSION:
            raise InputError(
                f"these rows were written by a newer dla_hooks (format {version}, this one reads "
                f"up to {_VERSION}); upgrade to read them"
            )
        digest = content.pop("digest")
        rows = rows_from(content.pop("labels", None), content.pop("rows"))
        return digest, About(rows=rows, words=Words(**content.pop("words")), **content)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the column 'about' holds {text!r:.60}, which no Attributor wrote "
            f"({type(error).__name__}: {error})"
        ) from None
