"""A unit, a target or a backend is one file: added to a copy of the library, it is there; deleted,
every mention of it is gone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from units import UNIT_NAMES

from dla_hooks.units import unit_class

ROOT = Path(__file__).parents[2]

TOY_UNIT = '''
"""The embeddings and everything else."""

from __future__ import annotations

from dla_hooks.results.rows import Row, Words
from dla_hooks.units.base import Split, Unit


class Halves(Unit):
    """``embed``, ``else``."""

    words = Words("toy", "Halves", "halves: the embeddings, and all else", index="half")

    def places(self, stream):
        return [stream.start, *(write.place for write in stream.writes)]

    def split(self, parts):
        running = parts.steps_SN.cumsum(0)
        rows = [Row("start", "half", None, None, 0), Row("else", "half", None, None, 1)]
        return Split(rows, running[[0, -1]] - running[[0, 0]] * running.new_tensor([[0], [1]]))
'''

TOY_TARGET = '''
"""A direction in the last stream, read as it is."""

from __future__ import annotations

import torch

from dla_hooks.projection.directions import Directions
from dla_hooks.projection.reading_point import ReadingPoint
from dla_hooks.projection.readout import Readout
from dla_hooks.targets.base import Request, Target


class Probe(Request):
    def __init__(self, vector):
        self.vector = vector

    def on(self, stream):
        return _ProbeTarget(self.vector, stream)


class _ProbeTarget(Target):
    def __init__(self, vector, stream):
        self.point = ReadingPoint(stream.last, None, None, stream.work_dtype)
        d_KM = vector[None].to(stream.work_dtype)
        self.readouts = [Readout(Directions.held(d_KM), torch.zeros(1, dtype=d_KM.dtype))]

    def own_and_theirs(self, reading, observed):
        own = reading.value_N()[observed.entries_E]
        return own, own
'''

TOY_BACKEND = '''
"""Models that come in a box."""

from __future__ import annotations

from dla_hooks.backends.huggingface import HuggingFaceBackend


class BoxBackend(HuggingFaceBackend):
    serves = ("box.Box",)

    def __init__(self, model, conventions=None, tokenizer=None):
        super().__init__(model.inside, conventions, tokenizer)
'''


@pytest.fixture
def copy(tmp_path):
    """A copy of the library, without what Python compiled of it."""
    for folder in ("dla_hooks", "adapters", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(folder, code):
    command = [sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
import sys, torch
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import dla_hooks
model, tokenizer = dla_hooks.demo.load()
PROMPT = "The keys near the cabinet"
def attribute(answer=" are", model=model, **options):
    return dla_hooks.direct_logit_attribution(
        model, PROMPT, answer, tokenizer=tokenizer, **options)
def shown(*arguments):
    "What a command prints, without frames and line breaks."
    from typer.testing import CliRunner
    from dla_hooks.cli import app
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return " ".join(done.output.replace("│", " ").split())
def reference_page():
    sys.path.insert(0, "scripts")
    import reference
    return reference.page()
"""


def mentions(text, name, class_name):
    """The lines that name a unit or its class; examples may use one."""
    named = re.compile(rf"""unit=.*["']{name}["']|`"{name}"`|dla_hooks\.{class_name}\b""")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if named.search(line) and not line.startswith((">>>", "..."))]


def test_a_new_unit_is_one_file(copy):
    (copy / "dla_hooks" / "units" / "toy.py").write_text(TOY_UNIT)
    out = run(
        copy,
        """
result = attribute(unit="toy")
whole = attribute()
assert torch.allclose(result.attribution.sum(0) + result.bias, result.logit, atol=1e-3)
assert torch.allclose(result.attribution[0], whole.attribution[:2].sum(0), atol=1e-4)
assert "halves: the embeddings" in repr(result) and "halves" in result._repr_html_()
assert {row["half"] for row in result.records()} == {0, 1}
assert attribute(unit=("toy", "head"))["toy"].labels == ["start", "else"]
assert attribute(unit=dla_hooks.Halves()).labels == ["start", "else"]
assert "Halves" in dir(dla_hooks) and "Halves" in dla_hooks.__all__
path = result.save("toy.safetensors")
assert dla_hooks.DirectLogitAttribution.load(path).records() == result.records()
result.plot()
summary = dla_hooks.summarize(dla_hooks.attribute_many(
    model, [PROMPT], " are", unit="toy", tokenizer=tokenizer))
assert "halves" in repr(summary)
assert "component, head, layer, toy" in shown("attribute", "--help")
assert " llama component head layer toy " in shown("list")
assert "halves: the embeddings" in shown(
    "attribute", "demo", PROMPT, "--answer", " are", "--unit", "toy")
assert '| `"toy"`, `dla_hooks.Halves` |' in reference_page()
try:
    attribute(unit="nothing")
except dla_hooks.InputError as error:
    print(error)
""",
    )
    assert "'toy'" in out


