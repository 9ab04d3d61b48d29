"""``dla-hooks demo``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dla_hooks.cli.browser import Open, show
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load
from dla_hooks.cli.options import OUTPUT, Loading
from dla_hooks.cli.running import running
from dla_hooks.cli.terminal import note, out
from dla_hooks.errors import InputError
from dla_hooks.pages.names import check_page

if TYPE_CHECKING:
    from dla_hooks.cli.story import Measured
    from dla_hooks.demo.stories import Story


@examples("dla-hooks demo", "dla-hooks demo --open", "dla-hooks demo --output page.html")
def demo(
    open: Open = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The html file to write; with --open alone, one in the folder for temporary "
            "files.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Attribute a few prompts of the small model that is included. Needs no network."""
    if output is not None and not output.parent.is_dir():
        raise InputError(f"cannot write {output}: there is no folder {output.parent}")
    if output is not None:
        check_page(output)
    model, tokenizer = load("demo", Loading())

    from dla_hooks.cli import story as view
    from dla_hooks.demo.stories import stories

    told = [(one, view.measure(model, tokenizer, one)) for one in stories()]
    if open or output is not None:
        path = _page(model, tokenizer, told, output)
        if open:
            show(path)
        return
    out().print(view.opening(model))
    shown: set[str] = set()
    for one, found in told:
        if one.title not in shown:
            shown.add(one.title)
            out().print(view.as_text(one, found), crop=False)
    out().print(view.ending(told[0][0]), crop=False)


def _page(
    model: Any, tokenizer: Any, told: list[tuple[Story, Measured]], output: Path | None
) -> Path:
    """Write the report of all prompts, with what taking heads out does; and open it."""
    from dla_hooks import Report, report

    made = []
    with running("making the page"):
        for one, found in told:
            asked = (one.example.prompt, one.example.answer, one.example.incorrect)
            made.append(report(model, *asked, effects=found.effects, tokenizer=tokenizer))
    pages = [page for one in made for page in one.pages]
    whole = Report("dla-hooks demo", pages, [text for one in made for text in one.texts])
    path = output or Path(tempfile.gettempdir()) / "dla-hooks-demo.html"
    whole.save(path)
    note(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MB, {len(pages)} pages)")
    return path
