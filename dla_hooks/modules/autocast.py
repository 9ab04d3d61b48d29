"""Contractions keep their own precision, also inside a caller's ``torch.autocast``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

AUTOCAST = (
    "Autocast is on, under which the model's own products are rounded to 16 bits: call this "
    "outside of it, or with check=False"
)
"""Why numbers miss each other under it, and what to do."""

_DEVICES = ("cpu", "cuda", "mps", "xpu")

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def autocast_is_on() -> bool:
    """Whether the caller has autocast on for any device."""
    return any(torch.is_autocast_enabled(device) for device in _DEVICES)


def outside_autocast(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorate a function so that it runs with autocast (16 bits) switched off."""

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        on = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not on:
            return function(*args, **kwargs)
        with ExitStack() as off:
            for device in on:
                off.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run
