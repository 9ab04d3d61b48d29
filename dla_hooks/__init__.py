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

from dla_hooks._version import __version__ as __version__

if TYPE_CHECKING:  # X as X: these names are public
    from dla_hooks import demo as demo
    from dla_hooks.attribution import Plan as Plan
    from dla_hooks.attribution import direct_logit_attribution as direct_logit_attribution
    from dla_hooks.attribution import prepare as prepare
    from dla_hooks.engines.attributor import Attributor as Attributor
    from dla_hooks.engines.load_summary import load_summary as load_summary
    from dla_hooks.engines.summarize_rows import summarize_rows as summarize_rows
    from dla_hooks.errors import ArgumentTypeError as ArgumentTypeError
    from dla_hooks.errors import CacheEntryError as CacheEntryError
    from dla_hooks.errors import CheckpointError as CheckpointError
    from dla_hooks.errors import DecompositionError as DecompositionError
    from dla_hooks.errors import DLAError as DLAError
    from dla_hooks.errors import DLAWarning as DLAWarning
    from dla_hooks.errors import HookError as HookError
    from dla_hooks.errors import InputError as InputError
    from dla_hooks.errors import LabelError as LabelError
    from dla_hooks.errors import MissingExtraError as MissingExtraError
    from dla_hooks.errors import NonFiniteError as NonFiniteError
    from dla_hooks.errors import PositionError as PositionError
    from dla_hooks.errors import ShapeMismatchError as ShapeMismatchError
    from dla_hooks.errors import TokenError as TokenError
    from dla_hooks.errors import TokenizerMissingError as TokenizerMissingError
    from dla_hooks.errors import TrainingModeError as TrainingModeError
    from dla_hooks.errors import UnsupportedModelError as UnsupportedModelError
    from dla_hooks.generation.verb import attribute_generation as attribute_generation
    from dla_hooks.inputs.rows_of_positions import PerRow as PerRow
    from dla_hooks.inputs.rows_of_positions import Span as Span
    from dla_hooks.many.sweep import attribute_many as attribute_many
    from dla_hooks.pages.document import Report as Report
    from dla_hooks.pages.report import report as report
    from dla_hooks.questions.ablated import Ablated as Ablated
    from dla_hooks.questions.ablated import ablated as ablated
    from dla_hooks.questions.compare import compare as compare
    from dla_hooks.questions.effects import effects as effects
    from dla_hooks.questions.upstream import upstream as upstream
    from dla_hooks.questions.where import where as where
    from dla_hooks.residual.architecture import Architecture as Architecture
    from dla_hooks.residual.architecture import Write as Write
    from dla_hooks.residual.registry import architectures as architectures
    from dla_hooks.residual.registry import register as register
    from dla_hooks.results.comparison import Comparison as Comparison
    from dla_hooks.results.effects import Effects as Effects
    from dla_hooks.results.effects_data import Effect as Effect
    from dla_hooks.results.load import load as load
    from dla_hooks.results.picture import Picture as Picture
    from dla_hooks.results.promoted import PromotedTokens as PromotedTokens
    from dla_hooks.results.ranked import RankedAttribution as RankedAttribution
    from dla_hooks.results.result import DirectLogitAttribution as DirectLogitAttribution
    from dla_hooks.results.summarize import summarize as summarize
    from dla_hooks.results.summary import Summary as Summary
    from dla_hooks.results.where import Where as Where
    from dla_hooks.stacks import accumulated_resid as accumulated_resid
    from dla_hooks.stacks import apply_ln_to_stack as apply_ln_to_stack
    from dla_hooks.stacks import decompose_resid as decompose_resid
    from dla_hooks.stacks import logit_attrs as logit_attrs
    from dla_hooks.stacks import promoted_tokens as promoted_tokens
    from dla_hooks.stacks import stack_head_results as stack_head_results
    from dla_hooks.stacks import stack_neuron_results as stack_neuron_results
    from dla_hooks.targets.own import NEXT as NEXT
    from dla_hooks.targets.own import RUNNER_UP as RUNNER_UP
    from dla_hooks.targets.own import TOP as TOP
    from dla_hooks.tl.cache_names import cache_names as cache_names
    from dla_hooks.tl.wrap import Wrapped as Wrapped
    from dla_hooks.tl.wrap import wrap as wrap
    from dla_hooks.verification.recognise import verify as verify
    from dla_hooks.verification.trace import Verification as Verification

# Loaded when first used: `dla-hooks --help` and `import dla_hooks` should not wait for torch.
_HOME = {
    "Ablated": "questions.ablated",
    "Architecture": "residual.architecture",
    "ArgumentTypeError": "errors",
    "Attributor": "engines.attributor",
    "CacheEntryError": "errors",
    "CheckpointError": "errors",
    "Comparison": "results.comparison",
    "DLAError": "errors",
    "DLAWarning": "errors",
    "DecompositionError": "errors",
    "DirectLogitAttribution": "results.result",
    "Effect": "results.effects_data",
    "Effects": "results.effects",
    "HookError": "errors",
    "InputError": "errors",
    "LabelError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "NEXT": "targets.own",
    "PerRow": "inputs.rows_of_positions",
    "Picture": "results.picture",
    "Plan": "attribution",
    "PositionError": "errors",
    "PromotedTokens": "results.promoted",
    "RUNNER_UP": "targets.own",
    "RankedAttribution": "results.ranked",
    "Report": "pages.document",
    "ShapeMismatchError": "errors",
    "Span": "inputs.rows_of_positions",
    "Summary": "results.summary",
    "TOP": "targets.own",
    "TokenError": "errors",
    "TokenizerMissingError": "errors",
    "TrainingModeError": "errors",
    "UnsupportedModelError": "errors",
    "Verification": "verification.trace",
    "Where": "results.where",
    "Wrapped": "tl.wrap",
    "Write": "residual.architecture",
    "ablated": "questions.ablated",
    "accumulated_resid": "stacks",
    "apply_ln_to_stack": "stacks",
    "architectures": "residual.registry",
    "attribute_generation": "generation.verb",
    "attribute_many": "many.sweep",
    "cache_names": "tl.cache_names",
    "compare": "questions.compare",
    "decompose_resid": "stacks",
    "direct_logit_attribution": "attribution",
    "effects": "questions.effects",
    "load": "results.load",
    "load_summary": "engines.load_summary",
    "logit_attrs": "stacks",
    "prepare": "attribution",
    "promoted_tokens": "stacks",
    "register": "residual.registry",
    "report": "pages.report",
    "stack_head_results": "stacks",
    "stack_neuron_results": "stacks",
    "summarize": "results.summarize",
    "summarize_rows": "engines.summarize_rows",
    "upstream": "questions.upstream",
    "verify": "verification.recognise",
    "where": "questions.where",
    "wrap": "tl.wrap",
}

_OTHERS = ("__version__", "demo")


def __getattr__(name: str) -> Any:
    if name == "demo":
        return importlib.import_module(f"{__name__}.demo")
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name == "__all__":
        return sorted([*_OTHERS, *_HOME, *_plugins()])
    elif name[:1].isupper() and name in _plugins():
        value = _plugins()[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_OTHERS, *_HOME, *_plugins()})


def _plugins() -> dict[str, Any]:
    """Units and targets, public under the names of their classes: ``Components``, ``Heads``, …"""
    from dla_hooks.targets import request_classes
    from dla_hooks.units import unit_classes

    return {**unit_classes(), **request_classes()}
