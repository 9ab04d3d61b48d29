"""Tiny random language models of every supported family: one table that feeds all tests.

A model here is made to be hard on code that guesses: no parameter is left at its default, so norm
weights are far from one, biases far from zero, and multipliers, sinks and caps are all felt.

    model = build("gemma2")                     # float64, eval mode, about 10,000 parameters
    for spec in ZOO: ...

`python tests/helpers/zoo.py` builds them all and prints a line for each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS, UNK = "<bos>", "<eos>", "<unk>"
SMALLEST_VOCAB = 61


@dataclasses.dataclass(frozen=True)
class Spec:
    """One model of the zoo: a family's `model_type` and what its config is given."""

    name: str
    model_type: str
    config: Mapping[str, Any] = dataclasses.field(hash=False)

    def __repr__(self) -> str:  # short, since it becomes a pytest id
        return self.name


def _spec(name: str, *parts: Mapping[str, Any], **config: Any) -> Spec:
    """The spec called "<model_type>" or "<model_type>-<variant>", its config merged from parts."""
    # One bos and eos for all, so that no family's default id lies outside the small vocabulary.
    merged: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    for part in (*parts, config):
        merged.update(part)
    return Spec(name, name.split("-")[0], MappingProxyType(merged))


def _sizes(
    vocab: int, width: int, inner: int | None, layers: int, heads: int, kv: int | None = None
) -> dict[str, int]:
    """The size fields in the names that most families use; None leaves a field out."""
    sizes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 64,
    }
    return {field: size for field, size in sizes.items() if size is not None}


def _old_sizes(vocab: int, width: int, layers: int, heads: int) -> dict[str, int]:
    """The same in the names of GPT-2, GPT-J and BLOOM."""
    sizes = {"vocab_size": vocab, "n_layer": layers, "n_head": heads, "n_positions": 64}
    return {**sizes, "n_embd": width, "hidden_size": width}


_UNTIED, _TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
_BIAS = {"attention_bias": True}
_WINDOW = {"sliding_window": 4}
_EPS = {"rms_norm_eps": 0.1}  # large enough to be missed when it is left out
_LAYER_EPS = {"layer_norm_eps": 0.1}

