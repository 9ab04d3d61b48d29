"""Linear modules as maps of directions: what they read, never what they contain copied.

A direction ``d`` in the space a linear module writes to becomes ``W^T d`` in the space it reads
from. Where the module keeps a plain weight that is one matrix product; for any other linear
module (quantised, LoRA-wrapped, ...) it is the module's own vector-Jacobian product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.weights import described, run_device, selected, stored, tiles

_TILE = 256
"""Rows of an identity that are pulled back at once."""


def pull_back(module: nn.Module, d_KM: Tensor) -> Tensor:
    """Directions at a linear module's output, as directions at its input.

    Args:
        module: any module that is an affine map along its last axis.
        d_KM: directions [n, d_out].

    Returns:
        [n, d_in], in the dtype and on the device of ``d_KM``.
    """
    weight = _weight_out_in(module)
    if weight is not None:
        return d_KM @ weight.to(d_KM)
    with torch.enable_grad():
        z = torch.zeros(
            d_KM.shape[0],
            input_width(module),
            dtype=_dtype_of(module),
            device=run_device(module),
            requires_grad=True,
        )
        out = module.forward(z)
        (u,) = torch.autograd.grad(out, z, grad_outputs=d_KM.to(out))
    return u.to(d_KM)


def matrix(module: nn.Module) -> Tensor:
    """A linear module's whole map [d_out, d_in].

    Where the module keeps a plain weight that is a view of it. For any other linear module it is
    made anew, by pulling back the identity a tile at a time, in the dtype the module runs in.
    """
    weight = _weight_out_in(module)
    if weight is not None:
        return weight
    out = value_at(module, torch.zeros(input_width(module)))
    made = out.new_empty(len(out), input_width(module))
    for tile in torch.arange(len(out), device=out.device).split(_TILE):
        identity = out.new_zeros(len(tile), len(out))
        identity[torch.arange(len(tile), device=out.device), tile] = 1
        made[tile] = pull_back(module, identity).to(made)
    return made


def value_at(module: nn.Module, z: Tensor) -> Tensor:
    """The module's output [d_out] for one input [d_in], past any hooks on it."""
    with torch.no_grad():
        out: Tensor = module.forward(z.to(run_device(module), _dtype_of(module))[None])[0]
    return out


def input_width(module: nn.Module) -> int:
    """The size of the space that a linear module reads."""
    shape = _shape_out_in(module)
    if shape is not None:
        return shape[1]
    width = getattr(module, "in_features", None)
    if isinstance(width, int):
        return width
    raise UnsupportedModelError(
        f"{type(module).__name__} does not say how wide its input is (in_features)"
    )


def rows(module: nn.Module, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of an unembedding and their biases, for the asked tokens only.

    Args:
        module: the output embedding; its output axis is the vocabulary.
        ids: token ids [n].
        dtype: of the result.

    Returns:
        ``W_U`` rows [n, d] and biases [n].
    """
    axis = _out_axis(module)
    weight = None if axis is None else selected(module, "weight", ids, axis)
    if weight is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no weight to read rows from")
    W = (weight.T if axis else weight).to(dtype)
    bias = selected(module, "bias", ids)
    b = W.new_zeros(len(ids)) if bias is None else bias.to(dtype)
    return W, b


def mean_row(module: nn.Module, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The unembedding's first ``count`` rows and biases, averaged: [d] and []."""
    axis = _out_axis(module)
    if axis is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no weight to average")
    W = torch.zeros(input_width(module), dtype=dtype, device=run_device(module))
    for tile in tiles(module, "weight", count, axis):
        W += tile.to(dtype).sum(axis)
    b = W.new_zeros(())
    for tile in tiles(module, "bias", count):
        b += tile.to(dtype).sum()
    return W / count, b / count


def vocabulary_size(module: nn.Module) -> int:
    """How many tokens an unembedding scores."""
    shape = _shape_out_in(module)
    if shape is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no weight to count rows of")
    return shape[0]


def _weight_out_in(module: nn.Module) -> Tensor | None:
    """The weight as [d_out, d_in], a view; None where the module's map is not just its weight."""
    axis = _out_axis(module)
    weight = None if axis is None else stored(module, "weight")
    return weight.T if weight is not None and axis else weight


def _shape_out_in(module: nn.Module) -> tuple[int, int] | None:
    """That weight's shape, for which nothing is read."""
    axis = _out_axis(module)
    weight = None if axis is None else described(module, "weight")
    if weight is None or axis is None:
        return None
    if weight.ndim != 2:
        raise InputError(
            f"the weight of {type(module).__name__} has the shape {list(weight.shape)}, so its "
            "values are elsewhere, as when they are sharded or gathered only while it runs; of "
            "such models only those that accelerate offloads can be attributed"
        )
    return int(weight.shape[axis]), int(weight.shape[1 - axis])


def _out_axis(module: nn.Module) -> int | None:
    """Which axis of the weight is the output's; None where the map is not just the weight."""
    # The exact types: a subclass may quantise, gate or adapt what it does with the weight.
    return {nn.Linear: 0, Conv1D: 1}.get(type(module))


def _dtype_of(module: nn.Module) -> torch.dtype:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    raise UnsupportedModelError(f"{type(module).__name__} has no floating-point parameter")
