"""Why a head looks where it looks: the score between two tokens, as a reading of one's stream.

    score = scaling * q . k,   q = R_t (W_Q N(x_t) + b_Q),   k = R_j (W_K N(x_j) + b_K)

with R the rotary positions and N the block's norm. With the key frozen it is linear in x_t, and
with the query frozen in x_j; norms of queries and keys are frozen at their scales.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.attention_form import attention_forms
from dla_hooks.calibration.attention_way import attention_way
from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.modules.attention_interface import AttentionCall, why_unseen
from dla_hooks.modules.attention_rows import attention_weights, head_blocks, scaling_of
from dla_hooks.modules.hooks import Tap
from dla_hooks.modules.way_in import WayIn
from dla_hooks.projection.tiles import View
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Request, Target
from dla_hooks.targets.entry_target import EntryTarget, columns_of
from dla_hooks.targets.stream_target import StreamTarget

SIDES = ("query", "key")


class AttentionScore(Request):
    """One head's score between two tokens: ``answer_tokens=AttentionScore(2, 1, query=4, key=1)``.

    The score is scaling * query . key, before any softcap, position bias, mask and softmax. What
    wrote it is asked of one of the two tokens: ``side="query"`` attributes it to what was written
    at the query's position, with the key as it is; ``side="key"`` to what was written at the key's,
    with the query as it is. The other side, rotary positions, and the scales of the norms of
    queries and keys are frozen.

    The model runs twice, up to that block: the first run shows the other side. The whole prompt
    runs at once in it, whatever ``chunk_size`` says. ``pos`` is set by the target.

    Args:
        layer: the block.
        head: which of its query heads.
        query: the position of the token that looks, among a row's real tokens.
        key: the position of the token that is looked at.
        side: ``"query"`` or ``"key"``.

    Raises:
        InputError: for anything else; when it meets a model, for a layer or head that is not there;
            for a prompt in which the query does not see the key, as a later token.
        PositionError: when it meets a prompt, for a position that some row does not have.
        UnsupportedModelError: where queries and keys cannot be seen, or are no linear readings of
            the stream.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> score = dla_hooks.AttentionScore(2, 1, query=-1, key=1)
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", score, tokenizer=tokenizer)
    >>> result.labels[-1]
    '1_mlp_out'
    """

    def __init__(self, layer: int, head: int, query: int, key: int, side: str = "query") -> None:
        given = {"layer": layer, "head": head, "query": query, "key": key}
        read = {name: _whole(value, name) for name, value in given.items()}
        self.layer, self.head, self.query, self.key = read.values()
        if self.layer < 0 or self.head < 0:
            raise InputError(f"layers and heads count from 0; got layer {layer}, head {head}")
        if side not in SIDES:
            raise InputError(f"side must be 'query' or 'key', got {side!r:.40}")
        self.side = side

    def __repr__(self) -> str:
        side = "" if self.side == "query" else f", side={self.side!r}"
        return f"AttentionScore({self.layer}, {self.head}, {self.query}, {self.key}{side})"

    def on(self, stream: Stream) -> Target:
        """The score on a located model."""
        return _Score(self, stream)


class _Score(StreamTarget):
    """The score on a model; its direction is known once a prompt is."""

    of_prompt = True

    def __init__(self, asked: AttentionScore, stream: Stream) -> None:
        self._asked, self._site = asked, _site(asked, stream)
        self._way = attention_way(stream, self._site)
        reader = self._way.reader
        # Until then it reads nothing: units are made ready on it, and say what they miss.
        nothing = torch.zeros(1, stream.d_model, dtype=stream.work_dtype, device="cpu")
        super().__init__(reader.stream, reader.norm, nothing, None, repr(asked))

    def in_prompt(self, source: Any, selection: Selection) -> Target:
        """The score in one prompt."""
        asked, way, mask = self._asked, self._way, selection.mask
        last = columns_of(-1, selection)
        if selection.cols.ndim != 1 or not torch.equal(selection.cols, last):
            raise InputError(f"{asked!r} says itself which positions are read: leave out pos")
        columns = columns_of(asked.query, selection), columns_of(asked.key, selection)
        rows = torch.arange(len(mask), device="cpu")
        own = columns[asked.side == "key"]
        real = torch.ones_like(rows, dtype=torch.bool)
        entries = Entries(rows, own, rows, real, source.prompt.shape, source.batched, mask)
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def see(call: AttentionCall) -> None:
            found.append(self._read(tap, call, *columns, source.prompt.shape[1]))

        tap = WayIn(way.place, way.passed, self.point.dtype, see)
        taps: list[Tap] = [tap]
        ending = self.stream.ending
        assert ending is not None
        with torch.inference_mode(False):  # in which autograd is off
            source.at_once().show(View(entries), lambda _: taps, None, ending.until)
        v_RM, bias_R, score_R = found[0]
        return EntryTarget(way.reader, entries, v_RM, bias_R, score_R, [repr(asked)])

    def _read(
        self, way: WayIn, call: AttentionCall, query: Tensor, key: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Directions and constants of the score in each row, and the score."""
        asked, dtype = self._asked, self.point.dtype
        rows, head = torch.arange(len(query), device=call.query.device), asked.head
        if call.query.ndim != 4 or call.key.ndim != 4 or len(call.query) != len(query):
            shapes = [list(x.shape) for x in (call.query, call.key)]
            raise UnsupportedModelError(
                f"the attention function of {self._site.name} gets queries and keys of the shapes "
                f"{shapes}, whose tokens cannot be told apart"
            )
        shared = head // (call.query.shape[1] // call.key.shape[1])
        at_q, at_k = (
            column.to(rows.device) + (made.shape[2] - width)
            for column, made in ((query, call.query), (key, call.key))
        )
        self._check_seen(call, at_q, at_k)
        q_RD = call.query[rows, head, at_q].detach().to(dtype)
        k_RD = call.key[rows, shared, at_k].detach().to(dtype)
        scaling = scaling_of(call)
        score_R = (q_RD * k_RD).sum(-1) * scaling
        if asked.side == "query":
            return *way.reading(call.query, rows, at_q, head, k_RD * scaling), score_R
        return *way.reading(call.key, rows, at_k, shared, q_RD * scaling), score_R

    def _check_seen(self, call: AttentionCall, at_q: Tensor, at_k: Tensor) -> None:
        """Refuse a pair that the mask keeps apart."""
        asked = self._asked
        (block,) = head_blocks(call, (asked.head,), 1)
        for row, (query, key) in enumerate(zip(at_q, at_k, strict=True)):
            p_S = attention_weights(call, row, query[None], block, self.point.dtype)[0, 0]
            if float(p_S[key]) == 0:
                raise InputError(
                    f"L{asked.layer}H{asked.head} does not see position {asked.key} from position "
                    f"{asked.query} in row {row}: its mask keeps the two apart (a later token, or "
                    "one outside of its window)"
                )


def _site(asked: AttentionScore, stream: Stream) -> HeadSite:
    """The heads that are asked about."""
    name = stream.backend.name
    if why_unseen() is not None:
        raise UnsupportedModelError(f"scores of {name} cannot be seen: {why_unseen()}")
    layers = [block.layer for block in stream.blocks]
    if asked.layer not in layers:
        raise InputError(f"{name} has the layers 0 to {layers[-1]}, and no layer {asked.layer}")
    sized = with_head_widths(stream)
    writes = sized.blocks[layers.index(asked.layer)].writes
    write = next((one for one in writes if one.heads is not None), None)
    site = None if write is None else write.heads
    if write is None or site is None:
        raise InputError(f"layer {asked.layer} of {name} has no attention heads")
    if asked.head >= site.n_heads:
        raise InputError(
            f"layer {asked.layer} of {name} has the heads 0 to {site.n_heads - 1}, and no head "
            f"{asked.head}"
        )
    if write.label in attention_forms(sized).unseen:
        raise UnsupportedModelError(
            f"{site.name} of {name} is reached without a call of transformers' attention functions "
            "(it computes attention in a loop of its own, or has none), so that its queries and "
            "keys cannot be seen"
        )
    return site


def _whole(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an int, got {value!r:.40}") from None
