"""The constant part of each head, for ``fold_value_biases``.

TransformerLens folds the value biases (and the first LayerNorm's bias, seen through W_V) out of
the heads: attention weights sum to one, so they add the same vector to z at every position. The
vector is found without unpacking any projection: run a token with zeros for every block's input.
Attention then reads its norm's bias. Attention over one token has weight one. So z is the constant
of each query head, for any layout of fused projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import Call, Tap, tapped
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream


def head_constants(stream: Stream, *, norm_bias: bool = True) -> dict[str, Tensor]:
    """The constant part of every z, by the write's label.

    Args:
        stream: the located model.
        norm_bias: count in the bias of the norm before attention, as seen through W_V; without
            it the constant is the value bias alone.

    Returns:
        ``{label: [head * d_head]}``, in the contraction's dtype.

    Raises:
        UnsupportedModelError: where z has no constant part: attention weights that do not sum
            to one (sinks), gated heads, normed values.
    """
    writes = [write for write in stream.writes if write.heads is not None]
    if any(write.heads is not None and write.heads.cross for write in writes):
        raise UnsupportedModelError(
            f"fold_value_biases: heads of {stream.backend.name} read what an encoder puts out, so "
            "that their value biases are no part of the decoder's stream. Use "
            "fold_value_biases=False."
        )
    sites = {write.label: write.heads for write in writes if write.heads is not None}
    seen: dict[str, Tensor] = {}
    # Three rows: the constant itself, one step above it, and one below. The outer two lie evenly
    # around the first only if z is an affine map of attention's input. Two equal tokens: their z
    # are equal only if attention weights sum to one, since the second attends to both.
    prompt = short_prompt(stream, batch=3, length=2)
    prompt.input_ids.copy_(prompt.input_ids[:1, :1].expand_as(prompt.input_ids))
    generator = torch.Generator().manual_seed(2)
    step = torch.randn(stream.d_model, generator=generator, dtype=torch.float32, device="cpu")
    steps = torch.stack((torch.zeros_like(step), step, -step))[:, None]

    def remember(label: str) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            z = sites[label].flat(call.entered).to(stream.work_dtype)
            seen[label] = z.reshape(3, -1, z.shape[-1])[:, -2:]

        return see

    edits = [Edit(block.module, torch.zeros_like, at_input=True) for block in stream.blocks]

    def stepped(x: Tensor) -> Tensor:
        constant = x if norm_bias else torch.zeros_like(x)
        return (constant.reshape(3, -1, x.shape[-1]) + steps.to(x)).view_as(x)

    edits += [Edit(site.attention, stepped, at_input=True) for site in sites.values()]
    taps = [Tap(site.place, remember(label)) for label, site in sites.items()]
    with edited(edits), tapped(taps):
        stream.backend.run_synthetic(prompt, None)
    for label, z in seen.items():
        _check(stream, sites[label], z)
    return {label: z[0, 0].clone() for label, z in seen.items()}


def _check(stream: Stream, site: HeadSite, z: Tensor) -> None:
    rounding = 1e-4 + 16 * torch.finfo(stream.product_dtype).eps
    first, second = z.unbind(1)
    if (first - second).norm() > rounding * first.norm():
        raise UnsupportedModelError(
            f"fold_value_biases: the attention weights of {site.name} do not sum to one (attention "
            "sinks do this), so its heads have no constant part. Use fold_value_biases=False."
        )
    constant, above, below = first
    if not bool(constant.any()):
        return  # nothing to fold
    bend = (above + below - 2 * constant).norm()
    if bend > rounding * (above.norm() + below.norm()):
        raise UnsupportedModelError(
            f"fold_value_biases: what the heads of {site.name} read is not an affine map of the "
            "stream (gates and value norms do this), so their biases cannot be told from the "
            "rest. Use fold_value_biases=False."
        )
