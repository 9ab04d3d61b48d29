"""Checks of arguments that several methods of the TransformerLens-shaped face take."""

from __future__ import annotations

from typing import Any

from dla_hooks.errors import InputError


def check_flag(value: Any, name: str) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {type(value).__name__}: {value!r:.80}")


def check_bos(prepend_bos: Any) -> None:
    """Refuse what is neither True, False nor None."""
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise InputError(
            "prepend_bos must be True, False, or None for cfg.default_prepend_bos; got "
            f"{type(prepend_bos).__name__}: {prepend_bos!r:.80}"
        )
