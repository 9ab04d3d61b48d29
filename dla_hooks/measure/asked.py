"""Tokens that a prompt or the model names: what is asked of one prompt, before it is measured.

``NEXT`` is read off the prompt. For ``TOP`` and ``RUNNER_UP`` the model runs once ahead of the
measurement, for its logits at the selected positions. Few of these are held at once: of many, each
piece is made from the final norm's output, and only the largest are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.measure.looks import Look
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.logit_hooks import hooks_logits
from dla_hooks.projection.tiles import View
from dla_hooks.residual.hooked import changed_behind
from dla_hooks.residual.stream import Stream
from dla_hooks.results.seen import Seen
from dla_hooks.sources.base import Source
from dla_hooks.targets.base import Target
from dla_hooks.targets.laid import numbered
from dla_hooks.targets.own import NEXT, Own
from dla_hooks.targets.question import Question
from dla_hooks.targets.token_sets import TokenSets

_MOST_LOGITS = 2**23
"""Logits of the model's that are held at once (32 MiB in float32)."""
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Asked:
    """What is asked of one prompt.

    Attributes:
        question: with tokens that are known.
        selection: where.
        seen: what the model's logits say at all of these, where it was run for them.
    """

    question: Question | Callable[[Stream], Target]
    selection: Selection
    seen: Seen | None = None


def settled(
    question: Question | Callable[[Stream], Target],
    stream: Stream,
    source: Source,
    selection: Selection,
) -> Asked:
    """Find the tokens that are asked about.

    Args:
        question: what is asked.
        stream: the located model.
        source: of the prompt.
        selection: the selected positions.

    Raises:
        InputError: where a prompt, or a stored cache, cannot say which tokens these are.
        ShapeMismatchError: for other tokens that do not fit the positions.
    """
    if not isinstance(question, Question) or question.fixed:
        return Asked(question, selection)
    sides = [side for side in (question.right, question.wrong) if isinstance(side, Own)]
    _check(sides, stream, source)
    if not bool(selection.valid.any()):  # nothing is asked, of any token
        any_token = TokenSets.of(torch.tensor(0, device="cpu"))
        names = ("right", "wrong")
        own = {name: any_token for name in names if isinstance(getattr(question, name), Own)}
        return Asked(question.knowing(own), selection)
    after: Tensor | None = None
    if NEXT in sides:
        after, selection = next_tokens(source.prompt, selection)
    shape = tuple(selection.cols.shape)
    known = {}
    for name in ("right", "wrong"):
        side = getattr(question, name)
        if side is NEXT and after is not None:
            known[name] = TokenSets.of(after)
        elif isinstance(side, TokenSets):
            known[name] = side.laid(numbered(side, shape))
    if all(side is NEXT for side in sides):
        return Asked(question.knowing(known), selection)
    n = max((side.shape[-1] for side in known.values() if side.several), default=0)
    entries = _entries(source, selection, n)
    look = _looked(stream, source, entries, _single(known.get("right"), entries))
    for name in ("right", "wrong"):
        side = getattr(question, name)
        if isinstance(side, Own) and side.place is not None:
            ids = entries.unfold(look.ids_KE[side.place].cpu(), padding=0)
            known[name] = TokenSets.of(ids[..., 0] if n else ids)
            if name == "right":
                look = look.asking(side.place)
    return Asked(question.knowing(known), selection, look.unfolded(entries))


def with_next(
    question: Question | Callable[[Stream], Target], prompt: Prompt, selection: Selection
) -> Selection:
    """The positions that a question is about: of the next token, those that have one."""
    if isinstance(question, Question) and NEXT in (question.right, question.wrong):
        return next_tokens(prompt, selection)[1]
    return selection


def _check(sides: list[Own], stream: Stream, source: Source) -> None:
    for side in sides:
        if not source.has_logits:
            raise InputError(
                f"a cache does not say which token {side!r} is; give the token, or run the model "
                "(without cache=)"
            )
        if side is NEXT and (stream.backend.scores_labels or source.prompt.embedded):
            what = "a classifier's labels" if stream.backend.scores_labels else "embeddings"
            raise InputError(f"NEXT is a token of the text, and {what} have none; name the answer")
        if side.place is not None and side.place >= stream.vocabulary:
            raise InputError(f"{side!r} needs {side.place + 1} answers to choose from")


