"""The lines of a declaration to start from, for a model that has none.

The suggestion is made from module names alone. Once registered, it is verified like any other
declaration before a number is given.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dla_hooks.modules.linear import declared_width

_NOT_WRITES = ("drop", "rotary", "act")


def sketch(model: Any, model_type: str) -> str:
    """Write a call of ``register`` for a model, as far as its module names tell.

    The longest list of modules is taken as the stack, and the last norm outside of it as the final
    norm. The children of a block that are no norms are taken as its writes.

    Args:
        model: the model.
        model_type: the name that the declaration is found by.
    """
    stacks = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    path, blocks = max(stacks, key=lambda entry: len(entry[1]), default=("", nn.ModuleList()))
    outside = (entry for entry in model.named_modules() if not entry[0].startswith(f"{path}."))
    norms = [name for name, module in outside if _is_norm(name, module)]
    writes = []
    for name, child in blocks[0].named_children() if len(blocks) else ():
        if not _is_norm(name, child) and not any(part in name for part in _NOT_WRITES):
            writes.append(f"            {_write(name, child)},")
    return "\n".join(
        [
            "    dla_hooks.register(Architecture(",
            f"        model_types=({model_type!r},),",
            f"        layers={path or '...'!r},",
            f"        final_norm={norms[-1] if norms else '...'!r},",
            "        writes=(",
            *writes,
            "        ),",
            "    ))",
        ]
    )


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or name.rsplit(".")[-1].startswith(
        ("norm", "ln")
    )


def _write(name: str, child: nn.Module) -> str:
    if "att" not in name:
        return f'Write("{name}_out", {name!r})'
    projections = [path for path, module in child.named_modules() if path and _reads(module)]
    heads = f', heads=Heads("{name}.{projections[-1]}")' if projections else ""
    return f'Write("attn_out", {name!r}{heads})'


def _reads(module: nn.Module) -> bool:
    return declared_width(module) is not None
