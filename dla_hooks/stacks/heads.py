"""What every attention head wrote to the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.call import Inputs
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.linear import check_readable, matrix
from dla_hooks.residual.gains import path_factors, times
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import WriteSite
from dla_hooks.stacks.arguments import Stack, finish, measured, place_of, scale_at, stream_at
from dla_hooks.stacks.checks import StreamSum, WriteSum
from dla_hooks.stacks.kept import Kept
from dla_hooks.units.head_layer import with_heads


@dataclass(frozen=True)
class KeptHeads:
    """The heads of one write: their labels' beginning, and what is kept of them.

    Attributes:
        layer: ``L3``; ``L3.1`` for a block's second attention.
        write: what they make up, with the output bias.
        site: where they are seen.
        z: the key of z.
        after: the key of the scale of the norm that follows, or None.
        factor: what the write is multiplied by on its way to the end of the stack.
        whole: holds them against the write.
    """

    layer: str
    write: WriteSite
    site: HeadSite
    z: Any
    after: Any
    factor: Tensor | None
    whole: WriteSum

    @property
    def labels(self) -> list[str]:
        """The labels of the heads."""
        beginning = f"{self.layer}{self.site.letter}"
        return [f"{beginning}{head}" for head in range(self.site.n_heads)]


def stack_head_results(
    model: Any,
    input: Any = None,
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: Any = None,
    apply_ln: bool = False,
    check: bool = True,
    **options: Any,
) -> Stack:
    """Stack what every attention head before block ``layer`` wrote to the stream.

    Where a norm follows attention (Gemma 2 and 3, OLMo 2), a head's write is pushed through it,
    with the norm's scale as it was.

    Args:
        model: as in :func:`decompose_resid`.
        input: as there.
        layer: heads of all blocks before this one; None, -1 or n_layers for all.
        return_labels: also return the labels: ``L0H2``, and ``L0.1H2`` for a block's second
            attention.
        incl_remainder: end with what no head wrote of that block's input.
        pos_slice: which positions; an int drops the axis.
        apply_ln: normalise by the norm that reads that stream.
        check: hold the heads and the output bias against what each attention wrote, and all
            writes against the stream.
        **options: as in :func:`decompose_resid`.

    Returns:
        [head, *batch_and_pos, d_model], or that and the labels.

    Raises:
        UnsupportedModelError: for a model without attention heads.
        DecompositionError: when something does not add up.

    >>> from dla_hooks import demo
    >>> model, tokenizer = demo.load()
    >>> stack_head_results(model, "the cat", 1, tokenizer=tokenizer, return_labels=True)[1][:2]
    ['L0H0', 'L0H1']
    """

    def measure(inputs: Inputs) -> Stack:
        stream = inputs.stream
        end = place_of(stream, layer, False)
        kept = Kept.of(inputs, pos_slice, check)
        plan = plan_heads(kept, end)
        if not plan and end:
            raise UnsupportedModelError(f"{stream.backend.name} has no attention heads to stack")
        whole = stream_at(kept, end) if incl_remainder or not plan else None
        sum_of_all = StreamSum(kept, end)
        scale = scale_at(kept, end, False) if apply_ln else None
        kept.run()
        sum_of_all.hold()

        rows = [row for heads in plan for row in _rows(kept, heads)]
        labels = [label for heads in plan for label in heads.labels]
        if incl_remainder:
            rows.append(kept[whole] - sum(rows))
            labels.append("remainder")
        stack = torch.stack(rows) if rows else kept[whole].new_zeros(0, *kept[whole].shape)
        return finish(stack, labels, scale, kept, return_labels)

    return measured(model, input, options, measure)


def plan_heads(kept: Kept, end: int) -> list[KeptHeads]:
    """Keep the heads of all blocks before a place in the stack.

    Raises:
        UnsupportedModelError: for an output projection that cannot be read through.
    """
    stream, plan = with_head_widths(kept.stream), []
    factors = path_factors(stream, end)
    for block in stream.blocks[:end]:
        for several, write in with_heads(block.writes):
            site = write.heads
            assert site is not None
            if not site.d_head:
                check_readable(site.linear, site.name)
            z = kept.heads(site)
            norm = site.post_norm_place
            after = None if norm is None else kept.scale(norm.ahead)
            layer = f"L{block.layer}.{several}" if several else f"L{block.layer}"
            whole = WriteSum(kept, write, "the heads")
            plan.append(KeptHeads(layer, write, site, z, after, factors[write.label], whole))
    return plan


@outside_autocast
def _rows(kept: Kept, heads: KeptHeads) -> list[Tensor]:
    """What each head of one attention wrote [*batch_and_pos, d_model], after the run."""
    W_MI = matrix(heads.site.linear)
    heads.whole.hold(heads.z, heads.site.linear, W_MI, heads.after)
    scale = None if heads.after is None else kept[heads.after]
    return written_by_heads(kept, heads, W_MI, kept[heads.z], scale)


def written_by_heads(
    kept: Kept, heads: KeptHeads, W_MI: Tensor, z_I: Tensor, scale: Tensor | None
) -> list[Tensor]:
    """What each head of one attention wrote, as it stands at the end of the stack.

    Args:
        kept: what was kept.
        heads: which of it.
        W_MI: the output projection's matrix [d_model, head * d_head].
        z_I: z at some entries [..., head * d_head].
        scale: of the norm that follows, there [..., 1], or None.

    Returns:
        A vector [..., d_model] for each head.
    """
    site = heads.site
    W_HDM = W_MI.T.to(z_I).reshape(site.n_heads, site.d_head, -1)
    z_HD = z_I.unflatten(-1, (site.n_heads, site.d_head))
    rows = []
    for head in range(site.n_heads):
        wrote = z_HD[..., head, :] @ W_HDM[head]
        if scale is not None:
            wrote = kept.norm(heads.after).at_scale_one(wrote) / scale.to(wrote)
        rows.append(times(wrote, heads.factor))
    return rows
