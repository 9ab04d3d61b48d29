"""Ablations: a model without some of its parts, for the length of a ``with`` block."""

from __future__ import annotations

import numbers
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.calibration.named_parts import part_named
from dla_hooks.call import model_of, source_of
from dla_hooks.errors import ArgumentTypeError, InputError, LabelError, ShapeMismatchError
from dla_hooks.inputs.plain import check_dense
from dla_hooks.modules.compiled import eagerly
from dla_hooks.modules.replacing import Replacing
from dla_hooks.questions.ablation import Part, Put, replacements
from dla_hooks.questions.feature_part import Dictionaries
from dla_hooks.questions.means import means_of
from dla_hooks.residual.hooked import decoders
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.base import Source
from dla_hooks.units.base import Unit

ZERO, MEAN = "zero", "mean"

_RUNNING_SUM = re.compile(r"[0-9]+_(pre|mid)|final_post")
_SOURCE = re.compile(r"(L[0-9]+(\.[0-9]+)?(H[0-9]+)?)?<[0-9]+")
_HOOK = re.compile(r"[0-9]+_hook|L[0-9.]+hook|(embed|final|logit)_hook")
_FEATURE = re.compile(r"(L[0-9]+)?F[0-9]+(@.+)?|.+\[(b_dec|error)\]")
_ADAPTER = re.compile(r".+\[.+\]")


def ablated(
    model: Any,
    labels: str | Iterable[str],
    how: Any = ZERO,
    *,
    input: Any = None,
    attention_mask: Any = None,
    unit: Unit | None = None,
    tokenizer: Any = None,
    prepend_bos: bool | None = None,
    every_thread: bool = False,
) -> Ablated:
    """A model without some of its parts, for the length of a ``with`` block.

    Real hooks replace what the parts write, at all positions; whatever runs the model meets them:
    ``model.generate``, :func:`direct_logit_attribution`, code of others. They act as hooks of your
    own would, and come off at the end of the block, also after an error. Blocks may stand in each
    other, and one may be entered again.

    A part is named by the label of its row. What is replaced is what really enters the stream (the
    output of a post-norm, where one follows), a head's slice of what the output projection reads,
    a neuron's channel of what the MLP's last map reads, or an expert's share of the experts' sum;
    routing weights of other experts stay. A shared expert is replaced ahead of its gate.

    Args:
        model: as for :func:`direct_logit_attribution`.
        labels: rows, or one: ``"3_attn_out"``, ``"3_mlp_out"``, ``"L9H6"``, ``"L0.1H2"``,
            ``"L2N5"``, ``"L3E5"``, ``"L3S0"``, and with ``unit`` features: ``"L3F123"``,
            ``"3_mlp_out[error]"``.
        how: what takes their place: ``"zero"``; ``"mean"``, each part's own mean over the real
            tokens of ``input``; a number; a tensor [width], [pos, width] or [batch, pos, width],
            with positions counted as columns of the batch, padding included; or a mapping from
            each label to one of these.
        input: prompts, for ``"mean"``; they are run once, when this function is called.
        attention_mask: for padded ids.
        unit: a :class:`Features`, for labels of its rows.
        tokenizer: for strings, unless the model carries one.
        prepend_bos: for strings.
        every_thread: act in all threads, as for what generates in a thread of its own; otherwise
            in the thread that enters the block only, and others run the model as it is.

    Returns:
        An :class:`Ablated`: a context manager.

    Raises:
        LabelError: (a KeyError) for a part that this model does not have.
        InputError: for rows that nothing can be taken out for (sources, layers, embeddings,
            remainders, hooks), and for any other argument that cannot be used.
        ShapeMismatchError: for a tensor of another width than its part.
        UnsupportedModelError: for a model, heads, neurons or experts that cannot be told apart.
        HookError: in a run of the model that goes past a part.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> with dla_hooks.ablated(model, ["L1H0", "2_mlp_out"]):
    ...     result = dla_hooks.direct_logit_attribution(
    ...         model, "The keys near the cabinet", " are", " is", tokenizer=tokenizer)
    >>> float(result["2_mlp_out"])
    0.0
    """
    read = model_of(model, tokenizer=tokenizer, prepend_bos=prepend_bos)
    names = names_of(labels)
    dictionaries = Dictionaries(unit, read.stream)
    parts = [ablatable(read.stream, label, dictionaries) for label in names]

    def prompts() -> Source:
        if input is None:
            raise InputError(
                "how='mean' is the mean over the tokens of prompts: give them as input=, or "
                "how='zero', or a tensor"
            )
        return source_of(read, input, attention_mask=attention_mask, purpose=None)

    puts = puts_of(parts, how, prompts)
    return Ablated(read.stream, puts, every_thread=every_thread)


class Ablated:
    """A model without some of its parts, while it is entered; made by :func:`ablated`.

    Attributes:
        labels: of the parts.
        values: by label, what takes the part's place; None for zero.
    """

    __module__ = "dla_hooks"

    def __init__(self, stream: Stream, puts: Sequence[Put], *, every_thread: bool = False) -> None:
        self.labels = [put.part.label for put in puts]
        self.values = {put.part.label: put.value for put in puts}
        self._model = stream.backend.name
        # Where torch's compiler is loaded, the caller may hold a compiled wrapper of the model.
        self._compiled = stream.backend.compiled or "torch._dynamo" in sys.modules
        around = [stream.backend.model, stream.backend.root, *decoders(stream)]
        called = [one for one in around if type(one).forward is not nn.Module.forward]
        self._hooks = Replacing(replacements(puts), called, every_thread=every_thread)
        self._eager = list[ExitStack]()

    def __enter__(self) -> Ablated:
        """Put the hooks on. A compiled model runs eagerly until they are off again."""
        with ExitStack() as stack:
            stack.enter_context(eagerly(self._compiled))
            self._hooks.__enter__()
            self._eager.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> None:
        """Take the hooks off, whatever happened."""
        stack = self._eager.pop()
        with stack:
            self._hooks.__exit__(*error)

    def __repr__(self) -> str:
        return f"Ablated({self._model}: {', '.join(self.labels)})"


