"""``cfg`` of the TransformerLens-shaped face: the model's sizes under the names used there.

Sizes are read from the located stream and its modules. Values that only a config file has (context
length, activation) are read under the field names that Hugging Face configs have for them. Values
that are not found are None.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, TypeVar

import torch
from torch import nn

from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules import norms
from dla_hooks.modules.linear import input_width
from dla_hooks.modules.weights import run_device
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.registry import begins_with_bos
from dla_hooks.residual.stream import Stream
from dla_hooks.tl.weights import Processing

T = TypeVar("T")

NO_SOFTCAP = -1.0
"""TransformerLens' value for a softcap that is off."""


class Config:
    """The fields of a TransformerLens config that a raw model can answer for.

    Attributes:
        n_layers: blocks of the stack, counted once for every time they run.
        d_model: width of the residual stream.
        n_heads: (query) heads of a layer; an error where layers differ or have none.
        d_head: width of a head; likewise.
        n_key_value_heads: key-value heads, where they are fewer than the heads; else None.
        d_mlp: width of the MLP's hidden layer (of one expert's, in a mixture).
        d_vocab: rows of the embedding.
        d_vocab_out: tokens that the unembedding scores.
        n_ctx: the longest prompt, by the position table or the config.
        act_fn: the activation's name.
        eps: the final norm's.
        model_name: the checkpoint's name without its folder, or the model type.
        original_architecture: the class that the config names.
        normalization_type: "LN" or "RMS", by what the final norm does; "LNPre" or "RMSPre" with
            its weights folded.
        positional_embedding_type: "standard" (added to the stream), "rotary", "alibi", or None.
        parallel_attn_mlp: whether MLPs read the stream from before their block's attention.
        attn_only: whether blocks have attention and nothing else.
        output_logits_soft_cap: the cap, or -1.0.
        tie_word_embeddings: whether W_E and W_U are one weight.
        window_size: of sliding-window attention, if any.
        rotary_base: of rotary positions, where there is one for all layers.
        dtype: of the weights.
        device: where token ids belong.
        tokenizer_name: what the tokenizer was loaded from.
        tokenizer_prepends_bos: whether it puts a BOS first by itself; None without a tokenizer.
        default_prepend_bos: whether strings get a BOS where a call does not say; may be set.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    n_key_value_heads: int | None
    d_mlp: int | None
    d_vocab: int
    d_vocab_out: int
    n_ctx: int | None
    act_fn: str | None
    eps: float | None
    model_name: str
    original_architecture: str
    normalization_type: str
    positional_embedding_type: str | None
    parallel_attn_mlp: bool
    attn_only: bool
    output_logits_soft_cap: float
    tie_word_embeddings: bool
    window_size: int | None
    rotary_base: float | None
    dtype: torch.dtype
    device: str
    tokenizer_name: str | None
    tokenizer_prepends_bos: bool | None
    default_prepend_bos: bool

    def __init__(self, fields: dict[str, Any], unanswerable: dict[str, str]) -> None:
        vars(self).update(fields)
        self._unanswerable = unanswerable

    def __getattr__(self, name: str) -> Any:
        # Only what is not set gets here. A copy that is being made has no fields at all yet.
        reason = vars(self).get("_unanswerable", {}).get(name)
        if reason is not None:
            raise AttributeError(f"cfg.{name}: {reason}")
        known = ", ".join(key for key in vars(self) if not key.startswith("_"))
        raise AttributeError(
            f"cfg has no field {name!r}; the Hugging Face config may have it under its own name: "
            f"wrapped.model.config. Fields here: {known}"
        )

    def __repr__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and v is not None}
        return "Config(\n" + "".join(f"    {k}={v!r},\n" for k, v in shown.items()) + ")"


def describe(
    stream: Stream, tokenizer: Any, processing: Processing, default_prepend_bos: bool | None
) -> Config:
    """Answer every field for one model.

    Args:
        stream: the located model.
        tokenizer: or None.
        processing: what the weights show; it decides ``normalization_type``.
        default_prepend_bos: None takes TransformerLens' default for the model type, and False
            for a tokenizer without BOS.
    """
    model = stream.backend.root
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    sites = _sites(stream)
    heads, unanswerable = _heads(sites)
    norm = norms.probe(
        stream.final_norm.module, stream.d_model, stream.final_norm.name, stream.work_dtype
    )
    if default_prepend_bos is None:
        has_bos = tokenizer is None or getattr(tokenizer, "bos_token_id", None) is not None
        default_prepend_bos = has_bos and begins_with_bos(config.model_type)
    name = str(getattr(config, "_name_or_path", "") or "")
    positions = _positions(stream, config)
    fields = {
        "n_layers": len(stream.blocks),
        "d_model": stream.d_model,
        **heads,
        "n_key_value_heads": _key_value_heads(config, sites),
        "d_mlp": _d_mlp(stream, config),
        "d_vocab": int(embedding.weight.shape[0]),
        "d_vocab_out": stream.vocabulary,
        "n_ctx": stream.position_limit
        or _first(config, int, "max_position_embeddings n_positions max_seq_len seq_length"),
        "act_fn": _first(
            config,
            str,
            "hidden_activation hidden_act activation_function activation mlp_hidden_act",
        ),
        "eps": _eps(stream.final_norm.module, config),
        "model_name": PurePosixPath(name.replace("\\", "/")).name or config.model_type,
        "original_architecture": (model.config.architectures or [type(model).__name__])[0],
        "normalization_type": ("LN" if norm.centred else "RMS")
        + ("Pre" if processing.fold_ln else ""),
        "positional_embedding_type": positions,
        "parallel_attn_mlp": _is_parallel(stream),
        "attn_only": all(write.heads is not None for write in stream.writes),
        "output_logits_soft_cap": NO_SOFTCAP if stream.softcap is None else stream.softcap,
        "tie_word_embeddings": _own_weight(stream.unembed) is _own_weight(embedding) is not None,
        "window_size": _first(config, int, "sliding_window window_size"),
        "rotary_base": _rotary_base(config) if positions == "rotary" else None,
        "dtype": stream.dtype,
        "device": str(run_device(embedding)),
        "tokenizer_name": getattr(tokenizer, "name_or_path", None) or None,
        "tokenizer_prepends_bos": None if tokenizer is None else prepends_bos(tokenizer),
        "default_prepend_bos": default_prepend_bos,
    }
    return Config(fields, unanswerable)


def prepends_bos(tokenizer: Any) -> bool:
    """True for a tokenizer that puts a BOS before every text by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer.encode(""))[:1] == [bos]


