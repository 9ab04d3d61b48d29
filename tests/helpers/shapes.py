"""Types and shapes at the public edge are checked in every test (jaxtyping and beartype).

The library names shapes in its annotations, ``Float[Tensor, "row *at"]``, and imports these names
for type checkers only. Here they are put where annotations are looked up, and the modules below are
imported with a check around each function. Without the two packages nothing is checked.
"""

from __future__ import annotations

import builtins
from importlib.util import find_spec
from typing import Any

# What a caller gets back. What a caller gives is refused by the library itself, and tests give it
# wrong types on purpose: the verbs are not among these.
EDGE = ("dla_hooks.results.result", "dla_hooks.results.data", "dla_hooks.stacks")
NAMES = ("Bool", "Float", "Int")


def checked(function: Any) -> Any:
    """A function whose arguments and result are checked; an int will do for a float."""
    from beartype import BeartypeConf, beartype

    return beartype(function, conf=BeartypeConf(is_pep484_tower=True))


def check_the_edge() -> bool:
    """Check the modules of the public edge, which must not be imported yet.

    Returns:
        Whether the packages are installed.
    """
    if find_spec("jaxtyping") is None or find_spec("beartype") is None:
        return False
    import jaxtyping

    for name in NAMES:
        setattr(builtins, name, getattr(jaxtyping, name))
    jaxtyping.install_import_hook(list(EDGE), "shapes.checked")
    return True
