"""From a model and its declaration to the modules themselves: the located residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.architecture import Architecture, Write
from dla_hooks.errors import InputError, TrainingModeError, UnsupportedModelError
from dla_hooks.hooks import Use
from dla_hooks.linear import input_width, vocabulary_size


@dataclass(frozen=True)
class HeadSite:
    """Where the heads of one write can be seen, side by side.

    Attributes:
        proj: the output projection, whose input is z [batch, pos, n_heads * d_head].
        name: its path.
        attention: the module that holds the projection and reads the (normed) stream.
        n_heads: number of heads.
        d_head: width of one head.
    """

    proj: nn.Module
    name: str
    attention: nn.Module
    n_heads: int
    d_head: int


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
    """

    label: str
    layer: int
    module: nn.Module
    post_norm: nn.Module | None
    name: str
    use: Use
    heads: HeadSite | None
    response: Tensor | None = None

    @property
    def written_by(self) -> nn.Module:
        """The module whose output enters the stream."""
        return self.module if self.post_norm is None else self.post_norm


@dataclass(frozen=True)
class Block:
    """One block of the stack, or one use of a block that is used several times.

    Attributes:
        layer: its place in the stack.
        module: the block.
        name: its path.
        use: which run of the module it is.
        writes: what it adds to the stream, in order.
        gain: what it multiplies its input by, [] or [d_model]; None is one.
        constant: what it adds besides its writes [d_model]; None is nothing.
    """

    layer: int
    module: nn.Module
    name: str
    use: Use
    writes: tuple[WriteSite, ...]
    gain: Tensor | None = None
    constant: Tensor | None = None


