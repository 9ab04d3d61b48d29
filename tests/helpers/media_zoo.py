"""Tiny random models that read images or sounds beside text, and what their inputs share.

A type's config is made as in `mapping_zoo`; parts besides the language model have sizes of their
own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import mapping_zoo as zoo
import torch
import transformers
from doors import Case
from mapping_configs import VOCAB
from mapping_overrides import FLOAT32_ONLY
from mapping_zoo import CannotBuild
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE, VIDEO, AUDIO, START, END = range(VOCAB - 3, VOCAB - 8, -1)
"""Ids of placeholders; prompts of `example_ids_any` hold none of them."""

KINDS = ("mm_token_type_ids", "token_type_ids")
"""Arguments that say which positions are an image."""

_LANGUAGE = ("text_config", "decoder", "llm_config")
_LAYER_LISTS = ("layer_types", "mlp_layer_types")

TOP: Mapping[str, Any] = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
    "vision_start_token_id": START,
    "image_start_token_id": START,
    "vision_end_token_id": END,
    "image_end_token_id": END,
    "projector_hidden_size": 24,
    "alignment_intermediate_size": 24,
    "image_seq_length": 16,
    "mm_tokens_per_image": 4,
    "image_grid_pinpoints": [[16, 16], [32, 16]],
    "downsample_factor": 2,
}
"""Fields of whole configs."""


Sizes = tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Mapping[str, Any]]]
"""Fields of the whole config, of its other parts, and what a type needs besides."""


def build_class(
    model_type: str,
    class_name: str,
    sizes: Sizes,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attn: str | None = None,
) -> Any:
    """A tiny model of this type, every parameter drawn anew from `seed`; or CannotBuild."""
    kwargs = {} if attn is None else {"attn_implementation": attn}
    if model_type in FLOAT32_ONLY:
        dtype = torch.float32
    try:
        found = config_of(model_type, sizes)
        model_class = getattr(transformers, class_name)
        zoo._prepare(found, dtype, True)
        with torch.random.fork_rng(devices=[]):
            model = model_class._from_config(found, dtype=dtype, **kwargs)
    except Exception as error:
        raise CannotBuild(f"{model_type}: {zoo.why(error)}") from error
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    zoo._randomise(model, generator, zoo._shaped_any)
    zoo._randomise_buffers(model, generator)
    model.config.architectures = [type(model).__name__]
    return model


def config_of(model_type: str, sizes: Sizes) -> Any:
    """The type's config with small sizes."""
    config_class, (whole, parts, besides) = CONFIG_MAPPING[model_type], sizes
    values = _sized(config_class, zoo._values(config_class, {}), whole, parts)
    return config_class(**_merged(values, besides.get(model_type, {})))


def _sized(
    config_class: Any, values: dict[str, Any], sizes: Mapping[str, Any], parts: Mapping[str, Any]
) -> dict[str, Any]:
    """The values, with the sizes of this kind of config, and of the parts in it."""
    fields = zoo._fields(config_class)
    found = {**values, **{name: value for name, value in sizes.items() if name in fields}}
    count = found.get("num_hidden_layers")
    for name in _LAYER_LISTS:
        if name in found and isinstance(count, int):
            found[name] = found[name][:count]
    for name, part in values.items():
        if isinstance(part, dict) and name in _LANGUAGE and "max_position_embeddings" in part:
            part["max_position_embeddings"] = 256  # images are long
        if isinstance(part, dict) and "model_type" in part and name not in _LANGUAGE:
            part_class = config_class.sub_configs[name]
            if part_class is AutoConfig:
                part_class = CONFIG_MAPPING[part["model_type"]]
            found[name] = _sized(part_class, part, parts, parts)
    return found


def _merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Others over values, part by part."""
    found = dict(values)
    for name, value in others.items():
        inner = found.get(name)
        both = isinstance(inner, dict) and isinstance(value, Mapping) and "model_type" in inner
        both = both and "model_type" not in value  # else it is another kind of part
        found[name] = _merged(inner, value) if both else value
    return found


def with_placeholders(ids: torch.Tensor, count: int, token: int = IMAGE) -> torch.Tensor:
    """Two tokens, the marks of an image with its placeholders between, and the other tokens."""
    n = len(ids)
    image = torch.full((n, count), token)
    start, end = torch.full((n, 1), START), torch.full((n, 1), END)
    return torch.cat((ids[:, :2], start, image, end, ids[:, 2:]), dim=1)


def asked(model: Any, given: dict[str, Any], token: int = IMAGE) -> int:
    """The number of positions of each image, which the model itself names when it is wrong."""
    said = _complaint(model, given, 1, token)
    if said is None:
        return 1
    width = model.config.get_text_config().hidden_size
    features = [int(number) for number in re.findall(r"\d+", said)][-1]
    counts = [n // 2 for n in (features // width, features) if n and n % 2 == 0]
    found = next((n for n in counts if _complaint(model, given, n, token) is None), None)
    if found is None:
        raise CannotBuild(said)
    return found


def _complaint(model: Any, given: dict[str, Any], count: int, token: int) -> str | None:
    """What the model says of so many placeholders; None where it takes them."""
    ids = with_placeholders(zoo.example_ids_any(model), count, token)
    arguments = set(inspect.signature(type(model).forward).parameters)
    extra = {n: (ids == token).long() for n in KINDS if n in arguments}
    try:
        with torch.no_grad():
            model(input_ids=ids, **given, **extra, use_cache=False)
    except Exception as error:
        if "match" in str(error) and "features" in str(error):
            return str(error)
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    return None


def noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def both_cases(model: Any, *inputs: tuple[str, Callable[[], dict[str, Any]]]) -> tuple[Case, ...]:
    """A case for each kind of input that the model takes; CannotBuild where it takes none."""
    cases, reasons = list[Case](), list[str]()
    for name, given_by in inputs:
        try:
            given = given_by()
            with torch.no_grad():
                logits = model(**given, use_cache=False).logits
        except Exception as error:  # of the code of a hundred types
            reasons.append(f"{name}: {type(error).__name__}: {error}")
            continue
        whole = given if len(given) > 1 else given["input_ids"]
        masked = logits < -1e30  # tokens of images, which some models never write
        logits = logits.masked_fill(masked, float(logits[~masked].min()))
        cases.append(Case(model, whole, logits, name=name))
    if not cases:
        raise CannotBuild("; ".join(reasons))
    return tuple(cases)
