"""The hook that shows tutorials as executed notebooks."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
pages = importlib.import_module("pages")
sys.path.remove(str(ROOT / "scripts"))

PAGE = """# A page

![what is drawn](picture.svg)

```python
>>> from dla_hooks.results import picture
>>> drawn = picture.bars(["a", "b"], [1.0, 2.0])
>>> 1 + 1
2
>>> drawn
<Picture "", ...>
>>> print("<script>")
<script>

```

```python
not_run()
```
"""


def test_cells_end_where_something_is_shown():
    tutorial = pages.run(PAGE)
    code = [cell for cell in tutorial.cells if cell.code]
    assert [cell.code.splitlines()[-1] for cell in code] == ["1 + 1", "drawn", 'print("<script>")']
    assert code[0].shown == "2\n"
    assert code[2].said == "<script>\n"
    assert "<svg" in code[1].rich
    assert "not_run()" in tutorial.cells[-1].text


def test_page_has_outputs_and_no_prompts_and_no_second_picture():
    tutorial = pages.run(PAGE)
    markdown = tutorial.markdown()
    assert ">>>" not in markdown
    assert "picture.svg" not in markdown
    assert "<svg" not in markdown  # Markdown could spoil it
    assert tutorial.filled(markdown).count("<svg") == 1
    assert "data-output" not in tutorial.filled(markdown)


def test_notebook_holds_the_cells_and_their_outputs():
    notebook = json.loads(pages.run(PAGE).notebook())
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds == ["markdown", "code", "code", "code", "markdown"]
    (shown,) = notebook["cells"][2]["outputs"]
    assert "<svg" in shown["data"]["text/html"]
    assert notebook["cells"][3]["outputs"][0]["text"] == "<script>\n"
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.from_dict(notebook))


def test_example_that_fails_stops_the_build():
    with pytest.raises(NameError):
        pages.run("```python\n>>> nothing\n```\n")


def test_what_an_example_saves_does_not_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run('```python\n>>> _ = open("saved", "w").close()\n```\n')
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


def test_page_that_loads_from_the_network_stops_the_build():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    pages.on_post_page('<a href="https://a.b">a link</a><img src="a.svg">', page=page)
    for tag in (
        '<script src="https://a.b/c.js">',
        '<img alt="x" src="//a.b/c.svg">',
        '<link rel="stylesheet" href="https://a.b/c.css">',
    ):
        with pytest.raises(ValueError, match=r"a\.md loads from the network"):
            pages.on_post_page(tag, page=page)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert f": {path.relative_to(ROOT / 'docs')}\n" in navigation
