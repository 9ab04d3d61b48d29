"""``dla-hooks demo``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import dla_hooks
from dla_hooks.cli.browser import Open, show
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load
from dla_hooks.cli.options import Loading
from dla_hooks.cli.terminal import note, out
from dla_hooks.units import unit_names


@examples("dla-hooks demo", "dla-hooks demo --open")
def demo(open: Open = False) -> None:
    """Attribute a few prompts of the small model that is included. Needs no network."""
    units = [name for name in ("component", "head") if name in unit_names()]
    model, tokenizer = load("demo", Loading())
    if open:
        show(_page(model, tokenizer))
        return

    from dla_hooks.cli import views
    from dla_hooks.demo import examples as prompts

    out().print(views.demo_opening(model))
    shown: set[str] = set()
    for example in prompts():
        if example.task in shown:
            continue
        shown.add(example.task)
        results = [
            dla_hooks.direct_logit_attribution(
                model,
                example.prompt,
                example.answer,
                example.incorrect,
                unit=unit,
                tokenizer=tokenizer,
            )
            for unit in units
        ]
        out().print(views.demo_example(example.task, example.prompt, *results), crop=False)
    out().print(views.demo_closing(prompts()[0], units[-1]), crop=False)


def _page(model: Any, tokenizer: Any) -> Path:
    """Write one page for each kind of prompt, to a file that stays until it is deleted."""
    from dla_hooks.demo import examples as prompts

    first: dict[str, Any] = {}
    for example in prompts():
        first.setdefault(example.task, example)
    chosen = list(first.values())
    path = Path(tempfile.mkdtemp(prefix="dla-hooks-")) / "demo.html"
    dla_hooks.report(
        model,
        [example.prompt for example in chosen],
        [example.answer for example in chosen],
        [example.incorrect for example in chosen],
        tokenizer=tokenizer,
        path=path,
        title="The demo model's prompts",
    )
    note(f"wrote {path}")
    return path
