"""Tiny random models of every type that transformers maps to a causal language model.

Where `zoo` holds the families with care, one spec each, this covers the whole mapping, so that what
the library reads off a model can be tested on all of them, and its refusals too.

    model = build_any("gemma4_text")            # float64, eval mode
    model = build_any("llama", mlp_bias=True)   # a config switch changed
    for model_type in MODEL_TYPES: ...
    for model_type, name, changes in VARIANTS: build_any(model_type, **changes)

`python tests/helpers/mapping_zoo.py` builds them all and prints a line for each.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from mapping_configs import GENERIC, LAYERS, VOCAB
from mapping_overrides import FLOAT32_ONLY, NEEDS_MORE, NO_CACHE, OVERRIDES
from mapping_variants import BY_TYPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import _randomise, _shaped

__all__ = [
    "MODEL_TYPES",
    "VARIANTS",
    "CannotBuild",
    "build_any",
    "example_ids_any",
    "logits_of",
    "runs",
    "supports_any",
    "tiny_config",
]

MODEL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VARIANTS: tuple[tuple[str, str, Mapping[str, Any]], ...] = tuple(
    (model_type, name, changes)
    for model_type, variants in BY_TYPE.items()
    for name, changes in variants.items()
    if model_type in MODEL_TYPES  # older transformers lack some
)

# Where a config of several parts keeps the one of its language model
_LANGUAGE_PARTS = ("text_config", "decoder")
# Vectors and numbers that multiply what they stand next to, so that zero would silence it
_GAINS = frozenset({"D", "scale", "temp", "time_first"})
# Buffers that move the choice of experts
_CHOICE = frozenset({"e_score_correction_bias", "expert_bias", "balancing_biases"})
_BASE_FIELDS = frozenset({"tie_word_embeddings", "add_cross_attention"})


class CannotBuild(Exception):
    """This type cannot be built, or not run, on its own here; the message says why."""


def build_any(
    model_type: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attn: str | None = None,
    *,
    auto: Any = AutoModelForCausalLM,
    decoder: bool = True,
    also: Mapping[str, Any] = MappingProxyType({}),
    **config_changes: Any,
) -> PreTrainedModel:
    """A tiny model of this type in eval mode, every parameter drawn anew from `seed`.

    `auto` is the auto class that picks the model's. `decoder` sets `is_decoder` where a config has
    it. `also` is set on the config that the class is made for, as `num_labels`.

    `config_changes` go to the field of that name, in the language model's part where the config has
    several. Types that break in float64 come in float32 (see `FLOAT32_ONLY`). The global random
    state is left as it was. Raises CannotBuild, also for a change or an attention implementation
    that the type does not take.
    """
    if model_type in NEEDS_MORE:
        raise CannotBuild(f"{model_type}: {NEEDS_MORE[model_type]}")
    if model_type in FLOAT32_ONLY:
        dtype = torch.float32
    kwargs = {} if attn is None else {"attn_implementation": attn}
    # Whatever goes wrong in the code of 190 types is for the caller to report, not to crash on.
    try:
        config = tiny_config(model_type, **config_changes)
        model_class = _model_class(auto, config)
        _prepare(config, dtype, decoder)
        with torch.random.fork_rng(devices=[]):
            own = _own_config(config, model_class)
            text = own.get_text_config()
            for name, value in also.items():
                for part in (own, text) if hasattr(text, name) else (own,):
                    setattr(part, name, value)
            model = model_class._from_config(own, dtype=dtype, **kwargs)
    except Exception as error:
        raise CannotBuild(f"{model_type}: {why(error)}") from error
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    _randomise(model, generator, _shaped_any)
    _randomise_buffers(model, generator)
    if model_type in NO_CACHE:
        model.config.use_cache = False
    model.config.architectures = [type(model).__name__]
    return model


def why(error: Exception) -> str:
    """What kept a type from being built: a package that is not installed, or the error."""
    found = re.findall(r"requires the (\w+) library|No module named '(\w+)'", str(error))
    if isinstance(error, ImportError) and found:
        return f"it needs the package {''.join(found[-1])}, which is not installed here"
    return f"{type(error).__name__}: {error}"


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The type's config with small sizes and with these fields changed."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_values(config_class, changes))


def example_ids_any(
    model: PreTrainedModel, batch: int = 2, length: int = 7, seed: int = 0
) -> torch.Tensor:
    """Random token ids [batch, length] that are valid for the model, specials left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB - 6, (batch, length), generator=generator)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a plain forward pass."""
    return model(ids).logits


def runs(model: PreTrainedModel) -> bool:
    """Whether a plain `model(ids)` gives finite logits [batch, position, vocabulary]."""
    ids = example_ids_any(model)
    try:
        logits = logits_of(model, ids)
    except Exception:
        return False
    return logits.ndim == 3 and logits.shape[:2] == ids.shape and bool(logits.isfinite().all())


def supports_any(model_type: str, attn: str | None, **config_changes: Any) -> bool:
    """Whether the type runs with this attention implementation, caps and sinks included."""
    if attn not in (None, "eager"):
        config = tiny_config(model_type, **config_changes)
        # Older transformers let scaled-dot-product attention drop this cap silently.
        part = next((getattr(config, p) for p in _LANGUAGE_PARTS if hasattr(config, p)), config)
        if getattr(part, "attn_logit_softcapping", None) is not None:
            return False
    try:
        return runs(build_any(model_type, attn=attn, **config_changes))
    except CannotBuild:
        return False


def _values(config_class: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What the config class is called with; a change that no part of it knows raises TypeError."""
    fields = _fields(config_class)
    default = _default(config_class)
    values = {name: value for name, value in GENERIC.items() if name in fields}
    values.update(_kinds(config_class))
    if getattr(default, "pad_token_id", None) is not None:  # else it stays without one
        values["pad_token_id"] = 2
    overrides = dict(OVERRIDES.get(config_class.model_type, {}))
    rest = {name: value for name, value in changes.items() if name not in fields}
    for name, part_class in getattr(config_class, "sub_configs", {}).items():
        if part_class is AutoConfig:  # any type may stand here: take the usual one
            if getattr(default, name) is None:  # a part that is left out
                continue
            part_class = CONFIG_MAPPING[getattr(default, name).model_type]
        taken: dict[str, Any] = {}
        if name in _LANGUAGE_PARTS:
            taken = {key: value for key, value in rest.items() if key in _fields(part_class)}
            rest = {key: value for key, value in rest.items() if key not in taken}
        values[name] = {
            "model_type": part_class.model_type,
            **_values(part_class, taken),
            **overrides.pop(name, {}),
        }
    if rest:
        raise TypeError(f"{config_class.__name__} has no {', '.join(rest)}")
    values.update(overrides)
    values.update({name: value for name, value in changes.items() if name in fields})
    return {  # configs keep the lists that they are given
        name: list(value) if isinstance(value, list) else value for name, value in values.items()
    }


