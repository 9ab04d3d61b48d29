"""The linear module that turns the last stream into logits: an unembedding, or a head of labels.

Models of transformers name their unembedding by ``get_output_embeddings()``. Classifiers, reward
models and question answering have a linear head under a name of their own. Other modules are
searched by name, and by the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dla_hooks.errors import TokenError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.hooks import Place, Tap, tapped
from dla_hooks.modules.outputs import tensor_in
from dla_hooks.modules.signature import Arguments, takes_keywords

_LABEL_HEADS = {
    "score": "logits",
    "classifier": "logits",
    "qa_outputs": "span",
    "v_head": "value",
    "logits_proj": "logits",
    "sequence_summary": "logits",
}
"""Names of heads with labels, and what the model makes of their output."""
_UNEMBEDDINGS = ("lm_head", "unembed", "unembedding", "embed_out", "output", "to_logits", "head")
_NAMES = {"span": ("start", "end"), "value": ("value",)}
"""The labels that no config names."""


@dataclass(frozen=True)
class LabelHead:
    """A linear head whose outputs are labels.

    Attributes:
        module: the head.
        name: its path.
        kind: what the model makes of its output: ``"logits"``; ``"span"``, the start and the end
            of an answer; ``"value"``, one number beside the logits of a language model.
    """

    module: nn.Module
    name: str
    kind: str


class LabelNames:
    """The labels of a classifier, with the face of a tokenizer: one name is one "token".

    Args:
        names: every label's name by its index.
        advice: a sentence for an answer that is no label; or nothing.
    """

    unk_token_id = None

    def __init__(self, names: Mapping[int, str], advice: str = "") -> None:
        self._names = dict(names)
        self._advice = advice

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The index of a label, in a list of one.

        Args:
            text: the label's name; or its index, which no name may be.
            add_special_tokens: as of a tokenizer; labels have none.

        Raises:
            TokenError: for a text that is neither.
        """
        found = [index for index, name in self._names.items() if name == text]
        if not found and text.isdecimal() and int(text) in self._names:
            found = [int(text)]
        if len(found) != 1:
            known = ", ".join(map(repr, list(self._names.values())[:20]))
            problem = "is no label" if not found else f"is the name of {len(found)} labels"
            raise TokenError(
                f"{text!r} {problem} of the model; its labels are {known}. Give a name or an index"
                f"{self._advice}"
            )
        return found

    def decode(self, ids: list[int]) -> str:
        """The name of a label; its index where it has none."""
        return " ".join(self._names.get(int(i), str(int(i))) for i in ids)

    def convert_ids_to_tokens(self, index: int) -> str:
        """The name of a label."""
        return self.decode([index])


def label_head(model: Any) -> LabelHead | None:
    """The head of a classifier, a reward or value model or a span model, or None."""
    for name, kind in _LABEL_HEADS.items():
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return LabelHead(module, name, kind)
    return None


def label_names(model: Any, head: LabelHead) -> LabelNames:
    """The names of a head's labels, from the model's config."""
    if head.kind in _NAMES:
        advice = "" if _inside(model) is None else f"; for a token, {way_out(model)}"
        return LabelNames(dict(enumerate(_NAMES[head.kind])), advice)
    return LabelNames(dict(getattr(model.config, "id2label", None) or {}))


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
        return found if isinstance(found, nn.Module) else None
    if not isinstance(model, nn.Module) or _inside(model) is not None:
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
    inside = _inside(model)
    if inside is not None:
        return token_embedding(inside)
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        found = None
    if isinstance(found, nn.Module):
        return found
    if not isinstance(model, nn.Module):
        return None
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


def last_real(prompt: Prompt, chunk: range) -> Tensor:
    """The column [batch], in a chunk, of each row's last real token; -1 where it is in another.

    A sequence classifier is read there. Which position it reads itself is measured.

    Args:
        prompt: the whole batch.
        chunk: the columns that are run.
    """
    columns = torch.arange(prompt.shape[1], device="cpu")
    last = (columns * prompt.mask.cpu()).amax(-1)
    inside = (last >= chunk.start) & (last < chunk.stop)
    return torch.where(inside, last - chunk.start, -1)


