"""The linear module that turns the last stream into logits of tokens, and the one that embeds them.

Models of transformers name their unembedding by ``get_output_embeddings()``. Others are searched by
name, and by the number of tokens. Heads of labels are in :mod:`dla_hooks.backends.labels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.signature import Arguments, takes_keywords

_UNEMBEDDINGS = ("lm_head", "unembed", "unembedding", "embed_out", "output", "to_logits", "head")


def unembedding(model: Any) -> nn.Module | None:
    """The module that scores the vocabulary, or None."""
    try:
        found = model.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        found = None
    if isinstance(found, nn.Module):
        return found
    if isinstance(model, PreTrainedModel):
        found = getattr(model, "lm_head", None)
        inside = getattr(model, "language_model", None)
        if found is None and isinstance(inside, PreTrainedModel) and model.can_generate():
            return unembedding(inside)  # of one that writes tokens, and scores no labels
        return found if isinstance(found, nn.Module) else None
    if not isinstance(model, nn.Module) or wrapped_in(model) is not None:
        return None
    named = (getattr(model, name, None) for name in _UNEMBEDDINGS)
    by_name = next((module for module in named if isinstance(module, nn.Module)), None)
    if by_name is not None:
        return by_name
    counts = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in counts]
    return linear[-1] if linear else None


def token_embedding(model: Any) -> nn.Module | None:
    """The module that puts out the token embeddings, or None."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        found = None
    if isinstance(found, nn.Module):
        return found
    if not isinstance(model, nn.Module):
        return None
    inside = wrapped_in(model)
    if inside is not None:
        return token_embedding(inside)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = unembedding(model)
    weight = getattr(head, "weight", None)
    tied = [table for table in tables if isinstance(weight, Tensor) and table.weight is weight]
    as_many = [
        table for table in tables if table.num_embeddings == getattr(head, "out_features", 0)
    ]
    return next(iter((*tied, *as_many, *tables)), None)


def n_embedded(embedding: nn.Module | None) -> int | None:
    """The number of tokens that an embedding module knows, or None where it does not say."""
    if embedding is None:
        return None
    for module in (embedding, *embedding.modules()):
        count = getattr(module, "num_embeddings", None)
        if isinstance(count, int) and not isinstance(count, bool):
            return count
    weight = getattr(embedding, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 else None


def entry(output: Any, name: str) -> Any:
    """An entry of a model's output; None where it has no such entry, as a tuple has none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def taken(arguments: dict[str, Any], accepted: Arguments) -> dict[str, Any]:
    """Those of some arguments that a forward takes."""
    if takes_keywords(accepted):
        return arguments
    return {name: value for name, value in arguments.items() if name in accepted}


def at_columns(logits: Tensor, wanted: Tensor, width: int, name: str) -> Tensor:
    """Logits at some columns of a chunk, where the model returns those of the last ones or all."""
    offset = logits.shape[1] - width
    if int(wanted.min()) + offset < 0:
        raise UnsupportedModelError(
            f"{name} returns logits at the last {logits.shape[1]} of {width} positions, so those "
            "at other positions cannot be compared with the model's own; use pos=-1"
        )
    return logits[:, (wanted + offset).to(logits.device)]


def wrapped_in(model: Any) -> nn.Module | None:
    """The language model in a wrapper with a value head, as trl makes one, or None."""
    found = getattr(model, "pretrained_model", None)
    return found if isinstance(found, nn.Module) else None


def way_out(model: Any) -> str:
    """Advice about a model without a head; none that would make a head of random weights."""
    if wrapped_in(model) is not None:
        return "pass the language model inside it, model.pretrained_model"
    return (
        "pass the whole model with its trained head, not the decoder inside it. A checkpoint that "
        "was saved without a head has none: loaded as a causal language model it would get a "
        "random one"
    )


def instead_of(given: Any) -> str:
    """Advice about what is no model at all: the model that it holds, as nnsight's have one."""
    held = [name for name, one in getattr(given, "__dict__", {}).items() if _is_model(one)]
    if not held:
        return "load one with AutoModelForCausalLM.from_pretrained(folder)"
    return (
        f"pass the model in it, .{held[0]}: its own hooks act there, and what a library does "
        f"around it, as edits of nnsight's, does not"
    )


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module) and hasattr(value, "config")
