"""``dla-hooks report``: a prompt as one html file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import dla_hooks
from dla_hooks.cli.browser import Open, show
from dla_hooks.cli.files import check_folder
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load, readable
from dla_hooks.cli.options import OUTPUT, QUESTION, Loading, Model, Run, Unit
from dla_hooks.cli.running import running
from dla_hooks.cli.terminal import note
from dla_hooks.cli.words import as_answer, as_pos
from dla_hooks.errors import InputError
from dla_hooks.pages.names import check_page
from dla_hooks.units import unit_names


@examples(
    "dla-hooks report demo 'The keys near the cabinet' \\",
    "    --answer ' are' --incorrect ' is' -o page.html",
)
def report(
    model: Model,
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT…",
            help="One prompt, or several: each is a page of the file.",
            show_default=False,
        ),
    ],
    run: Run,
    loading: Loading,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="The token whose logit is attributed, with its leading space: ' Paris'. Once, "
            "or once for each prompt; by default the model's own top token. Or 'next', the one "
            "that comes next in the text.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    incorrect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="Attribute the answer's logit minus this token's. Or 'runner-up', the model's "
            "second.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The html file to write.", rich_help_panel=OUTPUT
        ),
    ] = Path("report.html"),
    unit: Annotated[
        list[Unit] | None,
        typer.Option(
            metavar="UNIT",
            help="What to show, by itself or several times; by default all that the model has: "
            f"{', '.join(unit_names())}.",
            show_default=False,
            rich_help_panel=QUESTION,
        ),
    ] = None,
    pos: Annotated[
        str,
        typer.Option(
            metavar="POS",
            help="Positions that can be chosen: an int, several as in 1,3, a slice, or 'all'.",
            rich_help_panel=QUESTION,
        ),
    ] = "all",
    promoted: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=0,
            help="How many tokens that heads promote to list; 6, or 0 with --unit.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    title: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Of the window.", show_default=False, rich_help_panel=OUTPUT
        ),
    ] = None,
    open: Open = False,
) -> None:
    """Write a page to look at: who wrote a logit, in one html file that needs no network."""
    where = as_pos(pos)
    check_folder(output)
    check_page(output)
    answers = _of_each(answer, len(prompts), "--answer")
    wrong = _of_each(incorrect, len(prompts), "--incorrect")
    asked = zip(prompts, zip(answers, wrong, strict=True), strict=True)
    checks = [readable(prompt, both, where, run.prepend_bos) for prompt, both in asked]
    loaded, tokenizer = load(model, loading, check=lambda *read: [check(*read) for check in checks])
    with running():
        made = dla_hooks.report(
            loaded,
            prompts[0] if len(prompts) == 1 else prompts,
            _tokens(answers),
            _tokens(wrong),
            units=[one.value for one in unit] if unit else None,
            pos=where,
            promoted=promoted,
            title=title,
            tokenizer=tokenizer,
            prepend_bos=run.prepend_bos,
            chunk_size=run.chunk_size,
        )
        made.save(output)
    pages = f", {len(made)} pages" if len(made) > 1 else ""
    note(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MB{pages}); open it in a browser")
    if open:
        show(output)


def _of_each(given: list[str] | None, n: int, option: str) -> list[str | None]:
    """What was typed for each prompt: once for all, or once for each."""
    if not given:
        return [None] * n
    if len(given) not in (1, n):
        prompts = f"{n} prompt{'s' * (n > 1)}"
        raise InputError(
            f"{option} is given {len(given)} times for {prompts}; give it once, or once for each"
        )
    return [*given] * (n // len(given))


def _tokens(typed: list[str | None]) -> Any:
    """As the library takes it: one for all prompts where they are alike."""
    tokens = [as_answer(one) for one in typed]
    return tokens[0] if len(set(typed)) == 1 else tokens
