"""Modules between the projection of z and what attention writes, where the caller may write, too.

They are those that hold the projection in the module that writes (GPT-Neo's inner attention), and
the dropouts next to these. A wrapper of the caller's around attention may write by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from dla_hooks.modules.hooks import Place
from dla_hooks.modules.user_hooks import is_hooked, is_wrapper
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.carriers import PASS_ON
from dla_hooks.residual.stream import Stream, WriteSite


class Inside(NamedTuple):
    """A place between z and the stream, ahead of a post-norm, where something is written.

    Attributes:
        place: the place.
        may_rest: whether it need not run, or pass on what attention writes.
    """

    place: Place
    may_rest: bool = False


class _Paths(NamedTuple):
    """The same modules by their paths in the one that writes.

    Attributes:
        holders: the outermost first.
        pass_on: dropouts and identities next to them.
        wrapped: whether the module that writes is a wrapper of the caller's.
    """

    holders: tuple[str, ...] = ()
    pass_on: tuple[str, ...] = ()
    wrapped: bool = False


_known: Remembered[dict[str, _Paths]] = Remembered()


def written_inside(stream: Stream, write: WriteSite) -> Iterator[Inside]:
    """Where hooks and wrappers of the caller's may write between z and what attention puts out.

    Args:
        stream: the located model.
        write: one with heads.
    """
    whole = stream.whole
    found = _known.of(whole.model, stream.version, lambda: _every(whole), whole.architecture)
    paths = found.get(write.label)
    if paths is None:
        return

    def place(path: str) -> Place:
        return Place(write.module.get_submodule(path), f"{write.name}.{path}", write.use)

    for path in paths.holders:
        if is_hooked(place(path)):
            yield Inside(place(path))
    for path in paths.pass_on:
        for at in (place(path).entered, place(path)):
            if is_hooked(at):
                yield Inside(at, may_rest=True)
    if paths.wrapped:
        out = Place(write.module, write.name, write.use)
        yield Inside(out.ahead._replace(since=place(paths.holders[0])))


def _every(stream: Stream) -> dict[str, _Paths]:
    found = {write.label: _paths(stream, write) for write in stream.writes}
    return {label: paths for label, paths in found.items() if paths is not None and any(paths)}


def _paths(stream: Stream, write: WriteSite) -> _Paths | None:
    site = write.heads
    if site is None or site.linear is not site.proj or write.module is site.proj:
        return None
    named = {path: module for path, module in write.module.named_modules() if path}
    path = next((path for path, module in named.items() if module is site.proj), None)
    if path is None:
        return None
    names = path.split(".")
    holders = [".".join(names[:n]) for n in range(1, len(names))]
    around: list[tuple[str, nn.Module]] = [("", write.module)]
    around += [(holder, named[holder]) for holder in holders]
    pass_on = [
        f"{holder}.{name}".removeprefix(".")
        for holder, module in around
        for name, child in module._modules.items()
        if isinstance(child, PASS_ON)
    ]
    wrapped = bool(holders) and is_wrapper(write.module, stream.backend.root)
    return _Paths(tuple(holders), tuple(pass_on), wrapped)
