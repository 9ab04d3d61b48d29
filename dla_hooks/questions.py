"""Questions put to a model by short made-up runs, so that no declaration need answer them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dla_hooks.hooks import Edit, Tap, edited, tapped
from dla_hooks.precision import full
from dla_hooks.stream import Stream, WriteSite
from dla_hooks.tokens import Prompt
from dla_hooks.walk import modules_of

_asked: WeakKeyDictionary[nn.Module, tuple[int, list[int | None]]] = WeakKeyDictionary()
_Answers = WeakKeyDictionary[nn.Module, tuple[int, dict[bool | None, bool]]]
_padding: _Answers = WeakKeyDictionary()
_chunks: _Answers = WeakKeyDictionary()
_lock = threading.Lock()


def stamp(model: nn.Module) -> int:
    """A number that moves when a weight is changed in place or replaced, or a hook comes or goes.

    So it does when another PEFT adapter is made the active one, which leaves the weights alone.

    Writing through ``.data`` escapes it; a call whose check then fails asks again.
    """
    seen: list[Any] = []
    for module in modules_of(model):
        # Tables that a model makes anew as it runs (rotary frequencies, say) are no weights.
        passing = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in passing and not tensor.is_meta:
                seen += tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
        # Hooks on hook points are not seen by a question: see `Kind.quiet`.
        # (What a module does not have is slow to ask of it, and quick of what it is made of.)
        if "fwd_hooks" not in vars(module):
            seen += (*module._forward_hooks, *module._forward_pre_hooks)
        if hasattr(type(module), "_disable_adapters") or "_disable_adapters" in vars(module):
            seen += str(module.active_adapters), module.disable_adapters
    return hash(tuple(seen))


def short_prompt(stream: Stream, batch: int = 1, length: int = 4) -> Prompt:
    """A few tokens from all over the vocabulary, the same ones each time."""
    length = min(length, stream.position_limit or length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = stream.kind.n_tokens()
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    return Prompt(ids, torch.ones_like(ids, dtype=torch.bool))


def mid_streams(stream: Stream) -> list[int | None]:
    """For each block: after how many of its writes the stream is read again, if it is.

    In a sequential block the MLP reads the stream after attention has written: 1. In a parallel
    one nothing reads it before the block's end: None. Asked once per model, by running a few
    tokens twice: the second time every block is given the input it had before, and every first
    write is disturbed. The mid stream ends before the first write that this changes.
    """
    now = stamp(stream.model)
    with _lock:
        kept = _asked.get(stream.model)
    if kept is not None and kept[0] == now:
        return kept[1]
    answer = _ask_mid_streams(stream)
    with _lock:
        _asked[stream.model] = now, answer
    return answer


def _ask_mid_streams(stream: Stream) -> list[int | None]:
    prompt = short_prompt(stream)
    inputs: dict[str, Tensor] = {}
    clean: dict[str, Tensor] = {}
    disturbed: dict[str, Tensor] = {}

    def keep(where: dict[str, Tensor], key: str) -> Callable[[Tensor, Tensor], None]:
        return lambda x, _: where.__setitem__(key, x.detach().double().cpu().clone())

    def writes(where: dict[str, Tensor]) -> list[Tap]:
        # What a write's module reads, not what it puts out: that may be zero, or mostly bias.
        return [Tap(w.module, w.name, keep(where, w.label), use=w.use) for w in stream.writes]

    before = [
        Tap(block.module, block.name, keep(inputs, block.name), True, block.use)
        for block in stream.blocks
    ]
    with tapped([*before, *writes(clean)]):
        stream.kind.ask(prompt, None)

    generator = torch.Generator().manual_seed(1)
    given: dict[nn.Module, list[Tensor]] = {}
    noises: dict[nn.Module, list[Tensor]] = {}
    for block in stream.blocks:
        as_before = inputs[block.name]
        noise = torch.randn(as_before.shape, generator=generator).double()
        noise *= as_before.square().mean().sqrt()
        given.setdefault(block.module, []).append(as_before)
        noises.setdefault(block.writes[0].written_by, []).append(noise)
    edits = [Edit(module, _in_turn(_replaced, uses), True) for module, uses in given.items()]
    edits += [Edit(module, _in_turn(_disturbed, uses)) for module, uses in noises.items()]
    # Taps on the way out come before the edits there, and so see what the model made.
    with tapped(writes(disturbed)), edited(edits):
        stream.kind.ask(prompt, None)

    def changed(write: WriteSite) -> bool:
        difference = disturbed[write.label] - clean[write.label]
        return bool(difference.norm() > 1e-3 * clean[write.label].norm())

    return [
        next((k for k, write in enumerate(block.writes) if k and changed(write)), None)
        for block in stream.blocks
    ]


def _in_turn(
    change: Callable[[Tensor, Tensor], Tensor], values: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """A change whose value is another one at each use of the module."""
    remaining = iter(values)
    return lambda x: change(x, next(remaining))


def _replaced(x: Tensor, by: Tensor) -> Tensor:
    return by.to(x, copy=True)


def _disturbed(out: Tensor, noise: Tensor) -> Tensor:
    return out + noise.reshape(out.shape).to(out)


def padding_is_ignored(stream: Stream, *, left: bool) -> bool:
    """Whether a prompt's logits are the same with padding on one side as they are without.

    Recurrent layers read the padding on the left, and some position tables count it. Asked once
    per model and side.
    """
    return _remembered(_padding, stream, left, lambda: _ask_padding(stream, left))


def _remembered(
    known: _Answers, stream: Stream, left: bool | None, ask: Callable[[], bool]
) -> bool:
    """The answer for a side, asked for once as long as the model stays as it is."""
    now = stamp(stream.model)
    with _lock:
        kept = known.get(stream.model)
        if kept is None or kept[0] != now:
            kept = known[stream.model] = now, {}
    answers = kept[1]
    if left not in answers:
        answers[left] = ask()
    return answers[left]


def _ask_padding(stream: Stream, left: bool) -> bool:
    alone = short_prompt(stream, length=3)
    padded = _padded(alone, left)
    with torch.no_grad():
        expected = stream.kind.ask(alone, torch.tensor([2])).double()
        found = stream.kind.ask(padded, torch.tensor([4 if left else 2])).double()
    return _alike(stream, expected, found)


def _padded(prompt: Prompt, left: bool) -> Prompt:
    padding = torch.zeros(len(prompt.input_ids), 2, dtype=torch.long)
    ids = [padding, prompt.input_ids] if left else [prompt.input_ids, padding]
    real = [padding.bool(), prompt.mask] if left else [prompt.mask, padding.bool()]
    return Prompt(torch.cat(ids, 1), torch.cat(real, 1))


def chunks_are_ignored(stream: Stream, *, left: bool | None) -> bool:
    """Whether a prompt that is run in chunks gives the logits that it gives at once.

    Some recurrent layers start anew with each chunk. Asked once per model and side.

    Args:
        stream: the located model.
        left: the side on which the prompt is padded, or None if it is not.

    Raises:
        UnsupportedModelError: for a model that has no cache to run chunks against.
    """
    return _remembered(_chunks, stream, left, lambda: _ask_chunks(stream, left))


@full
def _ask_chunks(stream: Stream, left: bool | None) -> bool:
    # Two rows, since one that is alone may be treated apart; where there is padding, one has it.
    prompt = short_prompt(stream, batch=2, length=17)
    n_padding = 0 if left is None else min(4, prompt.shape[1] - 1)
    mask = prompt.mask.clone()
    mask[0, :n_padding] = False
    prompt = Prompt(prompt.input_ids, mask)
    if left is False:  # the last of the columns where both rows have a token
        prompt = Prompt(prompt.input_ids.flip(-1), mask.flip(-1))
    width = prompt.shape[1]
    last = width - 1 - (n_padding if left is False else 0)
    # Several tokens and one alone, which some layers treat apart: of padding, at the start, on top
    # of others, and at the end.
    ends = sorted({*((2, 3) if n_padding > 3 else ()), (width + 1) // 2, width - 1, width})
    found, past, start = None, None, 0
    with torch.no_grad(), stream.kind.quiet():
        try:
            for stop in ends:
                if start >= stop:
                    return False  # a model for prompts so short has no use for chunks
                column = torch.tensor([last]) if start <= last < stop else None
                chunk = range(start, stop)
                logits, past = stream.kind.forward_chunk(prompt, chunk, column, past)
                if column is not None:
                    found = logits.double()
                start = stop
        finally:  # the last run, for models that keep a state of their own until the next
            expected = stream.kind.forward(prompt, torch.tensor([last])).double()
    assert found is not None
    return _alike(stream, expected, found)


def _alike(stream: Stream, expected: Tensor, found: Tensor) -> bool:
    finite = torch.isfinite(expected) & torch.isfinite(found)
    if not bool(torch.equal(torch.isfinite(expected), finite)):
        return False
    difference = (found - expected)[finite].norm()
    tolerance = 1e-4 + 8 * torch.finfo(stream.coarsest_dtype).eps
    return bool(difference <= tolerance * expected[finite].norm())
