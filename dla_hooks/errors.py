"""What can go wrong, as a tree.

    DLAError
    ├── InputError (ValueError)                 an argument has the wrong value
    │   ├── TokenError                          an answer or a prompt cannot be read as tokens
    │   ├── TokenizerMissingError               a string was given and nothing to tokenize it with
    │   ├── CacheEntryError (KeyError)          a stored cache lacks an activation
    │   ├── LabelError (KeyError)               a result has no row of that label
    │   ├── ShapeMismatchError (RuntimeError)   answers and positions do not broadcast
    │   └── TrainingModeError                   the model would drop activations at random
    ├── ArgumentTypeError (TypeError)           an argument has the wrong type or length
    ├── PositionError (IndexError)              a position that some prompt does not have
    ├── UnsupportedModelError (NotImplementedError)
    │                                           the model is not a sum that we can take apart
    ├── DecompositionError (ArithmeticError, NotImplementedError)
    │   │                                       the parts did not sum to the model's own numbers
    │   └── NonFiniteError                      NaN or infinity in weights or activations
    ├── HookError (RuntimeError)                a module did not run exactly once
    ├── CheckpointError (OSError)               a checkpoint that is missing or cannot be read
    └── MissingExtraError (ImportError)         an optional package is not installed

    DLAWarning (UserWarning)                    right numbers that may not be those that were meant,
                                                or that cost more than they need to

Wherever the reference implementation raises a builtin error, ours is one too, so that code which
catches the builtin goes on working.
"""

from __future__ import annotations

import re
import sys
import warnings
from importlib import metadata


class DLAError(Exception):
    """The root: ``except DLAError`` catches whatever this library raises on purpose.

    Attributes:
        prompt_index: which prompt it is about, from 0, where it was yielded in place of a result
            (see :func:`dla_hooks.attribute_many`); otherwise None.
    """

    prompt_index: int | None = None


class DLAWarning(UserWarning):
    """The numbers are right for what was given.

    But it may not be what was meant (padding without a mask, two BOS), or something is not done
    that makes the numbers cheaper.

    ``warnings.simplefilter("ignore", DLAWarning)`` switches these off.
    """


class InputError(DLAError, ValueError):
    """An argument has a value that cannot be used."""


class TokenError(InputError):
    """A prompt or an answer cannot be read as tokens of this model."""


class TokenizerMissingError(InputError):
    """A string was given, but there is no tokenizer to read it with."""


class CacheEntryError(InputError, KeyError):
    """A stored cache does not hold an activation that is needed."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class LabelError(InputError, KeyError):
    """A result has no row of the label that was given."""

    __str__ = Exception.__str__


class ShapeMismatchError(InputError, RuntimeError):
    """The shape of the answers fits neither the batch nor the selected positions."""


class TrainingModeError(InputError):
    """The model is in training mode, where dropout makes every run another one."""


class ArgumentTypeError(DLAError, TypeError):
    """An argument has a type, or a number of items, that has no meaning here."""


class PositionError(DLAError, IndexError):
    """A position was asked for that some prompt does not have."""


class UnsupportedModelError(DLAError, NotImplementedError):
    """The model's logits are not known to be an affine map of a sum of writes."""


class DecompositionError(DLAError, ArithmeticError, NotImplementedError):
    """The parts do not add up to the model's own numbers, so no number is given."""


class NonFiniteError(DecompositionError):
    """NaN or infinity in the model's weights or activations."""


class HookError(DLAError, RuntimeError):
    """A module that had to run exactly once did not."""


class CheckpointError(DLAError, OSError):
    """A checkpoint folder or file is missing, incomplete or unreadable."""


class MissingExtraError(DLAError, ImportError):
    """A feature needs a package that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs packages that are not installed. "
            f"Install them with: pip install {' '.join(map(repr, _packages(extra)))}"
        )


def _packages(extra: str) -> list[str]:
    """What an extra of this package asks for, by the names that an index knows."""
    try:
        lines = metadata.requires("dla-hooks") or []
    except metadata.PackageNotFoundError:  # a folder on the path, not installed
        lines = []
    found = []
    for line in lines:
        package, _, condition = line.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", condition):
            found.append(package.strip())
    return found or [f"dla-hooks[{extra}]"]


def warn(message: str) -> None:
    """Give a :class:`DLAWarning` at the line of the caller, outside of this library.

    Args:
        message: the same text each time, so that Python shows it once for each line.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("dla_hooks."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DLAWarning, stacklevel=level)
