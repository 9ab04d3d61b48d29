"""A unit, a target or a backend is one file: added to a copy of the library, it is there; deleted,
every mention of it is gone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    for folder in ("dla_hooks", "adapters"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(folder, code):
    command = [sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HELP = """
from dla_hooks.cli import main
sys.argv = ["dla-hooks", "attribute", "--help"]
main()
"""
PRELUDE = """
import sys, torch
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import dla_hooks
model, tokenizer = dla_hooks.demo.load()
PROMPT = "The keys near the cabinet"
def attribute(answer=" are", model=model, **options):
    return dla_hooks.direct_logit_attribution(
        model, PROMPT, answer, tokenizer=tokenizer, **options)
"""


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
try:
    attribute(unit="nothing")
except dla_hooks.InputError as error:
    print(error)
""",
    )
    assert "'toy'" in out
    shown = run(copy, HELP)
    assert "toy" in " ".join(shown.replace("│", " ").split())


def test_a_deleted_unit_is_mentioned_no_more(copy):
    (copy / "dla_hooks" / "units" / "layer.py").unlink()
    out = run(
        copy,
        """
attribute(unit=("component", "head"))
assert "Layers" not in dir(dla_hooks)
try:
    attribute(unit="layer")
except dla_hooks.InputError as error:
    print(error)
""",
    )
    assert "unit must be one of ('component', 'head'), got 'layer'" in out
    shown = run(copy, HELP)
    assert "component, head" in " ".join(shown.replace("│", " ").split())


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