def run_labels(
    model: Any,
    head: LabelHead,
    given: tuple[Any, ...],
    arguments: dict[str, Any],
    last: Tensor,
) -> tuple[Any, Tensor]:
    """Run a model with a head of labels.

    Args:
        model: the model, or a wrapper around it.
        head: its head.
        given: positional arguments of the model.
        arguments: its other arguments.
        last: the column [batch] that the model has to read; -1 where it is in another chunk.

    Returns:
        The model's output, and the head's logits [batch, position, labels]. What the model itself
        returns is held against them.

    Raises:
        UnsupportedModelError: where the model returns something else than the head's output.
    """
    seen: list[Tensor] = []
    tap = Tap(Place(head.module, head.name), lambda call: seen.append(call.left))
    output: Any = None
    with tapped([tap]):
        try:
            output = model(*given, **arguments)
        except ValueError:
            # Without a pad token a batch is refused, after its head has run. The last real token
            # is known from the mask.
            if not seen or seen[0].ndim != 3:
                raise
    logits = seen[0]
    name = type(model).__name__
    if logits.ndim != 3:
        raise UnsupportedModelError(
            f"{name} pools the stream before {head.name}, so no logit belongs to one position; "
            "pass a model that scores every position"
        )
    if output is None:
        return output, logits
    same = _where_same(output, logits, head)
    if same is None or not bool(same.any(-1).all()):
        raise UnsupportedModelError(
            f"{name} returns something else than what {head.name} puts out at one position; pass "
            "a model that returns that"
        )
    rows = (last >= 0).nonzero()[:, 0]
    if not bool(same.cpu()[rows, last[rows]].all()):
        raise UnsupportedModelError(
            f"{name} reads another position than the last token that is no padding; pass a model "
            "that scores that one, or every position. transformers' classifiers know padding by "
            "config.pad_token_id alone: without one, or with inputs_embeds, pad on the left"
        )
    return output, logits


def _where_same(output: Any, logits: Tensor, head: LabelHead) -> Tensor | None:
    """Positions [batch, pos] at which a model may have read what it returned; None for nowhere."""
    if head.kind == "span":
        parts = [tensor_in(output, (f"{name}_logits",)) for name in _NAMES["span"]]
        returned = None if None in parts else torch.stack(parts, -1)  # type: ignore[arg-type]
    elif head.kind == "value":
        returned = _value(output, logits)
    else:
        returned = tensor_in(output, ("logits",))
    if returned is None or returned.shape[-1] != logits.shape[-1]:
        return None
    rounding = 4 * max(torch.finfo(one.dtype).eps for one in (logits, returned))
    ours, theirs = logits.double(), returned.double().to(logits.device)
    if theirs.ndim == 2:
        return torch.isclose(ours, theirs[:, None], rtol=rounding, atol=1e-30).all(-1)
    if theirs.shape != ours.shape:
        return None
    near = torch.isclose(ours, theirs, rtol=rounding, atol=1e-30, equal_nan=True)
    return near.all().expand(near.shape[:2])


def _value(output: Any, logits: Tensor) -> Tensor | None:
    """The value [batch, pos, 1] in the output of a model with a value head, or None."""
    several = output if isinstance(output, (tuple, list)) else [entry(output, "value")]
    shapes = logits.shape, logits.shape[:-1]
    found = [one for one in several if isinstance(one, Tensor) and one.shape in shapes]
    return found[-1].reshape(logits.shape) if found else None


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


def _inside(model: Any) -> nn.Module | None:
    """The language model in a wrapper with a value head, as trl makes one."""
    found = getattr(model, "pretrained_model", None)
    return found if isinstance(found, nn.Module) else None


def way_out(model: Any) -> str:
    """Advice about a model without a head; none that would make a head of random weights."""
    if _inside(model) is not None:
        return "pass the language model inside it, model.pretrained_model"
    return (
        "pass the whole model with its trained head, not the decoder inside it. A checkpoint that "
        "was saved without a head has none: loaded as a causal language model it would get a "
        "random one"
    )
