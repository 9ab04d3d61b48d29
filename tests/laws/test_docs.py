"""What is public is documented, and the examples in docstrings run."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
from nearly import Checker, nearly
from units import EVERY_UNIT

import dla_hooks

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference.md"

sys.path.insert(0, str(ROOT / "scripts"))
reference = importlib.import_module("reference")
pictures = importlib.import_module("pictures")
sys.path.remove(str(ROOT / "scripts"))

FUNCTIONS = {
    name: value for name, value in reference.public().items() if not inspect.isclass(value)
}
CLASSES = {name: value for name, value in reference.public().items() if inspect.isclass(value)}


@pytest.fixture(scope="module")
def pages() -> str:
    """The README and all pages, as one text."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def items(docstring: str, section: str) -> set[str]:
    """The names that a section of a docstring describes."""
    _, _, rest = inspect.cleandoc(docstring).partition(f"{section}:\n")
    body = rest.partition("\n\n")[0]
    found = re.findall(r"^ {4}([*\w, .]+):", body, re.MULTILINE)
    return {name.strip(" *") for names in found for name in names.split(",")}


# The pages


def test_reference_page_has_what_results_share():
    """What stands on a common base is a method of each result."""
    stored = [cls for cls in CLASSES.values() if hasattr(cls, "save") and hasattr(cls, "load")]
    assert len(stored) == 6
    for cls in stored:
        assert {"save", "load", "records", "to_dataframe"} <= set(reference.members(cls)), cls


def test_reference_page_matches_docstrings():
    command = "python scripts/reference.py --write docs/reference.md"
    assert REFERENCE.read_text(encoding="utf-8") == reference.page(), f"stale: run `{command}`"


def test_pictures_of_pages_are_current():
    command = "python scripts/pictures.py --write docs/pictures"
    drawn = pictures.pictures()
    folder = ROOT / "docs" / "pictures"
    assert {file.stem for file in folder.iterdir()} == set(drawn)
    stale = [
        name for name, one in drawn.items() if not pictures.is_current(one, folder / f"{name}.svg")
    ]
    assert stale == [], f"stale: run `{command}`"


def test_pictures_that_differ_in_a_number_or_a_word_are_stale(tmp_path):
    from dla_hooks.results import picture

    file = picture.bars(["a", "b"], [1.0, 2.0]).save(tmp_path / "p.svg")
    assert pictures.is_current(picture.bars(["a", "b"], [1.0, 2.0 + 1e-6]), file)
    assert not pictures.is_current(picture.bars(["a", "b"], [1.0, 2.2]), file)
    assert not pictures.is_current(picture.bars(["a", "c"], [1.0, 2.0]), file)


def test_public_names_are_on_a_page(pages):
    missing = [name for name in dla_hooks.__all__ if not re.search(rf"\b{name}\b", pages)]
    assert missing == ["__version__"]


def test_units_are_on_a_page(pages):
    assert [name for name in EVERY_UNIT if f'`"{name}"`' not in pages] == []


def test_errors_are_on_a_page(pages):
    from dla_hooks import errors

    names = [name for name in vars(errors) if name.endswith("Error")]
    assert len(names) > 10
    assert [name for name in names if f"`{name}`" not in pages] == []


def test_commands_and_flags_are_documented(pages):
    for name, command in reference.commands().items():
        assert command.help, name
        assert name in pages
        for flag, says in reference.flags(command):
            assert f"`{flag}`" in pages
            assert says or flag == "PROMPT", f"{name} {flag} has no help"


@pytest.mark.parametrize("name", ["DirectLogitAttribution", "Summary", "PromotedTokens", "Picture"])
def test_fields_and_methods_of_results_are_on_a_page(pages, name):
    cls = CLASSES[name]
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if not field.name.startswith("_"):
            assert f"`{field.name}`" in pages
    for member in reference.members(cls):
        assert f"`{name}.{member}" in pages


