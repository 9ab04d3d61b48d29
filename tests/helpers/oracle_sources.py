"""What each head reads from each token, by brute force and by derivative.

Nothing is shared with the library: the weights and values are seen in the products that the models
themselves compute (eager attention), in the present thread.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from oracle import _clean_run, _logit
from oracle_families import (
    family_of,
    final_norm,
    frozen_norm,
    layer_at,
    module_at,
    n_heads,
    n_layers,
    norm_scale,
    post_norms,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Products(TorchFunctionMode):
    """Keeps the weights and values of every product of the two, in order.

    Args:
        as_leaf: make what the product gives a leaf, so that derivatives by it can be taken.
    """

    def __init__(self, as_leaf: bool = False) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._as_leaf = as_leaf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in ("matmul", "__matmul__") or not _of_weights(args):
            return out
        if self._as_leaf:
            out = out.detach().requires_grad_()
        self.seen.append((args[0].detach(), args[1].detach(), out))
        return out


def _of_weights(args: Any) -> bool:
    first, second = args[:2]
    if first.ndim != 4 or second.ndim != 4 or first.shape[-1] != second.shape[-2]:
        return False
    # A query's weights on what it may read; those on what it may not are zero.
    return bool((first >= 0).all() and (first.sum(-1) < 1 + 1e-4).all() and (first.sum() > 0))


@torch.no_grad()
def source_effects(
    model: nn.Module, ids: Tensor, answer: Any, incorrect: Any = None, **inputs: Any
) -> Tensor:
    """What each head took from each token, [layer, head, batch, pos, source], by formula.

    The weights times the values, pushed through that head's slice of the output projection, the
    post-norm and the final norm with their scales held.
    """
    clean = _clean_run(model, ids, inputs)
    with Products() as products:
        model(ids, use_cache=False, **inputs)
    seen = products.seen
    assert len(seen) == n_layers(model)
    family, last = family_of(model), clean.last_stream
    final = final_norm(model)
    final_scale = norm_scale(family.norm, final, last)
    nothing = frozen_norm(family.norm, final, torch.zeros_like(last), final_scale)
    bias = _logit(model, nothing, answer, incorrect)
    effects = []
    for layer, (p, v, _) in enumerate(seen):
        v = v.repeat_interleave(p.shape[1] // v.shape[1], 1).double()
        projection = module_at(layer_at(model, layer), family.o_proj)
        weight = projection.weight.double()
        weight = weight if type(projection).__name__ == "Conv1D" else weight.T  # [in, out]
        of_head = weight.unflatten(0, (n_heads(model), -1))
        norm = post_norms(model).get(f"{layer}_attn_out")
        for head in range(n_heads(model)):
            written = v[:, head] @ of_head[head]  # [batch, source, d_model]
            rows = []
            for source in range(ids.shape[1]):
                write = p[:, head, :, source, None].double() * written[:, source, None]
                if norm is not None:
                    scale = norm_scale(
                        family.norm, norm, clean.post_norm_inputs[f"{layer}_attn_out"]
                    )
                    zero = frozen_norm(family.norm, norm, torch.zeros_like(write), scale)
                    write = frozen_norm(family.norm, norm, write, scale) - zero
                write = write * family.write_scale(model.config)
                normed = frozen_norm(family.norm, final, write, final_scale)
                rows.append(_logit(model, normed, answer, incorrect) - bias)
            effects.append(torch.stack(rows, -1))
    return torch.stack(effects).unflatten(0, (n_layers(model), n_heads(model)))


def source_slopes(
    model: nn.Module, ids: Tensor, projections: dict[str, nn.Module], directions: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What each source gives to what a layer writes, [head, batch, pos, source], by derivative.

    What attention returns is made a leaf, and the derivative of the projection's output along a
    direction, times what a source gave, is that source's part: for any layout, and through gates.
    A norm before the projection is not held fixed here, nor one behind it looked at.

    Args:
        model: on which all is eager.
        ids: [batch, pos].
        projections: of each layer, by a name.
        directions: what each one's output is projected on [d_model].
    """
    out: dict[str, Tensor] = {}
    own: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    with torch.enable_grad(), Products(as_leaf=True) as products, contextlib.ExitStack() as stack:
        for name, projection in projections.items():

            def keep(module: Any, args: Any, output: Tensor, name: str = name) -> None:
                out[name] = output
                own[name] = products.seen[-1]

            stack.callback(projection.register_forward_hook(keep).remove)
        model(ids, use_cache=False)
    found = {}
    for name, (p, v, leaf) in own.items():
        along = (out[name].reshape(*ids.shape, -1) @ directions[name].to(out[name])).sum()
        (slope,) = torch.autograd.grad(along, leaf)  # [batch, head, pos, d]
        v = v.repeat_interleave(p.shape[1] // v.shape[1], 1).to(slope)
        found[name] = (p.to(slope) * (slope @ v.transpose(-1, -2))).transpose(0, 1).double()
    return found