_GPT_NEO = {
    "vocab_size": 73,
    "hidden_size": 30,
    "num_layers": 3,
    "num_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local", "global"], 1]],
    "window_size": 3,
}
_NEOX = {**_sizes(79, 48, 70, 3, 3), "rotary_pct": 0.25}
_OPT = {**_sizes(67, 36, None, 2, 4), "ffn_dim": 50, "word_embed_proj_dim": 36}
_BLOOM = _old_sizes(71, 30, 2, 3)
_FALCON = {**_sizes(83, 40, None, 2, 4), "ffn_hidden_size": 60}
_FALCON_NEW = {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
# Widths in multiples of 8: the grouped kernel of the experts asks for 16-byte strides.
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GEMMA2 = {**_sizes(77, 36, 50, 3, 4, 2), "head_dim": 10, "query_pre_attn_scalar": 7, **_WINDOW}
_GEMMA3 = {**_GEMMA2, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_PHI = {"partial_rotary_factor": 0.5}
_STABLELM = {"partial_rotary_factor": 0.25}
_GPT_OSS = {
    "head_dim": 12,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}
# Far from one each, and from each other, so that none can be swapped or dropped unnoticed.
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.5,
}

# _sizes(vocabulary, width, MLP width, layers, heads, key-value heads)
ZOO: tuple[Spec, ...] = (
    _spec("gpt2", _old_sizes(63, 36, 3, 4)),
    _spec("gpt2-odd-width", _old_sizes(61, 15, 2, 3), n_inner=31, layer_norm_epsilon=0.1),
    _spec("gpt2-untied", _old_sizes(65, 24, 2, 4), _UNTIED),
    _spec("gpt_neo", _GPT_NEO),
    _spec("gpt_neo-untied", _GPT_NEO, _UNTIED),
    _spec("gptj", _old_sizes(69, 40, 2, 4), rotary_dim=4),
    _spec("gpt_neox-parallel", _NEOX, use_parallel_residual=True),
    _spec("gpt_neox-sequential", _NEOX, use_parallel_residual=False),
    _spec("gpt_neox-no-bias-tied", _NEOX, _TIED, attention_bias=False),
    _spec("opt", _OPT),
    _spec("opt-untied", _OPT, _UNTIED),
    _spec("opt-no-bias", _OPT, enable_bias=False),
    _spec("bloom", _BLOOM),
    _spec("bloom-untied", _BLOOM, _UNTIED),
    _spec("llama", _sizes(61, 40, 54, 3, 4, 2)),
    _spec("llama-mqa", _sizes(75, 36, 50, 2, 6, 1), _EPS),
    _spec("llama-mha-tied", _sizes(75, 30, 50, 2, 3, 3), _TIED),
    _spec("llama-bias", _sizes(65, 40, 54, 2, 4, 2), _BIAS, mlp_bias=True),
    _spec("llama-wide-heads", _sizes(87, 28, 50, 2, 4, 4), head_dim=12),
    _spec("mistral", _sizes(85, 40, 50, 2, 4, 2), _WINDOW),
    _spec("mistral-narrow-heads", _sizes(67, 36, 50, 2, 4, 1), _TIED, head_dim=6),
    _spec("mixtral", _sizes(63, 40, 24, 2, 4, 2), _MIXTRAL),
    _spec("mixtral-tied", _sizes(63, 48, 24, 2, 6, 1), _MIXTRAL, _WINDOW, _TIED),
    _spec("qwen2", _sizes(89, 40, 50, 2, 4, 2)),
    _spec(
        "qwen2-tied-window",
        _sizes(69, 36, 50, 3, 6, 1),
        {**_WINDOW, **_TIED},
        use_sliding_window=True,
        max_window_layers=1,
    ),
    _spec("qwen3", _sizes(91, 28, 50, 2, 4, 2), head_dim=12),
    _spec("qwen3-bias-tied", _sizes(91, 36, 50, 2, 3, 3), _BIAS, _TIED, head_dim=10),
    _spec("qwen3_moe", _sizes(93, 40, 50, 2, 4, 2), _QWEN3_MOE, head_dim=12),
    _spec(
        "qwen3_moe-mixed",  # a dense layer between two with experts
        _sizes(93, 40, 50, 3, 4, 1),
        {**_QWEN3_MOE, **_BIAS, **_TIED},
        head_dim=10,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    _spec("gemma", _sizes(61, 28, 50, 2, 4, 1), _EPS, head_dim=12),
    _spec("gemma-bias-untied", _sizes(61, 36, 50, 2, 4, 4), _BIAS, _UNTIED, head_dim=10),
    _spec("gemma2", _GEMMA2, final_logit_softcapping=5.0, attn_logit_softcapping=2.0),
    _spec(
        "gemma2-no-caps",
        {**_GEMMA2, **_BIAS, **_UNTIED},
        final_logit_softcapping=None,
        attn_logit_softcapping=None,
    ),
    _spec("gemma3_text", _GEMMA3, _EPS),
    _spec("gemma3_text-cap", _GEMMA3, _BIAS, _UNTIED, final_logit_softcapping=4.0),
    _spec("phi", _sizes(95, 36, 50, 2, 3, 3), _PHI, _LAYER_EPS),
    _spec("phi-qknorm", _sizes(95, 48, 50, 2, 4, 2), _PHI, qk_layernorm=True),
    _spec("phi3", _sizes(97, 40, 50, 2, 4, 2)),
    _spec("phi3-mha-tied", _sizes(97, 36, 50, 2, 3, 3), _WINDOW, _TIED),
    _spec("falcon-7b", _FALCON, parallel_attn=True, multi_query=True, layer_norm_epsilon=0.1),
    _spec("falcon-new", _FALCON_NEW, num_ln_in_parallel_attn=2),
    _spec("falcon-new-1ln", _FALCON_NEW, _UNTIED, num_ln_in_parallel_attn=1),
    _spec("falcon-rw", _FALCON, parallel_attn=False, multi_query=False, alibi=True, bias=True),
    _spec("stablelm-parallel", _sizes(81, 48, 60, 2, 3, 3), _STABLELM, use_parallel_residual=True),
    _spec("stablelm-sequential", _sizes(81, 48, 60, 2, 3, 1), _STABLELM, _TIED, _LAYER_EPS),
    _spec(
        "stablelm-qknorm",
        _sizes(81, 32, 60, 2, 4, 2),
        _STABLELM,
        use_qkv_bias=True,
        qk_layernorm=True,
    ),
    _spec("olmo", _sizes(71, 36, 50, 2, 3, 3)),
    _spec("olmo-gqa-tied", _sizes(71, 40, 50, 2, 4, 2), _BIAS, _TIED, clip_qkv=1.5),
    _spec("olmo2", _sizes(71, 40, 50, 3, 4, 2), _EPS),
    _spec("olmo2-bias-tied", _sizes(71, 36, 50, 2, 6, 6), _BIAS, _TIED),
    _spec("cohere", _sizes(79, 40, 50, 2, 4, 2), _LAYER_EPS, logit_scale=0.35),
    _spec(
        "cohere-qknorm-untied",
        _sizes(79, 36, 50, 2, 3, 3),
        {**_BIAS, **_UNTIED},
        logit_scale=1.8,
        use_qk_norm=True,
    ),
    _spec("gpt_oss", _sizes(87, 40, 24, 2, 4, 2), _GPT_OSS, _WINDOW, _EPS),
    _spec("gpt_oss-mha-tied", _sizes(87, 32, 24, 2, 3, 3), _GPT_OSS, _WINDOW, _TIED),
    _spec("granite", _sizes(83, 40, 50, 2, 4, 2), _GRANITE),
    _spec("granite-bias-tied", _sizes(83, 36, 50, 2, 6, 1), _GRANITE, _BIAS, _TIED, mlp_bias=True),
    _spec("starcoder2", _sizes(85, 40, 50, 2, 4, 2), norm_epsilon=0.1),
    _spec(
        "starcoder2-no-bias-untied",
        _sizes(85, 36, 50, 2, 3, 1),
        {**_WINDOW, **_UNTIED},
        use_bias=False,
    ),
)
BY_NAME: Mapping[str, Spec] = MappingProxyType({spec.name: spec for spec in ZOO})


def supports(spec: Spec | str, attn: str | None) -> bool:
    """Whether the spec runs with this attention implementation, caps and sinks included."""
    if attn in (None, "eager"):
        return True
    config = _config(_as_spec(spec))
    # Older transformers let scaled-dot-product attention drop this cap silently.
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    return bool(getattr(_model_class(config), f"_supports_{attn}", False))


def build(
    spec: Spec | str,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attn: str | None = "eager",
) -> PreTrainedModel:
    """The spec's model in eval mode, every parameter drawn anew from `seed`.

    The global random state is left as it was. `attn=None` takes the family's default; an
    implementation that the family does not support raises ValueError (see `supports`). For padding
    on the left take "sdpa" or float32: most eager attention softmaxes in float32, where float64's
    masking value overflows and the padded rows turn into NaN.
    """
    spec = _as_spec(spec)
    if not supports(spec, attn):
        raise ValueError(f"{spec.name} does not support the attention implementation {attn!r}")
    config = _config(spec)
    if dtype == torch.float64 and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # the grouped kernel has no float64
    kwargs = {} if attn is None else {"attn_implementation": attn}
    # The family's own initialisation is overwritten anyway, and StableLM's fails in older
    # transformers on a norm without bias.
    family = next(c for c in _model_class(config).__mro__ if "_init_weights" in vars(c))
    no_initialisation = mock.patch.object(family, "_init_weights", _leave_as_is)
    with torch.random.fork_rng(devices=[]), no_initialisation:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)
    model.eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    model.config.architectures = [type(model).__name__]
    return model


def example_ids(spec: Spec | str, batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length] that are valid for the spec, specials left out."""
    vocab = _as_spec(spec).config["vocab_size"]
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def _as_spec(spec: Spec | str) -> Spec:
    return BY_NAME[spec] if isinstance(spec, str) else spec


def _config(spec: Spec):
    kwargs = {  # configs keep the lists that they are given
        key: list(value) if isinstance(value, list) else value for key, value in spec.config.items()
    }
    return AutoConfig.for_model(spec.model_type, **kwargs)


def _model_class(config: Any) -> type[PreTrainedModel]:
    return AutoModelForCausalLM._model_mapping[type(config)]


def _leave_as_is(model: PreTrainedModel, module: torch.nn.Module) -> None:
    pass


@torch.no_grad()
def _randomise(
    model: PreTrainedModel,
    generator: torch.Generator,
    shaped: Callable[[torch.Tensor, str, str], torch.Tensor] | None = None,
) -> None:
    """Draws every parameter anew; `shaped` turns noise into a parameter, as `_shaped` does."""
    shaped = shaped or _shaped
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:  # tied
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(shaped(noise, type(module).__name__, name))


def _shaped(noise: torch.Tensor, module: str, name: str) -> torch.Tensor:
    """Standard normal noise turned into a plausible but unmistakable parameter."""
    if "bias" in name:
        return 0.4 * noise
    if name == "sinks":
        return noise
    if "Norm" in module:
        # Gemma's norms multiply by one plus the weight.
        return 0.5 * noise if module.startswith("Gemma") else 1.0 + 0.5 * noise
    if "Embedding" in module:
        return 0.7 * noise
    # torch keeps [out, in]; GPT-2's Conv1D and gpt-oss's experts keep [in, out].
    fan_in = noise.shape[-2] if module in ("Conv1D", "GptOssExperts") else noise.shape[-1]
    return noise / math.sqrt(fan_in)


_WORDS = (
    *("John", "Mary", "Paris", "Berlin", "France", "Germany", "capital", "store", "drink", "mat"),
    *(
        "cat",
        "dog",
        "When",
        "The",
        "the",
        "and",
        "went",
        "gave",
        "sat",
        "to",
        "a",
        "of",
        "is",
        "on",
    ),
)
_NO_SPACE_FORM = ("John", "Mary", "Paris", "Berlin", "cat", "dog", "When", "The", "the", "a")


def tiny_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose tokens carry their leading space, as GPT-2's do ("Ġcat").

    Its ids fit every model of the zoo: 0 is bos, 1 eos, 2 unknown. With `add_bos` it starts each
    text with bos, as Llama's does. It has no pad token.
    """
    pieces = [BOS, EOS, UNK, ",", ".", "!", "Ġ", *_NO_SPACE_FORM, *(f"Ġ{word}" for word in _WORDS)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.normalizer = normalizers.Replace(" ", "Ġ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[,.!]|Ġ?[^Ġ,.!]+|Ġ"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("Ġ", " "), decoders.Fuse()])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def main() -> None:
    for spec in ZOO:
        model = build(spec)
        logits = model(example_ids(spec), use_cache=False).logits
        state = "finite" if logits.isfinite().all() else "NOT FINITE"
        parameters = sum(parameter.numel() for parameter in model.parameters())
        line = f"{spec.name:28} {parameters:7,} parameters, logits {state}, {logits.std():.2f}"
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
