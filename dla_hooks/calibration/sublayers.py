"""Parts of a block that no declaration names, found by what they do in a short run.

These are the norms that its sublayers read the stream through, and the last linear map of its MLP.
"""

from __future__ import annotations

from torch import nn

from dla_hooks.calibration.block_run import ANY_NUMBER, run_block, same
from dla_hooks.calibration.last_maps import neuron_sites
from dla_hooks.calibration.mid_terms import mid_stream
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.hooks import Place, Use
from dla_hooks.modules.norms import probe
from dla_hooks.residual.stream import Block, Stream, WriteSite


def norm_before(stream: Stream, place: int, *, mlp: bool) -> Place:
    """Find the norm through which one block's attention, or its MLP, reads the stream.

    Args:
        stream: the located model.
        place: of the block in ``stream.blocks``.
        mlp: the norm before its MLP; otherwise before its attention.

    Raises:
        UnsupportedModelError: when there is none, as in blocks that norm what they write.
    """
    block = stream.blocks[place]
    what = "MLP" if mlp else "attention"
    name = stream.backend.norm_before(mlp=mlp)
    if name is not None:
        found = getattr(block.module, name, None)
        if isinstance(found, nn.Module):
            return Place(found, f"{block.name}.{name}", Use(0, ANY_NUMBER))
        raise _no_norm(block, what)
    run = run_block(stream, block)
    x = run.input
    mid = mid_stream(stream, place) if mlp else None
    if mid is not None:
        x = mid.of(x, [run.writes[w.label][1] for w in block.writes[: len(mid.responses)]])
    for call in run.calls:
        if same(call.entered, x):
            try:
                probe(call.module, stream.d_model, call.name, stream.work_dtype)
            except UnsupportedModelError:
                continue  # it reads the stream, but is no norm
            # It may run for queries, keys and values apart, and again in a block used again.
            return Place(call.module, call.name, Use(call.nth, ANY_NUMBER))
    raise _no_norm(block, what)


def _no_norm(block: Block, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{block.name} has no norm before its {what}, so apply_ln has no scale to use there; "
        "use apply_ln=False, or apply it at the final layer"
    )


def neurons(stream: Stream, write: WriteSite) -> tuple[Place, nn.Module]:
    """Find where the neurons of one MLP can be seen, and the linear map that they enter.

    Raises:
        UnsupportedModelError: when no single linear module makes the write, as with experts.
    """
    site = neuron_sites(stream).get(write.label)
    inside = site is not None and site.norm is not None and write.post_norm is None
    if site is None or site.factor != 1 or inside:
        raise UnsupportedModelError(
            f"{write.label} is not written by one linear module (experts, gates and convolutions "
            "are not), so it has no neurons to stack"
        )
    return site.place, site.linear
