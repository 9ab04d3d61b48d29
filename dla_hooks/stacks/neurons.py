"""What every MLP neuron wrote to the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.calibration.mid_terms import mid_stream
from dla_hooks.calibration.sublayers import neurons
from dla_hooks.call import Inputs
from dla_hooks.errors import InputError, PositionError, UnsupportedModelError
from dla_hooks.inputs.positions import parse
from dla_hooks.modules.linear import matrix
from dla_hooks.residual.gains import path_factors, times
from dla_hooks.residual.kinds import kind_of
from dla_hooks.residual.stream import Stream
from dla_hooks.stacks.arguments import Stack, measured, place_of, scale_at, stream_at
from dla_hooks.stacks.checks import StreamSum, WriteSum
from dla_hooks.stacks.kept import Kept


@dataclass(frozen=True)
class _Neurons:
    """The neurons of one write: their labels' beginning, and what is kept of them."""

    layer: str
    linear: nn.Module
    acts: Any
    after: Any
    factor: Tensor | None
    whole: WriteSum


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
    check: bool = True,
    **options: Any,
) -> Stack:
    """Stack what every MLP neuron before block ``layer`` wrote to the stream, or its projection.

    Where a norm follows the MLP (Gemma 2 and 3, OLMo 2), a neuron's write is pushed through it,
    with the norm's scale as it was. What a down projection and such a norm add to nothing (their
    biases) belongs to no neuron.

    Args:
        model: as in :func:`decompose_resid`.
        input: as there.
        layer: neurons of all blocks before this one; None, -1 or n_layers for all.
        pos_slice: which positions; an int drops the axis.
        neuron_slice: which neurons of each layer: an int, a slice, a tuple meaning a slice, or a
            list or tensor of ints.
        return_labels: also return the labels: ``L0N17``, and ``L0.1N17`` for a block's second MLP.
        incl_remainder: end with what no neuron of the stack wrote.
        apply_ln: normalise by the norm that reads that stream.
        project_output_onto: directions [d_model] or [d_model, n]: the stack is then what each
            neuron wrote along them, and nothing of size d_mlp x d_model per position is built.
        mlp_input: the stream that block ``layer``'s MLP reads, for remainder and norm.
        check: hold all neurons and the biases against what each MLP wrote, and all writes against
            the stream.
        **options: as in :func:`decompose_resid`.

    Returns:
        [neuron, *batch_and_pos, d_model], [neuron, *batch_and_pos] or
        [neuron, *batch_and_pos, n]; or that and the labels.

    Raises:
        PositionError: (an IndexError) for a neuron that some layer does not have.
        UnsupportedModelError: for a model without MLPs, or where an MLP has no single down
            projection (experts).
        DecompositionError: when something does not add up.

    >>> from dla_hooks import demo
    >>> model, tokenizer = demo.load()
    >>> stack, labels = stack_neuron_results(
    ...     model, "the cat", 1, neuron_slice=[0, 7], tokenizer=tokenizer, return_labels=True
    ... )
    >>> labels, stack.shape[0]
    (['L0N0', 'L0N7'], 2)
    """

    def measure(inputs: Inputs) -> Stack:
        stream = inputs.stream
        end = place_of(stream, layer, mlp_input)
        kept = Kept.of(inputs, pos_slice, check)
        onto = None if project_output_onto is None else _directions(project_output_onto, stream)
        plan = _plan(kept, end)
        if not plan and end:
            raise UnsupportedModelError(f"{stream.backend.name} has no MLP neurons to stack")
        start = stream_at(kept, end)
        mid = mid_stream(stream, end) if mlp_input else None
        to_mid = None if mid is None else kept.to_mid(end, mid)
        sum_of_all = StreamSum(kept, end + mlp_input)
        scale = scale_at(kept, end, mlp_input) if apply_ln else None
        kept.run()
        sum_of_all.hold()

        x = kept[start] if to_mid is None else to_mid(kept[start])
        centred = scale is not None and kept.norm(scale).centred
        if centred:
            x = x - x.mean(-1, keepdim=True)
        labels, rows = [], []
        for each in plan:
            acts, out = _factored(kept, each, centred, onto)
            chosen = _chosen(neuron_slice, acts.shape[-1], each.layer)
            rows.append(acts[..., chosen, None] * out[chosen.to(out.device)].to(acts.device))
            labels += [f"{each.layer}N{neuron}" for neuron in chosen.tolist()]
        width = stream.d_model if onto is None else onto.shape[-1]
        # Neurons as the leading axis [neuron, *batch_and_pos, width].
        stack = torch.cat(rows, -2).movedim(-2, 0) if rows else x.new_zeros(0, *x.shape[:-1], width)
        if incl_remainder:
            labels.append("remainder")
            rest = (x if onto is None else x @ onto.to(x)) - stack.sum(0)
            stack = torch.cat((stack, rest[None]))
        if scale is not None:
            stack = stack / kept[scale].to(stack)
        if project_output_onto is not None and project_output_onto.ndim == 1:
            stack = stack.squeeze(-1)
        return (stack, labels) if return_labels else stack

    return measured(model, input, options, measure)


def _plan(kept: Kept, end: int) -> list[_Neurons]:
    stream, plan = kept.stream, []
    factors = path_factors(stream, end)
    for block in stream.blocks[:end]:
        several = 0
        for write in block.writes:
            if kind_of(write.label) != "mlp":
                continue
            place, linear = neurons(stream, write)
            acts = kept.neurons(place)
            after = None if write.post_norm is None else kept.scale(write.place)
            layer = f"L{block.layer}.{several}" if several else f"L{block.layer}"
            whole = WriteSum(kept, write, "the neurons")
            plan.append(_Neurons(layer, linear, acts, after, factors[write.label], whole))
            several += 1
    return plan


def _factored(
    kept: Kept, each: _Neurons, centred: bool, onto: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Activations [*batch_and_pos, neuron], and what each neuron writes at one [neuron, width]."""
    W_MN, acts = matrix(each.linear), kept[each.acts]
    each.whole.hold(each.acts, each.linear, W_MN, each.after)
    W_NM = W_MN.T.to(acts)
    if each.after is not None:
        W_NM = kept.norm(each.after).at_scale_one(W_NM)
        acts = acts / kept[each.after].to(acts)
    W_NM = times(W_NM, each.factor)
    if centred:
        W_NM = W_NM - W_NM.mean(-1, keepdim=True)
    return acts, W_NM if onto is None else W_NM @ onto.to(W_NM)


def _directions(onto: Any, stream: Stream) -> Tensor:
    if not isinstance(onto, Tensor) or onto.ndim not in (1, 2) or len(onto) != stream.d_model:
        shape = list(onto.shape) if isinstance(onto, Tensor) else type(onto).__name__
        raise InputError(
            f"project_output_onto must be [d_model] or [d_model, n] with d_model = "
            f"{stream.d_model}, got {shape}"
        )
    return onto[:, None] if onto.ndim == 1 else onto


def _chosen(neuron_slice: Any, width: int, layer: str) -> Tensor:
    """Indices of the selected neurons of one layer."""
    found = parse(neuron_slice, width)
    for neuron in [found] if isinstance(found, int) else found if isinstance(found, list) else []:
        if not -width <= neuron < width:
            raise PositionError(
                f"neuron_slice asks for neuron {neuron}, but {layer} has {width} neurons, "
                f"from 0 to {width - 1}"
            )
    every = torch.arange(width, device="cpu")
    if found is None:
        return every
    return every[[found]] if isinstance(found, int) else every[found]
