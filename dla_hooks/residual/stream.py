"""A located residual stream: the modules that a declaration names, found in one model.

Decided here: the dtype of each place and of all contractions (``work_dtype``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.backends import Backend
from dla_hooks.modules.hooks import Place, Use
from dla_hooks.modules.vjp import dtype_of
from dla_hooks.residual.architecture import Architecture
from dla_hooks.residual.head_site import HeadSite


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that rounds most."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@dataclass(frozen=True)
class WriteSite:
    """One term that one block adds to the stream.

    Attributes:
        label: ``{layer}_{label}``.
        layer: the block's index.
        module: the module that makes the term, before any post-norm.
        post_norm: the norm between it and the stream, if any.
        name: path of the module whose output enters the stream.
        use: which run of that module it is, where blocks share it.
        response: what the block's output multiplies the term by, [] or [d_model]; None is one.
        heads: where its heads can be seen, if it has any.
        without_heads: the path of the projection that should show them, where there is none.
        by_row: the keyword argument of its block that multiplies it position by position, if any.
    """

    label: str
    layer: int
    module: nn.Module
    post_norm: nn.Module | None
    name: str
    use: Use
    heads: HeadSite | None
    response: Tensor | None = None
    without_heads: str = ""
    by_row: str | None = None

    @property
    def written_by(self) -> nn.Module:
        """The module whose output enters the stream."""
        return self.module if self.post_norm is None else self.post_norm

    @property
    def kind(self) -> str:
        """The term without its block: ``attn_out``, ``mlp_out``."""
        return self.label.removeprefix(f"{self.layer}_")

    @property
    def place(self) -> Place:
        """The place where the term leaves for the stream."""
        return Place(self.written_by, self.name, self.use)


@dataclass(frozen=True)
class Carrier:
    """A module in a block that carries the stream on, or a term to it, and writes nothing itself.

    BLOOM's attention adds its input to what it wrote; a dropout stands behind a write. What the
    caller's hooks change there enters the stream.

    Attributes:
        place: its input or its output.
        after: how many of the block's writes run before it, once it is measured.
        response: what the block's output multiplies a change there by; None is one.
    """

    place: Place
    after: int = 0
    response: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """One block of the stack, or one use of a block that is used several times.

    Attributes:
        layer: its place in the stack.
        module: the block.
        name: its path.
        use: the run of the module.
        writes: the terms that it adds to the stream, in order.
        gain: the factor of its input, [] or [d_model]; None is one.
        constant: the vector that it adds besides its writes [d_model]; None is nothing.
        carriers: modules in it that carry the stream on; before they are measured, those that may.
        optional: whether it runs only where there is something for its cross-attention to read.
        inner: the block itself, where the module is a wrapper of the caller's around it.
        behind: the factor between its output and what reads the stream next, [] or [d_model]; None
            is one. RWKV halves its stream behind some blocks.
    """

    layer: int
    module: nn.Module
    name: str
    use: Use
    writes: tuple[WriteSite, ...]
    gain: Tensor | None = None
    constant: Tensor | None = None
    carriers: tuple[Carrier, ...] = ()
    optional: bool = False
    inner: Place | None = None
    behind: Tensor | None = None

    @property
    def input(self) -> Place:
        """The stream before the block."""
        return Place(self.module, self.name, self.use, before=True)

    @property
    def output(self) -> Place:
        """What the block returns."""
        return Place(self.module, self.name, self.use)


@dataclass(frozen=True)
class Ending:
    """Where a stream ends that is read ahead of the final norm.

    Attributes:
        label: of that stream, in the ``layer`` unit: ``8_pre``, ``8_mid``.
        places: behind its last write, where hooks may write to it; the last one is read.
        until: the input of a block, or of the final norm, from which on nothing need run.
        whole: the model's whole stream.
        within: whether it ends in the middle of its last block.
    """

    label: str
    places: tuple[Place, ...]
    until: Place
    whole: Stream
    within: bool = False


@dataclass(frozen=True)
class Stream:
    """A model's residual stream, from block 0 to the logits.

    Attributes:
        backend: the kind of model, which runs it.
        architecture: the declaration that it was located by.
        blocks: the stack.
        positions: the place of the position embeddings, if they are added to the stream.
        declared_start: the beginning of the stream, if that is not block 0's input.
        final_norm: the last norm, in the last of its runs.
        after_norm: linear modules between it and the unembedding.
        unembed: the output embedding.
        d_model: width of the stream.
        vocabulary: number of tokens that the unembedding scores.
        logit_scale: the factor of the logits.
        logit_bias: what each logit has besides the unembedding's own output, before that factor
            [vocabulary], float64; None is nothing.
        softcap: the cap on the logits, or None.
        masked: tokens that the model masks with -inf [n], or None.
        stream_dtype: in which the blocks are added up.
        write_dtype: the coarsest in which a write leaves its module.
        read_dtype: the coarsest of the final norm's output, the unembedding and the logits.
        positions_response: what the stream's beginning multiplies positions by; None is one.
        ahead: how many positions the model puts before those of a prompt.
        version: of the model, as its scales were measured.
        remembered: whether the answers come from an earlier call.
        position_limit: the longest prompt that can run, or None where there is no fixed limit.
        ending: where it is read, if that is ahead of the final norm: ``blocks`` then end there.
    """

    backend: Backend
    architecture: Architecture
    blocks: tuple[Block, ...]
    positions: Place | None
    declared_start: Place | None
    final_norm: Place
    after_norm: tuple[nn.Module, ...]
    unembed: nn.Module
    d_model: int
    vocabulary: int
    position_limit: int | None
    stream_dtype: torch.dtype = torch.float64
    write_dtype: torch.dtype = torch.float64
    read_dtype: torch.dtype = torch.float64
    logit_scale: float = 1.0
    logit_bias: Tensor | None = None
    softcap: float | None = None
    masked: Tensor | None = None
    positions_response: Tensor | None = None
    ahead: int = 0
    version: int = 0
    remembered: bool = False
    ending: Ending | None = None

    @property
    def whole(self) -> Stream:
        """The model's whole stream, of which everything is measured."""
        return self if self.ending is None else self.ending.whole

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.backend.model

    @cached_property
    def embedding(self) -> Place:
        """The token embeddings, before positions and scales."""
        return Place(self.backend.embedding(), self.backend.embedding_name)

    @property
    def start(self) -> Place:
        """The beginning of the stream."""
        return self.declared_start or self.whole.blocks[0].input

    @property
    def last(self) -> Place:
        """The last stream: the final norm's input, or where it is read ahead of that."""
        return self.behind_blocks[-1]

    @property
    def last_label(self) -> str:
        """The label of the last stream."""
        return "final_post" if self.ending is None else self.ending.label

    @property
    def extent(self) -> str:
        """How much of the model is read, for messages that name it; all of it says nothing."""
        return "" if self.ending is None else f", as far as {self.last_label},"

    @property
    def behind_blocks(self) -> tuple[Place, ...]:
        """The places of the stream behind its last write; it is read at the last one."""
        return (self.final_norm.entered,) if self.ending is None else self.ending.places

    @property
    def beginning(self) -> Place:
        """The start, ahead of what the caller's hooks write to block 0's input."""
        return self.start.ahead if self.start.before else self.start

    def input_of(self, block: Block) -> Place:
        """The stream before a block; for the first one, its declared start."""
        return self.start if block.input == self.whole.blocks[0].input else block.input

    @cached_property
    def n_tokens(self) -> int:
        """The number of tokens that can be embedded."""
        return self.backend.n_tokens()

    @cached_property
    def writes(self) -> tuple[WriteSite, ...]:
        """All writes, in the order in which they are added."""
        return tuple(write for block in self.blocks for write in block.writes)

    @cached_property
    def hookable(self) -> tuple[nn.Module, ...]:
        """The modules at which hooks may write to the stream, at, in and behind its blocks."""
        carriers = [carrier.place for block in self.blocks for carrier in block.carriers]
        places = [self.embedding, *(block.input for block in self.blocks), *carriers]
        return tuple(dict.fromkeys(place.module for place in (*places, *self.behind_blocks)))

    @cached_property
    def wrapped(self) -> bool:
        """Whether a wrapper of the caller's stands around one of its blocks."""
        return any(block.inner is not None for block in self.blocks)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the model's unembedding runs in."""
        return dtype_of(self.unembed)

    @cached_property
    def coarsest_dtype(self) -> torch.dtype:
        """Of all that the stream is added up and read in, the dtype that rounds most."""
        return coarsest((self.dtype, self.stream_dtype, self.read_dtype))

    @cached_property
    def product_dtype(self) -> torch.dtype:
        """Of the stream, the writes and the products that make heads writes, the coarsest dtype.

        A module may round its product to 16 bits and hand it on in 32, as those with weights in
        four bits do.
        """
        products = [dtype_of(write.heads.linear) for write in self.writes if write.heads]
        return coarsest((self.coarsest_dtype, self.write_dtype, *products))

    @cached_property
    def work_dtype(self) -> torch.dtype:
        """The dtype of every contraction: float64 for float64 models, float32 for all others."""
        return torch.promote_types(self.dtype, torch.float32)
