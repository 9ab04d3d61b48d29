"""The stream as a stack: what was written to it, and what it was before each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.mid_terms import MidStream, mid_stream
from dla_hooks.call import Inputs
from dla_hooks.errors import InputError
from dla_hooks.residual.gains import constant_label, path_factors, product, times
from dla_hooks.residual.hooked import Hooked, hook_factor, hook_label, hooked_places
from dla_hooks.residual.kinds import kind_of
from dla_hooks.residual.stream import Stream
from dla_hooks.stacks.arguments import (
    Stack,
    apply_final_norm,
    finish,
    measured,
    place_of,
    scale_at,
)
from dla_hooks.stacks.checks import StreamSum
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
    check: bool = True,
    **options: Any,
) -> Stack:
    """Split the stream before block ``layer`` into what was written to it, one vector per write.

    With ``mode="all"`` and the embeddings, the vectors sum to the stream.

    Args:
        model: of any kind that :func:`direct_logit_attribution` takes.
        input: as there; None with a ``cache``.
        layer: the block whose input is split; None, -1 or n_layers for the last stream.
        mlp_input: split what that block's MLP reads instead: its attention's write too.
        mode: "all", or "mlp" or "attn" for the writes of MLPs (experts are) or of attention only;
            what is neither, as a Mamba mixer and a block's own constant, is in "all" alone.
        apply_ln: normalise by the norm that reads that stream.
        pos_slice: which positions; an int drops the axis.
        incl_embeds: with the embeddings.
        return_labels: also return the labels.
        check: hold the sum of everything that was written, whatever the mode, against the stream.
        **options: ``cache``, ``tokenizer``, ``attention_mask``, ``prepend_bos``, as in
            :func:`direct_logit_attribution`.

    Returns:
        [component, *batch_and_pos, d_model], or that and the labels.

    Raises:
        InputError: for an argument that cannot be used.
        DecompositionError: when what was written does not sum to the stream.

    >>> from dla_hooks import demo
    >>> model, tokenizer = demo.load()
    >>> stack, labels = decompose_resid(
    ...     model, "the cat", layer=1, pos_slice=-1, tokenizer=tokenizer, return_labels=True
    ... )
    >>> labels, stack.shape == (4, 1, model.config.n_embd)
    (['embed', 'pos_embed', '0_attn_out', '0_mlp_out'], True)
    """
    if mode not in ("all", "mlp", "attn"):
        raise InputError(f"mode must be 'all', 'mlp' or 'attn', got {mode!r}")

    def measure(inputs: Inputs) -> Stack:
        stream = inputs.stream
        end = place_of(stream, layer, mlp_input)
        mid = mid_stream(stream, end) if mlp_input else None
        kept = Kept.of(inputs, pos_slice, check)
        factors = _factors(stream, end, mid)
        embed = kept.start() if incl_embeds or not stream.writes else None
        where = kept.positions() if incl_embeds and stream.positions is not None else None
        plan: list[tuple[str, Any]] = []  # a key for a write; a vector for a constant
        hooks: dict[str, list[tuple[Any, Tensor | None]]] = {}  # by label: a key, and its factor
        always = set[str]()  # a wrapper that writes nothing has no row
        for hooked, factor in _hooks(stream, end, mid, factors) if mode == "all" else ():
            hooks.setdefault(hooked.label, []).append((kept.hook(hooked.place), factor))
            always |= set() if hooked.by_wrapper else {hooked.label}
        for place, block in enumerate(stream.blocks[: end + mlp_input]):
            inside = mid is not None and place == end
            for write in block.writes[: len(mid.responses) if mid and inside else None]:
                if mode in ("all", kind_of(write.label)):
                    plan.append((write.label, kept.write(write)))
            constant = mid.constant if mid and inside else block.constant
            if mode == "all" and constant is not None:
                plan.append((constant_label(block), constant))
            if hook_label(block) in hooks:
                plan.append((hook_label(block), hooks[hook_label(block)]))
        behind = [label for label in hooks if label not in dict(plan)]  # at the stream itself
        plan += [(label, hooks[label]) for label in behind]
        whole = StreamSum(kept, end + mlp_input)
        scale = scale_at(kept, end, mlp_input) if apply_ln else None
        like = embed
        if like is None and any(isinstance(part, Tensor) for _, part in plan):
            like = kept.start()  # constants need its shape
        kept.run()
        whole.hold()

        labels, rows = [], []
        if embed is not None and incl_embeds:
            tokens = times(kept[embed], factors["embed"])
            labels.append("embed")
            if where is not None:
                positions = times(kept[where], factors["pos_embed"])
                rows += [tokens - positions, positions]
                labels.append("pos_embed")
            else:
                rows.append(tokens)
        for label, part in plan:
            if isinstance(part, list):
                row = torch.stack([times(kept[key], factor) for key, factor in part]).sum(0)
                if label in always or bool(row.any()):
                    labels.append(label)
                    rows.append(row)
                continue
            labels.append(label)
            vector = (
                part.to(kept[like]).expand_as(kept[like])
                if isinstance(part, Tensor)
                else kept[part]
            )
            rows.append(times(vector, factors[label]))
        if not rows:
            raise InputError(f"nothing of mode={mode!r} was written before layer {layer}")
        return finish(torch.stack(rows), labels, scale, kept, return_labels)

    return measured(model, input, options, measure)


def _hooks(
    stream: Stream, end: int, mid: MidStream | None, factors: dict[str, Tensor | None]
) -> Iterator[tuple[Hooked, Tensor | None]]:
    """The caller's hooks ahead of the stream before a block, or in its middle."""
    for hooked in hooked_places(stream):
        if hooked.number < end:
            yield hooked, hook_factor(hooked, factors)
        elif hooked.number == end and hooked.at_input:
            yield hooked, factors["end"]
    yield from mid.hooks(stream, end) if mid else ()


