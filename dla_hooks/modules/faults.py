"""Errors inside of synthetic runs, as refusals that name the module which failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dla_hooks.errors import DLAError, UnsupportedModelError

_PASS = (DLAError, torch.OutOfMemoryError, MemoryError)
"""Errors that say by themselves what they are."""


class SyntheticRunError(UnsupportedModelError):
    """The model does not run on made-up activations.

    Attributes:
        cause: the error that it failed with.
    """

    @property
    def cause(self) -> Exception:
        return self.__cause__ if isinstance(self.__cause__, Exception) else self


class Refusing:
    """Turns any error in a ``with`` block into a refusal; modules fail in many ways.

    It is no generator, since one would let a ``StopIteration`` pass, as ``next`` raises it.

    Args:
        refusal: makes the refusal from the error.
    """

    def __init__(self, refusal: Callable[[Exception], UnsupportedModelError]) -> None:
        self._refusal = refusal

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, _PASS):
            raise self._refusal(error) from error


def as_refusal(what: str, instead: str = "") -> Refusing:
    """Refuse whatever fails in a ``with`` block.

    Args:
        what: the beginning of the refusal's text; the error follows in brackets.
        instead: its end.
    """
    return Refusing(
        lambda error: UnsupportedModelError(f"{what} ({described_error(error)}){instead}")
    )


def synthetic_run(model: nn.Module, name: str, shape: tuple[int, int]) -> Refusing:
    """Refuse a model that fails in a run on made-up tokens, naming the module.

    Args:
        model: the model that runs.
        name: its name for messages.
        shape: the number of rows, and of tokens in each.
    """

    def refusal(error: Exception) -> SyntheticRunError:
        rows, length = shape
        return SyntheticRunError(
            f"{name} does not run on made-up tokens, which it is measured on: with {rows} rows of "
            f"{length} tokens, {faulty_module(error, model)} fails ({described_error(error)}). "
            "Let each module take any batch and length. What belongs to one prompt, as a change at "
            "a position, goes into a hook (register_forward_hook): such runs leave hooks out"
        )

    return Refusing(refusal)


def described_error(error: Exception) -> str:
    """The class of an error and the first line of its text."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line:.200}".rstrip(": ")


def faulty_module(error: Exception, model: nn.Module) -> str:
    """The path of the innermost module of a model that was running when an error was raised.

    Returns:
        Its path and class; the model's class where the error was raised outside of any.
    """
    paths = {module: path for path, module in model.named_modules()}
    found, trace = model, error.__traceback__
    while trace is not None:
        running = trace.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module) and running in paths:
            found = running
        trace = trace.tb_next
    kind = type(found).__name__
    return f"{paths[found]} ({kind})" if paths.get(found) else kind
