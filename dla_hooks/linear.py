"""Linear modules as maps of directions: what they read, never what they contain copied.

A direction ``d`` in the space a linear module writes to becomes ``W^T d`` in the space it reads
from. Where the module keeps a plain weight that is one matrix product; for any other linear
module (quantised, LoRA-wrapped, ...) it is the module's own vector-Jacobian product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dla_hooks import vjp
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.weights import run_device, stored

_TILE = 256
"""Rows of an identity that are pulled back at once."""

_TILE_ELEMENTS = 2**21
"""Entries of a module's output that are there at once, where its rows are pulled back."""

_NO_HEADS = (
    "unit='component' and unit='layer' do not need that; for heads dequantise this module, "
    "quantise its weights alone and in a form that can be trained through, or merge its adapter"
)
_UNEMBED = "the unembedding"
_NO_ROWS = (
    "Logits are attributed through the rows of the unembedding: leave it out when quantising the "
    "model, or dequantise it"
)


def pull_back(module: nn.Module, d_KM: Tensor, name: str = "") -> Tensor:
    """Directions at a linear module's output, as directions at its input.

    Args:
        module: any module that is an affine map along its last axis.
        d_KM: directions [n, d_out].
        name: its path, for the message of an error.

    Returns:
        [n, d_in], in the dtype and on the device of ``d_KM``.

    Raises:
        UnsupportedModelError: for a module without a plain weight that cannot be read through.
    """
    weight = _weight_out_in(module)
    if weight is not None:
        return d_KM @ weight.to(d_KM)
    return vjp.pull_back(module, d_KM, input_width(module), name, _NO_HEADS)


def check_readable(module: nn.Module, name: str) -> None:
    """Refuse a module that cannot be read through, before the model runs.

    Raises:
        UnsupportedModelError: naming it, and why.
    """
    if _weight_out_in(module) is None:
        nothing = torch.zeros(0, output_width(module), device=run_device(module))
        vjp.pull_back(module, nothing, input_width(module), name, _NO_HEADS)


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


def bias_of(module: nn.Module) -> Tensor | None:
    """What an affine module puts out for an input of nothing [d_out]; None is nothing."""
    if _weight_out_in(module) is not None:
        return stored(module, "bias")
    return value_at(module, torch.zeros(input_width(module)))


def at_hand(module: nn.Module) -> bool:
    """Whether the module's plain weight lies in memory, so that reading it again costs nothing."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_meta and _weight_out_in(module) is not None


def value_at(module: nn.Module, z: Tensor) -> Tensor:
    """The module's output [d_out] for one input [d_in], past any hooks on it."""
    with vjp.alone(module), torch.no_grad():
        out: Tensor = module.forward(z.to(run_device(module), vjp.dtype_of(module))[None])[0]
    return out


def input_width(module: nn.Module) -> int:
    """The size of the space that a linear module reads."""
    weight = _weight_out_in(module)
    if weight is not None:
        return int(weight.shape[1])
    width = getattr(module, "in_features", None)
    if isinstance(width, int):
        return width
    inside = getattr(module, "original_module", None)  # PEFT's wrappers do not all hand it on
    if isinstance(inside, nn.Module):
        return input_width(inside)
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
    weight = _weight_out_in(module)
    if weight is None:
        return _pulled_back_rows(module, ids, dtype)
    ids = ids.to(weight.device)
    W = weight.index_select(0, ids).to(dtype)
    bias = stored(module, "bias")
    b = W.new_zeros(len(ids)) if bias is None else bias.index_select(0, ids).to(dtype)
    return W, b


def mean_row(module: nn.Module, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The unembedding's first ``count`` rows and biases, averaged: [d] and []."""
    weight = _weight_out_in(module)
    if weight is None:
        b_V = _biases(module)
        average = torch.zeros_like(b_V, dtype=dtype)[None]
        average[:, :count] = 1 / count
        W_mean = vjp.pull_back(module, average, input_width(module), _UNEMBED, _NO_ROWS)[0]
        return W_mean, b_V[:count].mean(dtype=dtype)
    bias = stored(module, "bias")
    W = weight[:count].mean(0, dtype=dtype)
    b = W.new_zeros(()) if bias is None else bias[:count].mean(dtype=dtype)
    return W, b


def output_width(module: nn.Module) -> int:
    """The size of the space that a linear module writes; of an unembedding, the vocabulary's."""
    weight = _weight_out_in(module)
    if weight is None:
        size = getattr(module, "out_features", None)
        return size if isinstance(size, int) else len(_biases(module))
    return int(weight.shape[0])


def _pulled_back_rows(module: nn.Module, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`rows` of a module without a plain weight: one-hot directions, pulled back in tiles."""
    b_V, width = _biases(module), input_width(module)
    ids = ids.to(b_V.device)
    W = torch.empty(len(ids), width, dtype=dtype, device=b_V.device)
    for tile in torch.arange(len(ids)).split(max(1, _TILE_ELEMENTS // len(b_V))):
        one_hot = torch.zeros(len(tile), len(b_V), dtype=dtype, device=b_V.device)
        one_hot[torch.arange(len(tile)), ids[tile]] = 1
        W[tile] = vjp.pull_back(module, one_hot, width, _UNEMBED, _NO_ROWS)
    return W, b_V.index_select(0, ids).to(dtype)


def _biases(module: nn.Module) -> Tensor:
    """What a linear module puts out for nothing [d_out]."""
    return value_at(module, torch.zeros(input_width(module)))


def _weight_out_in(module: nn.Module) -> Tensor | None:
    """The weight as [d_out, d_in], a view; None where the module's map is not just its weight."""
    # The exact types: a subclass may quantise, gate or adapt what it does with the weight, and so
    # may a weight that is no plain tensor, or a forward pass of the module's own. accelerate's
    # brings the weights and takes them away, no more.
    own_forward = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    if own_forward or type(getattr(module, "weight", None)) not in (Tensor, nn.Parameter):
        return None
    if type(module) is nn.Linear:
        return stored(module, "weight")
    if type(module) is Conv1D:
        weight = stored(module, "weight")
        return None if weight is None else weight.T
    return None