@functools.cache
def _fields(config_class: Any) -> frozenset[str]:
    if dataclasses.is_dataclass(config_class):
        return frozenset(field.name for field in dataclasses.fields(config_class))
    # In older transformers, where the base class takes the rest
    return frozenset(inspect.signature(config_class.__init__).parameters) | _BASE_FIELDS


@functools.cache
def _default(config_class: Any) -> Any:
    try:
        return config_class()
    except Exception:  # some have no valid default
        return None


@functools.cache
def _kinds(config_class: Any) -> dict[str, Any]:
    """The lists that give each layer its kind, cut short with every kind of them still there.

    Kinds of attention take turns and kinds of MLP follow each other, so that four layers hold each
    pair of two and two.
    """
    default = _default(config_class)
    names = [n for n in ("layer_types", "mlp_layer_types") if n in _fields(config_class)]
    kinds = {n: list(dict.fromkeys(getattr(default, n, None) or ())) for n in names}
    kinds = {n: found for n, found in kinds.items() if found}
    if not kinds:
        return {}
    count = max(LAYERS, *(len(found) for found in kinds.values()), 4 * (len(kinds) > 1))
    values: dict[str, Any] = {"num_hidden_layers": count}
    for name, found in kinds.items():
        in_turn = name == "layer_types"
        at = [i % len(found) if in_turn else i * len(found) // count for i in range(count)]
        values[name] = [found[i] for i in at]
    return values


def _own_config(config: Any, model_class: type[PreTrainedModel]) -> Any:
    """The part of the config that the model class is made for: all of it, or its decoder's."""
    parts = (getattr(config, name) for name in getattr(config, "sub_configs", {}))
    return next((p for p in (config, *parts) if isinstance(p, model_class.config_class)), config)


def _model_class(auto: Any, config: Any) -> Any:
    """The class behind an auto class; the first of several."""
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def _prepare(config: Any, dtype: torch.dtype, decoder: bool) -> None:
    parts = [getattr(config, name) for name in getattr(config, "sub_configs", {})]
    for part in [config, *parts]:
        if dtype == torch.float64 and hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"  # the grouped kernel has no float64
        if hasattr(part, "is_decoder"):
            part.is_decoder = decoder


def _shaped_any(noise: torch.Tensor, module: str, name: str) -> torch.Tensor:
    """As the zoo shapes noise, with the kinds of parameter that only these types have."""
    if name == "A_log":  # of a state's decay, exp(-exp(A_log) * time)
        return 0.5 * noise
    if name.startswith("time_mix"):  # RWKV's weights between this token and the one before
        return 0.5 + 0.2 * noise
    if noise.ndim == 0 or name in _GAINS or name.endswith(("_scale", "_residual")):
        return _gain(noise)
    return _shaped(noise, module, name)


def _gain(noise: torch.Tensor) -> torch.Tensor:
    """Between a half and three halves, since the gains of all layers multiply up."""
    return 1.0 + 0.5 * noise.tanh()


@torch.no_grad()
def _randomise_buffers(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draws anew the buffers that are weights in all but name."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
            if name == "layer_scalar":
                buffer.copy_(_gain(noise))
            elif name in _CHOICE:
                buffer.copy_(0.3 * noise)
            elif name == "tid2eid":  # the experts of each token, all different
                chances = torch.rand(
                    len(buffer), model.config.n_routed_experts, generator=generator
                )
                buffer.copy_(chances.argsort(dim=-1)[:, : buffer.shape[-1]])


def _line(model_type: str, changes: Mapping[str, Any]) -> str:
    """What became of one type, in words."""
    try:
        model = build_any(model_type, **changes)
        logits = logits_of(model, example_ids_any(model))
    except CannotBuild as error:
        return "cannot: " + " ".join(str(error).split())[:200]
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {error}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state = "finite" if logits.isfinite().all() else "NOT FINITE"
    return f"{parameters:9,} parameters, logits {state}, {logits.std():.2f}"


def main() -> None:
    plain: list[tuple[str, str, Mapping[str, Any]]] = [(t, "", {}) for t in MODEL_TYPES]
    for model_type, name, changes in (*plain, *VARIANTS):
        label = f"{model_type} {name}".strip()
        print(f"{label:44} {_line(model_type, changes)}")  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
