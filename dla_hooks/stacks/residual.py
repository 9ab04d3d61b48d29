"""The stream as a stack: what was written to it, and what it was before each block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.errors import InputError
from dla_hooks.residual.gains import both, later_gains, times
from dla_hooks.stacks.arguments import (
    Stack,
    apply_final_norm,
    finish,
    inputs_of,
    layer_of,
    scale_at,
)
from dla_hooks.stacks.kept import Kept


def decompose_resid(
    model: Any,
    input: Any = None,
    layer: int | None = None,
    mlp_input: bool = False,
    mode: str = "all",
    apply_ln: bool = False,
    pos_slice: Any = None,
    incl_embeds: bool = True,
    return_labels: bool = False,
    **options: Any,
) -> Stack:
    """What was written to the stream before block ``layer``, one vector per write.

    Args:
        model: of any kind that :func:`direct_logit_attribution` takes.
        input: as there; None with a ``cache``.
        layer: the block whose input is split; None, -1 or n_layers for the last stream.
        mlp_input: split what that block's MLP reads instead: its attention's write too.
        mode: "all", "mlp" or "attn": which writes.
        apply_ln: normalise by the norm that reads that stream.
        pos_slice: which positions; an int drops the axis.
        incl_embeds: with the embeddings.
        return_labels: also return the labels.
        **options: ``cache``, ``tokenizer``, ``attention_mask``, ``prepend_bos``, as in
            :func:`direct_logit_attribution`.

    Returns:
        [component, *batch_and_pos, d_model], or that and the labels.

    Raises:
        InputError: for an argument that cannot be used.
    """
    if mode not in ("all", "mlp", "attn"):
        raise InputError(f"mode must be 'all', 'mlp' or 'attn', got {mode!r}")
    inputs = inputs_of(model, input, options)
    stream = inputs.stream
    end = layer_of(stream, layer, mlp_input)
    kept = Kept.of(inputs, pos_slice)
    gains = later_gains(stream, end)
    plan: list[tuple[str, Any, Tensor | None]] = []
    start = kept.block_input(stream.blocks[0]) if incl_embeds or not stream.writes else None
    where = kept.positions() if incl_embeds and stream.positions is not None else None
    for block in stream.blocks[: end + mlp_input]:
        n_before = mid_streams(stream)[end] if block.layer == end else None
        for write in block.writes[:n_before]:
            attention = write.label.endswith("_attn_out")
            if mode == "all" or attention == (mode == "attn"):
                later = None if block.layer == end else gains[block.layer + 1]
                plan.append((write.label, kept.write(write), both(write.response, later)))
    scale = scale_at(kept, end, mlp_input) if apply_ln else None
    kept.run()

    labels, rows = [], []
    if start is not None and incl_embeds:
        whole = times(kept[start], gains[0])
        labels.append("embed")
        if where is not None:
            positions = times(kept[where], both(stream.positions_response, gains[0]))
            rows += [whole - positions, positions]
            labels.append("pos_embed")
        else:
            rows.append(whole)
    for label, key, factor in plan:
        labels.append(label)
        rows.append(times(kept[key], factor))
    if not rows:
        raise InputError(f"nothing of mode={mode!r} was written before layer {end}")
    stack = torch.stack(rows)
    return finish(stack, labels, scale, kept, return_labels)


def accumulated_resid(
    model: Any,
    input: Any = None,
    layer: int | None = None,
    incl_mid: bool = False,
    apply_ln: bool = False,
    pos_slice: Any = None,
    mlp_input: bool = False,
    return_labels: bool = False,
    **options: Any,
) -> Stack:
    """The stream before each block up to ``layer``, as a logit lens reads it.

    Args:
        model: as in :func:`decompose_resid`.
        input: as there.
        layer: the last block whose input is taken; None, -1 or n_layers go to the last stream.
        incl_mid: also the stream between attention and MLP; parallel blocks have none.
        apply_ln: normalise all by the norm of the end of the stack; at the last stream the final
            norm is applied to each entry anew, gain and bias included.
        pos_slice: which positions; an int drops the axis.
        mlp_input: end with what the MLP of ``layer`` reads.
        return_labels: also return the labels.
        **options: as in :func:`decompose_resid`.

    Returns:
        [component, *batch_and_pos, d_model], or that and the labels.
    """
    inputs = inputs_of(model, input, options)
    stream = inputs.stream
    end = layer_of(stream, layer, mlp_input)
    kept = Kept.of(inputs, pos_slice)
    mids = mid_streams(stream)
    plan: list[tuple[str, Any, list[tuple[Any, Tensor | None]]]] = []
    for block in stream.blocks[: end + 1]:
        start = kept.block_input(block)
        plan.append((f"{block.layer}_pre", start, []))
        n_before = mids[block.layer]
        wanted = incl_mid if block.layer < end else mlp_input
        if wanted and n_before is not None:
            writes = [(kept.write(w), w.response) for w in block.writes[:n_before]]
            plan.append((f"{block.layer}_mid", start, writes))
    last = len(stream.blocks)
    if end == last:
        plan.append(("final_post", kept.last_stream(), []))
    scale = scale_at(kept, end, mlp_input) if apply_ln and end < last else None
    kept.run()

    rows = []
    for _, start, writes in plan:
        x = kept[start]
        for key, response in writes:
            x = x + times(kept[key], response)
        rows.append(x)
    stack = torch.stack(rows)
    if apply_ln and end == last:
        stack = apply_final_norm(stream, stack)
    return finish(stack, [label for label, *_ in plan], scale, kept, return_labels)
