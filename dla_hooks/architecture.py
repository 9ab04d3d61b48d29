"""The words in which an adapter says where a model writes to its residual stream.

A declaration names modules (paths) and config fields. It holds no values and no arithmetic:
norms, embedding scales, head widths and biases are asked of the model itself (see
:mod:`dla_hooks.norms` and :mod:`dla_hooks.locate`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Attention heads, side by side in the input of an output projection.

    Attributes:
        proj: the output projection, relative to the block; its input is ``z`` flattened to
            [batch, pos, head * d_head], head after head. The module that holds it is taken to be
            the attention module itself.
        count: the config field with the number of (query) heads.
    """

    proj: str
    count: str = "num_attention_heads"


@dataclass(frozen=True)
class Write:
    """One term that every block adds to the residual stream.

    Attributes:
        label: what the term is called; block ``l`` labels it ``{l}_{label}``.
        module: the module, relative to the block, whose output is the term. Several names
            stand for the first one that a block has: versions of transformers, and blocks of
            different kinds in one model, differ in this.
        post_norm: the norm, if there is one, between that output and the stream. The term is
            then the norm's output, and parts of ``module``'s output are pushed through the norm.
        scale: the config field that the term is multiplied by on its way into the stream.
        heads: how the term splits into attention heads, if it does.
    """

    label: str
    module: str | tuple[str, ...]
    post_norm: str | None = None
    scale: str | None = None
    heads: Heads | None = None


@dataclass(frozen=True)
class Architecture:
    """Where the models of one or more ``model_type`` keep what attribution needs.

    Attributes:
        model_types: the values of ``config.model_type`` that this describes.
        layers: the list of blocks, from the causal LM downwards.
        final_norm: the norm between the last block and the unembedding.
        writes: what each block adds to the stream, in the order in which it is added.
        positions: the module whose output is added to the token embeddings, if positions enter
            the stream (learned position embeddings); rotary and ALiBi models have none.
        position_limit: the config field with the longest prompt that the model's position table
            can index, where a longer one cannot run.
        after_norm: linear modules, if any, between the final norm and the unembedding.
        logit_scale: the config field that the logits are multiplied by.
        logit_divisor: the config field that the logits are divided by.
        softcap: the config field with ``c`` in ``c * tanh(logit / c)``.
    """

    model_types: tuple[str, ...]
    layers: str
    final_norm: str
    writes: tuple[Write, ...]
    positions: str | None = None
    position_limit: str | None = None
    after_norm: tuple[str, ...] = ()
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None