# The docstrings


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_of_public_functions_are_described(name):
    function = FUNCTIONS[name]
    assert function.__doc__
    described = items(function.__doc__, "Args")
    assert set(inspect.signature(function).parameters) - described == set()


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_methods_of_public_classes_are_described(name):
    cls = CLASSES[name]
    assert cls.__doc__
    if dataclasses.is_dataclass(cls):
        public = {one.name for one in dataclasses.fields(cls) if not one.name.startswith("_")}
        assert public - items(cls.__doc__, "Attributes") == set()
    for member, value in reference.members(cls).items():
        assert inspect.getdoc(value), f"{name}.{member} has no docstring"


# Their examples


def _documented_modules() -> list[str]:
    """The modules whose docstrings hold examples that run without TransformerLens."""
    found = []
    for info in pkgutil.walk_packages(dla_hooks.__path__, "dla_hooks."):
        path = ROOT / "dla_hooks" / Path(*info.name.split(".")[1:])
        file = path / "__init__.py" if info.ispkg else path.with_suffix(".py")
        if file.is_file() and _runs(file.read_text(encoding="utf-8")):
            found.append(info.name)
    return ["dla_hooks", *found]


def _runs(source: str) -> bool:
    """Whether a docstring of a module holds an example that is not skipped."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [
        ast.get_docstring(n) for n in ast.walk(ast.parse(source)) if isinstance(n, owners)
    ]
    parser = doctest.DocTestParser()
    examples = [one for text in docstrings if text for one in parser.get_examples(text)]
    return any(doctest.SKIP not in example.options for example in examples)


@pytest.fixture(scope="module")
def namespace():
    """The names that examples may use without making them: the demo model and its like."""
    model, tokenizer = dla_hooks.demo.load()
    return {
        "dla_hooks": dla_hooks,
        "direct_logit_attribution": dla_hooks.direct_logit_attribution,
        "model": model,
        "tokenizer": tokenizer,
    }


class _Finder(doctest.DocTestFinder):
    """Finds the examples of public classes too, which say that their module is ``dla_hooks``."""

    def _from_module(self, module, object):
        public = getattr(object, "__module__", None) == "dla_hooks"
        written = getattr(module, getattr(object, "__name__", ""), None) is object
        if public and written:
            source = inspect.getsource(module)
            return bool(re.search(rf"^class {object.__name__}\b", source, re.M))
        return super()._from_module(module, object)


@pytest.mark.parametrize("name", _documented_modules())
def test_examples_in_docstrings_run(name, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what an example saves goes here
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in _Finder().find(module, name, extraglobs=dict(namespace)):
        runner.run(test)
    found = runner.summarize(verbose=False)
    assert found.failed == 0
    assert found.attempted > 0


def test_wrong_examples_in_docstrings_fail():
    """The runner would see it."""
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3", {}, "wrong", None, 0)
    said: list[str] = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 1
    assert "Expected" in "".join(said)


PAGES = {
    str(path.relative_to(ROOT / "docs")): path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if ">>> " in path.read_text()
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"reference.md"}))
def test_examples_of_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what an example saves goes here
    text = PAGES[page].read_text(encoding="utf-8")
    test = doctest.DocTestParser().get_doctest(
        text, {"__name__": "__main__"}, page, str(PAGES[page]), 0
    )
    found = doctest.DocTestRunner(checker=Checker()).run(test)
    assert found.attempted > 5
    assert found.failed == 0


def test_output_that_differs_in_a_digit_that_counts_or_a_word_fails():
    assert nearly("L3H3  +5.595  │████", "L3H3 +5.594 │███")
    assert nearly("gap 9.5e-07", "gap 0.0e+00")
    assert not nearly("L3H3 +5.595", "L3H3 +5.4")
    assert not nearly("L3H3 +5.595", "L3H2 +5.595")
    assert not nearly("rank 1, p 1", "rank 2, p 1")
    assert not nearly("[('L3H3', 5.59)]", "[('L3H3', -5.59)]")
