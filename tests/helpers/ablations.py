"""Ablations by hand: hooks, and copies of a model whose weights lack a part.

Nothing here is shared with the library.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from oracle_families import family_of, layer_at, module_at, n_heads, post_norms, write_modules

MAPS = (
    *("mlp.c_proj", "mlp.dense_4h_to_h", "fc2", "mlp.fc2", "mlp.down_proj"),
    *("mlp.fc_out",),
)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def last_map(model, layer):
    block = layer_at(model, layer)
    for path in MAPS:
        with contextlib.suppress(AttributeError):
            return block.get_submodule(path)
    raise LookupError(f"no last map in {type(block).__name__}")


def o_proj(model, layer):
    return module_at(layer_at(model, layer), family_of(model).o_proj)


def without_inputs(model, find, channels):
    """A copy of the model in which a linear module does not read some of its channels."""
    other = copy.deepcopy(model)
    linear = find(other)
    with torch.no_grad():
        if type(linear).__name__ == "Conv1D":
            linear.weight[channels] = 0
        else:
            linear.weight[:, channels] = 0
    return other


def width_of(linear):
    return linear.weight.shape[0 if type(linear).__name__ == "Conv1D" else 1]


def head_slice(model, layer, head):
    d_head = width_of(o_proj(model, layer)) // n_heads(model)
    return slice(head * d_head, (head + 1) * d_head)


def replaced(module, change):
    def hook(_, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return module.register_forward_hook(hook)


@contextlib.contextmanager
def by_hand(module, change, at_input=False):
    if at_input:
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:
        handle = replaced(module, change)
    try:
        yield
    finally:
        handle.remove()


def writer(model, label):
    return {**write_modules(model), **post_norms(model)}[label]


def experts_of(model, layer):
    for module in model.get_submodule("model.layers")[layer].modules():
        weight = module._parameters.get("down_proj")
        if weight is not None and weight.ndim == 3:
            return module
    raise LookupError("no experts")


class Made:
    """A dictionary without a structure that the library could know."""

    def __init__(self, width, n=40, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.W_enc = torch.randn(width, n, generator=generator, dtype=torch.float64) / width**0.5
        self.W_dec = torch.randn(n, width, generator=generator, dtype=torch.float64) / width**0.5
        self.b = torch.randn(width, generator=generator, dtype=torch.float64)

    def encode(self, x):
        return ((x - self.b) @ self.W_enc).relu()

    def decode(self, f):
        return f @ self.W_dec + self.b
