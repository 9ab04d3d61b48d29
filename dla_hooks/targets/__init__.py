"""What is attributed: a linear reading of the stream.

Tokens are read by default. Any other target is a :class:`~dla_hooks.targets.base.Request`, given as
``answer_tokens``. It is found by its file, and public as ``dla_hooks.<name of its class>``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dla_hooks.targets.base import Request


def request_classes() -> dict[str, type[Request]]:
    """The targets that are no tokens, by the name of the class."""
    from dla_hooks.targets.base import Request, TokenRequest
    from dla_hooks.targets.own import Own

    hidden = Request, TokenRequest, Own
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, Request) and value not in hidden:
                found[name] = value
    return found
