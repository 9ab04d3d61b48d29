"""Heads of labels: of classifiers, reward models, value models, and models that answer with a span.

transformers and trl have each such linear head under a name of its own. What the model returns is
held against what the head puts out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.backends.readouts import entry, way_out, wrapped_in
from dla_hooks.errors import TokenError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.hooks import Place, Tap, tapped
from dla_hooks.modules.outputs import tensor_in

_LABEL_HEADS = {
    "score": "logits",
    "classifier": "logits",
    "qa_outputs": "span",
    "v_head": "value",
    "logits_proj": "logits",
    "sequence_summary": "logits",
}
"""Names of heads with labels, and what the model makes of their output."""
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
        advice = "" if wrapped_in(model) is None else f"; for a token, {way_out(model)}"
        return LabelNames(dict(enumerate(_NAMES[head.kind])), advice)
    named = getattr(model.config, "id2label", None) or {}
    # JSON knows no keys but strings, and a dictionary that is set by hand may come from there.
    return LabelNames({int(index): str(name) for index, name in named.items()})


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
        theirs = theirs[:, None].expand_as(ours)
        near = torch.isclose(ours, theirs, rtol=rounding, atol=1e-30, equal_nan=True)
        return near.all(-1)
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


def padded_as_known(prompt: Prompt, pad: Any) -> Tensor:
    """Ids with the model's own pad token where the mask says padding, as classifiers read it.

    They find the last token by its id, and not by the mask.

    Args:
        prompt: the whole batch.
        pad: the model's pad token, or None.
    """
    if not prompt.padded or not isinstance(pad, int):
        return prompt.input_ids
    return prompt.input_ids.masked_fill(~prompt.mask, pad)
