"""Modules found by their paths, through wrappers that stand on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn


class Found(NamedTuple):
    """A module that was found by its path.

    Attributes:
        module: the module.
        path: where it is, with the wrappers on the way.
        holders: for each name of the declared path, the module that has it as a child.
    """

    module: nn.Module
    path: str
    holders: tuple[nn.Module, ...]


_DEEPEST_WRAPPER = 3


def look(root: nn.Module, path: str) -> Found | None:
    """Find a module by its path, through wrappers behind the first name.

    A wrapper lacks the next name of the path, and one of the modules in it has that.
    """
    first, *names = path.split(".")
    module = child(root, first)
    if module is None:
        return None
    taken, holders = [first], [root]
    for name in names:
        inside = descend(module, partial(child, name=name))
        if inside is None:
            return None
        holder, way = inside
        module = getattr(holder, name)
        taken += [*way, name]
        holders.append(holder)
    return Found(module, ".".join(taken), tuple(holders))


def descend(
    module: nn.Module, has: Callable[[nn.Module], Any]
) -> tuple[nn.Module, tuple[str, ...]] | None:
    """The module if it has what is sought, or the only one in it that does, with the way there."""
    level: list[tuple[nn.Module, tuple[str, ...]]] = [(module, ())]
    for _ in range(1 + _DEEPEST_WRAPPER):
        fits = [found for found in level if has(found[0])]
        if fits:
            return fits[0] if len({id(one) for one, _ in fits}) == 1 else None
        level = [
            (inner, (*way, name))
            for one, way in level
            for name, inner in one._modules.items()
            if inner is not None
        ]
    return None


def child(module: nn.Module, name: str) -> nn.Module | None:
    """The attribute of that name, where it is a module."""
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None