def ablatable(stream: Stream, label: str, dictionaries: Dictionaries) -> Part:
    """The part of a label, if something can be put in its place.

    Args:
        stream: the located model.
        label: of a row.
        dictionaries: whose rows may be named.

    Raises:
        LabelError: for a part that is not there.
        InputError: for a row that is no part, with what to do instead.
    """
    if isinstance(label, str):
        found = dictionaries.part(label)
        if found is not None:
            return found
        _check_kind(label, dictionaries.places)
    return part_named(stream, label)


def _check_kind(label: str, places: Sequence[str]) -> None:
    """Refuse the rows that nothing can be taken out for."""
    why = None
    if _RUNNING_SUM.fullmatch(label):
        why = (
            "is a running sum: all that was written before; name what was written, such as "
            "'3_attn_out'"
        )
    elif _SOURCE.fullmatch(label):
        why = (
            "is what a head read of one token, which attention adds up with all others before any "
            f"module shows it; ablate the head, {label.partition('<')[0] or 'L0H0'!r}"
        )
    elif label in ("embed", "pos_embed"):
        why = (
            "begins the stream, and without it there is no prompt; give other embeddings: "
            '{"inputs_embeds": ...} as input'
        )
    elif label in ("remainder", "rest", "bias") or label.endswith("_constant"):
        why = "is no part of the model; name what is within it"
    elif _HOOK.fullmatch(label):
        why = "is what hooks of yours write; take the hook off"
    elif _FEATURE.fullmatch(label):
        if places:
            raise LabelError(f"no dictionary (at {', '.join(places)}) has the row {label!r:.40}")
        why = "is a row of a dictionary; give it: unit=Features({place: dictionary})"
    elif _ADAPTER.fullmatch(label):
        why = "is an adapter's part; switch the adapter off: model.disable_adapter()"
    if why is not None:
        raise InputError(f"{label!r:.40} cannot be ablated: it {why}")


def names_of(labels: Any) -> list[str]:
    """Some labels, or one.

    Raises:
        ArgumentTypeError: for anything else.
        InputError: for none.
    """
    if isinstance(labels, str):
        return [labels]
    if not isinstance(labels, Iterable) or isinstance(labels, (bytes, Tensor)):
        raise ArgumentTypeError(
            f"labels must be a label such as 'L9H6', or a list of labels; got {labels!r:.80}"
        )
    found = list(dict.fromkeys(labels))
    if not found:
        raise InputError("labels is empty: name one part or more, such as 'L9H6'")
    return found


def puts_of(parts: Sequence[Part], how: Any, prompts: Callable[[], Source]) -> list[Put]:
    """What takes the place of each part.

    Args:
        parts: the parts.
        how: see :func:`ablated`.
        prompts: the run that means are taken over.

    Raises:
        InputError: for a value that cannot be used.
        ShapeMismatchError: for a tensor of another width than its part.
    """
    given = dict.fromkeys((part.label for part in parts), how)
    if isinstance(how, Mapping):
        lacking, more = [x for x in given if x not in how], [x for x in how if x not in given]
        if lacking or more:
            why = f"lacks {lacking[0]!r:.40}" if lacking else f"names {more[0]!r:.40} besides"
            raise InputError(f"a mapping of what is to be put needs the labels as keys; it {why}")
        given = dict(how)
    values = {part.label: _value(part, given[part.label]) for part in parts}
    of_means = [part for part in parts if is_word(given[part.label], MEAN)]
    if of_means:
        values |= means_of(of_means, prompts())
    return [Put(part, values[part.label]) for part in parts]


def is_word(how: Any, word: str) -> bool:
    """Whether what is to be put is a word, and not a tensor."""
    return isinstance(how, str) and how == word


def _value(part: Part, how: Any) -> Tensor | None:
    """A value as a tensor; None for zero, and for a mean that is not measured yet."""
    if is_word(how, ZERO) or is_word(how, MEAN):
        return None
    if isinstance(how, numbers.Real) and not isinstance(how, bool):
        how = torch.tensor(float(how), dtype=torch.float64, device="cpu")
    if hasattr(how, "__array__") and not isinstance(how, Tensor):
        how = torch.as_tensor(how, device="cpu")
    if not isinstance(how, Tensor):
        raise InputError(
            f"what takes the place of {part.label} must be 'zero', 'mean', a number or a tensor "
            f"[width], [pos, width] or [batch, pos, width]; got {how!r:.80}"
        )
    check_dense(how, "how")
    value = how.detach().clone()
    if not value.is_floating_point() or not bool(value.isfinite().all()):
        raise InputError(
            f"the tensor for {part.label} must hold finite floating-point numbers; it is of "
            f"{value.dtype}" + ("" if not value.is_floating_point() else ", with NaN or infinity")
        )
    fits = value.ndim == 0 or (value.ndim <= 3 and value.shape[-1] in (1, part.width or -1))
    if part.width and not fits:
        raise ShapeMismatchError(
            f"the tensor for {part.label} has the shape {list(value.shape)}; the part is "
            f"{part.width} wide: give [{part.width}], [pos, {part.width}] or "
            f"[batch, pos, {part.width}]"
        )
    return value
