"""The weights that the TransformerLens-shaped face shows, made from the model's own when asked.

Nothing is kept and nothing is written back: each function reads the modules of a located stream
and returns a tensor, a view of the model's own weight where no processing has to be done.

Shapes: V the vocabulary, M d_model, H heads, D d_head, K some tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.calibration.value_biases import head_constants
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules import norms
from dla_hooks.modules.faults import as_refusal
from dla_hooks.modules.hooks import Call, Tap, tapped
from dla_hooks.modules.linear import input_width, matrix, mean_row, rows, value_at
from dla_hooks.modules.vjp import past_hooks
from dla_hooks.modules.weights import run_device, stored
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.targets.tokens import before_norm

_TILE = 1024
"""Rows of the unembedding that are folded at once."""


@dataclass(frozen=True)
class Processing:
    """Changes to the weights that are shown; none of them changes a log-probability.

    Attributes:
        fold_ln: the norms' gains and biases sit in the weights that read them.
        center_writing_weights: what writes to the stream has mean zero over d_model.
        center_unembed: W_U has mean zero over the vocabulary.
        fold_value_biases: the value biases sit in b_O.
    """

    fold_ln: bool = True
    center_writing_weights: bool = True
    center_unembed: bool = True
    fold_value_biases: bool = True


def unembedding(stream: Stream, processing: Processing) -> Tensor:
    """W_U [M, V] in the model's dtype."""
    weight = stored(stream.unembed, "weight")
    if _is_as_stored(stream, processing) and weight is not None:
        return weight[: stream.vocabulary].T
    reader = UnembedReader(stream, processing)
    W_VM: Tensor | None = None
    for tile in torch.arange(stream.vocabulary, device="cpu").split(_TILE):
        W_KM, _ = reader.read(tile)
        if W_VM is None:
            W_VM = W_KM.new_empty(stream.vocabulary, W_KM.shape[1], dtype=stream.dtype)
        W_VM[tile] = W_KM.to(stream.dtype)
    assert W_VM is not None  # no model has an empty vocabulary
    return W_VM.T


def unembedding_bias(stream: Stream, processing: Processing) -> Tensor:
    """b_U [V] in the model's dtype; zeros where there is none."""
    reader = UnembedReader(stream, processing)
    tiles = torch.arange(stream.vocabulary, device="cpu").split(_TILE)
    return torch.cat([reader.read(tile)[1] for tile in tiles]).to(stream.dtype)


class UnembedReader:
    """Reads rows of the processed W_U and b_U, a few at a time.

    Args:
        stream: the located model.
        processing: what to fold and to centre.
    """

    def __init__(self, stream: Stream, processing: Processing) -> None:
        dtype = stream.work_dtype
        self._stream = stream
        self._norm = None
        if processing.fold_ln:
            self._norm = norms.probe(
                stream.final_norm.module, stream.d_model, stream.final_norm.name, dtype
            )
        self._mean: tuple[Tensor, Tensor] | None = None
        if centres_unembed(stream, processing):
            self._mean = mean_row(stream.unembed, stream.vocabulary, dtype)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [K, M] and biases [K] of some tokens [K], in at least float32."""
        W_KM, b_K = rows(self._stream.unembed, ids, self._stream.work_dtype)
        if self._mean is not None:
            W_KM, b_K = W_KM - self._mean[0], b_K - self._mean[1]
        return before_norm(self._stream, self._norm, W_KM, b_K)


def centres_unembed(stream: Stream, processing: Processing) -> bool:
    """Decide whether the vocabulary's mean is taken off; a softcap would change with it."""
    return processing.center_unembed and stream.softcap is None


def _is_as_stored(stream: Stream, processing: Processing) -> bool:
    changed = processing.fold_ln or centres_unembed(stream, processing)
    return not changed and stream.logit_scale == 1 and not stream.after_norm


def embedding(stream: Stream, processing: Processing) -> Tensor:
    """W_E [V, M]: each token's part of the stream's start, as a number times the module's weight.

    Behind a norm or a projection it is the module's weight as it is.
    """
    module = stream.backend.embedding()
    W_VM = stored(module, "weight") if "weight" in module._parameters else None
    if W_VM is None and isinstance(getattr(module, "weight", None), Tensor):
        # A wrapper, as an adapter puts one around the module: its weight is not the whole of it.
        what = f"W_E: {type(module).__name__} cannot be run on all tokens at once"
        with as_refusal(what), past_hooks(module), torch.no_grad():
            W_VM = module.forward(
                torch.arange(stream.backend.n_tokens(), device=run_device(module))
            )
    if W_VM is None:
        raise UnsupportedModelError(
            f"W_E: {type(module).__name__} keeps no plain weight; "
            "look at model.get_input_embeddings()"
        )
    ids, start, positions = _beginning(stream)
    if start.shape[-1] != W_VM.shape[-1]:
        return W_VM
    if positions is not None:
        start = start - positions
    weight = W_VM[ids.to(W_VM.device)].to(start)
    scale = (start * weight).sum() / weight.square().sum()
    if not _equal(start, weight, stream) and _equal(start, scale * weight, stream):
        W_VM = W_VM * scale.to(W_VM)
    return _as_embedding(W_VM, stream, processing)


