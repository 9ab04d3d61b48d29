"""A run of the model, whole or in pieces.

A long prompt may be run in pieces, each against the model's own cache of what came before it.
Activation memory then grows with the piece, and only the cache with the prompt. The numbers are
those of one whole run where the model computes the same either way; a short run measures that.

Decided here: how long a piece is (:func:`chunk_size_for`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dla_hooks.backends import Backend
from dla_hooks.bars import over_pieces
from dla_hooks.calibration.invariance import chunks_are_ignored, has_hole, length_limits
from dla_hooks.errors import InputError, UnsupportedModelError, warn
from dla_hooks.inputs.extras import EMBEDS
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.hooks import Call, Place, Tap, tapped
from dla_hooks.modules.runs import ended_at
from dla_hooks.modules.user_hooks import callers_hooks
from dla_hooks.modules.weights import is_sharded
from dla_hooks.projection.tiles import View
from dla_hooks.residual.hooked import places_hooked
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.as_run import as_run
from dla_hooks.sources.base import Source
from dla_hooks.sources.media import texts_of
from dla_hooks.sources.prompt import refusing_length

LONG_PROMPT = 8192
"""Prompts of more tokens than this are run in chunks, unless the caller says otherwise."""
AUTOMATIC_CHUNK = 2048
"""Tokens in each of these chunks."""


class Live(Source):
    """One forward pass of a model.

    Args:
        stream: the located model.
        prompt: the batch.
        chunk_size: columns that are run together; None is all at once.
    """

    def __init__(self, stream: Stream, prompt: Prompt, chunk_size: int | None = None) -> None:
        if stream.backend.reads_two and prompt.encoder is None:
            raise InputError(f"nothing is given that the encoder of {stream.backend.name} reads")
        self.prompt = prompt
        self._stream, self._chunk_size = stream, chunk_size

    def on(self, stream: Stream) -> Live:
        """The same run, of a model that was measured anew."""
        return Live(stream, self.prompt, self._chunk_size)

    def at_once(self) -> Live:
        """The same run in one piece."""
        return Live(self._stream, self.prompt)

    def show(
        self,
        view: View,
        taps: Callable[[View], list[Tap]],
        columns: Tensor | None,
        until: Place | None = None,
        before: Callable[[View], list[Tap]] | None = None,
    ) -> Tensor | None:
        """Run the model with taps on it; one that is brought piece by piece runs to its end."""
        logits, width = [], self.prompt.shape[1]
        if until is not None and runs_whole(self._stream.model):
            until = None
        pieces = chunks(self._stream.backend, self.prompt, columns, self._chunk_size)
        for chunk, run in over_pieces(pieces, -(-width // (self._chunk_size or width))):
            piece = view.part(chunk.start, chunk.stop)
            make = taps if piece is view or len(piece) else before
            looks = make(piece) if make else []
            if self.prompt.extras or places_hooked(self._stream):
                check = partial(self._check_width, chunk)
                places = filter(None, (self._stream.last, self._stream.positions))
                looks = [*(Tap(place, check, optional=True) for place in places), *looks]
            with (
                tapped(as_run(self._stream, looks)) as taken,
                refusing_length(self._stream, self.prompt),
                ended_at(until, taken) if until and chunk.stop == width else nullcontext(),
            ):
                logits.append(run())
        if columns is None:
            return None
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def _check_width(self, chunk: range, call: Call) -> None:
        """Refuse a stream of other positions than the prompt's, as where one token is an image.

        Raises:
            UnsupportedModelError: with both numbers.
        """
        shape, stream = call.activation.shape, self._stream
        ahead = 0 if chunk.start else stream.ahead
        if shape[:-1].numel() in [n * (ahead + len(chunk)) for n in (1, self.prompt.shape[0])]:
            return  # positions may be shared by the rows
        makes = f"a stream of shape {list(shape)} for {list(self.prompt.shape)} ids"
        hooked = places_hooked(stream)
        if hooked and not self.prompt.extras:
            raise UnsupportedModelError(
                f"a hook of yours on {hooked} makes other positions than the prompt has: {makes}, "
                "as with a soft prompt put before the tokens. Which position is which cannot be "
                "told. Take the hook off, and give the embeddings themselves, one for each "
                'position: {"inputs_embeds": ...} as input'
            )
        raise UnsupportedModelError(
            f"{stream.backend.name} makes other positions of this input than its ids have: "
            f"{makes}. Which position is which cannot be told; give one placeholder id for each "
            "position"
        )

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The tokens of every row, as text; see :func:`dla_hooks.sources.media.texts_of`."""
        reads_apart = self._stream.architecture.reads is not None  # no position is a patch
        config = None if reads_apart else getattr(self._stream.backend.root, "config", None)
        return texts_of(self.prompt, tokenizer, config)


def runs_whole(model: torch.nn.Module) -> bool:
    """Tell whether a pass must not be ended early: weights are brought and taken away in it."""
    return any(
        hasattr(module, "_hf_hook") or any(map(is_sharded, module._parameters.values()))
        for module in model.modules()
    )


