"""What the primitives share: their arguments, and where a stack ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.calibration.sublayers import norm_before
from dla_hooks.call import Inputs, read_call
from dla_hooks.errors import InputError
from dla_hooks.modules.hooks import Place, Use
from dla_hooks.residual.stream import Stream
from dla_hooks.stacks.kept import Kept

Stack = Tensor | tuple[Tensor, list[str]]


def inputs_of(model: Any, input: Any, options: dict[str, Any]) -> Inputs:
    known = {"cache": None, "tokenizer": None, "attention_mask": None, "prepend_bos": None}
    unknown = set(options) - set(known)
    if unknown:
        raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
    return read_call(model, input, **{**known, **options}, purpose="a stack")


def layer_of(stream: Stream, layer: int | None, mlp_input: bool) -> int:
    last = len(stream.blocks)
    if layer is None or layer == -1:
        layer = last
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
        raise InputError(f"layer must be None, -1 or from 0 to {last}, got {layer!r}")
    if mlp_input and layer == last:
        raise InputError(f"mlp_input needs a layer below {last}: there is no MLP after the last")
    if mlp_input and mid_streams(stream)[layer] is None:
        raise InputError(f"block {layer} is parallel: its MLP reads what its attention reads")
    return layer


def before_mlp(stream: Stream, layer: int) -> list[Any]:
    if layer >= len(stream.blocks):
        return []
    return list(stream.blocks[layer].writes[: mid_streams(stream)[layer] or 0])


def stream_at(kept: Kept, layer: int) -> Any:
    blocks = kept.stream.blocks
    return kept.last_stream() if layer == len(blocks) else kept.block_input(blocks[layer])


def scale_at(kept: Kept, layer: int, mlp_input: bool) -> Any:
    """Keep the scale of the norm that reads the stream there; for a key."""
    stream = kept.stream
    if layer == len(stream.blocks):
        return kept.scale(stream.final_norm)
    module, name = norm_before(stream, layer, mlp=mlp_input)
    # It may run for queries, keys and values apart.
    return kept.scale(Place(module, name, Use(0, 0)))


def finish(stack: Tensor, labels: list[str], scale: Any, kept: Kept, return_labels: bool) -> Stack:
    if scale is not None:
        if kept.norm(scale).centred:
            stack = stack - stack.mean(-1, keepdim=True)
        stack = stack / kept[scale].to(stack)
    return (stack, labels) if return_labels else stack


def apply_final_norm(stream: Stream, stack: Tensor) -> Tensor:
    """The final norm itself on every vector of a stack, past any hooks on it."""
    flat = stack.reshape(-1, 1, stack.shape[-1])
    with torch.no_grad():
        normed: Tensor = stream.final_norm.module.forward(flat)
    return normed.reshape(stack.shape)
