"""What every MLP neuron wrote to the stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.sublayers import neurons
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.positions import parse
from dla_hooks.modules.hooks import Place
from dla_hooks.modules.linear import matrix
from dla_hooks.residual.gains import both, later_gains, times
from dla_hooks.residual.stream import Stream
from dla_hooks.stacks.arguments import Stack, before_mlp, inputs_of, layer_of, scale_at, stream_at
from dla_hooks.stacks.kept import Kept


def stack_neuron_results(
    model: Any,
    input: Any = None,
    layer: int | None = -1,
    pos_slice: Any = None,
    neuron_slice: Any = None,
    return_labels: bool = False,
    incl_remainder: bool = False,
    apply_ln: bool = False,
    project_output_onto: Tensor | None = None,
    mlp_input: bool = False,
    **options: Any,
) -> Stack:
    """What every MLP neuron before block ``layer`` wrote to the stream, or its projection.

    Args:
        model: as in :func:`decompose_resid`.
        input: as there.
        layer: neurons of all blocks before this one; None, -1 or n_layers for all.
        pos_slice: which positions; an int drops the axis.
        neuron_slice: which neurons of each layer: an int, a slice, a tuple meaning a slice, or a
            list or tensor of ints.
        return_labels: also return the labels.
        incl_remainder: end with what no neuron of the stack wrote.
        apply_ln: normalise by the norm that reads that stream.
        project_output_onto: directions [d_model] or [d_model, n]: the stack is then what each
            neuron wrote along them, and nothing of size d_mlp x d_model per position is built.
        mlp_input: the stream that block ``layer``'s MLP reads, for remainder and norm.
        **options: as in :func:`decompose_resid`.

    Returns:
        [neuron, *batch_and_pos, d_model], [neuron, *batch_and_pos] or
        [neuron, *batch_and_pos, n]; or that and the labels.

    Raises:
        UnsupportedModelError: where an MLP has no single down projection (experts).
    """
    inputs = inputs_of(model, input, options)
    stream = inputs.stream
    end = layer_of(stream, layer, mlp_input)
    kept = Kept.of(inputs, pos_slice)
    gains = later_gains(stream, end)
    plan = []
    for block in stream.blocks[:end]:
        for write in block.writes:
            if write.label.endswith("_mlp_out"):
                if write.post_norm is not None:
                    raise UnsupportedModelError(
                        f"{write.label} passes a norm on its way to the stream; neurons behind a "
                        "norm are not stacked"
                    )
                seen, name, linear = neurons(stream, write)
                factor = both(write.response, gains[block.layer + 1])
                plan.append(
                    (block.layer, kept.neurons(Place(seen, name, write.use)), linear, factor)
                )
    whole = stream_at(kept, end)
    first = [kept.write(w) for w in before_mlp(stream, end)] if mlp_input else []
    scale = scale_at(kept, end, mlp_input) if apply_ln else None
    kept.run()
    x = kept[whole]
    for key, write in zip(first, before_mlp(stream, end), strict=False):
        x = x + times(kept[key], write.response)

    onto = None if project_output_onto is None else _directions(project_output_onto, stream)
    centred = scale is not None and kept.norm(scale).centred
    labels, rows = [], []
    for index, key, linear, factor in plan:
        acts = kept[key]
        chosen = _chosen(neuron_slice, acts.shape[-1])
        W_NM = matrix(linear).T[chosen].to(acts)
        W_NM = times(W_NM, factor)
        if centred:
            W_NM = W_NM - W_NM.mean(-1, keepdim=True)
        out = W_NM if onto is None else W_NM @ onto.to(W_NM)
        rows.append(acts[..., chosen, None] * out.to(acts.device))
        labels += [f"L{index}N{neuron}" for neuron in chosen.tolist()]
    if incl_remainder:
        labels.append("remainder")
    if centred:
        x = x - x.mean(-1, keepdim=True)
    width = stream.d_model if onto is None else onto.shape[-1]
    # Neurons as the leading axis [neuron, *batch_and_pos, width].
    stack = torch.cat(rows, -2).movedim(-2, 0) if rows else x.new_zeros(0, *x.shape[:-1], width)
    if incl_remainder:
        rest = (x if onto is None else x @ onto.to(x)) - stack.sum(0)
        stack = torch.cat((stack, rest[None]))
    if scale is not None:
        stack = stack / kept[scale].to(stack)
    if project_output_onto is not None and project_output_onto.ndim == 1:
        stack = stack.squeeze(-1)
    return (stack, labels) if return_labels else stack


def _directions(onto: Tensor, stream: Stream) -> Tensor:
    if not isinstance(onto, Tensor) or onto.ndim not in (1, 2) or len(onto) != stream.d_model:
        shape = list(onto.shape) if isinstance(onto, Tensor) else type(onto).__name__
        raise InputError(
            f"project_output_onto must be [d_model] or [d_model, n] with d_model = "
            f"{stream.d_model}, got {shape}"
        )
    return onto[:, None] if onto.ndim == 1 else onto


def _chosen(neuron_slice: Any, width: int) -> Tensor:
    found = parse(neuron_slice, width)
    every = torch.arange(width)
    if found is None:
        return every
    return every[[found]] if isinstance(found, int) else every[found]
