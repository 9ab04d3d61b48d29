"""What ``dla-hooks list`` prints. It needs no torch, so that the list comes at once."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dla_hooks.residual.architecture import Architecture
from dla_hooks.units import units_of


def architectures(known: Sequence[Architecture]) -> RenderableType:
    """One line per model type, in alphabetical order."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model type", no_wrap=True)
    table.add_column("units", no_wrap=True)
    table.add_column("besides blocks, norm and unembedding", overflow="fold")
    by_type = {name: architecture for architecture in known for name in architecture.model_types}
    for name in sorted(by_type):
        table.add_row(name, " ".join(units_of(by_type[name])), "; ".join(_special(by_type[name])))
    return Group(
        table,
        "",
        Text("Other types are recognised where they have one of these shapes and verify."),
    )


def _special(architecture: Architecture) -> list[str]:
    """What a declaration says beyond the places that every one names."""
    writes = architecture.writes
    found = []
    if any(write.post_norm for write in writes):
        found.append("a norm after each sublayer")
    if architecture.positions:
        found.append("learned positions")
    if architecture.position_limit:
        found.append(f"prompts up to {architecture.position_limit}")
    if architecture.after_norm:
        found.append("a projection after the final norm")
    return found