@pytest.mark.parametrize("name", UNIT_NAMES)
def test_a_deleted_unit_is_mentioned_no_more(copy, name):
    (copy / "dla_hooks" / "units" / f"{name}.py").unlink()
    others = tuple(other for other in UNIT_NAMES if other != name)
    out = run(
        copy,
        f"""
others, deleted = {others}, {name!r}
found = attribute(unit=others)
assert tuple(found) == others
for result in found.values():
    assert torch.allclose(result.total() + result.bias, result.logit, atol=1e-3)
assert {unit_class(name).__name__!r} not in dir(dla_hooks)
for make in (lambda: attribute(unit=deleted), lambda: attribute(unit=(deleted, others[0]))):
    try:
        make()
    except dla_hooks.InputError as error:
        assert f"unit must be one of {{others}}, got {{deleted!r}}" in str(error)
    else:
        raise AssertionError("the unit is still there")
assert ", ".join(others) + ". [default: " in shown("attribute", "--help")
assert " llama " + " ".join(others) + " " in shown("list")
assert shown("demo").startswith("A small GPT-2")
shown("attribute", "demo", PROMPT, "--answer", " are", "--unit", others[-1])
print(reference_page())
""",
    )
    assert mentions(out, name, unit_class(name).__name__) == []


@pytest.mark.parametrize("name", UNIT_NAMES)
def test_no_other_module_names_a_unit(name):
    found = {}
    for path in sorted((ROOT / "dla_hooks").rglob("*.py")):
        place = path.relative_to(ROOT / "dla_hooks").as_posix()
        lines = mentions(path.read_text(encoding="utf-8"), name, unit_class(name).__name__)
        if lines and place != f"units/{name}.py":
            found[place] = lines
    assert found == {}


def test_mentions_of_a_unit_are_found():
    text = """
    use unit='component' or 'layer'
    ``"layer"`` or a unit's object
    cell["layer"]
    >>> attribute(unit="layer")
    unit=dla_hooks.Layers()
    """
    assert len(mentions(text, "layer", "Layers")) == 3


def test_a_new_target_is_one_file(copy):
    (copy / "dla_hooks" / "targets" / "probe.py").write_text(TOY_TARGET)
    run(
        copy,
        """
vector = torch.randn(model.config.n_embd, generator=torch.Generator().manual_seed(0))
seen = []
handle = model.transformer.ln_f.register_forward_pre_hook(
    lambda module, args: seen.append(args[0][:, -1]))
model(**tokenizer(PROMPT, return_tensors="pt"))
handle.remove()
expected = (seen[-1] @ vector).detach()
for unit in ("component", "layer", "head"):
    result = attribute(dla_hooks.Probe(vector), unit=unit)
    whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
    assert torch.allclose(whole, expected, atol=1e-3), (unit, whole, expected)
    assert torch.allclose(result.logit, expected, atol=1e-3)
assert "Probe" in dir(dla_hooks)
""",
    )


def test_a_new_backend_is_one_file(copy):
    (copy / "dla_hooks" / "backends" / "box.py").write_text(TOY_BACKEND)
    (copy / "box.py").write_text(
        "class Box:\n    def __init__(self, inside):\n        self.inside = inside\n"
    )
    run(
        copy,
        """
from box import Box
found, expected = attribute(model=Box(model)), attribute()
assert torch.equal(found.attribution, expected.attribution)
""",
    )
