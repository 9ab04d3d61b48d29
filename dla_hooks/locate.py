"""From a model and its declaration to the modules themselves: the located residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dla_hooks.architecture import Architecture, Write
from dla_hooks.errors import InputError, TrainingModeError, UnsupportedModelError
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
        scale: what the term is multiplied by on its way in.
        heads: where its heads can be seen, if it has any.
    """

    label: str
    layer: int
    module: nn.Module
    post_norm: nn.Module | None
    name: str
    scale: float
    heads: HeadSite | None

    @property
    def written_by(self) -> nn.Module:
        """The module whose output enters the stream."""
        return self.module if self.post_norm is None else self.post_norm


@dataclass(frozen=True)
class Block:
    """One block of the stack: the module, its path, and its writes in order."""

    module: nn.Module
    name: str
    writes: tuple[WriteSite, ...]


@dataclass(frozen=True)
class Stream:
    """A model's residual stream, from block 0 to the logits.

    Attributes:
        model: the causal LM.
        architecture: the declaration it was located by.
        blocks: the stack.
        positions: the module that adds positions, if any.
        final_norm: the last norm.
        final_norm_name: its path.
        after_norm: linear modules between it and the unembedding.
        unembed: the output embedding.
        d_model: width of the stream.
        vocabulary: number of tokens that the unembedding scores.
        logit_scale: what the logits are multiplied by.
        softcap: the cap on the logits, or None.
        position_limit: the longest prompt that can run, or None where there is no fixed limit.
    """

    model: Any
    architecture: Architecture
    blocks: tuple[Block, ...]
    positions: nn.Module | None
    final_norm: nn.Module
    final_norm_name: str
    after_norm: tuple[nn.Module, ...]
    unembed: nn.Module
    d_model: int
    vocabulary: int
    logit_scale: float
    softcap: float | None
    position_limit: int | None

    @property
    def writes(self) -> tuple[WriteSite, ...]:
        """All writes, in the order in which they are added."""
        return tuple(write for block in self.blocks for write in block.writes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's unembedding."""
        return next(self.unembed.parameters()).dtype

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
    layers = finder.module(model, architecture.layers)
    blocks = tuple(
        Block(
            module,
            f"{architecture.layers}.{layer}",
            tuple(finder.write(module, layer, write) for write in architecture.writes),
        )
        for layer, module in enumerate(layers.children())
    )
    if not blocks:
        raise finder.refusal(f"{architecture.layers} holds no blocks")
    after_norm = (finder.optional(model, path) for path in architecture.after_norm)
    unembed = model.get_output_embeddings()
    limit = architecture.position_limit
    cap = finder.number(architecture.softcap, optional=True) if architecture.softcap else None
    return Stream(
        model=model,
        architecture=architecture,
        blocks=blocks,
        positions=finder.module(model, architecture.positions) if architecture.positions else None,
        final_norm=finder.module(model, architecture.final_norm),
        final_norm_name=architecture.final_norm,
        after_norm=tuple(module for module in after_norm if module is not None),
        unembed=unembed,
        d_model=int(finder.config.hidden_size),
        vocabulary=vocabulary_size(unembed),
        logit_scale=finder.number(architecture.logit_scale)
        / finder.number(architecture.logit_divisor),
        softcap=cap or None,
        position_limit=int(finder.number(limit)) if limit else None,
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

    def optional(self, root: nn.Module, path: str) -> nn.Module | None:
        """None where there is no such module, or the config has switched it off."""
        found: Any = root
        for name in filter(None, path.split(".")):
            found = getattr(found, name, None)
        return found if isinstance(found, nn.Module) else None

    def first_of(self, root: nn.Module, paths: str | tuple[str, ...]) -> tuple[nn.Module, str]:
        """The first of several names that the block has a module for."""
        if isinstance(paths, str):
            return self.module(root, paths), paths
        for path in paths:
            found = self.optional(root, path)
            if found is not None:
                return found, path
        raise self.refusal(f"there is no module {' or '.join(map(repr, paths))}")

    def number(self, field: str | None, optional: bool = False) -> float:
        if field is None:
            return 1.0
        value = getattr(self.config, field, None)
        if value is None and optional:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(f"config.{field} should be a number, but is {value!r}")
        return float(value)

    def write(self, block: nn.Module, layer: int, write: Write) -> WriteSite:
        post_norm = self.module(block, write.post_norm) if write.post_norm else None
        prefix = f"{self.architecture.layers}.{layer}"
        module, path = self.first_of(block, write.module)
        return WriteSite(
            label=f"{layer}_{write.label}",
            layer=layer,
            module=module,
            post_norm=post_norm,
            name=f"{prefix}.{write.post_norm or path}",
            scale=self.number(write.scale),
            heads=self.heads(block, prefix, write),
        )

    def heads(self, block: nn.Module, prefix: str, write: Write) -> HeadSite | None:
        if write.heads is None:
            return None
        proj = self.module(block, write.heads.proj)
        n_heads = int(self.number(write.heads.count))
        width = input_width(proj)
        if width % n_heads:
            raise self.refusal(
                f"{prefix}.{write.heads.proj} reads {width} channels, which {n_heads} heads "
                f"(config.{write.heads.count}) cannot share evenly"
            )
        return HeadSite(
            proj=proj,
            name=f"{prefix}.{write.heads.proj}",
            attention=self.module(block, write.heads.proj.rpartition(".")[0]),
            n_heads=n_heads,
            d_head=width // n_heads,
        )
