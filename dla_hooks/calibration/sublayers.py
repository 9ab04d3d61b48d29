"""Parts of a block that no declaration names, found by what they do in a short run.

The norms that its sublayers read the stream through, and the down projection of its MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.hooks import Place, Tap, tapped
from dla_hooks.modules.linear import input_width
from dla_hooks.modules.norms import probe
from dla_hooks.residual.stream import Block, Stream, WriteSite


def norm_before(stream: Stream, layer: int, *, mlp: bool) -> tuple[nn.Module, str]:
    """Find the norm through which block ``layer``'s attention, or its MLP, reads the stream.

    Raises:
        UnsupportedModelError: when there is none, as in blocks that norm what they write.
    """
    block = stream.blocks[layer]
    what = "MLP" if mlp else "attention"
    name = stream.backend.norm_before(mlp=mlp)
    if name is not None:
        found = getattr(block.module, name, None)
        if isinstance(found, nn.Module):
            return found, f"{block.name}.{name}"
        raise _no_norm(block, what)
    kept = _short_run(stream, block)
    x = kept[block.name][0]
    if mlp:
        n_before = mid_streams(stream)[layer]
        for write in block.writes[: n_before or 0]:
            x = x + kept[write.name][1]
    for name, (seen, _) in kept.items():
        module = block.module if name == block.name else _at(stream, name)
        if name != block.name and seen.shape == x.shape and _same(seen, x):
            try:
                probe(module, stream.d_model, name, stream.work_dtype)
            except UnsupportedModelError:
                continue  # it reads the stream, but is no norm
            return module, name
    raise _no_norm(block, what)


def _no_norm(block: Block, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{block.name} has no norm before its {what}, so apply_ln has no scale to use there; "
        "use apply_ln=False, or apply it at the final layer"
    )


def neurons(stream: Stream, write: WriteSite) -> tuple[nn.Module, str, nn.Module]:
    """Find where the neurons of one MLP are seen: a module, its path, and their linear map.

    Raises:
        UnsupportedModelError: when no single linear module makes the write, as with experts.
    """
    block = stream.blocks[write.layer]
    found = stream.backend.neurons(block.module)
    if found is not None:
        hook, path, linear = found
        return hook, f"{block.name}.{path}", linear
    kept = _short_run(stream, block)
    wrote = kept[write.name][0 if write.post_norm is not None else 1]
    for name, (_, out) in reversed(kept.items()):
        module = _at(stream, name)
        if out.shape == wrote.shape and _same(out, wrote):
            try:
                width = input_width(module)
            except UnsupportedModelError:
                continue  # a container around the projection
            if width > 1:
                return module, name, module
    raise UnsupportedModelError(
        f"{write.label} is not written by one linear module (experts, gates and convolutions are "
        "not), so it has no neurons to stack"
    )


def _short_run(stream: Stream, block: Block) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a few tokens: the input and output of every module of a block, in order."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            out = output[0] if isinstance(output, tuple) and output else output
            if tensors and isinstance(out, Tensor) and out.is_floating_point():
                kept[name] = (_flat(tensors[0]), _flat(out))

        return hook

    try:
        for path, module in block.module.named_modules():
            name = f"{block.name}.{path}" if path else block.name
            handles.append(module.register_forward_hook(keep(name), with_kwargs=True))
        see = keep(block.name)
        tap = Tap(
            Place(block.module, block.name, block.use),
            lambda call: see(None, (call.entered,), {}, call.left),
        )
        with tapped([tap]):
            stream.backend.run_synthetic(short_prompt(stream), None)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).clone()


def _same(one: Tensor, other: Tensor) -> bool:
    tolerance = 8 * torch.finfo(other.dtype).eps if other.is_floating_point() else 0
    return bool((one.double() - other.double()).norm() <= tolerance * other.double().norm())


def _at(stream: Stream, name: str) -> nn.Module:
    found: nn.Module = stream.backend.root.get_submodule(name)
    return found