def positional_embedding(stream: Stream, processing: Processing) -> Tensor:
    """W_pos [n_ctx, M]: each position's part of the stream's start.

    Raises:
        UnsupportedModelError: where positions enter the stream, but from no plain table.
    """
    assert stream.positions is not None
    W_PM = stored(stream.positions.module, "weight")
    _, _, seen = _beginning(stream)
    if W_PM is not None and seen is not None:
        if stream.position_limit is not None:
            W_PM = W_PM[-stream.position_limit :]  # OPT's table begins with two unused rows
        if stream.positions_response is not None:
            W_PM = W_PM * stream.positions_response.to(W_PM)
        if _equal(seen, W_PM[: len(seen)].to(seen), stream):
            return _as_embedding(W_PM, stream, processing)
    raise UnsupportedModelError(
        f"W_pos: what {stream.positions.name} ({type(stream.positions.module).__name__}) puts "
        "out are not the rows of a plain weight; run it on the positions that you want"
    )


def _beginning(stream: Stream) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two tokens' ids [2], the stream that they begin [2, M], and the positions' part of it."""
    prompt = short_prompt(stream, length=2)
    seen: dict[str, Tensor] = {}

    def keep(call: Call, key: str) -> None:
        out = call.activation
        seen[key] = out.detach().to(stream.work_dtype).reshape(-1, out.shape[-1]).clone()

    taps = [Tap(stream.start, lambda call: keep(call, "start"))]
    if stream.positions is not None:
        taps.append(Tap(stream.positions, lambda call: keep(call, "positions")))
    with tapped(taps):
        stream.backend.run_synthetic(prompt, None)
    positions = seen.get("positions")
    if positions is not None and stream.positions_response is not None:
        positions = positions * stream.positions_response.to(positions)
    return prompt.input_ids[0], seen["start"], positions


def _equal(one: Tensor, other: Tensor, stream: Stream) -> bool:
    tolerance = 1e-5 + 4 * torch.finfo(stream.coarsest_dtype).eps
    return bool((one - other.to(one)).norm() <= tolerance * one.norm())


def head_site(stream: Stream, layer: int) -> tuple[WriteSite, HeadSite]:
    """The write of a block that splits into heads, and where they are.

    Raises:
        UnsupportedModelError: when it has none.
    """
    block = with_head_widths(stream).blocks[layer]
    for write in block.writes:
        if write.heads is not None:
            return write, write.heads
    labels = ", ".join(write.label for write in block.writes)
    others = [str(other.layer) for other in stream.blocks if any(w.heads for w in other.writes)]
    raise UnsupportedModelError(
        f"block {layer} ({block.name}) has no attention heads, and so no W_O and b_O: what it "
        f"writes is {labels}. Blocks with heads: {', '.join(others) or 'none'}"
    )


def output_matrices(stream: Stream, processing: Processing, layers: list[int]) -> list[Tensor]:
    """W_O [H, D, M] of some blocks, from whatever their output projections are."""
    sites = [head_site(stream, layer) for layer in layers]
    centres = centres_writes(stream, processing, [write for write, _ in sites])
    found = []
    for (_, site), centre in zip(sites, centres, strict=True):
        W_O = matrix(site.linear).T.reshape(site.n_heads, site.d_head, -1)
        found.append(_centred(W_O) if centre else W_O)
    return found


def output_biases(stream: Stream, processing: Processing, layers: list[int]) -> Tensor:
    """b_O [layers, M]: the output projections' values for z = 0, or for its constant part."""
    sites = [head_site(stream, layer) for layer in layers]
    centres = centres_writes(stream, processing, [write for write, _ in sites])
    constants: dict[str, Tensor] = {}
    if processing.fold_value_biases:
        constants = head_constants(stream, norm_bias=processing.fold_ln)
    biases = []
    for (write, site), centre in zip(sites, centres, strict=True):
        nothing = torch.zeros(input_width(site.linear), dtype=torch.float32, device="cpu")
        bias = value_at(site.linear, constants.get(write.label, nothing))
        biases.append(_centred(bias) if centre else bias)
    return torch.stack([bias.to(biases[0]) for bias in biases])


def centres_writes(
    stream: Stream, processing: Processing, writes: Sequence[WriteSite | None]
) -> list[bool]:
    """Decide of each write (None: an embedding) whether the mean over d_model is taken off it.

    It is taken off only where no logit changes. The final norm must centre, and until then the
    write must be neither normed nor scaled channel by channel. The final norm is probed once.
    """
    none = [False] * len(writes)
    scaled = any(_per_channel(block.gain) for block in stream.blocks)
    if scaled or not processing.center_writing_weights:
        return none
    plain = [
        write is None or (write.post_norm is None and not _per_channel(write.response))
        for write in writes
    ]
    if not any(plain):
        return none
    norm = norms.probe(
        stream.final_norm.module, stream.d_model, stream.final_norm.name, stream.work_dtype
    )
    return plain if norm.centred else none


def _as_embedding(W: Tensor, stream: Stream, processing: Processing) -> Tensor:
    (centre,) = centres_writes(stream, processing, [None])
    return _centred(W) if centre else W


def _per_channel(factor: Tensor | None) -> bool:
    return factor is not None and factor.ndim > 0


def _centred(W: Tensor) -> Tensor:
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    return (wide - wide.mean(-1, keepdim=True)).to(W.dtype)