def chunks(
    backend: Backend, prompt: Prompt, columns: Tensor | None, size: int | None
) -> Iterator[tuple[range, Callable[[], Tensor]]]:
    """The runs that make up one forward pass: the columns of each, and the run itself.

    Args:
        backend: how the model is run.
        prompt: the batch.
        columns: where logits are wanted, or None for the least that the model can do.
        size: columns of each chunk; None is all at once.

    Yields:
        A range of columns, and a function that runs them and returns the logits that are wanted
        there [batch, n, vocabulary]; it must be called before the next is asked for.
    """
    width = prompt.shape[1]
    if size is None or size >= width:
        yield range(width), lambda: backend.forward(prompt, columns)
        return
    past: Any = None

    def run(chunk: range) -> Tensor:
        nonlocal past
        wanted = None
        if columns is not None:
            inside = columns[(columns >= chunk.start) & (columns < chunk.stop)]
            wanted = inside if len(inside) else None
        logits, past = backend.forward_chunk(prompt, chunk, wanted, past)
        return logits if wanted is not None else logits[:, :0]

    for start in range(0, width, size):
        chunk = range(start, min(start + size, width))
        yield chunk, partial(run, chunk)


def chunk_size_for(stream: Stream, prompt: Prompt, chunk_size: Any) -> int | None:
    """Decide the size of the chunks that a prompt is run in, or None for all at once.

    A long prompt that cannot be run in chunks on its own account is run at once, with a
    :class:`DLAWarning` that says why.

    Args:
        stream: the located model.
        prompt: the batch.
        chunk_size: the caller's own; None chooses by the prompt's length. Then the model must allow
            it, and carry no hooks of the caller's, which would see the chunks.

    Raises:
        InputError: for what is no positive number.
        UnsupportedModelError: when chunks were asked for, but would change the model's numbers.
    """
    width = prompt.shape[1]
    if chunk_size is None:
        if width <= LONG_PROMPT:
            return None
        reason = _is_hooked(stream) or why_not_in_chunks(stream, prompt)
        if reason is None:
            return AUTOMATIC_CHUNK
        warn(
            f"this prompt of {width} tokens runs at once instead of in chunks of "
            f"{AUTOMATIC_CHUNK}, so activation memory grows with it: {reason}. Pass "
            f"chunk_size={width} to run it so without this warning."
        )
        return None
    size = _as_size(chunk_size)
    if size >= width:
        return None
    reason = why_not_in_chunks(stream, prompt)
    if reason is not None:
        raise UnsupportedModelError(
            f"{stream.backend.name} cannot be run in chunks of a prompt: {reason}. Leave "
            "chunk_size out, or give one that is no smaller than the prompt, to run it all at once."
        )
    if _is_hooked(stream) is not None:
        warn(
            "with chunk_size a hook of yours sees each chunk by itself, as a wrapper of yours "
            "does: a position that it names "
            "is counted anew in each one. The numbers are those of the model as it then runs. "
            "Leave chunk_size out for a hook that names a position."
        )
    return size


def _as_size(chunk_size: Any) -> int:
    try:
        size = 0 if isinstance(chunk_size, bool) else operator.index(chunk_size)
    except TypeError:
        size = 0
    if size < 1:
        raise InputError(
            "chunk_size must be a positive number of tokens, or None to leave it to the prompt's "
            f"length; got {chunk_size!r}"
        )
    return size


def why_not_in_chunks(stream: Stream, prompt: Prompt) -> str | None:
    """The reason why chunks would give other numbers than the whole prompt, or None."""
    uncut = sorted(set(prompt.extras) - {EMBEDS})
    if uncut:
        return f"its input holds {', '.join(uncut)}, which cannot be cut into chunks"
    rotary = length_limits(stream).rotary_beyond(prompt.shape[1])
    if rotary is not None:
        return (
            f"its rotary positions ({rotary}) depend on how long a prompt is, and this one is "
            f"longer ({prompt.shape[1]} tokens) than the model was first trained for"
        )
    if prompt.padded and bool(has_hole(prompt.mask).any()):
        return "tokens in its middle are masked, and only masks at its ends are measured for chunks"
    ends = ((True, prompt.mask[:, 0]), (False, prompt.mask[:, -1]))
    left: list[bool | None] = [left for left, end in ends if not bool(end.all())]
    try:
        ignored = all(chunks_are_ignored(stream, left=side) for side in (left or [None]))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model that is not made for it may fail in any way
        return str(error)
    if not ignored:
        where = "" if not left else " (padded as this one is)"
        return (
            f"a short prompt{where} gives other logits in chunks than at once, as where recurrent "
            "layers start anew with each chunk"
        )
    return None


def _is_hooked(stream: Stream) -> str | None:
    """The reason why the caller's hooks rule out chunks that nobody asked for, or None.

    Hooks and wrappers may not expect a prompt in pieces. Those of libraries are part of the model:
    a short run in chunks checks them together with it.
    """
    path, wrapper = (
        next(callers_hooks(stream.model), None),
        next(iter(stream.backend.wrappers), None),
    )
    if path is None and wrapper is None:
        return None
    if path is not None:
        what = f"{path or 'the model'} has a hook of yours"
    else:
        what = f"{type(wrapper).__name__} is a wrapper of yours"
    return (
        f"{what}, which would see each chunk by itself; pass chunk_size={AUTOMATIC_CHUNK} where it "
        "may"
    )