def _sites(stream: Stream) -> list[HeadSite]:
    """Where all heads are, with their measured widths; none where some cannot be told apart."""
    try:
        measured = with_head_widths(stream)
    except UnsupportedModelError:
        return []
    return [write.heads for write in measured.writes if write.heads is not None]


def _heads(sites: list[HeadSite]) -> tuple[dict[str, int], dict[str, str]]:
    """The fields that all layers agree on, and for the others the reason why they have no value."""
    fields: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for name in ("n_heads", "d_head"):
        values = {getattr(site, name) for site in sites}
        if len(values) == 1:
            fields[name] = values.pop()
        elif values:
            reasons[name] = (
                f"layers differ ({', '.join(map(str, sorted(values)))}); ask one of them: "
                f"wrapped.blocks[layer].attn.{name}"
            )
        else:
            reasons[name] = "this model has no attention heads that can be told apart"
    return fields, reasons


def _key_value_heads(config: Any, sites: list[HeadSite]) -> int | None:
    if not sites:
        return None
    site = sites[0]
    groups = _first(site.attention, int, "num_key_value_groups")
    count = _first(site.attention, int, "num_key_value_heads num_kv_heads kv_heads")
    if count is None and groups is not None:
        count = site.n_heads // groups
    if count is None:
        count = _first(config, int, "num_key_value_heads")
    return None if count == site.n_heads else count


def _d_mlp(stream: Stream, config: Any) -> int | None:
    """The width that the MLPs' down projections read, where there is only one such width."""
    widths = set()
    for write in stream.writes:
        if write.heads is None:
            for module in write.module.modules():
                if not list(module.children()) and _writes_stream(module, stream.d_model):
                    widths.add(input_width(module))
    if len(widths) == 1:
        return int(widths.pop())
    # Experts in one fused tensor, or adapters beside the projection: the module cannot say.
    return _first(
        config, int, "moe_intermediate_size intermediate_size ffn_dim ffn_hidden_size n_inner d_ff"
    )


def _writes_stream(module: nn.Module, d_model: int) -> bool:
    out = getattr(module, "out_features", getattr(module, "nf", None))  # Conv1D says nf
    if out != d_model:
        return False
    try:
        input_width(module)
    except UnsupportedModelError:
        return False
    return True


def _eps(norm: nn.Module, config: Any) -> float | None:
    own = _first(norm, float, "eps variance_epsilon epsilon")
    if own is not None:
        return own
    return _first(
        config, float, "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps"
    )


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("weight")  # not what a wrapper, around an adapter, hands on


def _positions(stream: Stream, config: Any) -> str | None:
    if stream.positions is not None:
        return "standard"
    kinds = {type(module) for module in stream.model.modules()}
    alibi = getattr(config, "alibi", None)
    if alibi is None:
        alibi = any("alibi" in name for kind in kinds for name in dir(kind))
    if alibi:
        return "alibi"
    if getattr(config, "rotary_dim", None) or _rotary_base(config) is not None:
        return "rotary"
    return "rotary" if any("Rotary" in kind.__name__ for kind in kinds) else None


def _is_parallel(stream: Stream) -> bool:
    several = [len(block.writes) > 1 for block in stream.blocks]
    return any(several) and all(after is None for after in mid_streams(stream))


def _rotary_base(config: Any) -> float | None:
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict) and isinstance(parameters.get("rope_theta"), (int, float)):
        return float(parameters["rope_theta"])
    return _first(config, float, "rope_theta rotary_emb_base")


def _first(source: Any, kind: type[T], names: str) -> T | None:
    """The first of several attributes that is there and of the right kind."""
    for name in names.split():
        value = getattr(source, name, None)
        if isinstance(value, bool):
            continue
        if isinstance(value, int) and kind is float:
            value = float(value)
        if isinstance(value, kind):
            return value
    return None
