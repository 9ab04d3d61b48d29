"""The arguments that a model's forward pass takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from torch import nn

_ANY = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD

Arguments = Mapping[str, inspect.Parameter]


def arguments_of(model: nn.Module) -> Arguments:
    """The arguments that a model's forward pass takes, by their names.

    A function put in its place may take anything and hand it on. The class then names them.
    """
    own = own_arguments(model)
    for cls in type(model).__mro__:
        if named(own):
            break
        own = _of_method(vars(cls)["forward"]) if "forward" in vars(cls) else own
    return own


def own_arguments(model: nn.Module) -> Arguments:
    """The arguments that the function itself takes which stands as a model's forward."""
    method = getattr(model.forward, "__func__", None)
    return inspect.signature(model.forward).parameters if method is None else _of_method(method)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module runs what its class was written with; nobody has put a ``forward`` there."""
    if "forward" in vars(module):
        return False
    kind = type(module)
    home = getattr(getattr(kind, "forward", None), "__module__", None)
    return home == kind.__module__ or any(
        home == base.__module__ for base in kind.__mro__ if "forward" in vars(base)
    )


@lru_cache(maxsize=256)
def _of_method(method: Any) -> Arguments:
    """A method's arguments without `self`. Reading them takes longer than many a tap."""
    found = list(inspect.signature(method).parameters.items())
    return MappingProxyType(dict(found[1:]))


def named(arguments: Arguments) -> list[str]:
    """The arguments that have a name, less ``*args`` and ``**kwargs``."""
    return [name for name, one in arguments.items() if one.kind not in _ANY]


def takes_keywords(arguments: Arguments) -> bool:
    """Whether a function takes keywords that it does not name."""
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in arguments.values())


def takes_any(model: nn.Module) -> bool:
    """Whether a forward names none of its arguments, and hands on whatever it is given."""
    return not named(arguments_of(model)) and takes_keywords(own_arguments(model))
