"""Who wrote what a head read? One head-and-source row, split by the parts of what it reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dla_hooks.attribution import Plan
from dla_hooks.backends import Conventions
from dla_hooks.bars import with_progress
from dla_hooks.calibration.attention_way import attention_way
from dla_hooks.call import check_given, checked, model_of, placed, source_of, target_of
from dla_hooks.errors import InputError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.measure.asked import Asked, settled
from dla_hooks.measure.one_prompt import measure
from dla_hooks.questions.head_read import HeadRead, HeadReadSplit
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Target
from dla_hooks.targets.entry_target import EntryTarget, columns_of
from dla_hooks.targets.stream_target import StreamTarget
from dla_hooks.units import DEFAULT_UNIT, UnitName, read_units
from dla_hooks.units.base import Unit
from dla_hooks.units.plan import make_plan
from dla_hooks.units.source_layer import as_heads, source_layers

_ROW = re.compile(r"(L[0-9]+(?:\.[0-9]+)?H[0-9]+)<([0-9]+)")
_CROSS_ROW = re.compile(r"L[0-9]+(?:\.[0-9]+)?X[0-9]+<[0-9]+")
_NEURON = re.compile(r"L[0-9]+N[0-9]+")


@with_progress
def upstream(
    model: Any,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    part: str | Sequence[str],
    unit: UnitName | Unit | tuple[UnitName | Unit, ...] | Mapping[str, Any] = DEFAULT_UNIT,
    pos: Any = -1,
    tokenizer: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    check: bool = True,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> Any:
    """Split what one head took from one token by who wrote what the head read there.

    A row of the unit ``source``, ``L9H6<5``, is ``p (v . u_h) / s``: attention weight, value and
    folded direction. With the pattern and all scales frozen v is linear in the stream at position
    5, so that each part written there before block 9 has an exact share of the row. The shares and
    the bias (value biases, the norm's beta) sum to the row, which is the ``logit`` of the result.

    A path is walked back with ``unit=SourceTokens(...)`` and a longer ``part``: in the result for
    ``"L9H6<5"`` look for the strongest row, say ``"L7H3<2"``, and ask for
    ``part=["L9H6<5", "L7H3<2"]``: what of ``L9H6<5`` came through ``L7H3`` from token 2.

    The model runs once for each part, and once more, only up to the block of the last part. It is
    the first run of each part that shows its direction. In these the prompt runs at once, whatever
    ``chunk_size`` says. One direction [d_model] is kept for each selected entry.

    Args:
        model: as for :func:`direct_logit_attribution`; so are all arguments but ``part``. Models of
            TransformerLens are refused.
        input: the prompt.
        answer_tokens: whose logit the row is a share of; any target goes.
        incorrect_tokens: whose logit is subtracted.
        part: the label of a row of the unit ``source``, ``"L9H6<5"``; or a list of them, each read
            by the head of the one before.
        unit: into which rows.
        pos: where the logit is read. The result's positions are those that the head read.
        tokenizer: for strings.
        attention_mask: for padded ids.
        prepend_bos: for strings.
        center_unembed: take the vocabulary's mean off every row of W_U.
        check: hold all runs against the model.
        chunk_size: for the last run.
        progress: show a bar over its chunks; None shows it in a terminal or a notebook, where they
            take long.

    Returns:
        A :class:`DirectLogitAttribution`, or what goes with the unit; its ``answer`` names the row.
        Entries whose query does not see the token are 0.

    Raises:
        InputError: for what is no such label, a head that is not there, or behind the one that
            reads it; where no selected position sees the token.
        PositionError: for a position that some row does not have.
        UnsupportedModelError: where values cannot be seen, or are no linear reading of the stream.
        DecompositionError: when parts and bias do not sum to the row.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.upstream(
    ...     model, "The keys near the cabinet", " are", " is", part="L3H3<1", tokenizer=tokenizer)
    >>> bool(abs(result.attribution.sum() + result.bias - result.logit) < 1e-3)
    True
    """
    rows = _as_rows(part)
    units, single = read_units(unit)
    if answer_tokens is None:
        raise InputError("answer_tokens is required: the token whose logit the row is a share of")
    backend = checked(model)
    check_given(input, None)
    read = model_of(backend, tokenizer=tokenizer, prepend_bos=prepend_bos)
    source = source_of(
        read, input, attention_mask=attention_mask, chunk_size=chunk_size, purpose=None
    )
    conventions = read.conventions(center_unembed)
    asked = target_of(read, answer_tokens, incorrect_tokens, conventions)
    asked, source, selection = placed(read, asked, source, input, pos, chunk_size)
    known = settled(asked, read.stream, source, selection)
    question: Callable[[Stream], Target] = known.question
    for label, position in rows:
        columns_of(position, known.selection)  # every row of the batch must have it
        question = _through(question, label, position, conventions, check, read.tokenizer)
    plan = Plan(model, read, question, units, single, conventions, bool(check))
    return plan._attribute(source, Asked(question, known.selection))


def _through(
    question: Callable[[Stream], Target],
    label: str,
    position: int,
    conventions: Conventions,
    check: bool,
    tokenizer: Any,
) -> Callable[[Stream], Target]:
    def on(stream: Stream) -> Target:
        return _HeadRow(question(stream), label, position, conventions, check, tokenizer)

    return on


class _HeadRow(StreamTarget):
    """One head-and-source row of another target; its direction is known once a prompt is."""

    of_prompt = True

    def __init__(
        self,
        of: Target,
        label: str,
        position: int,
        conventions: Conventions,
        check: bool,
        tokenizer: Any,
    ) -> None:
        self._of, self._label, self._position = of, label, position
        self._conventions, self._check, self._tokenizer = conventions, check, tokenizer
        whole = of.stream.whole
        (chosen,) = source_layers(whole, as_heads([label]), None)
        write = next((one for one in of.stream.writes if one.label == chosen.label), None)
        if write is None or write.heads is None:
            raise InputError(
                f"{label} writes nothing to what is read: {of.stream.last_label} holds the layers "
                f"before it; name a head of an earlier layer"
            )
        self._reader = attention_way(whole, write.heads).reader
        nothing = torch.zeros(1, whole.d_model, dtype=whole.work_dtype, device="cpu")
        super().__init__(self._reader.stream, self._reader.norm, nothing, None, label)

    def in_prompt(self, source: Any, selection: Selection) -> Target:
        """The row in one prompt."""
        of = self._of.in_prompt(source, selection)
        columns_B = columns_of(self._position, selection)
        unit = HeadRead(self._label, columns_B)
        plan = make_plan(of, {"read": unit}, self._conventions)
        with torch.inference_mode(False):  # in which autograd is off
            found, _ = measure(plan, source.at_once(), selection, self._check)
        split = found.splits["read"]
        assert isinstance(split, HeadReadSplit)
        name = f"{self._label}<{self._position}"
        if len(found.entries) and not bool(split.weight_N.any()):
            raise InputError(
                f"no selected position reads position {self._position} through {self._label}: it "
                f"comes later, or is masked; {name} is no row there"
            )
        entries = found.entries.at(columns_B[found.entries.rows])
        names = [f"{name} of {one}" for one in _asked_for(of, found.entries, self._tokenizer)]
        return EntryTarget(self._reader, entries, split.v_NM, split.bias_N, split.value_N, names)


def _asked_for(of: Target, entries: Entries, tokenizer: Any) -> list[str]:
    """What a target asks for, in words: one, or one for each entry."""
    answers, incorrect = of.names(entries, tokenizer)
    if of.reading is not None:
        return answers
    if incorrect is None:
        return [repr(answer) for answer in answers]
    return [f"{one!r} - {other!r}" for one, other in zip(answers, incorrect, strict=True)]


def _as_rows(part: Any) -> list[tuple[str, int]]:
    """The heads and the positions that they read, the last one first."""
    labels = [part] if isinstance(part, str) else part
    if not isinstance(labels, (list, tuple)) or not labels:
        raise InputError(f"part must be a label such as 'L9H6<5', or a list, got {part!r:.60}")
    found = []
    for label in labels:
        if isinstance(label, str) and _NEURON.fullmatch(label):
            number = label.partition("N")[2]
            raise InputError(
                "a neuron's row is no linear reading of the stream, but its pre-activation is: "
                f"attribute dla_hooks.Output(path of the module that makes it, {number}) as "
                "answer_tokens; of a gated MLP that is the gate's projection, or the up "
                "projection. A router's logit is an Output, too"
            )
        match = _ROW.fullmatch(label) if isinstance(label, str) else None
        if match is None and isinstance(label, str) and _CROSS_ROW.fullmatch(label):
            raise InputError(
                f"{label!r} read a position of the encoder, whose output is given: nothing in the "
                "decoder's stream wrote it. Ask about a head that reads the decoder ('L9H6<5')"
            )
        if match is None:
            raise InputError(
                f"part must name a head and the position that it reads, as a row of the unit "
                f"source does: 'L9H6<5'; got {label!r:.60}"
            )
        found.append((match[1], int(match[2])))
    return found
