"""Many results as one set of tensors, and back: what a file of a resumed run holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from dla_hooks.results.ranked import RankedAttribution, Result
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.results.rows import Row
from dla_hooks.results.schema import row_columns, unpack, words_as_json
from dla_hooks.results.seen import Seen

Stored = tuple[int, bytes, Result]
"""A prompt's index and digest, and its result."""

_OF_ENTRY = ("attribution", "bias", "logit", "positions")
_OF_RANKED = ("rest", "remainder")
_MEANS, _BESIDE, _SEEN = "prompt_means", "beside.", "seen."
_ROW_INDEX, _SOURCES = "row_index", "n_sources"


def pack(done: Sequence[Stored]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of some results, and what they have in common as JSON can hold it."""
    results = [result for _, _, result in done]
    tensors = {
        "index": torch.tensor([index for index, _, _ in done], device="cpu"),
        "digest": torch.tensor(
            [list(digest) for _, digest, _ in done], dtype=torch.uint8, device="cpu"
        ),
        "n_entries": torch.tensor([result.logit.numel() for result in results], device="cpu"),
        "gap": torch.tensor([result.gap for result in results], dtype=torch.float64, device="cpu"),
        "logit_gap": torch.tensor(
            [result.logit_gap for result in results], dtype=torch.float64, device="cpu"
        ),
    }
    tensors |= _numbers(results)
    one = max(results, key=lambda result: len(result.rows))  # a longer prompt has more sources
    names = ("unit", "model", "softcap", *(() if _is_ranked(one) else ("labels",)))
    rest = {name: getattr(one, name) for name in names}
    rest["one_position"] = one.logit.ndim - one.several == 1
    rest["n_answers"] = one.logit.shape[-1] if one.several else 0
    return tensors, rest | {"rows": row_columns(one.rows), "words": words_as_json(one.words)}


def unpack_all(rest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Stored]:
    """The other way round.

    Raises:
        KeyError, ValueError, RuntimeError: for what :func:`pack` does not make.
    """
    one_position, n_answers = rest.pop("one_position"), rest.pop("n_answers", 0)
    rest["several"] = bool(n_answers)
    rest = unpack({}, rest)
    made: type[Result] = RankedAttribution if _ROW_INDEX in tensors else DirectLogitAttribution
    found = []
    start = 0
    per_prompt = ("index", "digest", "n_entries", "gap", "logit_gap")
    lines = zip(*(tensors.pop(name).tolist() for name in per_prompt), strict=True)
    means = tensors.pop(_MEANS, None)
    sources = tensors.pop(_SOURCES, None)
    for number, (index, digest, n, gap, logit_gap) in enumerate(lines):
        numbers: dict[str, Any] = {"beside": {}}
        seen = dict[str, Any]()
        for name, every in tensors.items():
            own = every[..., start : start + n].clone()
            if n_answers:
                own = own.unflatten(-1, (-1, n_answers))
            if n_answers and one_position:
                own = own.reshape(*own.shape[:-2], 1, n_answers)
            elif not one_position:
                own = own.unsqueeze(-3 if n_answers else -2)
            if name.startswith(_SEEN):
                seen[name.removeprefix(_SEEN)] = own
                continue
            where = numbers["beside"] if name.startswith(_BESIDE) else numbers
            where["index" if name == _ROW_INDEX else name.removeprefix(_BESIDE)] = own
        numbers["seen"] = Seen(**seen) if seen else None
        if means is not None:
            numbers[_MEANS] = means[:, number : number + 1].clone()
        start += n
        own_rows = rest["rows"]
        if sources is not None and int(sources[number]):  # the rows are those of the longest
            own_rows = own_rows.of_tokens(int(sources[number]))
            n_places = min(len(own_rows), len(numbers["index"]))
            for name in ("attribution", "index"):
                numbers[name] = numbers[name][:n_places]
            numbers["beside"] = {k: own[:n_places] for k, own in numbers["beside"].items()}
        result = made(**numbers, **{**rest, "rows": own_rows}, gap=gap, logit_gap=logit_gap)
        found.append((index, bytes(digest), result))
    return found


def _is_ranked(result: Result) -> bool:
    return isinstance(result, RankedAttribution)


def _numbers(results: Sequence[Result]) -> dict[str, Tensor]:
    """All entries of all results, side by side; places that a result lacks hold no row."""
    one = results[0]

    def side_by_side(of: Callable[[Result], Tensor], padding: float = 0) -> Tensor:
        n_axes = one.logit.ndim  # of the entries
        flat = [own.flatten(own.ndim - n_axes) for own in map(of, results)]
        if flat[0].ndim == 1:
            return torch.cat(flat)
        most = max(map(len, flat))
        more = [own.new_full((most - len(own), own.shape[1]), padding) for own in flat]
        return torch.cat([torch.cat(pair) for pair in zip(flat, more, strict=True)], 1)

    names = [*_OF_ENTRY, *(_OF_RANKED if _is_ranked(one) else ())]
    tensors = {name: side_by_side(attrgetter(name)) for name in names}
    if _is_ranked(one):  # "index" is that of the prompt
        tensors[_ROW_INDEX] = side_by_side(attrgetter("index"), padding=-1)
        sources = [_n_sources(result.rows) for result in results]
        tensors[_SOURCES] = torch.tensor(sources, device="cpu")
    k = max(0 if one.seen is None else len(one.seen.top_ids) for one in results)
    if k:
        looks = {id(result): result.seen or Seen.nothing(result.shape, k) for result in results}
        for name in (own.name for own in fields(Seen) if own.name != "names"):
            tensors[_SEEN + name] = side_by_side(partial(_look, looks, name))
    for name in one.beside:
        tensors[_BESIDE + name] = side_by_side(partial(_beside, name))
    if getattr(one, _MEANS, None) is not None:
        tensors[_MEANS] = torch.cat([getattr(result, _MEANS) for result in results], 1)
    return tensors


def _n_sources(rows: Sequence[Row]) -> int:
    """How many tokens a result's rows read, by which they are counted; 0 where they read none."""
    runs = rows.runs if isinstance(rows, RowRuns) else ()
    return max((run.n for run in runs if run.of_sources), default=0)


def _look(looks: dict[int, Seen], name: str, result: Result) -> Tensor:
    found: Tensor = getattr(looks[id(result)], name)
    return found


def _beside(name: str, result: Result) -> Tensor:
    return result.beside[name]
