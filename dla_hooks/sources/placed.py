"""Positions that a prompt's text names, and tokens that are put behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError
from dla_hooks.inputs.forms import pad_left, pad_right
from dla_hooks.inputs.positions import Selection, select_each
from dla_hooks.inputs.prompts import check_ids, is_text, tokenizer_for
from dla_hooks.inputs.rows_of_positions import Span, encoder
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.base import Source
from dla_hooks.sources.live import Live, chunk_size_for
from dla_hooks.sources.prompt import prompt_for, runnable


def spanned(
    stream: Stream,
    tokenizer: Any,
    prepend_bos: bool | None,
    source: Source,
    input: Any,
    span: Span,
) -> Selection:
    """The positions of the tokens that a span of the text covers.

    Args:
        stream: the located model.
        tokenizer: that the prompt was read with.
        prepend_bos: likewise.
        source: of the prompt.
        input: as it was given.
        span: what is looked for.

    Raises:
        InputError: for prompts that are no strings, and for a span that one does not have.
    """
    if source.prompt.encoder is not None:
        raise InputError(
            f"pos={span!r:.80} is a piece of one text, and {stream.backend.name} reads two; give "
            "positions of the decoder, as an int or a list"
        )
    if not is_text(input) or not isinstance(source, Live):
        what = type(input).__name__ if isinstance(source, Live) else "a cache"
        raise InputError(
            f"pos={span!r:.80} needs prompts that are strings, got {what}; give positions, as an "
            "int or a list"
        )
    reads = tokenizer_for(stream.backend.model, tokenizer, "pos=Span(...)")
    encode = encoder(reads, prepend_bos)
    texts = [input] if isinstance(input, str) else input
    rows = zip(texts, source.prompt.input_ids, source.prompt.mask, strict=True)
    found = [span.tokens(text, ids[real].tolist(), encode) for text, ids, real in rows]
    return select_each(found, source.prompt.mask)


def continued(
    stream: Stream, follows: Sequence[Tensor], source: Source, pos: Any, chunk_size: Any
) -> tuple[Tensor, Source, Selection]:
    """Put tokens behind each prompt, and find where each of them is predicted.

    Args:
        stream: the located model.
        follows: the tokens, for each prompt or for all.
        source: of the prompt alone.
        pos: the caller's.
        chunk_size: the caller's.

    Returns:
        The tokens [batch, n], the longer prompt, and the positions; shorter rows end early.

    Raises:
        InputError: for positions of the caller's, a cache, and inputs that tokens cannot follow.
        TokenError: for an id outside the vocabulary.
    """
    prompt, backend = source.prompt, stream.backend
    if isinstance(pos, bool) or not isinstance(pos, int) or pos != -1:
        raise InputError(
            f"a Continuation says its positions itself; leave pos at -1, got {pos!r:.80}"
        )
    what = ""
    if not isinstance(source, Live):
        what = "a cache, which holds the prompt alone"
    elif backend.scores_labels:
        what = "the text of a classifier, which scores it as a whole"
    elif prompt.extras:
        what = f"an input with {', '.join(prompt.extras)}"
    if what:
        raise InputError(f"a Continuation follows texts and token ids, and cannot follow {what}")
    n = len(prompt.mask)
    if len(follows) not in (1, n):
        raise ShapeMismatchError(
            f"there are {len(follows)} continuations for {n} prompts; give one for each, or one "
            "for all"
        )
    follows = list(follows) if len(follows) == n else list(follows) * n
    for ids in follows:
        check_ids(ids, min(backend.n_tokens(), stream.vocabulary))
    lines = zip(prompt.input_ids, prompt.mask, follows, strict=True)
    rows = [torch.cat((row[real], more)) for row, real, more in lines]
    if prompt.encoder is None:
        ids, mask = pad_left(rows)
        longer = prompt_for(stream, None, None, ids, attention_mask=mask)
    else:
        ids, mask = pad_right(rows)
        longer = runnable(stream, replace(prompt, input_ids=ids, mask=mask))
    pairs = zip(mask.sum(-1).tolist(), follows, strict=True)
    places = [range(length - len(more) - 1, length - 1) for length, more in pairs]
    most = max(map(len, follows))
    right = torch.stack([torch.cat((more, more[:1].expand(most - len(more)))) for more in follows])
    live = Live(stream, longer, chunk_size_for(stream, longer, chunk_size))
    return right, live, select_each(places, mask, from_the_left=True)
