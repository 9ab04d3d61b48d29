"""The declarations and refusals of all model types.

This module alone imports the adapters (the repository's top-level folder ``adapters/``, installed
as ``dla_hooks.adapters``).
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from dla_hooks.errors import InputError
from dla_hooks.residual.architecture import Architecture, Refusal

_ADAPTERS = "dla_hooks.adapters"

_registered: dict[str, Architecture] = {}
# Declarations before which a later one of the same type stands.
_earlier: dict[str, tuple[Architecture, ...]] = {}
_refused: dict[str, list[Refusal]] = {}
_without_bos: set[str] = set()
_builtin_loaded = False
_lock = threading.RLock()


def register(architecture: Architecture) -> None:
    """Add a declaration, so that models of its types are recognised from now on.

    A type may have several declarations. The one that was added last is tried first, and the next
    one where a model does not have its modules or is no sum of its writes.

    Args:
        architecture: the declaration; see :class:`Architecture`.

    Raises:
        InputError: for ``model_types`` that is no tuple of names.
    """
    with _lock:
        _load_builtin()
        _check_types(architecture)
        for name in architecture.model_types:
            before = _registered.get(name)
            if before is not None and before != architecture:
                _earlier[name] = (before, *_earlier.get(name, ()))
            _registered[name] = architecture


def adapter_for(model_type: str) -> Architecture | None:
    """The declaration for a ``config.model_type``, or None when there is none."""
    with _lock:
        _load_builtin()
        return _registered.get(model_type)


def declarations_for(model_type: str) -> tuple[Architecture, ...]:
    """All declarations for a ``config.model_type``, the one that was added last first."""
    with _lock:
        _load_builtin()
        first = _registered.get(model_type)
        if first is None:
            return ()
        earlier = _earlier.get(model_type)
        return tuple(dict.fromkeys((first, *earlier))) if earlier else (first,)


def refusal_for(model_type: str, door: str | None = None) -> Refusal | None:
    """The known reason why models of this type are refused, or None.

    Args:
        model_type: ``config.model_type``.
        door: the kind of model (:mod:`dla_hooks.doors`), or None where that is not known. A reason
            that holds for this kind stands before one that holds for all.
    """
    with _lock:
        _load_builtin()
        known = [one for one in _refused.get(model_type, ()) if not one.doors or door in one.doors]
    return min(known, key=lambda one: not one.doors, default=None)


def begins_with_bos(model_type: str) -> bool:
    """True if TransformerLens puts a BOS before prompts of this model type."""
    with _lock:
        _load_builtin()
        return model_type not in _without_bos


def architectures() -> tuple[Architecture, ...]:
    """Every declaration, each once, in alphabetical order of its first model type."""
    with _lock:
        _load_builtin()
        earlier = (architecture for several in _earlier.values() for architecture in several)
        distinct = dict.fromkeys((*_registered.values(), *earlier))
    return tuple(sorted(distinct, key=lambda architecture: architecture.model_types[0]))


def _check_types(architecture: Architecture) -> None:
    if isinstance(architecture.model_types, str):
        name = architecture.model_types
        raise InputError(f"model_types is a tuple of names: write ({name!r},) instead of {name!r}")


def _add(architecture: Architecture) -> None:
    _check_types(architecture)
    taken = [name for name in architecture.model_types if name in _registered]
    if taken:
        raise InputError(
            f"model type {', '.join(map(repr, taken))} is declared already; "
            "the adapters declare each type once"
        )
    for name in architecture.model_types:
        _registered[name] = architecture


def _adapters() -> ModuleType:
    """The package of the adapters; in an uninstalled checkout, the folder beside this one."""
    try:
        return importlib.import_module(_ADAPTERS)
    except ModuleNotFoundError as error:
        root = Path(__file__).parents[2]
        folder = root / "adapters"
        file = folder / "__init__.py"
        # Beside an installed package, that folder would be an unrelated package of the same name.
        if not ((root / "pyproject.toml").is_file() and file.is_file()):
            raise ImportError(
                "the adapters are not installed beside dla_hooks; in a checkout run "
                "`pip install -e .`"
            ) from error
    spec: Any = spec_from_file_location(_ADAPTERS, file, submodule_search_locations=[str(folder)])
    package = sys.modules[_ADAPTERS] = module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def _load_builtin() -> None:
    global _builtin_loaded
    if _builtin_loaded:
        return
    package = _adapters()
    for module in sorted(entry.name for entry in pkgutil.iter_modules(package.__path__)):
        declarations = importlib.import_module(f"{_ADAPTERS}.{module}")
        for architecture in declarations.ARCHITECTURES:
            _add(architecture)
        for refusal in getattr(declarations, "REFUSALS", ()):
            for name in refusal.model_types:
                _refused.setdefault(name, []).append(refusal)
        _without_bos.update(getattr(declarations, "WITHOUT_BOS", ()))
    _builtin_loaded = True
