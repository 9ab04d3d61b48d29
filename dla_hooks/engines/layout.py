"""Which columns a sweep reads and writes, and whether a data set has them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from dla_hooks.engines.columns import READ
from dla_hooks.engines.rows import OWN
from dla_hooks.errors import InputError

_TEXT = ("str", "object")
"""Words in the type of a column of texts, as engines say it."""


def names_of(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The data set's name of each column that is read.

    Raises:
        InputError: for one that is not read.
    """
    own = dict(columns or {})
    for name in own:
        if name not in READ:
            raise InputError(
                f"columns names {name!r}, which is not read; it may name {', '.join(READ)}"
            )
    return {name: own.get(name, name) for name in READ}


@dataclass(frozen=True)
class Layout:
    """The columns of a sweep.

    Attributes:
        names: the data set's name of each column that is read.
        keep: the columns that come back, or None for all.
        given: what was given for all rows, of ``answer``, ``incorrect`` and ``pos``.
    """

    names: dict[str, str]
    keep: tuple[str, ...] | None
    given: Set[str]

    def keeps(self, name: str) -> bool:
        """Whether a column comes back."""
        return self.keep is None or name in self.keep

    def check(self, types: Mapping[str, str]) -> None:
        """Check the columns of a data set.

        Args:
            types: of each column, as text; "" where it is not known.

        Raises:
            InputError: for the first that is wrong.
        """
        there = {name for name, own in self.names.items() if own in types}
        known = ", ".join(map(repr, types)) or "none"
        texts, ids = self.names["prompt"], self.names["input_ids"]
        if not there & {"prompt", "input_ids"}:
            raise InputError(
                f"there is no column {texts!r} (texts) or {ids!r} (token ids); the columns are "
                f"{known}. Name yours: columns={{'prompt': 'sentence'}}"
            )
        if {"prompt", "input_ids"} <= there:
            raise InputError(
                f"there are both {texts!r} and {ids!r}; leave one out, so that it is clear which "
                "is run"
            )
        for name, option in (("answer", "answer"), ("incorrect", "incorrect"), ("position", "pos")):
            if name in there and option in self.given:
                raise InputError(
                    f"{option}= is for rows without a column {self.names[name]!r}, and there is one"
                )
        if "answer" not in there and "answer" not in self.given:
            raise InputError(
                f"there is no column {self.names['answer']!r}, and no answer= for all rows; the "
                f"columns are {known}. answer=dla_hooks.TOP asks for the model's own top token"
            )
        own = {self.names[name] for name in there}
        taken = [name for name in OWN if name in types and name not in own and self.keeps(name)]
        if taken:
            raise InputError(
                f"the column {taken[0]!r} would be written over; rename it, or leave it out of keep"
            )
        kind = types[texts].lower() if "prompt" in there else ""
        if kind and not any(word in kind for word in _TEXT):
            raise InputError(
                f"the column {texts!r} must hold texts, and is {kind}; token ids go in a column "
                f"{ids!r}"
            )
