"""A look at attention as torch computes it: how many heads there are, and what each one changes.

Attention ends in a call of ``softmax`` or of ``scaled_dot_product_attention``, whatever the model
calls its own modules. Both are seen here, in the present thread only, without any change to the
model: a mode of torch's stands between the model's code and these two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Change = Callable[[Tensor, int], Tensor]
"""From what attention computed [batch, head, query, …] and its number of heads to what is used."""

_NAMES = frozenset({"softmax", "scaled_dot_product_attention"})


class AttentionCalls(TorchFunctionMode):
    """Sees each call of an attention function for the length of a ``with`` block.

    Args:
        batch: rows of the run.
        length: tokens of each row.
        change: what to make of the result of each call.
        inside: whether the call is one of attention, as far as the caller can say.
    """

    def __init__(self, batch: int, length: int, change: Change, inside: Callable[[], bool]) -> None:
        super().__init__()
        self._batch, self._length = batch, length
        self._change, self._inside = change, inside

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and change what it returns where that is attention's."""
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _NAMES or not self._inside():
            return out
        # [batch, head, query, …] or [batch * head, query, …]; other uses of softmax (a router's)
        # have fewer axes.
        if not isinstance(out, Tensor) or out.ndim < 3 or out.shape[-2] < self._length:
            return out
        lead = out.shape[:-2]
        if lead[0] % self._batch or not out.numel():
            return out
        by_head = out.reshape(self._batch, -1, *out.shape[-2:])
        return self._change(by_head, by_head.shape[1]).reshape(out.shape).to(out)


def scaled_heads(out: Tensor, factors: Tensor) -> Tensor:
    """Multiply each head of each row by a number of its own, ``factors`` [batch, head]."""
    return out * factors[:, :, None, None].to(out)


def disturbed_heads(out: Tensor) -> Tensor:
    """In row h + 1, change what head h holds entry by entry; the other heads stay as they are."""
    generator = torch.Generator().manual_seed(6)
    shape = out.shape[2:]
    noise = 1.25 + 0.5 * torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64)
    changed = out.clone()
    heads = torch.arange(min(out.shape[1], out.shape[0] - 1), device=out.device)
    changed[heads + 1, heads] *= noise.to(out)
    return changed
