"""A hook of mkdocs: tutorials appear as executed notebooks.

The pages of docs/tutorials/ are Markdown with examples (``>>> ``), which tests run. As the site is
built they run once more, and below each cell stands what a notebook shows: tables and pictures.
The same cells lie beside the page as NAME.ipynb.
"""

from __future__ import annotations

import contextlib
import doctest
import html
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TUTORIALS = "tutorials/"
_FENCE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_IMAGE = re.compile(r"^!\[.*\]\(.*\)\n", re.MULTILINE)  # the cell's own output stands there
_LOADED = re.compile(
    r'<(script|img|iframe|link rel="stylesheet")[^>]*(src|href)="(https?:)?//[^>]*'
)
_SLOT = '<div data-output="{}"></div>'

_written: dict[str, Tutorial] = {}


@dataclass
class Cell:
    """Code and what it gave; or text, where there is no code."""

    text: str = ""
    code: str = ""
    said: str = ""
    shown: str = ""
    rich: str = ""


@dataclass
class Tutorial:
    """A page that has run."""

    cells: list[Cell] = field(default_factory=list)

    def markdown(self) -> str:
        """The page, with a slot for each output that Markdown could spoil."""
        pieces = []
        for number, cell in enumerate(self.cells):
            pieces.append(cell.text or f"```python\n{cell.code}```\n")
            if plain := cell.said + ("" if cell.rich else cell.shown):
                pieces.append(f"```text\n{plain}```\n")
            if cell.rich:
                pieces.append(f"{_SLOT.format(number)}\n")
        return "\n".join(pieces)

    def filled(self, page: str) -> str:
        """The page's html, with its outputs in their slots."""
        for number, cell in enumerate(self.cells):
            page = page.replace(_SLOT.format(number), f"<div>{cell.rich}</div>")
        return page

    def notebook(self) -> str:
        """The page as the text of an .ipynb file."""
        cells = [_as_notebook_cell(number, cell) for number, cell in enumerate(self.cells)]
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        whole = {"cells": cells, "metadata": {"kernelspec": kernel}}
        return json.dumps({**whole, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def run(markdown: str) -> Tutorial:
    """Run the examples of a page, in their order and with names in common.

    A cell ends where something is shown. What an example saves goes into a folder that is thrown
    away. An example that fails stops the build.
    """
    tutorial, names = Tutorial(), {"__name__": "__main__"}
    end = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for fence in _FENCE.finditer(markdown):
            examples = doctest.DocTestParser().get_examples(fence[1])
            if not examples:
                continue
            tutorial.cells += _text(markdown[end : fence.start()])
            tutorial.cells += _cells(examples, names)
            end = fence.end()
    tutorial.cells += _text(markdown[end:])
    return tutorial


def _text(markdown: str) -> list[Cell]:
    rest = _IMAGE.sub("", markdown).strip()
    return [Cell(text=f"{rest}\n")] if rest else []


def _cells(examples: list[doctest.Example], names: dict[str, Any]) -> Iterator[Cell]:
    code = ""
    for example in examples:
        code += example.source
        said, values = io.StringIO(), []
        with contextlib.redirect_stdout(said), _displayed(values):
            exec(compile(example.source, "<tutorial>", "single"), names)
        if values or said.getvalue():
            yield Cell(code=code, said=said.getvalue(), **_shown(values))
            code = ""
    if code:
        yield Cell(code=code)


@contextlib.contextmanager
def _displayed(values: list[Any]) -> Iterator[None]:
    """Collect what an interpreter would show."""
    before = sys.displayhook
    sys.displayhook = lambda value: None if value is None else values.append(value)
    try:
        yield
    finally:
        sys.displayhook = before


def _shown(values: list[Any]) -> dict[str, str]:
    if not values:
        return {}
    as_html = getattr(values[-1], "_repr_html_", None)
    return {"shown": f"{values[-1]!r}\n", "rich": as_html() if as_html else ""}


def _as_notebook_cell(number: int, cell: Cell) -> dict[str, Any]:
    if cell.text:
        return {
            "id": f"cell-{number}",
            "cell_type": "markdown",
            "metadata": {},
            "source": cell.text.strip(),
        }
    outputs: list[dict[str, Any]] = []
    if cell.said:
        outputs.append({"output_type": "stream", "name": "stdout", "text": cell.said})
    if cell.shown:
        data = {"text/plain": cell.shown.rstrip()}
        if cell.rich:
            data["text/html"] = cell.rich
        shown = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        outputs.append({**shown, "data": data})
    return {
        "id": f"cell-{number}",
        "cell_type": "code",
        "metadata": {},
        "execution_count": number,
        "source": cell.code.rstrip(),
        "outputs": outputs,
    }


# What mkdocs calls


def on_post_page(output: str, *, page: Any, **_: Any) -> None:
    """Refuse a page that would load something over the network."""
    if found := _LOADED.search(output):
        raise ValueError(f"{page.file.src_uri} loads from the network: {found[0]}")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str | None:
    """Run a tutorial, and put its outputs into the page."""
    if not page.file.src_uri.startswith(TUTORIALS) or not _FENCE.search(markdown):
        return None
    tutorial = _written[page.file.src_uri] = run(markdown)
    name = html.escape(Path(page.file.src_uri).with_suffix(".ipynb").name)
    link = f'<p><a href="{name}" download>This page as an executed notebook</a></p>'
    return f"{tutorial.markdown()}\n{link}\n"


def on_page_content(page_html: str, *, page: Any, **_: Any) -> str | None:
    """Put tables and pictures where Markdown has left room."""
    tutorial = _written.get(page.file.src_uri)
    return tutorial and tutorial.filled(page_html)


def on_post_build(*, config: Any, **_: Any) -> None:
    """Write the notebooks beside their pages."""
    for uri, tutorial in _written.items():
        file = Path(config["site_dir"], uri).with_suffix(".ipynb")
        file.write_text(tutorial.notebook(), encoding="utf-8")