def next_tokens(prompt: Prompt, selection: Selection) -> tuple[Tensor, Selection]:
    """The token after each selected position, and the positions that have one."""
    width = prompt.shape[1]
    places = torch.where(prompt.mask, torch.arange(width, device="cpu"), width)
    after = torch.full_like(places, width)
    after[:, :-1] = places.flip(1).cummin(1).values.flip(1)[:, 1:]
    column = after[selection.rows, selection.cols]
    valid = selection.valid & (column < width)
    ends = selection.valid & ~valid
    if bool(ends.any()) and (ends.ndim == 1 or not bool(valid.any())):
        row = int(selection.rows[ends][0])
        raise InputError(
            f"NEXT is the token that follows a position, and nothing follows the last one of row "
            f"{row}; leave it out (pos=slice(0, -1), pos=-2), or use TOP there"
        )
    ids = prompt.input_ids.gather(1, after.clamp(max=width - 1))[selection.rows, selection.cols]
    changed = replace(selection, valid=valid)
    if ends.ndim == 2:
        kept = valid.any(0) | ~ends.any(0)
        if not bool(kept.all()):
            rows, cols, valid = (one[:, kept] for one in (selection.rows, selection.cols, valid))
            ids, changed = ids[:, kept], Selection(rows, cols, valid, selection.mask)
    return ids, changed


def _entries(source: Source, selection: Selection, n: int) -> Entries:
    """The selected positions as entries, each n times where there are several answers."""
    rows, cols, valid = (
        one[..., None].expand(*one.shape, n) if n else one
        for one in (selection.rows, selection.cols, selection.valid)
    )
    return Entries(
        rows,
        cols,
        torch.zeros_like(cols),
        valid,
        source.prompt.shape,
        source.batched,
        selection.mask,
        several=bool(n),
    )


def _single(right: TokenSets | None, entries: Entries) -> Tensor | None:
    """The tokens that are asked for at each entry; None where they are not known."""
    if right is None or right.n_right != 1:
        return None
    ids: Tensor = torch.where(right.weights[..., 0] == 1, right.ids[..., 0], -1)
    if entries.several and not right.several:
        ids = ids[..., None]
    return entries.taken(ids.expand(entries.shape))


def _looked(stream: Stream, source: Source, entries: Entries, answer_N: Tensor | None) -> Look:
    """Run the model for its logits at some entries.

    Args:
        stream: the located model.
        source: of the prompt.
        entries: where.
        answer_N: the token that is asked for at each of them, or None.
    """
    vocabulary, view = stream.vocabulary, View(entries)
    if answer_N is not None:  # what is no token is refused later
        answer_N = answer_N.where(answer_N < vocabulary, -1)
    columns = entries.cols.unique()
    hooked = changed_behind(stream) or hooks_logits(stream.unembed) or is_hooked(stream.final_norm)
    if not len(entries):
        nothing = torch.zeros(0, vocabulary, dtype=torch.float32, device="cpu")
        return Look.at(nothing, answer_N)
    if hooked:  # they may name a position
        columns = torch.arange(source.prompt.shape[1], device="cpu")
    size = max(1, _AT_ONCE // vocabulary)
    if hooked or len(columns) * source.prompt.shape[0] * vocabulary <= _MOST_LOGITS:
        logits_BSV = source.show(view, lambda _: [], columns)
        assert logits_BSV is not None
        place = torch.searchsorted(columns, entries.cols.contiguous()).to(logits_BSV.device)
        row = entries.rows.to(logits_BSV.device)
        pieces = _slices(len(entries), size)
        return _in_pieces(lambda part: logits_BSV[row[part], place[part]], pieces, answer_N)

    found: list[tuple[Tensor, Look]] = []

    def taps(part: View) -> list[Tap]:
        def see(call: Call) -> None:
            y = call.left
            for piece in _slices(len(part), size):
                inside = part.inside[piece]
                own = None if answer_N is None else answer_N[inside]
                found.append((inside, Look.at(_logits(stream, part.take(y, piece)), own)))

        return [Tap(stream.final_norm._replace(before=False), see)]

    source.show(view, taps, None)
    order = torch.cat([inside for inside, _ in found]).argsort()
    look = Look.joined([look for _, look in found])
    there = order.to(look.rank_E.device)
    return Look(
        look.log_p_E[there], look.rank_E[there], look.ids_KE[:, there], look.log_p_KE[:, there]
    )


def _in_pieces(
    logits: Callable[[slice], Tensor], pieces: list[slice], answer_N: Tensor | None
) -> Look:
    def own(piece: slice) -> Tensor | None:
        return None if answer_N is None else answer_N[piece]

    return Look.joined([Look.at(logits(piece), own(piece)) for piece in pieces])


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)] or [slice(0, 0)]


@torch.no_grad()
def _logits(stream: Stream, y_EM: Tensor) -> Tensor:
    """The model's logits of what the final norm puts out."""
    out: Any = y_EM
    for module in (*stream.after_norm, stream.unembed):
        out = module(out)
    logits: Tensor = out if stream.logit_scale == 1 else out * stream.logit_scale
    cap = stream.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)
