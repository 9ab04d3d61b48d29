"""Linear modules as maps of directions, without copies of their weights.

A direction ``d`` in the space a linear module writes to becomes ``W^T d`` in the space it reads
from. For a module with a plain weight this is one matrix product. For any other linear module
(quantised, LoRA-wrapped, ...) it is the module's own vector-Jacobian product.
"""

from __future__ import annotations

from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.modules import vjp
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.faults import as_refusal
from dla_hooks.modules.weights import described, is_sharded, run_device, selected, stored, tiles
from dla_hooks.modules.widths import Shapes, held_shapes, possible_widths

_TILE = 256
"""Number of identity rows that are pulled back in one pass."""

_TILE_ELEMENTS = 2**21
"""Largest number of output entries in memory while rows are pulled back."""

_CAST_ELEMENTS = 2**19
"""Largest number of weight entries in memory in another dtype (2 MiB in float32)."""

_CAST_ELEMENTS_ON_GPU = 2**24
"""The same on a GPU, where each piece costs a launch: 64 MiB, before any activation is there."""

_widths: WeakKeyDictionary[nn.Module, tuple[Shapes, int]] = WeakKeyDictionary()

_NO_HEADS = (
    "whole sublayers do not need that (leave out unit=); for heads dequantise this module, "
    "quantise its weights alone and in a form that can be trained through, or merge its adapter"
)
_UNEMBED = "the unembedding"
_NO_ROWS = (
    "Logits are attributed through the rows of the unembedding: leave it out when quantising the "
    "model, or dequantise it"
)


@outside_autocast
def pull_back(module: nn.Module, d_KM: Tensor, name: str = "") -> Tensor:
    """Directions at a linear module's output, as directions at its input.

    Args:
        module: any module that is an affine map along its last axis.
        d_KM: directions [n, d_out].
        name: its path, for the message of an error.

    Returns:
        [n, d_in], in the dtype of ``d_KM``, on the device of the module's weight.

    Raises:
        UnsupportedModelError: for a module without a plain weight that cannot be read through.
    """
    weight = _weight_out_in(module)
    if weight is not None:
        return _product(d_KM.to(weight.device), weight)
    return vjp.pull_back(module, d_KM, input_width(module), name, _NO_HEADS)


