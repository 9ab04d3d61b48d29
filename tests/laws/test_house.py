"""The house stays one: imports run one way, nothing runs in a circle, no module is a long one.

Every import counts: those inside of functions and those for type checkers, too.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A module imports from lower floors, from its own room, and from nothing else;
# rooms of one floor do not know each other. CONTRIBUTING.md says what each room is for.
FLOORS = (
    ("doors", "errors", "_version", "tolerance", "quiet"),
    ("bars", "inputs", "modules", "results"),
    ("backends",),
    ("residual",),
    ("adapters", "projection", "calibration"),
    ("targets", "sources"),
    ("units", "verification"),
    ("measure", "call", "tl"),
    ("attribution", "stacks"),
    ("questions",),
    ("many", "generation", "pages"),
    ("placement", "hub"),
    ("checkpoint",),
    ("engines",),
    ("__init__",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Beside the floors: the table of public names lists `demo` as one of them, for type checkers.
ALLOWED = {("__init__", "demo")}

# Exceptions, each with the reason beside it: there are none. A line whose import, circle or length
# is gone fails the test.
KNOWN: set[tuple[str, str]] = set()  # (importing module, imported room)
KNOWN_IN_CIRCLES: set[str] = set()
KNOWN_LONG: set[str] = set()
LONGEST = 300
HIGHEST = 14  # engines stand on `many`; `python -m dla_hooks` stands on the command line
"""Rooms that stand on each other; FLOORS has more lines, to say who may import whom."""


def _modules() -> dict[str, Path]:
    """Every module of the package, its adapters and the benchmarks, by its full name."""
    found = {}
    places = (("dla_hooks", "dla_hooks"), ("adapters", "dla_hooks.adapters"))
    for folder, name in (*places, ("benchmarks", "benchmarks")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imported(name: str, source: str, modules: set[str], packages: set[str]) -> set[str]:
    """The modules of ours that a module's source imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")
                above = above[: len(above) - node.level + (name in packages)]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return {module for module in found if module in modules} - {name}


ARROWS = {
    name: imported(name, path.read_text(), set(MODULES), PACKAGES) for name, path in MODULES.items()
}


def room_of(module: str) -> str:
    """The folder of a module of dla_hooks, or the module itself where it stands at the top."""
    return module.split(".")[1] if "." in module else "__init__"


def against_the_order(arrows: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Pairs (importing module, imported room) that the floors do not allow."""
    found = set()
    for name, targets in arrows.items():
        if name.startswith("benchmarks"):
            continue
        here = room_of(name)
        for target in targets:
            there = room_of(target)
            if here == there or FLOOR[there] < FLOOR[here] or (here, there) in ALLOWED:
                continue
            found.add((name.removeprefix("dla_hooks.") or "__init__", there))
    return found


def circles(arrows: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules each of which reaches all others of its set (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in arrows[name]:
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.add(frozenset(members))

    for name in arrows:
        if name not in order:
            visit(name)
    return found


def test_every_room_has_its_floor():
    rooms = {room_of(name) for name in MODULES if name.startswith("dla_hooks")}
    assert rooms - set(FLOOR) == set(), "give the new folder a place in FLOORS"


def test_imports_between_rooms_run_down():
    found = against_the_order(ARROWS)
    assert sorted(found - KNOWN) == [], "these imports run against the order of FLOORS"
    assert sorted(KNOWN - found) == [], "these are gone: take them out of KNOWN"


def heights(arrows: dict[str, set[str]]) -> dict[str, int]:
    """How many rooms stand on each other from the ground to each room, itself counted."""
    below: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        if not name.startswith("benchmarks"):
            here = room_of(name)
            below.setdefault(here, set()).update(
                there
                for there in map(room_of, targets)
                if there != here and (here, there) not in ALLOWED
            )
    found: dict[str, int] = {}
    for room in sorted(below, key=FLOOR.__getitem__):
        found[room] = 1 + max((found[other] for other in below[room]), default=0)
    return found


def test_rooms_stand_on_few_floors():
    """With ``scripts/``, which import the command line, one more."""
    assert max(heights(ARROWS).values()) <= HIGHEST


def test_modules_do_not_import_each_other_in_a_circle():
    found = set().union(*circles(ARROWS))
    assert sorted(found - KNOWN_IN_CIRCLES) == [], "these modules import each other in a circle"
    assert sorted(KNOWN_IN_CIRCLES - found) == [], "in none by now: take them out"


def test_nothing_imports_the_benchmarks_or_the_adapters_by_name():
    for name, targets in ARROWS.items():
        if not name.startswith("benchmarks"):
            assert not [one for one in targets if one.startswith("benchmarks")], name
        if not name.startswith("dla_hooks.adapters"):
            assert not [one for one in targets if one.startswith("dla_hooks.adapters")], name


def test_modules_are_short():
    long = {name for name, path in MODULES.items() if _lines(path) > LONGEST}
    assert sorted(long - KNOWN_LONG) == []
    assert sorted(KNOWN_LONG - long) == [], "short by now: take them out of KNOWN_LONG"


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_pyproject_lists_every_folder_with_modules():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name in PACKAGES if name != "benchmarks")
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import dla_hooks.b.c", {"dla_hooks.b.c"}),
        ("from dla_hooks.b import c", {"dla_hooks.b.c"}),
        ("from dla_hooks.b import thing", {"dla_hooks.b"}),
        ("from . import d", {"dla_hooks.a.d"}),
        ("from .d import thing", {"dla_hooks.a.d"}),
        ("from ..b.c import thing", {"dla_hooks.b.c"}),
        ("def f():\n    from dla_hooks.b.c import thing", {"dla_hooks.b.c"}),
        ("if TYPE_CHECKING:\n    from dla_hooks.b.c import thing", {"dla_hooks.b.c"}),
        ("import torch\nfrom os import path", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, expected):
    packages = {"dla_hooks", "dla_hooks.a", "dla_hooks.b"}
    modules = packages | {"dla_hooks.a.d", "dla_hooks.a.e", "dla_hooks.b.c"}
    assert imported("dla_hooks.a.e", source, modules, packages) == expected


def test_upward_import_and_circle_are_found():
    up = {"dla_hooks.errors": {"dla_hooks.units.base"}, "dla_hooks.units.base": set()}
    assert against_the_order(up) == {("errors", "units")}
    beside = {"dla_hooks.inputs.a": {"dla_hooks.results.b"}, "dla_hooks.results.b": set()}
    assert against_the_order(beside) == {("inputs.a", "results")}
    chain = {"dla_hooks.call": {"dla_hooks.errors"}, "dla_hooks.errors": set()}
    assert heights({**chain, "dla_hooks.many.x": {"dla_hooks.call"}})["many"] == 3
    round_trip = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(round_trip) == {frozenset("abc")}
