"""Direct Logit Attribution on plain Hugging Face models, with forward hooks and no cache.

>>> from dla_hooks import direct_logit_attribution
>>> result = direct_logit_attribution(                       # doctest: +SKIP
...     model, "The Eiffel Tower is in the city of", " Paris", " London",
...     unit="head", tokenizer=tokenizer,
... )
>>> result.top(3)                                            # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dla_hooks._version import __version__

if TYPE_CHECKING:
    from dla_hooks import demo
    from dla_hooks.attribution import direct_logit_attribution
    from dla_hooks.errors import (
        ArgumentTypeError,
        CacheEntryError,
        CheckpointError,
        DecompositionError,
        DLAError,
        HookError,
        InputError,
        MissingExtraError,
        NonFiniteError,
        PositionError,
        ShapeMismatchError,
        TokenError,
        TokenizerMissingError,
        TrainingModeError,
        UnsupportedModelError,
    )
    from dla_hooks.many.sweep import attribute_many
    from dla_hooks.residual.architecture import Architecture, Heads, Write
    from dla_hooks.residual.registry import architectures, register
    from dla_hooks.results.result import DirectLogitAttribution
    from dla_hooks.results.summary import Summary, summarize
    from dla_hooks.stacks import (
        accumulated_resid,
        apply_ln_to_stack,
        decompose_resid,
        logit_attrs,
        stack_head_results,
        stack_neuron_results,
    )
    from dla_hooks.tl.cache_names import cache_names
    from dla_hooks.tl.wrap import Wrapped, wrap
    from dla_hooks.verification.recognise import verify
    from dla_hooks.verification.trace import Verification

# Loaded when first used: `dla-hooks --help` and `import dla_hooks` should not wait for torch.
_HOME = {
    "Architecture": "residual.architecture",
    "ArgumentTypeError": "errors",
    "CacheEntryError": "errors",
    "CheckpointError": "errors",
    "DLAError": "errors",
    "DecompositionError": "errors",
    "DirectLogitAttribution": "results.result",
    "Heads": "residual.architecture",
    "HookError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "PositionError": "errors",
    "ShapeMismatchError": "errors",
    "Summary": "results.summary",
    "TokenError": "errors",
    "TokenizerMissingError": "errors",
    "TrainingModeError": "errors",
    "UnsupportedModelError": "errors",
    "Verification": "verification.trace",
    "Wrapped": "tl.wrap",
    "Write": "residual.architecture",
    "accumulated_resid": "stacks",
    "apply_ln_to_stack": "stacks",
    "architectures": "residual.registry",
    "attribute_many": "many.sweep",
    "cache_names": "tl.cache_names",
    "decompose_resid": "stacks",
    "direct_logit_attribution": "attribution",
    "logit_attrs": "stacks",
    "register": "residual.registry",
    "stack_head_results": "stacks",
    "stack_neuron_results": "stacks",
    "summarize": "results.summary",
    "verify": "verification.recognise",
    "wrap": "tl.wrap",
}

__all__ = [
    "Architecture",
    "ArgumentTypeError",
    "CacheEntryError",
    "CheckpointError",
    "DLAError",
    "DecompositionError",
    "DirectLogitAttribution",
    "Heads",
    "HookError",
    "InputError",
    "MissingExtraError",
    "NonFiniteError",
    "PositionError",
    "ShapeMismatchError",
    "Summary",
    "TokenError",
    "TokenizerMissingError",
    "TrainingModeError",
    "UnsupportedModelError",
    "Verification",
    "Wrapped",
    "Write",
    "__version__",
    "accumulated_resid",
    "apply_ln_to_stack",
    "architectures",
    "attribute_many",
    "cache_names",
    "decompose_resid",
    "demo",
    "direct_logit_attribution",
    "logit_attrs",
    "register",
    "stack_head_results",
    "stack_neuron_results",
    "summarize",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "demo":
        return importlib.import_module(f"{__name__}.demo")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
