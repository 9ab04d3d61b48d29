"""A folder that keeps the finished results of a run over many prompts.

    folder/run.json                              options and model of the run
    folder/finished.json                         written at its end: how many prompts there were
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import CheckpointError, InputError
from dla_hooks.many.packed import Stored, pack, unpack_all
from dla_hooks.results.ranked import Result

_FORMAT = "dla_hooks.many"
_VERSION = 1
RUN, FINISHED = "run.json", "finished.json"
SHARD = re.compile(r"(\d{9,})-(\d{9,})\.safetensors")
_UNFINISHED = ".unfinished"
_ABANDONED = 24 * 60 * 60
"""Seconds after which an unfinished file counts as abandoned."""


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
        run = self.folder / RUN
        content: Any = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self.fresh = not run.exists()
            others = (path for path in self.folder.iterdir() if path.suffix != _UNFINISHED)
            if self.fresh and any(others):
                raise InputError(
                    f"{self.folder} holds other files and no {RUN}; resume takes a new folder, "
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
            self._put(RUN, lambda path: path.write_text(json.dumps(content, indent=1)))
        else:
            self._compare(content, stamp)
        self._ahead: dict[str, list[Stored]] = {}  # already read, for later windows
        self._ranges = sorted(
            (int(match[1]), int(match[2]), match[0])
            for match in map(SHARD.fullmatch, (path.name for path in self.folder.iterdir()))
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
        ahead: dict[str, list[Stored]] = {}
        for start, end, name in self._ranges:
            if start <= last and end >= first:
                stored = self._ahead.pop(name, None)
                if stored is None:
                    stored = _read(self.folder / name)
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
        (self.folder / FINISHED).unlink(missing_ok=True)  # a longer list of prompts goes on
        done = sorted(done, key=lambda one: one[0])
        tensors, rest = pack(done)
        header = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "results": (about := json.dumps(rest)),
            "sha256": _checksum(tensors, about),
        }
        name = f"{done[0][0]:09d}-{done[-1][0]:09d}.safetensors"
        self._put(name, lambda path: save_file(tensors, str(path), metadata=header))

    def finish(self, n: int, n_failed: int) -> None:
        """Say that the run came to its end: how many prompts it had, and how many failed.

        Raises:
            CheckpointError: when it cannot be written.
        """
        said = json.dumps({"prompts": n, "failed": n_failed})
        self._put(FINISHED, lambda path: path.write_text(said))

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
            raise InputError(f"{self.folder / RUN} is not of a run over many prompts")
        version = content.get("version")
        if not isinstance(version, int) or version > _VERSION:
            raise InputError(
                f"{self.folder} was begun by a newer dla_hooks (format {version}, this one reads "
                f"up to {_VERSION}); upgrade to resume it"
            )
        kept = content.get("run")
        if not isinstance(kept, dict):
            raise CheckpointError(
                f"{self.folder / RUN} is damaged: its 'run' is no object, but {kept!r:.80}; "
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


def read_results(path: Path) -> list[Result]:
    """The results of one file of a folder, in the order of their prompts.

    Raises:
        CheckpointError: when it is damaged.
    """
    return [result for _, _, result in _read(path)]


def _read(path: Path) -> list[Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        # Older versions of safetensors read to the caller's default device.
        with torch.device("cpu"), safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("sha256") != _checksum(tensors, header.get("results", "")):
            raise ValueError("it does not hold what was written")
        return unpack_all(json.loads(header["results"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete this file, and its "
            "prompts will be run again"
        ) from None


def _checksum(tensors: dict[str, Tensor], about: str) -> str:
    whole = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        whole.update(f"{name} {list(tensors[name].shape)}".encode())
        whole.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
