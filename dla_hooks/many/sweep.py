"""Attribution of many prompts: batches of them, one result for each."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from dla_hooks.errors import DLAError
from dla_hooks.many.begin import begin
from dla_hooks.results.ranked import Result
from dla_hooks.units import DEFAULT_UNIT, UnitName
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
    shard: tuple[int, int] | None = None,
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
        prompts: any iterable of strings, or of token ids [pos] (lists, arrays, tensors). Or of
            mappings with ``input_ids`` and ``position_ids`` or ``token_type_ids`` for that prompt:
            it then runs by itself.
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
        progress: show a bar; None shows it in a terminal or a notebook, where it takes long.
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
        shard: ``(i, n)`` runs every n-th prompt only, beginning with number i (from 0): the share
            of the i-th of n jobs over the same prompts. With ``resume`` each job has a folder of
            its own, ``shard-i-of-n`` in the one that is given; :func:`load_summary` merges them.

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
    return begin(
        model,
        prompts,
        answer_tokens,
        incorrect_tokens,
        options={
            "unit": unit,
            "pos": pos,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "check": check,
        },
        tokenizer=tokenizer,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
        window=window,
        progress=progress,
        resume=resume,
        chunk_size=chunk_size,
        tag=tag,
        shard=shard,
    ).results()