def _product(d_KO: Tensor, weight_OI: Tensor) -> Tensor:
    """d @ weight in the dtype of d, without a copy of the whole weight in that dtype."""
    if weight_OI.dtype == d_KO.dtype:
        return d_KO @ weight_OI
    elements = _CAST_ELEMENTS_ON_GPU if weight_OI.is_cuda else _CAST_ELEMENTS
    step = max(1, elements // max(1, weight_OI.shape[1]))
    pieces = zip(d_KO.split(step, 1), weight_OI.split(step), strict=True)
    product: Tensor = reduce(torch.add, (d @ weight.to(d) for d, weight in pieces))
    return product


def check_readable(module: nn.Module, name: str) -> None:
    """Refuse a module that cannot be read through, before the model runs.

    Raises:
        UnsupportedModelError: naming it, and why.
    """
    if is_sharded(getattr(module, "weight", None)) and "forward" in vars(module):
        raise UnsupportedModelError(
            f"{name} reads a part of the heads in each process (tensor parallelism), so none sees "
            "all of them; load the model without tp_plan, or attribute whole sublayers (leave out "
            "unit=)"
        )
    if _out_axis(module) is None:
        home = run_device(module)
        nothing = torch.zeros(0, output_width(module), dtype=torch.float32, device=home)
        vjp.pull_back(module, nothing, input_width(module), name, _NO_HEADS)


def matrix(module: nn.Module) -> Tensor:
    """A linear module's whole map [d_out, d_in].

    For a module with a plain weight it is a view of that weight. For any other linear module it
    is computed: the identity is pulled back a tile at a time, in the dtype the module runs in.
    """
    weight = _weight_out_in(module)
    if weight is not None:
        return weight
    out = _biases(module)
    made = out.new_empty(len(out), input_width(module))
    for tile in torch.arange(len(out), device=out.device).split(_TILE):
        identity = out.new_zeros(len(tile), len(out))
        identity[torch.arange(len(tile), device=out.device), tile] = 1
        made[tile] = pull_back(module, identity).to(made)
    return made


def bias_of(module: nn.Module) -> Tensor | None:
    """The output [d_out] of an affine module for an input of zeros; None is zero."""
    if _out_axis(module) is not None:
        return stored(module, "bias")
    return _biases(module)


def at_hand(module: nn.Module) -> bool:
    """True if the module's plain weight is in memory, so that reading it again is free."""
    weight: Any = getattr(module, "weight", None)
    return _out_axis(module) is not None and not weight.is_meta


def value_at(module: nn.Module, z: Tensor) -> Tensor:
    """The module's output [d_out] for one input [d_in], past any hooks on it; or a refusal."""
    what = f"{vjp.describe(module)} cannot be run on one made-up vector of width {len(z)}"
    with (
        as_refusal(what, "; let it take any batch and length"),
        vjp.past_hooks(module),
        torch.no_grad(),
    ):
        # With the axes that a module of a model is given: [batch, pos, d_in].
        given = z.to(run_device(module), vjp.dtype_of(module))[None, None]
        out: Tensor = module.forward(given)[0, 0]
    return out


def input_width(module: nn.Module) -> int:
    """The size of the space that a linear module reads.

    A module that does not say it is run on rows of each width that its weights have; the result is
    kept while these have the same shapes.

    Raises:
        UnsupportedModelError: where no width or several fit.
    """
    width = declared_width(module)
    if width is not None:
        return width
    if isinstance(module, nn.Sequential) and len(module):
        first = declared_width(module[0])
        if first is not None:
            return first
    shapes = held_shapes(module)
    known = _widths.get(module)
    if known is None or known[0] != shapes:
        known = _widths[module] = shapes, _width_by_trying(module, shapes)
    return known[1]


def declared_width(module: nn.Module) -> int | None:
    """The width that a linear module, or the one inside a wrapper of PEFT's, says that it reads."""
    shape = _shape_out_in(module)
    if shape is not None:
        return shape[1]
    width = getattr(module, "in_features", None)
    if isinstance(width, int):
        return width
    if isinstance(module, Conv1D) and isinstance(getattr(module, "weight", None), Tensor):
        return int(module.weight.shape[0])
    inside = getattr(module, "original_module", None)  # PEFT's wrappers do not all hand it on
    return declared_width(inside) if isinstance(inside, nn.Module) else None


def _width_by_trying(module: nn.Module, shapes: Shapes) -> int:
    fits = []
    for width in possible_widths(shapes):
        try:
            out = value_at(module, torch.zeros(width, dtype=torch.float32, device="cpu"))
        except UnsupportedModelError:
            continue
        if isinstance(out, Tensor) and out.ndim == 1:
            fits.append(width)
    if len(fits) != 1:
        tried = f"it runs on inputs of the widths {fits}" if fits else "it runs on no width"
        raise UnsupportedModelError(
            f"{type(module).__name__} does not say how wide its input is, and {tried}; "
            "give it an attribute in_features"
        )
    return fits[0]


def rows(module: nn.Module, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Read rows of an unembedding and their biases, for the given tokens only.

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
        return _pulled_back_rows(module, ids, dtype)
    W = (weight.T if axis else weight).to(dtype)
    bias = selected(module, "bias", ids)
    b = W.new_zeros(len(ids)) if bias is None else bias.to(dtype)
    return W, b


def mean_row(module: nn.Module, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The unembedding's first ``count`` rows and biases, averaged: [d] and []."""
    axis = _out_axis(module)
    if axis is None:
        b_V = _biases(module)
        average = torch.zeros_like(b_V, dtype=dtype)[None]
        average[:, :count] = 1 / count
        W_mean = vjp.pull_back(module, average, input_width(module), _UNEMBED, _NO_ROWS)[0]
        return W_mean, b_V[:count].mean(dtype=dtype)
    W = torch.zeros(input_width(module), dtype=dtype, device=run_device(module))
    for tile in tiles(module, "weight", count, axis):
        W += tile.to(dtype).sum(axis)
    b = W.new_zeros(())
    for tile in tiles(module, "bias", count):
        b += tile.to(dtype).sum()
    return W / count, b / count


def output_width(module: nn.Module) -> int:
    """The size of the space that a linear module writes; of an unembedding, the vocabulary's."""
    shape = _shape_out_in(module)
    if shape is None:
        size = getattr(module, "out_features", None)
        return size if isinstance(size, int) else len(_biases(module))
    return shape[0]


def _pulled_back_rows(module: nn.Module, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`rows` of a module without a plain weight: one-hot directions, pulled back in tiles."""
    b_V, width = _biases(module), input_width(module)
    ids = ids.to(b_V.device)
    W = torch.empty(len(ids), width, dtype=dtype, device=b_V.device)
    for tile in torch.arange(len(ids), device="cpu").split(max(1, _TILE_ELEMENTS // len(b_V))):
        one_hot = torch.zeros(len(tile), len(b_V), dtype=dtype, device=b_V.device)
        one_hot[torch.arange(len(tile), device="cpu"), ids[tile]] = 1
        W[tile] = vjp.pull_back(module, one_hot, width, _UNEMBED, _NO_ROWS)
    return W, b_V.index_select(0, ids).to(dtype)


def _biases(module: nn.Module) -> Tensor:
    """The output [d_out] of a linear module for an input of zeros."""
    return value_at(module, torch.zeros(input_width(module), dtype=torch.float32, device="cpu"))


def _weight_out_in(module: nn.Module) -> Tensor | None:
    """The weight as [d_out, d_in], a view; None where the module's map is not just its weight."""
    axis = _out_axis(module)
    weight = None if axis is None else stored(module, "weight")
    return weight.T if weight is not None and axis else weight


def _shape_out_in(module: nn.Module) -> tuple[int, int] | None:
    """The shape of that weight. No values are read."""
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
    # The exact types: a subclass may quantise, gate or adapt what it does with the weight, and so
    # may a weight that is no plain tensor, or a forward pass of the module's own. accelerate's
    # brings the weights and takes them away, no more.
    own = vars(module).get("forward")
    # A method of the class that was only bound anew computes the same.
    replaced = own is not None and getattr(own, "__func__", None) is not type(module).forward
    if replaced and not hasattr(module, "_hf_hook"):
        return None
    weight: Any = getattr(module, "weight", None)
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
        return None
    return {nn.Linear: 0, Conv1D: 1}.get(type(module))
