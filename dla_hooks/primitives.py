"""The pieces that attributions are made of, as stacks of vectors: TransformerLens' primitives.

Its methods live on an ``ActivationCache``; here they take a model and an input, or a ``cache``.
Only the selected positions are kept, and only what the stack is made of. On a Hugging Face model
every vector is as it stands in the stream: scales and gains of the model are in it.

Normalised (``apply_ln``) means centred, for a LayerNorm, and divided by the scale that the norm
used; its gain and bias are not applied, as in a model whose norms are folded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.answers import Targets, read_answers
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.hooks import Use
from dla_hooks.inputs import Inputs, read_inputs
from dla_hooks.keep import Kept, later_gains
from dla_hooks.linear import pull_back
from dla_hooks.positions import parse
from dla_hooks.questions import mid_streams
from dla_hooks.readout import read_out
from dla_hooks.run import times
from dla_hooks.stream import Stream
from dla_hooks.sublayers import neurons, norm_before

Stack = Tensor | tuple[Tensor, list[str]]


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
    inputs = _inputs(model, input, options)
    stream = inputs.stream
    end = _layer(stream, layer, mlp_input)
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
                plan.append((write.label, kept.write(write), _both(write.response, later)))
    scale = _scale(kept, end, mlp_input) if apply_ln else None
    kept.run()

    labels, rows = [], []
    if start is not None and incl_embeds:
        whole = times(kept[start], gains[0])
        labels.append("embed")
        if where is not None:
            positions = times(kept[where], _both(stream.positions_response, gains[0]))
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
    return _finish(stack, labels, scale, kept, return_labels)


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
    inputs = _inputs(model, input, options)
    stream = inputs.stream
    end = _layer(stream, layer, mlp_input)
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
    scale = _scale(kept, end, mlp_input) if apply_ln and end < last else None
    kept.run()

    rows = []
    for _, start, writes in plan:
        x = kept[start]
        for key, response in writes:
            x = x + times(kept[key], response)
        rows.append(x)
    stack = torch.stack(rows)
    if apply_ln and end == last:
        with torch.no_grad():
            normed = [stream.final_norm.forward(x[None, None])[0, 0] for x in _flat(stack)]
        stack = torch.stack(normed).reshape(stack.shape)
    return _finish(stack, [label for label, *_ in plan], scale, kept, return_labels)


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
    inputs = _inputs(model, input, options)
    stream = inputs.stream
    end = _layer(stream, layer, False)
    kept = Kept.of(inputs, pos_slice)
    gains = later_gains(stream, end)
    plan = []
    for block in stream.blocks[:end]:
        for write in block.writes:
            site = write.heads
            if site is not None:
                z = kept.heads(write, site)
                after = None
                if site.post_norm is not None:
                    after = kept.scale(site.post_norm, site.post_norm_name, write.use)
                factor = _both(write.response, gains[block.layer + 1])
                plan.append((block.layer, site, z, after, factor))
    if not plan and end:
        raise UnsupportedModelError(f"{stream.kind.name} has no attention heads to stack")
    whole = _stream_at(kept, end) if incl_remainder or not plan else None
    scale = _scale(kept, end, False) if apply_ln else None
    kept.run()

    labels, rows = [], []
    for index, site, z, after, factor in plan:
        W_HDM = _matrix(site.linear, site.n_heads * site.d_head, kept[z].dtype)
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
    return _finish(stack, labels, scale, kept, return_labels)


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
    inputs = _inputs(model, input, options)
    stream = inputs.stream
    end = _layer(stream, layer, mlp_input)
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
                factor = _both(write.response, gains[block.layer + 1])
                plan.append((block.layer, kept.neurons(seen, name, write.use), linear, factor))
    whole = _stream_at(kept, end)
    first = [kept.write(w) for w in _before_mlp(stream, end)] if mlp_input else []
    scale = _scale(kept, end, mlp_input) if apply_ln else None
    kept.run()
    x = kept[whole]
    for key, write in zip(first, _before_mlp(stream, end), strict=False):
        x = x + times(kept[key], write.response)

    onto = None if project_output_onto is None else _directions(project_output_onto, stream)
    centred = scale is not None and kept.norm(scale).centred
    labels, rows = [], []
    for index, key, linear, factor in plan:
        acts = kept[key]
        chosen = _chosen(neuron_slice, acts.shape[-1])
        W_NM = _matrix(linear, acts.shape[-1], acts.dtype)[chosen]
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


def apply_ln_to_stack(
    model: Any,
    input: Any,
    residual_stack: Tensor,
    layer: int | None = None,
    mlp_input: bool = False,
    pos_slice: Any = None,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
    recompute_ln: bool = False,
    **options: Any,
) -> Tensor:
    """A stack normalised by the scale that a norm of this run divided by.

    Args:
        model: as in :func:`decompose_resid`.
        input: the prompt whose scales are used.
        residual_stack: [component, *batch_and_pos, d_model], already of these positions.
        layer: whose norm; None, -1 or n_layers for the final one.
        mlp_input: the norm before that block's MLP instead of its attention.
        pos_slice: the positions that the stack holds.
        batch_slice: the rows of the batch to take, of the stack too.
        has_batch_dim: whether the stack has an axis for the batch.
        recompute_ln: apply the final norm itself to each entry instead (final layer only).
        **options: as in :func:`decompose_resid`.

    Returns:
        The normalised stack, of the same shape but for ``batch_slice``.
    """
    inputs = _inputs(model, input, options)
    stream = inputs.stream
    end = _layer(stream, layer, mlp_input)
    kept = Kept.of(inputs, pos_slice)
    key = _scale(kept, end, mlp_input)
    kept.run()
    rows = _slice(batch_slice, inputs.prompt.shape[0])
    if has_batch_dim and rows is not None:
        residual_stack = residual_stack[:, rows]
    if recompute_ln and end == len(stream.blocks):
        with torch.no_grad():
            normed = [stream.final_norm.forward(x[None, None])[0, 0] for x in _flat(residual_stack)]
        return torch.stack(normed).reshape(residual_stack.shape)
    scale = kept[key]
    if rows is not None and kept.sites.batched:
        scale = scale[rows]
    if not has_batch_dim and kept.sites.batched and scale.shape[0] == 1:
        scale = scale[0]
    if kept.norm(key).centred:
        residual_stack = residual_stack - residual_stack.mean(-1, keepdim=True)
    return residual_stack / scale.to(residual_stack)


def logit_attrs(
    model: Any,
    input: Any,
    residual_stack: Tensor,
    tokens: Any,
    incorrect_tokens: Any = None,
    pos_slice: Any = None,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
    center_unembed: bool = False,
    **options: Any,
) -> Tensor:
    """How much each vector of a stack adds to a token's logit, or to a difference of two.

    Args:
        model: as in :func:`decompose_resid`.
        input: the prompt whose final scale is used.
        residual_stack: [component, *batch_and_pos, d_model], already of these positions.
        tokens: as ``answer_tokens`` of :func:`direct_logit_attribution`.
        incorrect_tokens: of the same shape, or None.
        pos_slice: the positions that the stack holds.
        batch_slice: the rows of the batch to take, of the stack too.
        has_batch_dim: whether the stack has an axis for the batch.
        center_unembed: as in :func:`direct_logit_attribution`.
        **options: as in :func:`decompose_resid`.

    Returns:
        [component, *batch_and_pos]: vector . d / s, with d the final norm folded into W_U.
    """
    normed = apply_ln_to_stack(
        model,
        input,
        residual_stack,
        pos_slice=pos_slice,
        batch_slice=batch_slice,
        has_batch_dim=has_batch_dim,
        **options,
    )
    inputs = _inputs(model, input, options)
    answers = read_answers(
        tokens, incorrect_tokens, model=inputs.stream.model, tokenizer=inputs.tokenizer
    )
    flat = Targets(
        answers.correct.reshape(-1),
        None if answers.incorrect is None else answers.incorrect.reshape(-1),
    )
    d_KM = read_out(inputs.stream, flat, center_unembed=center_unembed).d_KM
    shape = answers.correct.shape if answers.correct.numel() > 1 else ()
    d = d_KM.reshape(*shape, -1).to(normed.device)
    if has_batch_dim and normed.ndim == 4 and d.ndim == 2 and len(d) == normed.shape[1]:
        d = d.unsqueeze(-2)  # one per row of the batch, at every position
    normed = normed.to(d.dtype)
    return (normed * d).sum(-1)


def _inputs(model: Any, input: Any, options: dict[str, Any]) -> Inputs:
    known = {"cache": None, "tokenizer": None, "attention_mask": None, "prepend_bos": None}
    unknown = set(options) - set(known)
    if unknown:
        raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
    return read_inputs(model, input, **{**known, **options}, purpose="a stack")


def _layer(stream: Stream, layer: int | None, mlp_input: bool) -> int:
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


def _before_mlp(stream: Stream, layer: int) -> list[Any]:
    if layer >= len(stream.blocks):
        return []
    return list(stream.blocks[layer].writes[: mid_streams(stream)[layer] or 0])


def _stream_at(kept: Kept, layer: int) -> Any:
    blocks = kept.stream.blocks
    return kept.last_stream() if layer == len(blocks) else kept.block_input(blocks[layer])


def _scale(kept: Kept, layer: int, mlp_input: bool) -> Any:
    """Keep the scale of the norm that reads the stream there; for a key."""
    stream = kept.stream
    if layer == len(stream.blocks):
        runs = stream.final_norm_runs
        return kept.scale(stream.final_norm, stream.final_norm_name, Use(runs - 1, runs))
    module, name = norm_before(stream, layer, mlp=mlp_input)
    return kept.scale(module, name, Use(0, 0))  # it may run for queries, keys and values apart


def _finish(stack: Tensor, labels: list[str], scale: Any, kept: Kept, return_labels: bool) -> Stack:
    if scale is not None:
        if kept.norm(scale).centred:
            stack = stack - stack.mean(-1, keepdim=True)
        stack = stack / kept[scale].to(stack)
    return (stack, labels) if return_labels else stack


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else times(one, other)


def _flat(stack: Tensor) -> Tensor:
    return stack.reshape(-1, stack.shape[-1])


def _matrix(linear: Any, width: int, dtype: torch.dtype) -> Tensor:
    """W [width, d_model]: what each channel of a linear module's input becomes."""
    weight = getattr(linear, "weight", None)
    d_model = weight.shape[0] if type(linear) is torch.nn.Linear and weight is not None else None
    if d_model is None:
        from dla_hooks.linear import value_at

        d_model = len(value_at(linear, torch.zeros(width)))
    eye = torch.eye(d_model, dtype=torch.promote_types(dtype, torch.float32))
    return pull_back(linear, eye).T.to(dtype)


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


def _slice(batch_slice: Any, batch: int) -> Any:
    return None if batch_slice is None else parse(batch_slice, batch)
