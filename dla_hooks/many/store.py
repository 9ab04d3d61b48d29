"""A folder that keeps the finished results of a run over many prompts.

    folder/run.json                              options and model of the run
    folder/000000000-000001023.safetensors       results of prompts among the first 1024

A file is written under another name and then renamed, so a file with its final name is complete.
Tokens and answers are not stored. They are read again from the prompts, and each prompt is compared
with its stored digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import CheckpointError, InputError
from dla_hooks.results.ranked import RankedAttribution, Result
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.schema import row_columns, unpack, words_as_json

_FORMAT = "dla_hooks.many"
_VERSION = 1
_RUN = "run.json"
_SHARD = re.compile(r"(\d{9,})-(\d{9,})\.safetensors")
_UNFINISHED = ".unfinished"
_ABANDONED = 24 * 60 * 60
"""Seconds after which an unfinished file counts as abandoned."""

_Stored = tuple[int, bytes, Result]


class Shards:
    """Opens or begins a folder.

    Args:
        folder: its path; created if missing.
        stamp: options and model of the run, as values for JSON.

    Attributes:
        fresh: whether the folder was begun just now.

    Raises:
        InputError: when the folder belongs to another run, or to something else.
        CheckpointError: when it cannot be read or written.
    """

    def __init__(self, folder: str | Path, stamp: dict[str, Any]) -> None:
        self.folder = Path(folder)
        run = self.folder / _RUN
        content: Any = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self.fresh = not run.exists()
            others = (path for path in self.folder.iterdir() if path.suffix != _UNFINISHED)
            if self.fresh and any(others):
                raise InputError(
                    f"{self.folder} holds other files and no {_RUN}; resume takes a new folder, "
                    "or one that an earlier call has begun"
                )
            if not self.fresh:
                content = json.loads(run.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be used to resume: {error}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{run} is damaged: {error}") from None
        if self.fresh:
            content = {"format": _FORMAT, "version": _VERSION, "run": stamp}
            self._put(_RUN, lambda path: path.write_text(json.dumps(content, indent=1)))
        else:
            self._compare(content, stamp)
        self._ahead: dict[str, list[_Stored]] = {}  # already read, for later windows
        self._ranges = sorted(
            (int(match[1]), int(match[2]), match[0])
            for match in map(_SHARD.fullmatch, (path.name for path in self.folder.iterdir()))
            if match
        )

    def load(self, first: int, last: int) -> dict[int, tuple[bytes, Result]]:
        """The stored results of prompts ``first`` to ``last``: each prompt's digest and result.

        Windows come in order. Results in a file that belong to later windows are kept, so that
        each file is read once.

        Raises:
            CheckpointError: when a file is damaged.
        """
        found: dict[int, tuple[bytes, Result]] = {}
        ahead: dict[str, list[_Stored]] = {}
        for start, end, name in self._ranges:
            if start <= last and end >= first:
                stored = self._ahead.pop(name, None)
                if stored is None:
                    stored = self._read(self.folder / name)
                found |= {i: (digest, one) for i, digest, one in stored if first <= i <= last}
                ahead[name] = [one for one in stored if one[0] > last]
        self._ahead = ahead
        return found

    def write(self, done: Sequence[tuple[int, bytes, Result]]) -> None:
        """Store results: each prompt's index, digest, and result without tokens and answers.

        Raises:
            CheckpointError: when they cannot be written.
        """
        from safetensors.torch import save_file

        if not done:
            return
        done = sorted(done, key=lambda one: one[0])
        results = [result for _, _, result in done]
        tensors = {
            "index": torch.tensor([index for index, _, _ in done], device="cpu"),
            "digest": torch.tensor(
                [list(digest) for _, digest, _ in done], dtype=torch.uint8, device="cpu"
            ),
            "n_entries": torch.tensor([result.logit.numel() for result in results], device="cpu"),
            "gap": torch.tensor(
                [result.gap for result in results], dtype=torch.float64, device="cpu"
            ),
            "logit_gap": torch.tensor(
                [r.logit_gap for r in results], dtype=torch.float64, device="cpu"
            ),
        }
        tensors |= _numbers(results)
        one = max(results, key=lambda result: len(result.rows))  # a longer prompt has more sources
        names = ("unit", "model", "softcap", *(() if _is_ranked(one) else ("labels",)))
        rest = {name: getattr(one, name) for name in names}
        rest["one_position"] = one.logit.ndim == 1
        rest |= {"rows": row_columns(one.rows), "words": words_as_json(one.words)}
        header = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "results": (about := json.dumps(rest)),
            "sha256": _checksum(tensors, about),
        }
        name = f"{done[0][0]:09d}-{done[-1][0]:09d}.safetensors"
        self._put(name, lambda path: save_file(tensors, str(path), metadata=header))

    def _read(self, path: Path) -> list[_Stored]:
        from safetensors import SafetensorError, safe_open

        try:
            # Older versions of safetensors read to the caller's default device.
            with torch.device("cpu"), safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.get("sha256") != _checksum(tensors, header.get("results", "")):
                raise ValueError("it does not hold what was written")
            return _unpack(json.loads(header["results"]), tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {error}); delete this file, and its "
                "prompts will be run again"
            ) from None

    def _put(self, name: str, write: Any) -> None:
        """Write a file in full or not at all."""
        from safetensors import SafetensorError

        own = f"{os.getpid()}-{secrets.token_hex(4)}"  # another process may write the same file
        unfinished = self.folder / f"{name}.{own}{_UNFINISHED}"
        try:
            write(unfinished)
            with unfinished.open("rb+") as file:  # on the disk before it gets its name
                os.fsync(file.fileno())
            unfinished.replace(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / name} cannot be written: {error}") from None
        finally:
            unfinished.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove unfinished files of a crash. A recent one may belong to another process."""
        for leftover in self.folder.glob(f"*{_UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):  # finished, or swept, in the meantime
                if time.time() - leftover.stat().st_mtime > _ABANDONED:
                    leftover.unlink()

    def _compare(self, content: Any, stamp: dict[str, Any]) -> None:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(f"{self.folder / _RUN} is not of a run over many prompts")
        version = content.get("version")
        if not isinstance(version, int) or version > _VERSION:
            raise InputError(
                f"{self.folder} was begun by a newer dla_hooks (format {version}, this one reads "
                f"up to {_VERSION}); upgrade to resume it"
            )
        kept = content.get("run")
        if not isinstance(kept, dict):
            raise CheckpointError(
                f"{self.folder / _RUN} is damaged: its 'run' is no object, but {kept!r:.80}; "
                "take another folder to begin anew"
            )
        given = json.loads(json.dumps(stamp))
        differ = [name for name in given if kept.get(name) != given[name]]
        if differ:
            said = "; ".join(f"{n} was {kept.get(n)!r}, now {given[n]!r}" for n in differ)
            raise InputError(
                f"{self.folder} holds the results of another run: {said}. Give the same arguments "
                "and model to resume it, or another folder to begin anew."
            )


_OF_ENTRY = ("attribution", "bias", "logit", "positions")
_OF_RANKED = ("rest", "remainder")
_MEANS, _BESIDE, _ROW_INDEX = "prompt_means", "beside.", "row_index"


def _is_ranked(result: Result) -> bool:
    return isinstance(result, RankedAttribution)


def _numbers(results: Sequence[Result]) -> dict[str, Tensor]:
    """All entries of all results, side by side; places that a result lacks hold no row."""
    one, n_places = results[0], max(len(result.attribution) for result in results)

    def side_by_side(of: Callable[[Result], Tensor], padding: float = 0) -> Tensor:
        n_axes = one.logit.ndim  # of the entries
        flat = [own.flatten(own.ndim - n_axes) for own in map(of, results)]
        if flat[0].ndim == 1:
            return torch.cat(flat)
        more = [own.new_full((n_places - len(own), own.shape[1]), padding) for own in flat]
        return torch.cat([torch.cat(pair) for pair in zip(flat, more, strict=True)], 1)

    names = [*_OF_ENTRY, *(_OF_RANKED if _is_ranked(one) else ())]
    tensors = {name: side_by_side(attrgetter(name)) for name in names}
    if _is_ranked(one):  # "index" is that of the prompt
        tensors[_ROW_INDEX] = side_by_side(attrgetter("index"), padding=-1)
    for name in one.beside:
        tensors[_BESIDE + name] = side_by_side(partial(_beside, name))
    if getattr(one, _MEANS, None) is not None:
        tensors[_MEANS] = torch.cat([getattr(result, _MEANS) for result in results], 1)
    return tensors


def _beside(name: str, result: Result) -> Tensor:
    return result.beside[name]


def _unpack(rest: dict[str, Any], tensors: dict[str, Tensor]) -> list[_Stored]:
    one_position = rest.pop("one_position")
    rest = unpack({}, rest)
    made: type[Result] = RankedAttribution if _ROW_INDEX in tensors else DirectLogitAttribution
    found = []
    start = 0
    per_prompt = ("index", "digest", "n_entries", "gap", "logit_gap")
    lines = zip(*(tensors.pop(name).tolist() for name in per_prompt), strict=True)
    means = tensors.pop(_MEANS, None)
    for number, (index, digest, n, gap, logit_gap) in enumerate(lines):
        numbers: dict[str, Any] = {"beside": {}}
        for name, every in tensors.items():
            own = every[..., start : start + n].clone()
            own = own if one_position else own.unsqueeze(-2)
            where = numbers["beside"] if name.startswith(_BESIDE) else numbers
            where["index" if name == _ROW_INDEX else name.removeprefix(_BESIDE)] = own
        if means is not None:
            numbers[_MEANS] = means[:, number : number + 1].clone()
        start += n
        result = made(**numbers, **rest, gap=gap, logit_gap=logit_gap)
        found.append((index, bytes(digest), result))
    return found


def _checksum(tensors: dict[str, Tensor], about: str) -> str:
    whole = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        whole.update(f"{name} {list(tensors[name].shape)}".encode())
        whole.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
