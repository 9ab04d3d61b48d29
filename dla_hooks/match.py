"""From a model to its located stream: by declaration, or by trying the known shapes."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from dla_hooks.architecture import Architecture
from dla_hooks.errors import DLAError, UnsupportedModelError
from dla_hooks.locate import Stream, check_model, locate
from dla_hooks.registry import adapter_for, architectures
from dla_hooks.verification import Verification, trace_report

_matched: WeakKeyDictionary[nn.Module, Architecture] = WeakKeyDictionary()
_lock = threading.Lock()


def stream_of(model: Any) -> Stream:
    """Locate a model's residual stream, or refuse.

    A model type without a declaration is held against every known shape, and accepted as the
    first one that verifies on a few tokens; that is done once per model object.

    Raises:
        InputError: for what is no causal language model in evaluation mode.
        UnsupportedModelError: when no declaration is true of the model.
    """
    check_model(model)
    declared = adapter_for(model.config.model_type)
    if declared is not None:
        return locate(model, declared)
    with _lock:
        known = _matched.get(model)
    if known is None:
        known = _match(model)
        with _lock:
            _matched[model] = known
    return locate(model, known)


def verify(model: Any, *, show: bool = True) -> Verification:
    """Verify, block by block, that a model is the sum of writes that it is taken for.

    Args:
        model: a causal LM in evaluation mode.
        show: print the table.

    Returns:
        The table: one line per block, per set of heads, and for the logits.

    Raises:
        UnsupportedModelError: when the model cannot be located at all.
    """
    report = trace_report(stream_of(model))
    if show:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(str(report), markup=False)
    return report


def _match(model: Any) -> Architecture:
    misses = []
    for architecture in dict.fromkeys(architectures()):
        try:
            report = trace_report(locate(model, architecture))
        except UnsupportedModelError:
            continue  # other module names: not this shape, and nothing to tell
        except DLAError as error:
            misses.append(f"as {architecture.model_types[0]}: {error}")
            continue
        if report.ok:
            return architecture
        misses.append(f"as {architecture.model_types[0]}: {report.diagnosis()}")
    found = "; ".join(misses) or "none of the known shapes has its module names"
    raise UnsupportedModelError(
        f"model type {model.config.model_type!r} ({type(model).__name__}) has no declaration, and "
        f"was not recognised: {found}. Declare it with dla_hooks.register(Architecture(...)) if "
        "its stream is a sum of writes."
    )
