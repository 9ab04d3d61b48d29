"""The arguments that the primitives share, and where a stack ends."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.calibration.sublayers import norm_before
from dla_hooks.call import Inputs, read_call
from dla_hooks.errors import DecompositionError, HookError, InputError
from dla_hooks.inputs.extras import OF_TEXT
from dla_hooks.modules.faults import as_refusal
from dla_hooks.modules.user_hooks import refuse_second_run
from dla_hooks.modules.version import forget
from dla_hooks.residual.stream import Stream
from dla_hooks.stacks.kept import Kept

Stack = Tensor | tuple[Tensor, list[str]]
_Result = TypeVar("_Result")


def inputs_of(model: Any, input: Any, options: dict[str, Any]) -> Inputs:
    """Read a model, its prompt or cache, and the keyword arguments that go with them."""
    known = {"cache": None, "tokenizer": None, "attention_mask": None, "prepend_bos": None}
    unknown = set(options) - set(known)
    if unknown:
        raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
    given = {**known, **options}
    # Vectors are kept of one whole run, however long the prompt is.
    whole = sys.maxsize if given["cache"] is None else None
    return _of_what_runs(read_call(model, input, **given, purpose=None, chunk_size=whole))


def _of_what_runs(inputs: Inputs) -> Inputs:
    """Leave blocks with cross-attention out, where a prompt has nothing that they read."""
    stream, extras = inputs.stream, inputs.source.prompt.extras
    runs = tuple(block for block in stream.blocks if not block.optional)
    if len(runs) == len(stream.blocks) or extras.keys() - OF_TEXT:
        return inputs
    stream = dataclasses.replace(stream, blocks=runs)
    model = dataclasses.replace(inputs.model, stream=stream)
    return dataclasses.replace(inputs, model=model, source=inputs.source.on(stream))


def measured(
    model: Any, input: Any, options: dict[str, Any], measure: Callable[[Inputs], _Result]
) -> _Result:
    """Measure something of a model's run, twice if what is remembered of the model is out of date.

    Args:
        model: of any kind that :func:`dla_hooks.direct_logit_attribution` takes.
        input: as there.
        options: the keyword arguments of :func:`inputs_of`.
        measure: what to do with them; raises DecompositionError when something does not add up.
    """
    inputs = inputs_of(model, input, options)
    try:
        return measure(inputs)
    except (DecompositionError, HookError) as error:
        if not inputs.stream.remembered:
            raise
        forget(inputs.stream.model)  # it may have changed in a way that leaves no trace
        refuse_second_run(inputs.stream.model, error)
    return measure(inputs_of(model, input, options))


def place_of(stream: Stream, layer: int | None, mlp_input: bool) -> int:
    """Find the place in the stack of a layer, whose number is that of its labels.

    The two differ where some blocks of a model do not run. A layer that does not run leaves the
    stream as it is for the next one that does.

    Returns:
        An index into ``stream.blocks``, or their number for the last stream.
    """
    layers = [block.layer for block in stream.blocks]
    declared = stream.backend.root.get_submodule(stream.architecture.layers)
    last = max(layers[-1] + 1, len(list(declared.children())))
    if layer is None or layer == -1:
        layer = last
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
        raise InputError(f"layer must be None, -1 or from 0 to {last}, got {layer!r}")
    place = sum(one < layer for one in layers)
    if not mlp_input:
        return place
    if layer == last:
        raise InputError(f"mlp_input needs a layer below {last}: there is no MLP after the last")
    if layer not in layers:
        raise InputError(f"block {layer} does not run, so its MLP reads nothing; {layers} do")
    if mid_streams(stream)[place] is None:
        raise InputError(f"block {layer} is parallel: its MLP reads what its attention reads")
    return place


def stream_at(kept: Kept, place: int) -> Any:
    """Keep the stream before the block at a place, or the last stream; for a key."""
    blocks = kept.stream.blocks
    return kept.last_stream() if place == len(blocks) else kept.block_input(blocks[place])


def scale_at(kept: Kept, place: int, mlp_input: bool) -> Any:
    """Keep the scale of the norm that reads the stream there; for a key."""
    stream = kept.stream
    if place == len(stream.blocks):
        return kept.scale(stream.final_norm)
    return kept.scale(norm_before(stream, place, mlp=mlp_input))


def finish(stack: Tensor, labels: list[str], scale: Any, kept: Kept, return_labels: bool) -> Stack:
    """Normalise a stack by a scale that was kept, if any, and return it as the caller wants it."""
    if scale is not None:
        if kept.norm(scale).centred:
            stack = stack - stack.mean(-1, keepdim=True)
        stack = stack / kept[scale].to(stack)
    return (stack, labels) if return_labels else stack


def apply_final_norm(stream: Stream, stack: Tensor) -> Tensor:
    """The final norm itself on every vector of a stack, past any hooks on it."""
    flat = stack.reshape(-1, 1, stack.shape[-1])
    what = f"{stream.final_norm.name} cannot be run on the vectors of a stack, one at a time"
    with as_refusal(what), torch.no_grad():
        normed: Tensor = stream.final_norm.module.forward(flat)
    return normed.reshape(stack.shape)
