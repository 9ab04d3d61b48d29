"""Run the examples of docs/, docstrings and the README, and write what they give now.

python scripts/outputs.py --write           # of all
python scripts/outputs.py --write docs/units.md dla_hooks/attribution.py
python scripts/outputs.py --check           # fails when an output is stale

An output that is nearly what stands there is left as it is. An example that raises is named, and
not written. Words around the examples are nobody's but yours: read them again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import doctest
import importlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dla_hooks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
Checker, nearly = (getattr(importlib.import_module("nearly"), n) for n in ("Checker", "nearly"))
sys.path.pop(0)

_MADE = ROOT / "docs" / "reference.md"  # scripts/reference.py writes it
_SNIPPET = re.compile(r"(```python\n(.*?)```\n)(?:(\n```text\n)(.*?)(```\n))?", re.DOTALL)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class _Runner(doctest.DocTestRunner):
    """Notes what examples give, where that is not what stands there."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.new: list[tuple[doctest.Example, str]] = []
        self.raised: list[str] = []

    def report_failure(
        self, out: Any, test: doctest.DocTest, example: doctest.Example, got: str
    ) -> None:
        self.new.append((example, got))

    def report_unexpected_exception(
        self, out: Any, test: doctest.DocTest, example: doctest.Example, exc_info: Any
    ) -> None:
        line = (test.lineno or 0) + example.lineno + 1
        self.raised.append(f"{test.filename}:{line}: {exc_info[0].__name__}: {exc_info[1]}")


def _rewritten(lines: list[str], start: int, runner: _Runner) -> list[str]:
    """The lines of a file, with the outputs of examples that begin at a line of it."""
    for example, got in reversed(runner.new):
        first = start + example.lineno + example.source.count("\n")
        stood = example.want.partition("```")[0]  # a fence without an empty line ahead of it stays
        after = first + stood.count("\n")
        indent = " " * example.indent
        said = [line.rstrip() or "<BLANKLINE>" for line in got.splitlines()]
        lines[first:after] = [f"{indent}{line}\n" for line in said]
    return lines


def page(text: str, name: str) -> tuple[str, list[str]]:
    """A page of docs/ with its outputs, and what raised."""
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, name, 0)
    runner = _Runner(checker=Checker())
    with contextlib.redirect_stdout(io.StringIO()):
        runner.run(test)
    return "".join(_rewritten(text.splitlines(keepends=True), 0, runner)), runner.raised


def readme(text: str, name: str) -> tuple[str, list[str]]:
    """The README: what a block of Python prints stands in the next block, of text."""
    names: dict[str, Any] = {}

    def replaced(found: re.Match[str]) -> str:
        block, code, opening, stood, end = found.groups()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, name, "exec"), names)
        if opening is None or nearly(stood, said.getvalue()):
            return found[0]
        printed = "".join(f"{line.rstrip()}\n" for line in said.getvalue().splitlines())
        return f"{block}{opening}{printed}{end}"

    return _SNIPPET.sub(replaced, text), []


def module(text: str, name: str) -> tuple[str, list[str]]:
    """A module with the outputs in its docstrings, and what raised."""
    lines, raised = text.splitlines(keepends=True), []
    found = [one for one in _docstrings(ast.parse(text)) if ">>> " in one.value]
    if not found:
        return text, []
    parts = [part for part in Path(name).with_suffix("").parts if part != "__init__"]
    names = vars(importlib.import_module(".".join(parts)))
    model, tokenizer = dla_hooks.demo.load()
    given = {
        "dla_hooks": dla_hooks,
        "direct_logit_attribution": dla_hooks.direct_logit_attribution,
        "model": model,
        "tokenizer": tokenizer,
    }
    for one in reversed(found):
        start = one.lineno - 1
        test = doctest.DocTestParser().get_doctest(one.value, {**names, **given}, name, name, start)
        runner = _Runner(optionflags=_FLAGS)
        with contextlib.redirect_stdout(io.StringIO()):
            runner.run(test)
        raised += runner.raised
        _rewritten(lines, start, runner)
    return "".join(lines), raised


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            yield node.body[0].value  # type: ignore[attr-defined]


def _files() -> list[Path]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [*pages, *sorted((ROOT / "dla_hooks").rglob("*.py"))]


def main() -> int:
    """Write, or say what is stale."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--write", action="store_true")
    one.add_argument("--check", action="store_true")
    parser.add_argument("files", nargs="*", type=Path)
    asked = parser.parse_args()
    stale, raised = [], []
    for file in [path.resolve() for path in asked.files] or _files():
        text = file.read_text(encoding="utf-8")
        how = module if file.suffix == ".py" else readme if file.name == "README.md" else page
        if file == _MADE or (">>> " not in text and how is not readme):
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            new, wrong = how(text, str(file.relative_to(ROOT)))
        raised += wrong
        if new != text:
            stale.append(str(file.relative_to(ROOT)))
            if asked.write:
                file.write_text(new, encoding="utf-8")
    for line in stale:
        sys.stdout.write(f"{'wrote' if asked.write else 'stale:'} {line}\n")
    for line in raised:
        sys.stdout.write(f"raised: {line}\n")
    return int(bool(raised) or (asked.check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main())
