"""The doors of transformers: the auto classes whose models the survey builds and holds to account.

A module in this folder defines doors as ``DOORS``; it is found by being here. A door names its
model types, and makes cases of each: a tiny random model, what it is asked, and its own logits.

    door = by_name("classification")
    for case in door.cases("llama", seed=0): ...
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Case", "Door", "by_name", "doors"]


@dataclass(frozen=True)
class Case:
    """One question to one tiny model, with the model's own answer.

    Attributes:
        model: in evaluation mode, every parameter drawn at random, float64 where it runs so.
        asked: what is passed as the prompt: ids, or a mapping.
        logits: the model's own [*result shape, answers], of a plain forward pass.
        answer: what is passed as `answer_tokens`.
        incorrect: what is passed as `incorrect_tokens`, or None.
        columns: the answer's and the other's place in the last axis of `logits`.
        options: further arguments of the call. Every position is read unless they say otherwise.
        name: of the case among its type's, as "with pixels"; empty for the only one.
    """

    model: Any
    asked: Any
    logits: Tensor
    answer: Any = 5
    incorrect: Any = 7
    columns: tuple[int, int | None] = (5, 7)
    options: Mapping[str, Any] = field(default_factory=lambda: {"pos": None})
    name: str = ""


@dataclass(frozen=True)
class Door:
    """An auto class, with the model types behind it.

    Attributes:
        name: as the command line has it.
        title: the heading of its section of docs/architectures.md.
        about: a paragraph below it: what the survey builds and holds against what.
        model_types: all that the pinned transformers maps to it.
        cases: makes the cases of a type: `cases(model_type, seed=0, attn=None, **changes)`. Raises
            mapping_zoo.CannotBuild.
        rank: where its section stands; sections of one rank stand in the order of their names.
        in_ci: one type in how many is checked where time is short.
    """

    name: str
    title: str
    about: str
    model_types: tuple[str, ...]
    cases: Callable[..., tuple[Case, ...]]
    rank: int = 5
    in_ci: int = 8


def doors() -> tuple[Door, ...]:
    """Every door, in the order of the page."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [door for name in names for door in importlib.import_module(f"doors.{name}").DOORS]
    return tuple(sorted(found, key=lambda door: (door.rank, door.name)))


def by_name(name: str) -> Door:
    """The door of this name; a KeyError names those that there are."""
    known = {door.name: door for door in doors()}
    if name not in known:
        raise KeyError(f"no door is called {name!r}; there are {', '.join(known)}")
    return known[name]
