"""Where the caller's hooks write to the stream, beside the writes of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from dla_hooks.modules.hooks import Place
from dla_hooks.modules.user_hooks import (
    FINAL_HOOK,
    has_callers,
    hooked_modules,
    is_foreign,
    is_hooked,
    is_replaced,
    is_wrapper,
)
from dla_hooks.residual.gains import constant_label, product
from dla_hooks.residual.stream import Block, Stream


class Hooked(NamedTuple):
    """A place of the stream with hooks of the caller's on it: no write, and ahead of the last norm.

    Attributes:
        number: the block's place in the stack; the number of blocks for the last stream.
        block: the block; None for the last stream.
        at_input: whether the place is the block's input, or the last stream.
        place: where the hooks are.
        after: how many of the block's writes stand before it.
        response: what the stream behind the block multiplies a change there by; None is one.
        by_wrapper: whether it is a wrapper's, which may write nothing.
    """

    number: int
    block: Block | None
    at_input: bool
    place: Place
    after: int = 0
    response: Tensor | None = None
    by_wrapper: bool = False

    @property
    def label(self) -> str:
        """The label of the row that it belongs to."""
        return FINAL_HOOK if self.block is None else hook_label(self.block)


def hook_label(block: Block) -> str:
    """The label of what the caller's hooks write in a block, beside its own writes.

    It is one row, as ``3_hook``.
    """
    return f"{block.layer}_hook"


def hooked_places(stream: Stream) -> Iterator[Hooked]:
    """Find the caller's hooks at and in the blocks, in stream order."""
    if not (stream.wrapped or _any_hooked(stream.hookable)):  # nearly every call ends here
        return
    n_whole = len(stream.blocks) - (stream.ending is not None and stream.ending.within)
    start = stream.declared_start
    for number, block in enumerate(stream.blocks):
        # A stream that starts within its first block (RWKV) holds what hooks do ahead of that.
        ahead = not number and start is not None and start.name.startswith(f"{block.name}.")
        if not ahead and is_hooked(block.input):
            yield Hooked(number, block, True, block.input)
        inner = block.inner
        if inner is not None:
            read = inner.entered._replace(since=block.input)
            yield Hooked(number, block, False, read, 0, block.gain, True)
        for one in sorted(block.carriers, key=lambda carrier: carrier.after):
            if is_hooked(one.place):
                yield Hooked(number, block, False, one.place, one.after, one.response)
        if number < n_whole and inner is not None:
            left = block.output.ahead._replace(since=inner.ahead)
            yield Hooked(number, block, False, left, len(block.writes), block.behind, True)
        if number < n_whole and is_hooked(block.output):
            yield Hooked(number, block, False, block.output, len(block.writes), block.behind)
    for place in stream.behind_blocks:
        if not place.first and is_hooked(place):
            yield Hooked(len(stream.blocks), None, True, place)


def _any_hooked(modules: Iterable[nn.Module]) -> bool:
    return any(one._forward_hooks or one._forward_pre_hooks for one in modules)


def hook_factor(hooked: Hooked, factors: Mapping[str, Tensor | None]) -> Tensor | None:
    """Compute the factor of what hooks write: all gains between it and the stream.

    Args:
        hooked: where they write.
        factors: from :func:`dla_hooks.residual.gains.path_factors`, of the block's constant.
    """
    block = hooked.block
    if block is None:
        return None
    response = block.gain if hooked.at_input else hooked.response
    return product(response, factors[constant_label(block)])


def decoders(stream: Stream) -> list[nn.Module]:
    """The modules around the final norm, from the outermost below the model itself."""
    found = list[nn.Module]()
    holder: object = stream.backend.root
    for part in stream.final_norm.name.split(".")[:-1]:
        holder = getattr(holder, part, None) or getattr(holder, "base_model", None)
        if isinstance(holder, nn.Module):
            found.append(holder)
    return found


def places_hooked(stream: Stream) -> str:
    """Where a hook of the caller's may change how many positions the stream has.

    Returns:
        The path of the first such place: the embeddings, or what enters the model, its decoder or
        a block. Empty where there is none.
    """
    around = (stream.model, stream.backend.root, *decoders(stream))
    if not _any_hooked((*around, *stream.hookable)):
        return ""
    found = {stream.embedding.name or "the embeddings": is_hooked(stream.embedding)}
    found |= {"the model": any(has_callers(one._forward_pre_hooks) for one in around)}
    found |= {block.name: is_hooked(block.input) for block in stream.blocks}
    return next((path for path, hooked in found.items() if hooked), "")


def changed_behind(stream: Stream) -> bool:
    """Tell whether the caller may change activations behind the last stream, out of sight.

    A hook on the output of the model or of its decoder may do that, and so do a ``forward`` or a
    wrapper that was put there or around the unembedding, and a hook inside of the latter. The check
    must then see all logits. A model's own class is taken for what it is.
    """
    root = stream.backend.root
    behind = [stream.backend.model, root, stream.unembed, *decoders(stream)]
    if any(
        has_callers(one._forward_hooks) or is_replaced(one) or is_wrapper(one, root)
        for one in behind
    ):
        return True
    inside = [
        one
        for path, one in stream.unembed.named_modules()
        if path and not path.startswith("parametrizations")
    ]
    return bool(hooked_modules(inside)) or any(
        is_replaced(one) or is_foreign(one, root) for one in (*inside, *stream.after_norm)
    )