@dataclass(frozen=True)
class Stream:
    """A model's residual stream, from block 0 to the logits.

    Attributes:
        model: the causal LM.
        architecture: the declaration it was located by.
        blocks: the stack.
        positions: the module that adds positions, if any.
        start: the module whose output is the beginning of the stream, if it is not block 0's
            input.
        final_norm: the last norm.
        final_norm_name: its path.
        final_norm_runs: how often it runs; the last time is the one.
        after_norm: linear modules between it and the unembedding.
        unembed: the output embedding.
        d_model: width of the stream.
        vocabulary: number of tokens that the unembedding scores.
        logit_scale: what the logits are multiplied by.
        softcap: the cap on the logits, or None.
        stream_dtype: in which the blocks are added up.
        positions_response: what the stream's beginning multiplies positions by; None is one.
        remembered: whether the answers come from an earlier call.
        position_limit: the longest prompt that can run, or None where there is no fixed limit.
    """

    model: Any
    architecture: Architecture
    blocks: tuple[Block, ...]
    positions: nn.Module | None
    start: nn.Module | None
    final_norm: nn.Module
    final_norm_name: str
    after_norm: tuple[nn.Module, ...]
    unembed: nn.Module
    d_model: int
    vocabulary: int
    position_limit: int | None
    final_norm_runs: int = 1
    stream_dtype: torch.dtype = torch.float64
    logit_scale: float = 1.0
    softcap: float | None = None
    positions_response: Tensor | None = None
    remembered: bool = False

    @property
    def writes(self) -> tuple[WriteSite, ...]:
        """All writes, in the order in which they are added."""
        return tuple(write for block in self.blocks for write in block.writes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's unembedding."""
        return next(self.unembed.parameters()).dtype

    @property
    def coarsest_dtype(self) -> torch.dtype:
        """Of the weights' and the stream's, the dtype that rounds more (Mamba adds in float32)."""
        return max(self.dtype, self.stream_dtype, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype of every contraction: float64 for float64 models, float32 for all others."""
        return torch.promote_types(self.dtype, torch.float32)


def check_model(model: Any) -> None:
    """Refuse what is not a causal language model in evaluation mode.

    Raises:
        InputError: for something that is no Hugging Face model at all.
        UnsupportedModelError: for encoders, encoder-decoders and models without an LM head.
        TrainingModeError: when the model or any part of it is in training mode.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise InputError(
            f"model must be a Hugging Face causal language model, got {type(model).__name__}; "
            "load one with AutoModelForCausalLM.from_pretrained(folder)"
        )
    config: Any = model.config
    name = f"{type(model).__name__} (model type {config.model_type!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its decoder's stream also holds what the encoder "
            "wrote. Only decoder-only causal language models can be attributed."
        )
    find_unembed: Any = getattr(model, "get_output_embeddings", lambda: None)
    if find_unembed() is None:
        raise UnsupportedModelError(
            f"{name} has no unembedding, so there are no logits to attribute; "
            "load it with AutoModelForCausalLM"
        )
    for path, module in model.named_modules():
        if module.training:
            place = f" (in {path})" if path else ""
            raise TrainingModeError(
                f"the model is in training mode{place}, where dropout changes every run; "
                "call model.eval() first"
            )


def locate(model: Any, architecture: Architecture) -> Stream:
    """Find every module that a declaration names.

    Args:
        model: a causal LM that :func:`check_model` let through.
        architecture: the declaration.

    Raises:
        UnsupportedModelError: when the model does not have what the declaration says.
    """
    finder = _Finder(model, architecture)
    found = (finder.optional(model, path) for path in architecture.after_norm)
    after_norm = tuple(module for module in found if module is not None)
    unembed = model.get_output_embeddings()
    limit = architecture.position_limit
    return Stream(
        model=model,
        architecture=architecture,
        blocks=finder.blocks(),
        positions=finder.module(model, architecture.positions) if architecture.positions else None,
        start=finder.module(model, architecture.start) if architecture.start else None,
        final_norm=finder.final_norm(),
        final_norm_name=architecture.final_norm,
        after_norm=after_norm,
        unembed=unembed,
        d_model=input_width((*after_norm, unembed)[0]),
        vocabulary=vocabulary_size(unembed),
        position_limit=finder.number(limit) if limit else None,
    )


class _Finder:
    """Resolves a declaration's paths and field names, and says what is missing."""

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.model = model
        self.architecture = architecture
        self.config = model.config.get_text_config()

    def refusal(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} (model type {self.model.config.model_type!r}) does not "
            f"fit the declaration of {', '.join(self.architecture.model_types)}: {what}"
        )

    def module(self, root: nn.Module, path: str) -> nn.Module:
        found = self.optional(root, path)
        if found is None:
            raise self.refusal(f"there is no module {path!r}")
        return found

    def final_norm(self) -> nn.Module:
        found = self.optional(self.model, self.architecture.final_norm)
        if found is None:
            raise self.refusal(
                f"there is no final norm ({self.architecture.final_norm}), as in models whose "
                "blocks norm their own sum; those are no sums of writes"
            )
        return found

    def optional(self, root: nn.Module, path: str) -> nn.Module | None:
        """None where there is no such module, or the config has switched it off."""
        found: Any = root
        for name in filter(None, path.split(".")):
            found = getattr(found, name, None)
        return found if isinstance(found, nn.Module) else None

    def number(self, field: str) -> int:
        value = getattr(self.config, field, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(f"config.{field} should be a number, but is {value!r}")
        return value

    def blocks(self) -> tuple[Block, ...]:
        path = self.architecture.layers
        layers: Any = self.module(self.model, path)
        modules = list(layers) if isinstance(layers, Iterable) else list(layers.children())
        if not modules:
            raise self.refusal(f"{path} holds no blocks")
        uses = Counter(modules)
        so_far: Counter[nn.Module] = Counter()
        blocks = []
        for layer, module in enumerate(modules):
            use = Use(so_far[module], uses[module])
            so_far[module] += 1
            name = f"{path}.{layer}"
            found = (self.write(module, name, layer, w, use) for w in self.architecture.writes)
            writes = tuple(write for write in found if write is not None)
            twice = [n for n, k in Counter(w.name for w in writes).items() if k > 1]
            if twice:
                raise self.refusal(f"{twice[0]} is said to make two writes of one block")
            if not writes:
                names = [write.module for write in self.architecture.writes]
                raise self.refusal(f"{name} has none of the modules {names}")
            blocks.append(Block(layer, module, name, use, writes))
        return self.with_uses(tuple(blocks))

    def with_uses(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """The blocks with every write's use counted by its own module, which blocks may share."""
        total = Counter(write.written_by for block in blocks for write in block.writes)
        so_far: Counter[nn.Module] = Counter()
        counted = []
        for block in blocks:
            writes = []
            for write in block.writes:
                use = Use(so_far[write.written_by], total[write.written_by])
                so_far[write.written_by] += 1
                writes.append(replace(write, use=use))
            counted.append(replace(block, writes=tuple(writes)))
        return tuple(counted)

    def write(
        self, block: nn.Module, prefix: str, layer: int, write: Write, use: Use
    ) -> WriteSite | None:
        if write.beside is not None:
            neighbours: Any = self.module(self.model, write.beside)
            if layer + 1 >= len(neighbours):
                return None
            block, prefix = neighbours[layer + 1], f"{write.beside}.{layer + 1}"
        names = (write.module,) if isinstance(write.module, str) else write.module
        path = next((name for name in names if self.optional(block, name) is not None), None)
        if path is None:
            return None
        post_norm = self.optional(block, write.post_norm) if write.post_norm else None
        return WriteSite(
            label=f"{layer}_{write.label}",
            layer=layer,
            module=self.module(block, path),
            post_norm=post_norm,
            name=f"{prefix}.{path if post_norm is None else write.post_norm}",
            use=use,
            heads=self.heads(block, prefix, write),
        )

    def heads(self, block: nn.Module, prefix: str, write: Write) -> HeadSite | None:
        proj = self.optional(block, write.heads.proj) if write.heads is not None else None
        if write.heads is None or proj is None:
            return None
        attention: Any = self.module(block, write.heads.proj.rpartition(".")[0])
        if isinstance(write.module, str) and write.heads.proj.startswith(f"{write.module}."):
            attention = self.module(block, write.module)  # a projection may be wrapped once more
        # The layer knows best: layers of one model may differ, and then the config has no answer.
        n_heads = getattr(attention, "num_heads", None)
        if isinstance(n_heads, bool) or not isinstance(n_heads, int):
            n_heads = self.number(write.heads.count)
        width = input_width(proj)
        if width % n_heads:
            raise self.refusal(
                f"{prefix}.{write.heads.proj} reads {width} channels, which {n_heads} heads "
                f"(config.{write.heads.count}) cannot share evenly"
            )
        return HeadSite(
            proj=proj,
            name=f"{prefix}.{write.heads.proj}",
            attention=attention,
            n_heads=n_heads,
            d_head=width // n_heads,
        )
