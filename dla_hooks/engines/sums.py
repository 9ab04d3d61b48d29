"""Sums of rows, which any engine may make of any split of them, in any order."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from dla_hooks.engines.about import About, read_about
from dla_hooks.engines.columns import plain
from dla_hooks.engines.question import Question
from dla_hooks.engines.samples import samples_of
from dla_hooks.errors import InputError
from dla_hooks.results.moments import Moments
from dla_hooks.results.summary import Summary


@dataclass
class _Group:
    """One group's samples, and of what."""

    moments: Moments | None = None
    n_failed: int = 0
    abouts: dict[str, None] = field(default_factory=dict)
    failure: str = ""

    def add(self, samples: Tensor) -> None:
        if samples.shape[1]:
            self.merge(_Group(Moments.of(samples)))

    def merge(self, other: _Group) -> None:
        if self.moments is None or other.moments is None:
            self.moments = self.moments or other.moments
        else:
            _check_width(self.moments.mean, other.moments.mean)
            self.moments = self.moments.merged(other.moments)
        self.n_failed += other.n_failed
        self.abouts |= other.abouts
        self.failure = self.failure or other.failure


class RowSums:
    """The sums of some rows; those of others are added by :meth:`merge`.

    Args:
        question: what is summed.

    Attributes:
        known: what is known of the rows, by its digest.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self.known: dict[str, About] = {}
        self._groups: dict[Hashable, _Group] = {}
        # One side of each pair whose other was not seen: group, side, sample (None: it failed).
        self._waiting: dict[Hashable, tuple[Hashable, bool, Tensor | None, str]] = {}

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Add the rows of some columns.

        Raises:
            InputError: for a column that is missing, and rows that no Attributor wrote.
        """
        missing = [name for name in self.question.columns if name not in columns]
        if missing:
            raise InputError(
                f"these rows have no column {missing[0]!r}; they have "
                f"{', '.join(map(repr, columns)) or 'none'}"
            )
        errors = [str(plain(one) or "") for one in columns["error"]]
        abouts = [self._read(plain(one) or "") for one in columns["about"]]
        good = [index for index, error in enumerate(errors) if not error]
        samples, places = samples_of(columns, good)
        groups = self._keys(columns, self.question.by, len(errors))
        if self.question.contrast is None:
            self._add_all(groups, errors, abouts, samples, places)
        else:
            self._add_pairs(columns, groups, errors, abouts, samples, places)

    def merge(self, other: RowSums) -> RowSums:
        """The sums of the rows of both; the first becomes them."""
        self.known |= other.known
        for key, group in other._groups.items():
            self._group(key).merge(group)
        for pair, half in other._waiting.items():
            self._pair(pair, *half)
        return self

    def summaries(self) -> dict[Hashable, Summary]:
        """The summary of each group; one without a group is that of ``None``.

        Raises:
            InputError: when rows of several models, units or conventions are in one group, a row
                has no partner, or there is none.
        """
        if self._waiting:
            pair = next(iter(self._waiting))
            assert self.question.contrast is not None
            side = self.question.contrast[1 if self._waiting[pair][1] else 2]
            raise InputError(
                f"{len(self._waiting)} rows have no partner; the first is {side!r} of "
                f"{self.question.pair} {pair!r}"
            )
        if not any(group.moments for group in self._groups.values()):
            failed = sum(group.n_failed for group in self._groups.values())
            why = next((one.failure for one in self._groups.values() if one.failure), "")
            said = f"all {failed} failed, the first with {why}" if failed else "there is none"
            raise InputError(f"there are no rows to summarize: {said}")
        return {key: self._summary(group) for key, group in self._groups.items()}

    def _summary(self, group: _Group) -> Summary:
        if group.moments is None:
            return Summary.empty(group.n_failed)
        unknown = [digest for digest in group.abouts if digest not in self.known]
        if unknown:
            raise InputError(
                f"no row says what those with about = {unknown[0]!r} are: the first row of a batch "
                "does, and it was left out. Summarize all rows of a sweep, or keep those"
            )
        first, *others = (self.known[digest] for digest in group.abouts)
        for other in others:
            raise InputError(f"rows cannot be averaged: {other.differs(first) or 'they differ'}")
        subject = first.subject
        if self.question.contrast is not None:
            column, side, taken = self.question.contrast
            subject = replace(subject, contrast=f"{side} - {taken} ({column})")
        if len(group.moments.mean) != len(subject.labels) + 2:
            raise InputError(
                f"rows have {len(group.moments.mean) - 2} numbers, and {len(subject.labels)} labels"
            )
        return Summary.of_moments(
            group.moments, subject, n_failed=group.n_failed, model=first.model
        )

    def _read(self, text: str) -> str:
        if not text:
            return ""
        digest, about = read_about(text)
        if about is not None:
            self.known.setdefault(digest, about)
        return digest

    def _group(self, key: Hashable) -> _Group:
        return self._groups.setdefault(key, _Group())

    @staticmethod
    def _keys(columns: Mapping[str, Sequence[Any]], name: str | None, n: int) -> list[Hashable]:
        return [None] * n if name is None else [plain(value) for value in columns[name]]

    def _add_all(
        self,
        groups: list[Hashable],
        errors: list[str],
        abouts: list[str],
        samples: Tensor,
        places: list[int],
    ) -> None:
        for index, error in enumerate(errors):
            group = self._group(groups[index])
            if error:
                group.n_failed, group.failure = group.n_failed + 1, group.failure or error
            elif abouts[index]:
                group.abouts[abouts[index]] = None
        keys = [groups[index] for index in places]
        for key in dict.fromkeys(keys):
            own = [place for place, one in enumerate(keys) if one == key]
            self._group(key).add(samples if len(own) == len(keys) else samples[:, own])

    def _add_pairs(
        self,
        columns: Mapping[str, Sequence[Any]],
        groups: list[Hashable],
        errors: list[str],
        abouts: list[str],
        samples: Tensor,
        places: list[int],
    ) -> None:
        assert self.question.contrast is not None
        column, counted, taken = self.question.contrast
        sides = self._keys(columns, column, len(errors))
        pairs = self._keys(columns, self.question.pair, len(errors))
        where = {index: place for place, index in enumerate(places)}
        for index, (pair, side) in enumerate(zip(pairs, sides, strict=True)):
            if side not in (counted, taken):
                continue
            if abouts[index]:
                self._group(groups[index]).abouts[abouts[index]] = None
            sample = samples[:, where[index]].clone() if index in where else None
            why = errors[index] or "no position is selected"
            self._pair(pair, groups[index], side == counted, sample, why)

    def _pair(
        self, pair: Hashable, key: Hashable, counted: bool, sample: Tensor | None, why: str
    ) -> None:
        if pair not in self._waiting:
            self._waiting[pair] = key, counted, sample, why
            return
        key_before, counted_before, before, why_before = self._waiting.pop(pair)
        assert self.question.contrast is not None
        if counted == counted_before:
            raise InputError(
                f"{self.question.pair} {pair!r} holds {self.question.contrast[2 - counted]!r} "
                "twice; give each pair one row of each side"
            )
        if key != key_before:
            raise InputError(
                f"{self.question.pair} {pair!r} is of two groups, {key_before!r} and {key!r}"
            )
        group = self._group(key)
        if sample is None or before is None:
            group.n_failed += 1
            group.failure = group.failure or (why if sample is None else why_before)
            return
        _check_width(before, sample)
        difference = sample - before if counted else before - sample
        group.add(difference[:, None])


def _check_width(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise InputError(
            f"rows cannot be averaged: some have {len(first) - 2} numbers, others {len(second) - 2}"
        )