def _factors(stream: Stream, end: int, mid: MidStream | None) -> dict[str, Tensor | None]:
    """What the stream before a block, or in its middle, holds of every part."""
    factors = {**path_factors(stream, end), "end": None}
    if mid is None:
        return factors
    block = stream.blocks[end]
    inside = dict(zip((w.label for w in block.writes), mid.responses, strict=False))
    before = {label: product(mid.gain, factor) for label, factor in factors.items()}
    return {**before, **inside, constant_label(block): None}


def accumulated_resid(
    model: Any,
    input: Any = None,
    layer: int | None = None,
    incl_mid: bool = False,
    apply_ln: bool = False,
    pos_slice: Any = None,
    mlp_input: bool = False,
    return_labels: bool = False,
    check: bool = True,
    **options: Any,
) -> Stack:
    """Stack the stream before each block up to ``layer``, as a logit lens reads it.

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
        check: where mid streams are computed, hold all writes against the stream at the end.
        **options: as in :func:`decompose_resid`.

    Returns:
        [component, *batch_and_pos, d_model], or that and the labels.

    Raises:
        DecompositionError: when mid streams are computed, and writes do not sum to the stream.

    >>> from dla_hooks import demo
    >>> model, tokenizer = demo.load()
    >>> accumulated_resid(model, "the cat", tokenizer=tokenizer, return_labels=True)[1]
    ['0_pre', '1_pre', '2_pre', '3_pre', 'final_post']
    """

    def measure(inputs: Inputs) -> Stack:
        stream = inputs.stream
        end, last = place_of(stream, layer, mlp_input), len(stream.blocks)
        kept = Kept.of(inputs, pos_slice, check)
        plan: list[tuple[str, Any, Callable[[Tensor], Tensor] | None]] = []
        for place, block in enumerate(stream.blocks[: end + 1]):
            start = kept.block_input(block)
            plan.append((f"{block.layer}_pre", start, None))
            wanted = incl_mid if place < end else mlp_input
            mid = mid_stream(stream, place) if wanted else None
            if mid is not None:
                plan.append((f"{block.layer}_mid", start, kept.to_mid(place, mid)))
        if end == last:
            plan.append(("final_post", kept.last_stream(), None))
        computed = any(to_mid is not None for *_, to_mid in plan)
        whole = StreamSum(kept, end + mlp_input if computed else 0)
        scale = scale_at(kept, end, mlp_input) if apply_ln and end < last else None
        kept.run()
        whole.hold()

        rows = [kept[start] if mid is None else mid(kept[start]) for _, start, mid in plan]
        stack = torch.stack(rows)
        if apply_ln and end == last:
            stack = apply_final_norm(stream, stack)
        return finish(stack, [label for label, *_ in plan], scale, kept, return_labels)

    return measured(model, input, options, measure)
