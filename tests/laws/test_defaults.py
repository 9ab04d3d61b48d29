"""torch's defaults are the caller's: neither its default device nor its default dtype matters."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import direct_logit_attribution

ROOT = Path(__file__).parents[2]
UNITS = ("component", "layer", "head")
TEXTS = ["the cat", "the dog sat on"]

# Calls that make a tensor from nothing go to the default device unless they name one.
FACTORIES = {function.__name__ for function in _device_constructors()}
WITH_A_DEFAULT_DTYPE = {"empty", "eye", "linspace", "ones", "rand", "randn", "zeros"}

# The training script makes its model on the default device, and its batches beside it.
ON_THE_DEFAULT_DEVICE = {f"dla_hooks/demo/{name}.py" for name in ("batches", "lessons", "train")}


def factory_calls() -> Iterator[tuple[str, str, set[str | None]]]:
    """Every call of a factory in the library: where, which, and the names of its keywords."""
    for path in sorted([*(ROOT / "dla_hooks").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]):
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "torch":
                keywords = {keyword.arg for keyword in node.keywords}
                yield f"{where}:{node.lineno}", called.attr, keywords


def test_every_factory_call_names_its_device():
    found = [
        f"{where}: torch.{name}"
        for where, name, keywords in factory_calls()
        if name in FACTORIES and "device" not in keywords
    ]
    assert [one for one in found if one.partition(":")[0] not in ON_THE_DEFAULT_DEVICE] == []


def test_every_factory_call_names_its_dtype_where_the_values_do_not_say_it():
    found = [
        f"{where}: torch.{name}"
        for where, name, keywords in factory_calls()
        if name in WITH_A_DEFAULT_DTYPE and "dtype" not in keywords
    ]
    assert [one for one in found if one.partition(":")[0] not in ON_THE_DEFAULT_DEVICE] == []


def test_no_factory_is_handed_on_or_imported_by_itself():
    for path in sorted((ROOT / "dla_hooks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not FACTORIES & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Call):
                handed = [*node.args, *(keyword.value for keyword in node.keywords)]
                names = {ast.unparse(one) for one in handed if isinstance(one, ast.Attribute)}
                assert not {f"torch.{name}" for name in FACTORIES} & names, f"{path}:{node.lineno}"


@contextmanager
def default(setting):
    """torch's default device (a string) or dtype within a ``with`` block."""
    dtype = torch.get_default_dtype()
    if isinstance(setting, torch.dtype):
        torch.set_default_dtype(setting)
    else:
        torch.set_default_device(setting)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


SETTINGS = ["meta", torch.float64, torch.float16, torch.bfloat16]


def same(found, expected):
    """Results, tensors and containers of these hold the same numbers, in the same dtype."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)
    elif isinstance(expected, dla_hooks.DirectLogitAttribution):
        same(found.attribution, expected.attribution)
        same([found.bias, found.logit], [expected.bias, expected.logit])
        assert (found.labels, found.tokens) == (expected.labels, expected.tokens)
    else:
        assert found == expected


def of_one_prompt(model, ids):
    for seed in (0, 1):
        ids = example_ids_like(ids, seed)
        yield direct_logit_attribution(model, ids, 5, 7, unit=UNITS, pos=[0, -1])
        yield direct_logit_attribution(model, ids, 5, pos=None, center_unembed=True)
    yield direct_logit_attribution(
        model, ids, 5, unit=dla_hooks.Heads(fold_value_biases=True), pos=slice(1, None)
    )
    assert dla_hooks.verify(model, show=False).ok


def example_ids_like(ids, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(int(ids.max()), ids.shape, generator=generator, device="cpu")


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox-parallel", "gemma2", "granite", "opt"])
def test_numbers_under_other_defaults_are_those_under_torchs_own(name, setting):
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    fresh = copy.deepcopy(model)  # nothing has been measured of it
    expected = list(of_one_prompt(model, ids))
    with default(setting):
        try:
            model(ids, use_cache=False)
        except RuntimeError as error:  # older ones of transformers make tensors there, too
            pytest.skip(f"the model itself does not run: {error}")
        same(list(of_one_prompt(fresh, ids)), expected)


def of_padded_prompts(model, ids):
    holes = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1]], device="cpu")
    yield direct_logit_attribution(model, ids, 5, attention_mask=holes)
    yield direct_logit_attribution(model, ids, 5, attention_mask=holes.tolist(), pos=None)
    yield direct_logit_attribution(model, ids, [5, 6], chunk_size=3, pos=None)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_padding_and_chunks_under_other_defaults_are_measured_alike(name, setting):
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    fresh = copy.deepcopy(model)
    expected = list(of_padded_prompts(model, ids))
    with default(setting):
        same(list(of_padded_prompts(fresh, ids)), expected)


def of_texts(model, folder, name):
    tokenizer = tiny_tokenizer()
    plan = dla_hooks.prepare(model, 5, 6, unit="head", tokenizer=tokenizer)
    yield plan(TEXTS)
    lists = [[3, 4, 5], [6, 7]]
    yield list(dla_hooks.attribute_many(model, lists, 5, pos=None, resume=folder / name))
    again = list(dla_hooks.attribute_many(model, lists, 5, pos=None, resume=folder / name))
    yield again
    yield list(dla_hooks.attribute_many(model, TEXTS, 5, tokenizer=tokenizer, unit="layer"))
    several = list(dla_hooks.attribute_many(model, [[3, 4, 5], [6, 7]], 5))
    summary = dla_hooks.summarize(several)
    yield [summary.mean, summary.standard_error, repr(summary)]
    path = folder / f"{name}.safetensors"
    several[0].save(path)
    yield dla_hooks.load(path)
    yield several[0].records()
    yield several[0].top(2)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_sweeps_and_files_under_other_defaults_are_as_ever(setting, tmp_path):
    model = build("llama", dtype=torch.float32)
    fresh = copy.deepcopy(model)
    expected = list(of_texts(model, tmp_path, "first"))
    with default(setting):
        same(list(of_texts(fresh, tmp_path, "second")), expected)


def of_stacks(model, ids):
    yield dla_hooks.decompose_resid(model, ids, return_labels=True)
    yield dla_hooks.accumulated_resid(model, ids)
    stack = dla_hooks.stack_head_results(model, ids)
    yield stack
    yield dla_hooks.stack_neuron_results(model, ids)
    parts = dla_hooks.decompose_resid(model, ids)
    yield dla_hooks.logit_attrs(model, ids, parts, 5)
    wrapped = dla_hooks.wrap(model, tokenizer=tiny_tokenizer())
    yield wrapped(ids)
    yield wrapped.W_U
    yield wrapped.W_O
    yield wrapped.b_O
    yield wrapped.to_tokens(TEXTS)
    yield direct_logit_attribution(wrapped, ids, 5, unit=UNITS)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_stacks_and_wrappers_under_other_defaults_are_as_ever(name, setting):
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    fresh = copy.deepcopy(model)
    expected = list(of_stacks(model, ids))
    with default(setting):
        same(list(of_stacks(fresh, ids)), expected)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_demo_under_other_defaults_is_loaded_and_attributed(setting):
    model, tokenizer = dla_hooks.demo.load()
    expected = direct_logit_attribution(model, TEXTS[0], " are", " is", tokenizer=tokenizer)
    with default(setting):
        found = direct_logit_attribution(model, TEXTS[0], " are", " is", tokenizer=tokenizer)
    same(found, expected)
