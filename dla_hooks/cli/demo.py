"""``dla-hooks demo``."""

from __future__ import annotations

import dla_hooks
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load
from dla_hooks.cli.options import Loading
from dla_hooks.cli.terminal import out
from dla_hooks.units import unit_names


@examples("dla-hooks demo")
def demo() -> None:
    """Attribute a few prompts of the small model that is included. Needs no network."""
    units = [name for name in ("component", "head") if name in unit_names()]
    model, tokenizer = load("demo", Loading())

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
