"""What a run over many prompts begins with: its arguments are checked, its folder is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dla_hooks.backends import Backend
from dla_hooks.bars import check_progress
from dla_hooks.call import checked
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs import positions
from dla_hooks.inputs.prompts import check_tokenizer
from dla_hooks.inputs.rows_of_positions import PerRow, Span
from dla_hooks.many import fingerprint
from dla_hooks.many.batches import Runner
from dla_hooks.many.prompts import Reader
from dla_hooks.many.rows import Rows
from dla_hooks.many.store import Shards
from dla_hooks.many.work import Share, Work
from dla_hooks.modules.user_hooks import callers_changes
from dla_hooks.targets.question import require_answer
from dla_hooks.units import read_units


def begin(
    model: Any,
    prompts: Any,
    answer_tokens: Any,
    incorrect_tokens: Any = None,
    *,
    options: Mapping[str, Any],
    tokenizer: Any = None,
    prepend_bos: bool | None = None,
    max_tokens: int = 4096,
    window: int = 1024,
    progress: bool | None = None,
    resume: str | Path | None = None,
    chunk_size: int | None = None,
    tag: str | None = None,
    shard: Any = None,
    tried: bool = False,
) -> Work:
    """Check the arguments of :func:`dla_hooks.attribute_many`, and get ready to run.

    Args:
        options: ``unit``, ``pos``, ``center_unembed``, ``fold_value_biases`` and ``check``; they
            and all others are those of :func:`dla_hooks.attribute_many`.
        tried: whether the model was tried out with these options before, which is not done again.

    Raises:
        InputError: for arguments that no prompt could be attributed with.
        UnsupportedModelError: for a model or unit that cannot be attributed.
        CheckpointError: when the folder cannot be read or written.
    """
    unit, pos = options["unit"], options["pos"]
    units, single = read_units(unit)
    if not single:
        raise InputError(f"attribute_many takes one unit, got {len(units)}; call it for each")
    require_answer(answer_tokens)
    max_tokens, window = count("max_tokens", max_tokens), count("window", window)
    if chunk_size is not None:
        chunk_size = count("chunk_size", chunk_size)
    share = Share() if shard is None else Share.given(shard)
    folder = None if resume is None else _folder(resume)
    check_progress(progress)
    rows = Rows(prompts, {"answer_tokens": answer_tokens, "incorrect_tokens": incorrect_tokens})
    backend = checked(model)
    check_tokenizer(tokenizer)
    if isinstance(pos, PerRow) and rows.total not in (None, len(pos)):
        raise InputError(
            f"PerRow holds positions of {len(pos)} prompts, and there are {rows.total}; give one "
            "int, or one list, for each"
        )
    if backend.reads_two:
        raise UnsupportedModelError(
            f"attribute_many takes prompts of one text, and {backend.name} is an encoder-decoder; "
            "call a plan of prepare(...) for each prompt, or for each batch"
        )
    conventions = backend.conventions.given(
        center_unembed=options["center_unembed"], fold_value_biases=options["fold_value_biases"]
    )
    centred = conventions.center_unembed
    reader = Reader(backend, *backend.reads_with(tokenizer, prepend_bos), pos, centred)
    reader.read_for_all(rows)

    width = len(pos) if getattr(pos, "ndim", 0) == 1 else 0  # the width of a mask
    settled = {
        "unit": unit,
        "pos": pos if isinstance(pos, PerRow | Span) else positions.parse(pos, width),
        "center_unembed": conventions.center_unembed,
        "fold_value_biases": conventions.fold_value_biases,
        "check": bool(options["check"]),
    }
    shards = None
    if folder is not None:
        _check_tag(backend, tag)
        stamp = {
            "model": backend.name,
            "config": fingerprint.of_config(backend),
            "adapters": fingerprint.of_adapters(backend),
            "weights": fingerprint.of_weights(backend),
            **settled,
            "unit": fingerprint.of_unit(unit),
            # Positions of each prompt's own are held with the prompt.
            "pos": "PerRow" if isinstance(pos, PerRow) else repr(settled["pos"]),
            "tag": tag,
        }
        if shard is not None:
            folder, stamp = folder / share.name, {**stamp, "shard": [share.number, share.of]}
        shards = Shards(folder, stamp)
    runner = Runner(backend, {**settled, "chunk_size": chunk_size}, max_tokens)
    if not tried and (shards is None or shards.fresh):  # a resumed run was tried when it began
        runner.try_out(reader.trial(rows))
    return Work(rows, reader, runner, shards, window, progress, share)


def count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be an int of at least 1, got {value!r}")
    return value


def _check_tag(backend: Backend, tag: Any) -> None:
    """Refuse a folder for a model that more than its weights and settings makes what it is.

    Raises:
        InputError: for hooks, wrappers and the like of the caller's without a tag.
    """
    if tag is not None:
        if not isinstance(tag, str) or not tag:
            raise InputError(f"tag must be a string that is not empty, or None, got {tag!r:.80}")
        return
    for path, what in callers_changes(backend.model):
        one = what.split()[-3]
        raise InputError(
            f"{path or 'the model'} {what}, and a folder to resume cannot tell what it does: "
            f"results with another {one}, or with none, would be taken for these. Give tag=, a "
            "name of your own for what it does, or leave resume out."
        )


def _folder(resume: Any) -> Path:
    if not isinstance(resume, (str, os.PathLike)) or not os.fspath(resume):
        raise InputError(f"resume must be the path of a folder, or None, got {resume!r:.80}")
    return Path(resume)
