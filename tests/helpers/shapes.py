"""Types and shapes of what a caller gets back, checked in every test (jaxtyping and beartype).

The library names shapes in its annotations, ``Float[Tensor, "row *at"]``, and imports these names
for type checkers only. Here they are put where annotations are looked up. Arguments that a caller
gives are left alone: the library refuses wrong ones itself, and tests give them on purpose.
"""

from __future__ import annotations

import builtins
from importlib.util import find_spec
from typing import Any

NAMES = ("Bool", "Float", "Int")
RESULTS = ("DirectLogitAttribution", "Summary")  # of dla_hooks


def checked(function: Any) -> Any:
    """A function whose arguments are checked; an int will do for a float."""
    from beartype import BeartypeConf, beartype

    return beartype(function, conf=BeartypeConf(is_pep484_tower=True))


def check_results() -> bool:
    """Check the fields of every result that is made from now on.

    Returns:
        Whether the two packages are installed; nothing is checked without them.
    """
    if find_spec("jaxtyping") is None or find_spec("beartype") is None:
        return False
    import jaxtyping

    import dla_hooks

    for name in NAMES:
        setattr(builtins, name, getattr(jaxtyping, name))
    for name in RESULTS:
        jaxtyping.jaxtyped(getattr(dla_hooks, name), typechecker=checked)
    return True
