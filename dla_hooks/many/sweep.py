"""Attribution of many prompts: batches of them, one result for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

from tqdm.auto import tqdm

from dla_hooks.backends import Backend
from dla_hooks.call import checked
from dla_hooks.errors import DLAError, InputError, UnsupportedModelError
from dla_hooks.inputs import positions
from dla_hooks.inputs.prompts import check_tokenizer
from dla_hooks.inputs.rows_of_positions import PerRow, Span
from dla_hooks.many import fingerprint
from dla_hooks.many.batches import Runner, freed
from dla_hooks.many.names import Names
from dla_hooks.many.prompts import Reader
from dla_hooks.many.rows import Row, Rows
from dla_hooks.many.store import Shards
from dla_hooks.modules.user_hooks import callers_hooks
from dla_hooks.results.ranked import Result
from dla_hooks.targets.question import require_answer
from dla_hooks.units import DEFAULT_UNIT, UnitName, read_units
from dla_hooks.units.base import Unit


def attribute_many(
    model: Any,
    prompts: Any,
    answer_tokens: Any,
    incorrect_tokens: Any = None,
    *,
    unit: UnitName | Unit = DEFAULT_UNIT,
    pos: Any = -1,
    tokenizer: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    check: bool = True,
    max_tokens: int = 4096,
    window: int = 1024,
    progress: bool | None = None,
    resume: str | Path | None = None,
    chunk_size: int | None = None,
    tag: str | None = None,
) -> Generator[Result | DLAError, None, None]:
    """Attribute many prompts: one result for each, in the order that they come in.

    Prompts are read a window at a time, sorted by length, and run in batches that are padded on
    the left. Where a model reads its padding (recurrent layers, some position tables), or carries
    hooks of yours, prompts of one length run together. Each result is that of its prompt run
    alone, up to rounding, on the CPU. Memory holds one window of prompts and results, however
    many there are.

    A prompt that fails (empty, too long, an answer of several tokens, …) does not stop the rest:
    its error is yielded in the place of its result, with ``prompt_index`` set. A batch that fails
    as a whole, or runs out of memory, is halved until the prompt at fault stands alone.

    Args:
        model: as for :func:`direct_logit_attribution`.
        prompts: any iterable of strings, or of token ids [pos] (lists, arrays, tensors).
        answer_tokens: one token for all prompts (a string or an id), or an iterable with one
            answer for each prompt: a string, an id, or with several positions a list or tensor
            of one id for each selected position. Or one of the other questions that
            :func:`direct_logit_attribution` takes, for all prompts or in an iterable with one for
            each; ``Each`` and ``Continuation`` may hold one line for each prompt themselves.
        incorrect_tokens: the same, or None; the results are then of
            ``logit[answer] - logit[incorrect]``.
        unit: into which rows, as for :func:`direct_logit_attribution`; one unit only.
        pos: which positions of each prompt, as for :func:`direct_logit_attribution`. ``PerRow``
            holds those of all prompts, as a column of a table does.
        tokenizer: for strings, unless the model carries one.
        prepend_bos: for strings, as for :func:`direct_logit_attribution`; so are the next three.
        center_unembed: take the vocabulary's mean off every row of W_U.
        fold_value_biases: move each head's constant part to the remainder.
        check: hold every batch against the model's own logits.
        max_tokens: the most tokens in a batch, padding counted; a longer prompt runs alone.
        window: how many prompts are read, sorted and run before their results are yielded.
        progress: show a bar; None shows it where stderr is a terminal.
        resume: a folder where finished results are kept, after each window and when interrupted.
            A later call with the same arguments yields those without running the model and goes
            on with the rest; prompts that failed are tried again. ``max_tokens``, ``window``,
            ``progress`` and ``chunk_size`` may differ. With hooks of yours on the model it needs a
            ``tag``.
        chunk_size: run each batch so many tokens at a time, as for
            :func:`direct_logit_attribution`: activation memory grows with it and not with the
            prompts, and the numbers are the same.
        tag: a name of your own for what ``resume`` cannot compare, as what your hooks do. A folder
            that was begun under another tag, or under none, is refused.

    Returns:
        A generator of one result per prompt, as of :func:`direct_logit_attribution`: its
        ``attribution`` is [component, 1] for a single position and [component, 1, pos'] otherwise.
        Of a prompt that failed it gives the :class:`DLAError`. ``gap`` and ``logit_gap`` are the
        largest of the batch that the prompt ran in.

    Raises:
        InputError: at once, for arguments that no prompt could be attributed with, and for a
            ``resume`` folder of another run; while it runs, when there are not as many answers as
            prompts, or the folder's prompts were others.
        UnsupportedModelError: at once, for a model or unit that cannot be attributed.
        Exception: whatever the prompts' source raises, after the results of what it gave before.
        CheckpointError: when the folder cannot be read or written.
    """
    units, single = read_units(unit)
    if not single:
        raise InputError(f"attribute_many takes one unit, got {len(units)}; call it for each")
    require_answer(answer_tokens)
    max_tokens, window = _count("max_tokens", max_tokens), _count("window", window)
    if chunk_size is not None:
        chunk_size = _count("chunk_size", chunk_size)
    folder = None if resume is None else _folder(resume)
    if not isinstance(progress, (bool, NoneType)):
        raise InputError(f"progress must be True, False or None, got {progress!r}")
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
        center_unembed=center_unembed, fold_value_biases=fold_value_biases
    )
    centred = conventions.center_unembed
    reader = Reader(backend, *backend.reads_with(tokenizer, prepend_bos), pos, centred)
    reader.read_for_all(rows)

    width = len(pos) if getattr(pos, "ndim", 0) == 1 else 0  # the width of a mask
    options = {
        "unit": unit,
        "pos": pos if isinstance(pos, PerRow | Span) else positions.parse(pos, width),
        "center_unembed": conventions.center_unembed,
        "fold_value_biases": conventions.fold_value_biases,
        "check": bool(check),
    }
    shards = None
    if folder is not None:
        _check_tag(backend, tag)
        stamp = {
            "model": backend.name,
            "config": fingerprint.of_config(backend),
            "adapters": fingerprint.of_adapters(backend),
            "weights": fingerprint.of_weights(backend),
            **options,
            "unit": unit if isinstance(unit, str) else repr(unit),
            # Positions of each prompt's own are held with the prompt.
            "pos": "PerRow" if isinstance(pos, PerRow) else repr(options["pos"]),
            "tag": tag,
        }
        shards = Shards(folder, stamp)
    runner = Runner(backend, {**options, "chunk_size": chunk_size}, max_tokens)
    if shards is None or shards.fresh:  # a resumed run was tried out when it began
        runner.try_out(reader.trial(rows))
    return _results(rows, reader, runner, shards, window, progress)


def _results(
    rows: Rows,
    reader: Reader,
    runner: Runner,
    shards: Shards | None,
    window: int,
    progress: bool | None,
) -> Generator[Result | DLAError, None, None]:
    names = Names(reader.tokenizer, reader.backend.answer_tokenizer(reader.tokenizer))
    unread = iter(rows)
    hidden = None if progress is None else not progress  # None: only at a terminal
    with tqdm(total=rows.total, unit="prompt", disable=hidden) as bar:
        failure: Exception | None = None
        while failure is None:
            batch, failure = _read(unread, window)
            if not batch:
                break
            outcomes = _of_window(batch, reader, runner, shards, names, bar.update)
            for index in sorted(outcomes):
                yield outcomes.pop(index)
    if failure is not None:
        raise failure
    if rows.mismatch is not None:
        raise rows.mismatch


def _read(unread: Iterator[Row], count: int) -> tuple[list[Row], Exception | None]:
    """Read the next rows. Also return an error of their source; rows before it still run."""
    batch: list[Row] = []
    try:
        for row in islice(unread, count):
            batch.append(row)
    except Exception as error:
        return batch, error
    return batch, None


def _of_window(
    batch: Sequence[Row],
    reader: Reader,
    runner: Runner,
    shards: Shards | None,
    names: Names,
    count: Callable[[int], Any],
) -> dict[int, Result | DLAError]:
    """Return the outcome of every prompt of a window, by index, after storing them."""
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
                    f"prompt {row.index} or its answer is not the one whose result is stored in "
                    "the folder to resume; give the same prompts and answers, or another folder"
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


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be an int of at least 1, got {value!r}")
    return value


def _check_tag(backend: Backend, tag: Any) -> None:
    """Refuse a folder for a model that more than its weights and settings makes what it is.

    Raises:
        InputError: for hooks of the caller's without a tag.
    """
    if tag is not None:
        if not isinstance(tag, str) or not tag:
            raise InputError(f"tag must be a string that is not empty, or None, got {tag!r:.80}")
        return
    path = next(callers_hooks(backend.model), None)
    if path is not None:
        raise InputError(
            f"{path or 'the model'} has a hook of yours, and a folder to resume cannot tell what "
            "it does: results with other hooks, or with none, would be taken for these. Give "
            "tag=, a name of your own for what the hooks do, or leave resume out."
        )


def _folder(resume: Any) -> Path:
    if not isinstance(resume, (str, os.PathLike)) or not os.fspath(resume):
        raise InputError(f"resume must be the path of a folder, or None, got {resume!r:.80}")
    return Path(resume)
