"""What the oracle knows of each family, read from its modelling code in transformers.

Where it writes to its stream, what its norms compute, which scales it applies and where. Nothing
here is taken from the library under test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a family writes to its stream, as its modelling code says. Defaults: Llama.

    Paths below a layer are relative to it; "a|b" means b where there is no a, which is how a
    module that was renamed between two releases of transformers is written. `attn` and `mlp` are
    the modules whose output is added; `norm` the formula of the final and the post norms.
    """

    layers: str = "model.layers"
    attn: str = "self_attn"
    mlp: str = "mlp"
    o_proj: str = "self_attn.o_proj"
    post_norms: tuple[str, str] | None = None  # of attn and mlp; the norm's output is the write
    final_norm: str = "model.norm"
    norm: str = "rms"  # rms | rms of 1 + weight | layer | layer without weight
    embed: str = "model.embed_tokens"
    embed_norm: str | None = None
    positions: str | None = None
    head: str = "lm_head"
    embed_scale: Callable[[Any], float] = lambda config: 1.0
    write_scale: Callable[[Any], float] = lambda config: 1.0
    logit_scale: Callable[[Any], float] = lambda config: 1.0


_GPT2 = Family(
    layers="transformer.h",
    attn="attn",
    o_proj="attn.c_proj",
    final_norm="transformer.ln_f",
    norm="layer",
    embed="transformer.wte",
    positions="transformer.wpe",
)
_LLAMA = Family()
_MIXTURE = dataclasses.replace(_LLAMA, mlp="block_sparse_moe|mlp")
_GEMMA = dataclasses.replace(
    _LLAMA, norm="rms of 1 + weight", embed_scale=lambda config: math.sqrt(config.hidden_size)
)
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA2 = dataclasses.replace(_GEMMA, post_norms=_POST_NORMS)
_LAYER_NORMED = dataclasses.replace(_LLAMA, norm="layer")

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neo": dataclasses.replace(_GPT2, o_proj="attn.attention.out_proj"),
    "gptj": dataclasses.replace(_GPT2, o_proj="attn.out_proj", positions=None),  # rotary
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        attn="attention",
        o_proj="attention.dense",
        final_norm="gpt_neox.final_layer_norm",
        norm="layer",
        embed="gpt_neox.embed_in",
        head="embed_out|lm_head",
    ),
    "opt": Family(
        layers="model.decoder.layers",
        mlp="fc2",  # no module holds the whole MLP
        o_proj="self_attn.out_proj",
        final_norm="model.decoder.final_layer_norm",
        norm="layer",
        embed="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
    ),
    # BLOOM's sublayers add the residual themselves: what they write is their last linear's output.
    "bloom": Family(
        layers="transformer.h",
        attn="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        o_proj="self_attention.dense",
        final_norm="transformer.ln_f",
        norm="layer",
        embed="transformer.word_embeddings",
        embed_norm="transformer.word_embeddings_layernorm",
    ),
    "falcon": Family(
        layers="transformer.h",
        attn="self_attention",
        o_proj="self_attention.dense",
        final_norm="transformer.ln_f",
        norm="layer",
        embed="transformer.word_embeddings",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gpt_oss": _LLAMA,
    "mixtral": _MIXTURE,
    "qwen3_moe": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo": dataclasses.replace(_LLAMA, norm="layer without weight"),
    "olmo2": dataclasses.replace(_LLAMA, post_norms=_POST_NORMS),
    "stablelm": _LAYER_NORMED,
    "starcoder2": _LAYER_NORMED,
    "phi": dataclasses.replace(
        _LAYER_NORMED, o_proj="self_attn.dense", final_norm="model.final_layernorm"
    ),
    "cohere": dataclasses.replace(_LAYER_NORMED, logit_scale=lambda config: config.logit_scale),
    "granite": dataclasses.replace(
        _LLAMA,
        embed_scale=lambda config: config.embedding_multiplier,
        write_scale=lambda config: config.residual_multiplier,
        logit_scale=lambda config: 1 / config.logits_scaling,
    ),
}


# Finding modules


def family_of(model: nn.Module) -> Family:
    return FAMILIES[model.config.model_type]


def module_at(root: nn.Module, path: str) -> nn.Module:
    for alternative in path.split("|"):
        with contextlib.suppress(AttributeError):
            return root.get_submodule(alternative)
    raise LookupError(f"{type(root).__name__} has no {path}")


def layer_at(model: nn.Module, layer: int) -> nn.Module:
    return module_at(model, family_of(model).layers)[layer]


def n_layers(model: nn.Module) -> int:
    return len(module_at(model, family_of(model).layers))


def n_heads(model: nn.Module) -> int:
    return model.config.num_attention_heads


def final_norm(model: nn.Module) -> nn.Module:
    return module_at(model, family_of(model).final_norm)


def write_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose output is written, or normed and written, by part label."""
    family = family_of(model)
    return {
        f"{layer}_{name}_out": module_at(layer_at(model, layer), path)
        for layer in range(n_layers(model))
        for name, path in (("attn", family.attn), ("mlp", family.mlp))
    }


def post_norms(model: nn.Module) -> dict[str, nn.Module]:
    paths = family_of(model).post_norms
    if paths is None:
        return {}
    return {
        f"{layer}_{name}_out": module_at(layer_at(model, layer), path)
        for layer in range(n_layers(model))
        for name, path in zip(("attn", "mlp"), paths, strict=True)
    }


# Norms by formula


def norm_scale(kind: str, norm: nn.Module, x: Tensor) -> Tensor:
    """The number [batch, pos, 1] that the norm divides x by."""
    centred = _centred(kind, x)
    return (centred.pow(2).mean(-1, keepdim=True) + _epsilon(norm)).sqrt()


def frozen_norm(kind: str, norm: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """The norm of x with its scale given instead of computed: affine in x."""
    y = _centred(kind, x) / scale
    if kind == "layer without weight":
        return y
    if kind == "rms of 1 + weight":
        return y * (1 + norm.weight)
    y = y * norm.weight
    bias = getattr(norm, "bias", None)
    return y if bias is None else y + bias


def _centred(kind: str, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if kind.startswith("layer") else x


def _epsilon(norm: nn.Module) -> float:
    for name in ("eps", "variance_epsilon"):
        if hasattr(norm, name):
            return getattr(norm, name)
    return 1e-5  # OLMo's norm has it as a literal
