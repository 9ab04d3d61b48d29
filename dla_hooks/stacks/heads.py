"""What every attention head wrote to the stream."""

from __future__ import annotations

from typing import Any

import torch

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.linear import matrix
from dla_hooks.residual.gains import both, later_gains, times
from dla_hooks.stacks.arguments import Stack, finish, inputs_of, layer_of, scale_at, stream_at
from dla_hooks.stacks.kept import Kept


def stack_head_results(
    model: Any,
    input: Any = None,
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: Any = None,
    apply_ln: bool = False,
    **options: Any,
) -> Stack:
    """What every attention head before block ``layer`` wrote to the stream.

    Where a norm follows attention (Gemma 2 and 3, OLMo 2), a head's write is pushed through it,
    with the norm's scale as it was.

    Args:
        model: as in :func:`decompose_resid`.
        input: as there.
        layer: heads of all blocks before this one; None, -1 or n_layers for all.
        return_labels: also return the labels.
        incl_remainder: end with what no head wrote of that block's input.
        pos_slice: which positions; an int drops the axis.
        apply_ln: normalise by the norm that reads that stream.
        **options: as in :func:`decompose_resid`.

    Returns:
        [head, *batch_and_pos, d_model], or that and the labels.
    """
    inputs = inputs_of(model, input, options)
    stream = inputs.stream
    end = layer_of(stream, layer, False)
    kept = Kept.of(inputs, pos_slice)
    gains = later_gains(stream, end)
    plan = []
    for block in stream.blocks[:end]:
        for write in block.writes:
            site = write.heads
            if site is not None:
                post_norm = site.post_norm_place
                z = kept.heads(site)
                after = None if post_norm is None else kept.scale(post_norm)
                factor = both(write.response, gains[block.layer + 1])
                plan.append((block.layer, site, z, after, factor))
    if not plan and end:
        raise UnsupportedModelError(f"{stream.backend.name} has no attention heads to stack")
    whole = stream_at(kept, end) if incl_remainder or not plan else None
    scale = scale_at(kept, end, False) if apply_ln else None
    kept.run()

    labels, rows = [], []
    for index, site, z, after, factor in plan:
        W_HDM = matrix(site.linear).T.to(kept[z])
        W_HDM = W_HDM.reshape(site.n_heads, site.d_head, -1)
        z_HD = kept[z].unflatten(-1, (site.n_heads, site.d_head))
        for head in range(site.n_heads):
            wrote = z_HD[..., head, :] @ W_HDM[head].to(z_HD.device)
            if after is not None:
                wrote = kept.norm(after).at_scale_one(wrote) / kept[after].to(wrote)
            rows.append(times(wrote, factor))
            labels.append(f"L{index}H{head}")
    stack = torch.stack(rows) if rows else kept[whole].new_zeros(0, *kept[whole].shape)
    if incl_remainder:
        stack = torch.cat((stack, (kept[whole] - stack.sum(0))[None]))
        labels.append("remainder")
    return finish(stack, labels, scale, kept, return_labels)
