"""An architecture, a unit, a target or a backend is one file: added to a copy of the library, it is
there; deleted, every mention of it is gone. The files are those that CONTRIBUTING.md shows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from units import EVERY_UNIT, UNIT_NAMES

from dla_hooks.units import unit_class

ROOT = Path(__file__).parents[2]

ADDED = ("a unit", "a target", "a backend")
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def recipe(title: str) -> list[str]:
    """The blocks of Python in a section of CONTRIBUTING.md."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```$", section, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in blocks]


# A decoder that has the modules of the recipe's declaration, and nothing of transformers.
MY_MODEL = """
from types import SimpleNamespace
from torch import nn
D, HEADS = 24, 4
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(z.transpose(1, 2).flatten(2))
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(D), Attention()
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.post_mlp_norm = nn.LayerNorm(D)
    def forward(self, x):
        x = x + self.self_attn(self.norm(x))
        return x + self.post_mlp_norm(self.mlp(x))
class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, D)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(D)
class My(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="my_model", num_attention_heads=HEADS)
        self.model, self.lm_head = Decoder(), nn.Linear(D, 30)
        self.double().eval()
    def forward(self, input_ids):
        x = self.model.embed(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))
"""


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


@pytest.mark.parametrize("title", [f"Add {what}" for what in ("an architecture", *ADDED)])
def test_the_recipes_code_is_in_the_style_of_the_library(title, tmp_path):
    pytest.importorskip("ruff")
    (tmp_path / "dla_hooks").mkdir()  # so that its imports are known for our own
    (tmp_path / "dla_hooks" / "__init__.py").touch()
    (tmp_path / "dla_hooks" / "new.py").write_text(recipe(title)[-1])
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for command in (("check",), ("format", "--check")):
        ruff = [sys.executable, "-m", "ruff", *command, str(tmp_path)]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_new_architecture_is_one_file(copy):
    look, declaration = recipe("Add an architecture")
    (copy / "adapters" / "my_model.py").write_text(declaration)
    (copy / "mine.py").write_text(MY_MODEL)
    out = run(
        copy,
        f"""
from mine import My
torch.manual_seed(0)
model = My()
{look}
ids = torch.arange(7)[None]
for unit in {UNIT_NAMES}:
    result = dla_hooks.direct_logit_attribution(model, ids, 5, unit=unit)
    assert torch.allclose(result.total() + result.bias, model(ids)[:, -1, 5], atol=1e-9), unit
assert "0_attn_out" in dla_hooks.direct_logit_attribution(model, ids, 5).labels
assert any("my_model" in one.model_types for one in dla_hooks.architectures())
assert " my_model " + " ".join({UNIT_NAMES}) + " " in shown("list")
""",
    )
    assert "my_model), float64: adds up" in out


def test_a_new_unit_is_one_file(copy):
    (code,) = recipe("Add a unit")
    (copy / "dla_hooks" / "units" / "halves.py").write_text(code)
    out = run(
        copy,
        """
result = attribute(unit="halves")
whole = attribute()
assert torch.allclose(result.attribution.sum(0) + result.bias, result.logit, atol=1e-3)
assert torch.allclose(result.attribution[0], whole.attribution[:2].sum(0), atol=1e-4)
assert "halves: the embeddings" in repr(result) and "halves" in result._repr_html_()
assert {row["half"] for row in result.records()} == {0, 1}
assert attribute(unit=("halves", "head"))["halves"].labels == ["start", "else"]
assert attribute(unit=dla_hooks.Halves()).labels == ["start", "else"]
assert "Halves" in dir(dla_hooks) and "Halves" in dla_hooks.__all__
path = result.save("halves.safetensors")
assert dla_hooks.DirectLogitAttribution.load(path).records() == result.records()
result.plot()
summary = dla_hooks.summarize(dla_hooks.attribute_many(
    model, [PROMPT], " are", unit="halves", tokenizer=tokenizer))
assert "halves" in repr(summary)
assert ", halves, head, layer" in shown("attribute", "--help")
assert " llama component halves head layer " in shown("list")
assert "halves: the embeddings" in shown(
    "attribute", "demo", PROMPT, "--answer", " are", "--unit", "halves")
assert '| `"halves"`, `dla_hooks.Halves` |' in reference_page()
try:
    attribute(unit="nothing")
except dla_hooks.InputError as error:
    print(error)
""",
    )
    assert "'halves'" in out


# Verbs that ask of the rows of one unit go with it.
STANDS_ON = {"source": "upstream"}
# The demonstration tells of heads, what they read, and what the parts around them make up for.
DEMONSTRATED = ("component", "head", "source")
STORY = "cli/story.py"


@pytest.mark.parametrize("name", EVERY_UNIT)
def test_a_deleted_unit_is_mentioned_no_more(copy, name):
    (copy / "dla_hooks" / "units" / f"{name}.py").unlink()
    if name in STANDS_ON:
        names = copy / "dla_hooks" / "__init__.py"
        lines = names.read_text().splitlines(keepends=True)
        names.write_text("".join(line for line in lines if STANDS_ON[name] not in line))
    others = tuple(other for other in UNIT_NAMES if other != name)
    every = tuple(other for other in EVERY_UNIT if other != name)
    demo = "" if name in DEMONSTRATED else 'assert shown("demo").startswith("A small GPT-2")'
    out = run(
        copy,
        f"""
others, every, deleted = {others}, {every}, {name!r}
found = attribute(unit=others)
assert tuple(found) == others
for result in found.values():
    assert torch.allclose(result.total() + result.bias, result.logit, atol=1e-3)
assert {unit_class(name).__name__!r} not in dir(dla_hooks)
for make in (lambda: attribute(unit=deleted), lambda: attribute(unit=(deleted, others[0]))):
    try:
        make()
    except dla_hooks.InputError as error:
        assert f"unit must be one of {{every}}, got {{deleted!r}}" in str(error)
    else:
        raise AssertionError("the unit is still there")
assert ", ".join(every) + ". [default: " in shown("attribute", "--help")
assert " llama " + " ".join(others) + " " in shown("list")
{demo}
shown("attribute", "demo", PROMPT, "--answer", " are", "--unit", others[-1])
print(reference_page())
""",
    )
    assert mentions(out, name, unit_class(name).__name__) == []


@pytest.mark.parametrize("name", EVERY_UNIT)
def test_no_other_module_names_a_unit(name):
    found = {}
    for path in sorted((ROOT / "dla_hooks").rglob("*.py")):
        place = path.relative_to(ROOT / "dla_hooks").as_posix()
        lines = mentions(path.read_text(encoding="utf-8"), name, unit_class(name).__name__)
        if lines and place != f"units/{name}.py" and (place, name in DEMONSTRATED) != (STORY, True):
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
    (code,) = recipe("Add a target")
    (copy / "dla_hooks" / "targets" / "probe.py").write_text(code)
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
    (code,) = recipe("Add a backend")
    (copy / "dla_hooks" / "backends" / "box.py").write_text(code)
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
