"""Hooks do not wait for the device: no number of an activation is read on the host inside of one.

On CUDA torch itself says so (its sync debug mode). Elsewhere what would wait is counted while hooks
run, by operator and by method; and the source of what runs in hooks is searched for it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from syncs import counted
from zoo import build

from dla_hooks import TOP, DLAError, prepare
from dla_hooks.units import unit_names

ROOT = Path(__file__).parents[2] / "dla_hooks"
SLOW = pytest.mark.slow
FAMILIES = ("gpt2", *(pytest.param(name, marks=SLOW) for name in (
    "llama", "gemma2", "granite", "gpt_neox-parallel", "mixtral", "qwen3_moe")))  # fmt: skip

# Places that do read numbers on the host while a hook runs, each with the reason.
_ENTRIES = "of the entries' places and targets, which are on the CPU whatever the model is on"
ALLOWED = {
    ("projection/tiles.py", "_tile"): _ENTRIES,
    ("projection/tiles.py", "_run_of"): _ENTRIES,
    ("projection/tiles.py", "by_prompt"): _ENTRIES,
    ("projection/votes.py", "_ask"): "only the device knows which experts ran; entries go by them",
    ("projection/read_ledger.py", "of_tokens"): "of the numbers of tokens, which are on the CPU",
}

# Modules whose functions run in hooks, and those in them that read numbers of tensors on the host
# all the same, each with the reason.
IN_HOOKS = (
    *("projection/kernels.py", "projection/ledger.py", "modules/hooks.py", "modules/outputs.py"),
    *("units/component.py", "units/layer.py", "units/parts.py", "units/head.py"),
    *("units/head_rows.py", "modules/attention_rows.py"),
)
READS = {
    ("projection/ledger.py", "all_finite"): "asked of sums once the run has ended",
    ("projection/ledger.py", "largest"): "asked of differences once the run has ended",
    ("units/parts.py", "_wrote"): "asked of a wrapper's row once the run has ended",
    ("units/head_rows.py", "_written"): "likewise",
}
WAITING = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select"}
CASTS = {"bool", "float", "int"}


def asked(family, unit, answer, seed=0):
    model = build(family, seed, dtype=torch.float32)
    try:
        return prepare(model, answer, unit=unit)
    except DLAError:
        pytest.skip(f"{family} has no {unit}")


@pytest.mark.parametrize("unit", unit_names())
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_read_no_number_on_the_host(family, unit):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 50, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    plan, found = asked(family, unit, TOP), set()
    for pos in (-1, None):
        for more in ({}, {"attention_mask": mask}, {"chunk_size": 4}):
            try:
                plan(ids, pos=pos, **more)  # what is measured once is measured
            except DLAError:
                continue
            with counted() as seen:
                plan(ids, pos=pos, **more)
            found |= {place for place in seen if place[:2] not in ALLOWED}
    assert found == set()


def test_waiting_hooks_are_found(monkeypatch):
    plan = asked("gpt2", "component", 7)
    ids = torch.tensor([[5, 6, 7]])
    plan(ids)
    _read_on_host(monkeypatch)
    with counted() as seen:
        plan(ids)
    assert {what for *_, what in seen} >= {"_local_scalar_dense", "tolist"}


def _read_on_host(monkeypatch):
    """Let every tap read a number of its activation."""
    from dla_hooks.modules.hooks import Call

    before = Call.activation.fget

    def activation(call):
        found = before(call)
        float(found.flatten()[0])
        found.flatten()[:1].tolist()
        return found

    monkeypatch.setattr(Call, "activation", property(activation))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("unit", unit_names())
def test_hooks_do_not_synchronise_on_cuda(unit, monkeypatch):
    from dla_hooks.modules.hooks import Tap

    plan_model = build("mixtral" if unit == "expert" else "llama", dtype=torch.float32).cuda()
    try:
        plan = prepare(plan_model, 7, unit=unit)
    except DLAError:
        pytest.skip(f"no {unit}")
    ids = torch.randint(5, 50, (2, 9), device="cuda")
    count = Tap.count

    def strictly(tap, call):
        try:
            torch.cuda.set_sync_debug_mode("error")
            count(tap, call)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for pos in (-1, None):
        plan(ids, pos=pos)
        with monkeypatch.context() as patched:
            patched.setattr(Tap, "count", strictly)
            plan(ids, pos=pos)


def reads_on_host(source):
    """(function, what) of each call in a module that would read a tensor's numbers on the host."""
    found = set()

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in WAITING:
                found.add((function, called.attr))
            if isinstance(called, ast.Name) and called.id in CASTS:
                found.add((function, called.id))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def test_source_of_hooks_reads_no_number_on_the_host():
    for name in IN_HOOKS:
        found = reads_on_host((ROOT / name).read_text(encoding="utf-8"))
        left = {(function, what) for function, what in found if (name, function) not in READS}
        assert left == set(), name
    for name, function in READS:
        assert function in {one for one, _ in reads_on_host((ROOT / name).read_text())}, function


def test_reads_are_found_wherever_they_stand():
    source = "def f(x):\n    if bool(x.any()):\n        return lambda: x.sum().item()\n"
    assert reads_on_host(source) == {("f", "bool"), ("f", "item")}
