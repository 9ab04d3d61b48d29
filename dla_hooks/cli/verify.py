"""``dla-hooks verify``."""

from __future__ import annotations

import typer

import dla_hooks
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load
from dla_hooks.cli.options import Loading, Model
from dla_hooks.cli.terminal import progress, show


@examples("dla-hooks verify demo", "dla-hooks verify demo --dtype float64")
def verify(model: Model, loading: Loading) -> None:
    """Verify, block by block, that a model is a sum of writes. Exits with 1 if it is not."""
    loaded, _ = load(model, loading, needs_tokenizer=False)
    with progress("verifying"):
        report = dla_hooks.verify(loaded, show=False)
    show(str(report))
    if not report.ok:
        raise typer.Exit(1)
