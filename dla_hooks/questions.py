"""Questions put to a model by short made-up runs, so that no declaration need answer them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dla_hooks.hooks import Edit, Tap, edited, tapped
from dla_hooks.locate import Stream
from dla_hooks.run import run_model
from dla_hooks.tokens import Prompt

_asked: WeakKeyDictionary[nn.Module, list[bool]] = WeakKeyDictionary()
_lock = threading.Lock()


def short_prompt(stream: Stream, batch: int = 1, length: int = 4) -> Prompt:
    """A few tokens from all over the vocabulary, the same ones each time."""
    length = min(length, stream.position_limit or length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = stream.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    return Prompt(ids, torch.ones_like(ids, dtype=torch.bool))


def mlp_reads_mid(stream: Stream) -> list[bool]:
    """For each block: does its second write depend on its first?

    It does in a sequential block, where the MLP reads the stream after attention has written, and
    does not in a parallel one. Asked once per model, by running a few tokens twice: the second
    time every block is given the input it had before, and every first write is disturbed.
    """
    with _lock:
        known = _asked.get(stream.model)
    if known is None:
        known = _ask_mlp_reads_mid(stream)
        with _lock:
            _asked[stream.model] = known
    return known


def _ask_mlp_reads_mid(stream: Stream) -> list[bool]:
    pairs = [
        (block, block.writes[0].written_by, block.writes[1].written_by)
        for block in stream.blocks
        if len(block.writes) > 1
    ]
    prompt = short_prompt(stream)
    inputs: dict[int, Tensor] = {}
    clean: dict[int, Tensor] = {}
    disturbed: dict[int, Tensor] = {}

    def keep(where: dict[int, Tensor], key: int) -> Callable[[Tensor, Tensor], None]:
        return lambda _, out: where.__setitem__(key, out.detach().double().cpu().clone())

    def seconds(where: dict[int, Tensor]) -> list[Tap]:
        return [Tap(second, block.name, keep(where, id(block))) for block, _, second in pairs]

    before = [Tap(block.module, block.name, keep(inputs, id(block)), True) for block, _, _ in pairs]
    with tapped([*before, *seconds(clean)]):
        run_model(stream.model, prompt, None)

    generator = torch.Generator().manual_seed(1)
    edits = []
    for block, first, _ in pairs:
        as_before = inputs[id(block)]
        noise = torch.randn(as_before.shape, generator=generator).double()
        noise *= as_before.square().mean().sqrt()
        edits.append(Edit(block.module, partial(_replaced, by=as_before), at_input=True))
        edits.append(Edit(first, partial(_disturbed, noise=noise)))
    with edited(edits), tapped(seconds(disturbed)):
        run_model(stream.model, prompt, None)

    depends = {
        key: bool((disturbed[key] - out).norm() > 0.01 * out.norm()) for key, out in clean.items()
    }
    return [depends.get(id(block), False) for block in stream.blocks]


def _replaced(x: Tensor, by: Tensor) -> Tensor:
    return by.to(x)


def _disturbed(out: Tensor, noise: Tensor) -> Tensor:
    return out + noise.reshape(out.shape).to(out)
