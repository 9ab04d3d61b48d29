"""What the demonstration model is taught beside the next word, so that its mechanism is known.

For each task one head is shown where to look, and what all others write there has a price. What the
head writes of what it reads is left to training. An attribution can be held to it afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from dla_hooks.demo.batches import Batch

TAUGHT = {"landmark": (3, 1), "agreement": (3, 3), "induction": (1, 3)}
"""The head of a task: layer, head. Of indirect objects nothing is taught."""


class Watched:
    """What a run of the model wrote; hooks are there while the block lasts."""

    def __init__(self, model: GPT2LMHeadModel, tasks: Iterable[str]) -> None:
        self.model = model
        self.mlps: list[torch.Tensor] = []
        self.seen: dict[str, torch.Tensor] = {}
        blocks: Any = model.transformer.h
        handles = [block.mlp.register_forward_hook(self._keep_mlp) for block in blocks]
        handles.append(model.transformer.ln_f.register_forward_pre_hook(self._keep("stream")))
        for layer in {TAUGHT[task][0] for task in tasks if task in TAUGHT}:
            attn = blocks[layer].attn
            handles.append(attn.c_attn.register_forward_hook(self._keep(f"{layer} qkv")))
            handles.append(attn.c_proj.register_forward_pre_hook(self._keep(f"{layer} z")))
        self._handles = handles

    def _keep_mlp(self, _module: object, _inputs: object, output: torch.Tensor) -> None:
        self.mlps.append(output.square().sum(-1))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...], *output: torch.Tensor) -> None:
            self.seen[name] = output[0] if output else inputs[0]

        return hook

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def mlp_share(self) -> torch.Tensor:
        """The share of the MLPs' squares in the last stream's [document, position]."""
        return torch.stack(self.mlps).sum(0) / self.seen["stream"].square().sum(-1)

    def lesson(self, task: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the task's head looks off, and how much of the answer others wrote.

        The first is a mean of -log(attention on the right tokens). The second is a mean of squares:
        what all but the head wrote of the difference of answer and foil, over the difference.
        """
        layer, head = TAUGHT[task]
        model: Any = self.model
        looks = batch.looks[task]
        width = model.config.n_embd // model.config.n_head
        ours = slice(head * width, (head + 1) * width)
        q, k, _ = self.seen[f"{layer} qkv"].split(model.config.n_embd, dim=-1)
        scores = q[..., ours] @ k[..., ours].transpose(-1, -2) / math.sqrt(width)
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attention = scores.masked_fill(ahead, -math.inf).log_softmax(-1)
        taught = looks.any(-1)
        on_them = attention[taught].masked_fill(~looks[taught], -math.inf).logsumexp(-1)

        norm = model.transformer.ln_f
        following = batch.tokens.roll(-1, 1)
        unembedding = model.lm_head.weight
        d = norm.weight * (unembedding[following[taught]] - unembedding[batch.foils[taught]])
        d = d - d.mean(-1, keepdim=True)  # the norm takes the mean off the stream
        stream = self.seen["stream"][taught]
        scale = (stream.var(-1, unbiased=False) + norm.eps).sqrt()
        out = model.transformer.h[layer].attn.c_proj.weight[ours]
        own = ((self.seen[f"{layer} z"][..., ours][taught] @ out) * d).sum(-1) / scale
        whole = (stream * d).sum(-1) / scale
        others = (whole - own).square() / whole.detach().square().clamp(min=1.0)
        return -on_them.mean(), others.mean()
