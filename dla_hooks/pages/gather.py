"""Results of any kind become pages: one for each prompt and question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dla_hooks.errors import ArgumentTypeError, InputError
from dla_hooks.pages import averages, contents
from dla_hooks.pages.grid import BUDGET, room
from dla_hooks.pages.reads import effects_of, promotes_of, reads_of
from dla_hooks.results.data import EntryData, real_entries
from dla_hooks.results.promoted import PromotedTokens
from dla_hooks.results.ranked_data import RankedData
from dla_hooks.results.summary import Summary
from dla_hooks.results.wording import printable, question

_READS = 12_000
"""Pairs of a head and a token that all pages list together."""
_KEPT = 150_000  # of the budget, for what is never rounded
_MOST_RANKED = 64
"""Entries at which a page lists ranked rows."""


@dataclass
class _Subject:
    """What one page is about."""

    kind: str
    model: str
    prompt: int
    tokens: list[str]
    question: str
    results: list[EntryData] = field(default_factory=list)
    promoted: list[PromotedTokens] = field(default_factory=list)
    comparison: Any = None


def pages_of(results: Iterable[Any], effects: Any = None) -> list[dict[str, Any]]:
    """The content of each page.

    Args:
        results: attributions (or dictionaries of them), promoted tokens, comparisons, summaries.
            Those of one prompt and one question share a page, and so do summaries of several units
            over the same prompts; these come last.
        effects: direct and total effects: an object with ``records()``, or the lines themselves.

    Raises:
        ArgumentTypeError: for anything else.
        InputError: when there is nothing to show, or no place for it.
    """
    subjects: list[_Subject] = []
    groups: list[list[Summary]] = []
    for one in _flat(results):
        if isinstance(one, Summary):
            averages.join(groups, one)
        else:
            _sort_in(subjects, one)
    pages = [subject for subject in subjects if subject.results]
    if not pages and not groups:
        raise InputError(
            "there is nothing to show: give at least one attribution, comparison or summary"
        )
    lines = effects.records() if hasattr(effects, "records") else effects
    shown = effects_of(lines) if lines else None
    n_pages = len(pages) + len(groups)
    made = [_page(subject, n_pages, shown) for subject in pages]
    return made + [averages.page_of(group) for group in groups]


def _flat(results: Iterable[Any]) -> Iterator[Any]:
    for one in results:
        if isinstance(one, Mapping):
            yield from _flat(one.values())
        elif isinstance(one, (list, tuple)):
            yield from _flat(one)
        else:
            yield one


def _sort_in(subjects: list[_Subject], one: Any) -> None:
    """Add one result to the pages that it belongs to, one for each of its prompts."""
    if isinstance(one, EntryData):
        contents.check_axes(one)
        for prompt, part in enumerate(_prompts(one)):
            _subject(subjects, "attribution", prompt, part).results.append(part)
    elif hasattr(one, "difference") and isinstance(one.difference, EntryData):
        contents.check_axes(one.difference)
        whole = [one.difference, one.first, one.second]
        parts = [list(_prompts(result)) for result in whole]
        for prompt, (difference, first, second) in enumerate(zip(*parts, strict=True)):
            subject = _subject(subjects, "comparison", prompt, difference)
            subject.results.append(difference)
            subject.comparison = subject.comparison or (first, second)
    elif isinstance(one, PromotedTokens):
        for prompt, tokens in enumerate(one.tokens or [[]]):
            part = one if len(one.tokens) < 2 else one.prompt(prompt)
            for subject in subjects:
                if subject.tokens == tokens and subject.prompt == prompt:
                    subject.promoted.append(part)
    else:
        raise ArgumentTypeError(
            "a report is made of attributions, PromotedTokens behind them, comparisons and "
            f"summaries; got {type(one).__name__}: {one!r:.80}"
        )


def _prompts(data: EntryData) -> Iterator[Any]:
    if len(data.tokens) < 2:
        yield data
    else:
        for prompt in range(len(data.tokens)):
            yield data.prompt(prompt)  # type: ignore[attr-defined]  # of every public result


def _subject(subjects: list[_Subject], kind: str, prompt: int, data: EntryData) -> _Subject:
    """The page of this prompt and question, new where there is none."""
    tokens = data.tokens[0] if data.tokens else []
    about = question(data)
    for subject in subjects:
        same = (subject.kind, subject.model, subject.prompt, subject.tokens, subject.question)
        taken = {one.words.name for one in subject.results}
        if same == (kind, data.model, prompt, tokens, about) and data.words.name not in taken:
            return subject
    subjects.append(_Subject(kind, data.model, prompt, tokens, about))
    return subjects[-1]


def _page(subject: _Subject, n_pages: int, effects: dict[str, Any] | None) -> dict[str, Any]:
    about: dict[str, Any] = {
        "kind": subject.kind,
        "model": printable(subject.model),
        "tokens": subject.tokens,
        "question": subject.question,
        "notes": [],
        "effects": effects,
    }
    whole = max(subject.results, key=lambda one: len(contents.spots(one)))
    spots = contents.spots(whole)
    kept = _room(subject.results, len(spots), (BUDGET - _KEPT) // n_pages)
    entry = contents.entries_of(whole)
    if kept < len(spots):
        about["notes"].append(
            f"Shown are the last {kept} of {len(spots)} positions: more would not fit the file."
        )
        spots = spots[-kept:]
        entry = {name: _last(value, kept, name) for name, value in entry.items()}
    focus = len(spots) - 1
    page = {**about, **entry, "focus": focus, "units": [], "reads": None, "promotes": []}
    for data in subject.results:
        _add(page, data, spots, n_pages)
    for promoted in subject.promoted:
        found = [spot for spot in promoted.positions.flatten().tolist() if spot >= 0]
        if set(found) <= set(spots):
            page["promotes"].append(promotes_of(promoted, [spots.index(spot) for spot in found]))
    if subject.comparison is not None:
        sides = [contents.entries_of(one) for one in subject.comparison]
        shown = ("logit", "rank", "probability")
        page["sides"] = [
            {name: _last(side[name], len(spots), name) for name in shown if name in side}
            | {"model": one.model}
            for side, one in zip(sides, subject.comparison, strict=True)
        ]
        for name in ("rank", "probability", "top"):  # of a run, not of a difference
            page.pop(name, None)
        tokens = [one.tokens[0] if one.tokens else [] for one in subject.comparison]
        if tokens[0] != tokens[1]:
            page["other_tokens"] = tokens[1]
    return page


def _add(page: dict[str, Any], data: EntryData, spots: list[int], n_pages: int) -> None:
    """Add a result's rows to its page, at the entries that the page shows."""
    own = contents.spots(data)
    most = len(spots)
    if isinstance(data, RankedData):
        most = min(most, max(1, _MOST_RANKED // n_pages))
    known = set(spots)
    shown = [place for place, spot in enumerate(own) if spot in known][-most:]
    if len(shown) < len(own):
        data = _entries(data, shown)
    at = [spots.index(own[place]) for place in shown] if len(own) > 1 else [len(spots) - 1]
    if len(own) == 1 and own[0] in known:
        at = [spots.index(own[0])]
    page["units"].append(contents.unit_of(data, data.words.name, at, page["focus"]))
    if isinstance(data, RankedData) and data.words.sources:
        page["reads"] = reads_of(data, at, _READS // n_pages)


def _entries(data: EntryData, shown: list[int]) -> Any:
    """Some of the real entries of one prompt's result."""
    found = real_entries(data)[0].flatten().nonzero()[:, 0][torch.tensor(shown, device="cpu")]
    place: Any = found
    return data.at((slice(None), place)) if len(data.shape) == 2 else data.at((place,))


def _room(results: list[EntryData], n: int, budget: int) -> int:
    """How many of ``n`` entries the file has room for."""
    dense = [one for one in results if not one.keeps_some]
    return min(n, room(sum((1 + len(one.beside)) * len(one.attribution) for one in dense), budget))


def _last(value: Any, kept: int, name: str) -> Any:
    """The last entries of what has one value for each."""
    if name in ("answers", "incorrects") or not isinstance(value, list):
        return value
    return value[-kept:]
