"""What the README shows runs, gives the output that stands there, and leads somewhere."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from nearly import nearly

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def test_readme_examples_run_and_print_what_stands_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shown = 0
    for code, expected in SNIPPET.findall(README):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, "README.md", "exec"), names)
        assert nearly(said.getvalue(), expected), said.getvalue()
        shown += bool(expected)
    assert shown == 2
    assert (tmp_path / "heads.svg").is_file()


def test_readme_first_example_is_short_and_the_page_too():
    first, _ = SNIPPET.findall(README)[0]
    assert len(first.splitlines()) <= 10
    assert len(README.splitlines()) < 200
    before_picture = README[: README.index("![")]
    assert len(before_picture.splitlines()) < 8


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles)
    return {title.replace(" ", "-") for title in words}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_readme_link_leads_to_a_file_and_a_title(link):
    path, _, anchor = link.partition("#")
    assert (ROOT / path).is_file()
    assert not anchor or anchor in _anchors(ROOT / path)
