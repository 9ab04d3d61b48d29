"""Sources of mixers without attention, against runs of the mixer without one token's value."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading

import pytest
import torch
from mapping_zoo import build_any, example_ids_any
from torch.overrides import TorchFunctionMode

import dla_hooks
from dla_hooks import (
    NEXT,
    DecompositionError,
    InputError,
    SourceTokens,
    UnsupportedModelError,
    direct_logit_attribution,
)
from dla_hooks.calibration import mixer_form
from dla_hooks.modules.attention_interface import why_unseen
from dla_hooks.units import source_mixers

if why_unseen() is not None:
    pytest.skip("this transformers shows no attention function", allow_module_level=True)

ANSWER, INCORRECT = 5, 7
SLOW = pytest.mark.slow
# Of each family the function that its recurrence is, the values in it, and the axis of positions.
SCANS = {
    "delta": ("torch_chunk_gated_delta_rule", "value", 1),
    "kimi": ("chunk_kimi_delta_attention", "value", 1),
    "mamba2": ("mamba2_chunk_scan", "hidden_states", 1),
    "mamba": ("mamba_selective_scan", "hidden_states", 2),
    "rwkv": ("rwkv_linear_attention", "value", 1),
}
FAMILIES = {
    "qwen3_next": "delta",
    "kimi_linear": "kimi",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "falcon_h1": "mamba2",
    "rwkv": "rwkv",
}
MORE = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), "delta"),
    "bailing_hybrid": "kimi",
    **dict.fromkeys(("falcon_mamba", "jamba", "zamba"), "mamba"),
    **dict.fromkeys(("bamba", "granitemoehybrid", "nemotron_h", "zamba2"), "mamba2"),
}
ALL = [*FAMILIES, *(pytest.param(name, marks=SLOW) for name in MORE)]
FAMILIES |= MORE


class Wide(TorchFunctionMode):
    """Lets models compute in float64 where they would in float32.

    Args:
        scales: what reciprocal roots were, to be given again in the same order; None keeps them.
    """

    def __init__(self, scales: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []
        self._scales = None if scales is None else iter(scales)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "float":
            return args[0].double()
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {
            key: torch.float64 if arg is torch.float32 else arg
            for key, arg in (kwargs or {}).items()
        }
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "rsqrt":
            self.kept.append(out)
            if self._scales is not None:
                return next(self._scales)
        return out


@contextlib.contextmanager
def replaced(kind, mixer, change):
    """The recurrence in the file of a mixer, with ``change(name of values, axis, bound)`` first."""
    name, values, axis = SCANS[kind]
    home = sys.modules[type(mixer).__module__]
    before = getattr(home, name)

    def other(*args, **kwargs):
        bound = inspect.signature(before).bind(*args, **kwargs)
        bound.arguments[values] = change(bound.arguments[values], axis)
        return before(*bound.args, **bound.kwargs)

    setattr(home, name, other)
    try:
        yield
    finally:
        setattr(home, name, before)


def without(source):
    def change(values, axis):
        values = values.clone()
        values.select(axis, source).zero_()
        return values

    return change


@torch.no_grad()
def written_by_source(model, mixer, kind, ids):
    """What each position gave to what a mixer wrote [source, batch, pos, d_model]."""
    seen = {}
    keep = mixer.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    with Wide():
        model(ids, use_cache=False)
    keep.remove()

    def run(scales=None):
        with Wide(scales) as wide:
            out = mixer(*seen["args"], **seen["kwargs"])
        return out[0] if isinstance(out, tuple) else out, wide.kept

    clean, scales = run()
    found = []
    for source in range(ids.shape[1]):
        with replaced(kind, mixer, without(source)):
            found.append(clean - run(scales)[0])
    return clean, torch.stack(found)


def dense(result):
    shape = len(result.rows), *result.attribution.shape[1:]
    found = torch.zeros(shape, dtype=torch.float64)
    values = result.attribution.double().nan_to_num().where(result.index >= 0, 0)
    found.scatter_add_(0, result.index.clamp_min(0), values)
    return {
        run.label.removesuffix("<{}"): part
        for run, part in zip(
            result.rows.runs, found.unflatten(0, (-1, result.rows.runs[0].n)), strict=True
        )
    }


def weights(result):
    """The weight of every row [row, *batch_and_pos]."""
    found = torch.zeros(len(result.rows), *result.attribution.shape[1:], dtype=torch.float64)
    kept = result.beside["weight"].double().nan_to_num().where(result.index >= 0, 0)
    return found.scatter_add_(0, result.index.clamp_min(0), kept)


def ask(model, ids, *, pos=None, **options):
    call = {key: options.pop(key) for key in ("attention_mask", "chunk_size") if key in options}
    unit = SourceTokens(**{"top": None, **options})
    return direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=unit, pos=pos, **call)


def mixers(model):
    plan = dla_hooks.prepare(model, ANSWER, INCORRECT, unit=SourceTokens(top=None))
    return plan._data.units["source"].mixers


def assert_sums(result):
    total = result.attribution.nan_to_num().sum(0) + result.rest + result.remainder + result.bias
    torch.testing.assert_close(total, result.logit, atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
@pytest.mark.parametrize("model_type", ALL)
def test_rows_are_what_is_missing_without_the_value_of_that_token(model_type, seed):
    model = build_any(model_type, seed)
    assert_rows_are_what_is_missing(model_type, model, example_ids_any(model))


@SLOW
@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("model_type", ["qwen3_next", "kimi_linear", "mamba", "mamba2", "rwkv"])
def test_rows_of_prompts_longer_than_a_chunk_are_what_is_missing(model_type):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 50, (2, 70), generator=generator)
    assert_rows_are_what_is_missing(model_type, build_any(model_type, 0), ids)


def assert_rows_are_what_is_missing(model_type, model, ids):
    target = torch.zeros(1, dtype=torch.long)
    with Wide():
        plan = dla_hooks.prepare(
            model, ANSWER, INCORRECT, unit=("component", SourceTokens(top=None, sum="layer"))
        )
        both = plan(ids, pos=None)
    rows, parts = dense(both["source"]), both["component"]
    found = plan._data.units["source"].mixers
    assert found
    assert_sums(both["source"])
    for mixer in found:
        write = mixer.write
        clean, effects = written_by_source(model, write.module, FAMILIES[model_type], ids)
        direction = plan._data.parts.directions(write.label).of(target)[0]
        scale = (clean @ direction) / parts[write.label]  # the final norm's
        truth = (effects @ direction) / scale
        name = f"L{write.layer}" + (f".{mixer.sub}" if mixer.sub else "")
        assert float(truth.abs().max()) > 1e-4
        torch.testing.assert_close(rows[name], truth, atol=1e-9, rtol=1e-7)
        assert bool((rows[name][1:, :, 0] == 0).all())  # nobody reads what comes later


@pytest.mark.parametrize("model_type", ALL)
def test_sums_over_layers_and_over_all_are_reductions_of_rows(model_type):
    model = build_any(model_type, 0)
    ids = example_ids_any(model)
    each, layers, all_ = (dense(ask(model, ids, sum=sum)) for sum in (None, "layer", "heads"))
    for name, rows in layers.items():
        own = [of for label, of in each.items() if label.partition("H")[0] == name]
        torch.testing.assert_close(rows, torch.stack(own).sum(0), atol=1e-9, rtol=1e-6)
    whole = torch.stack(list(each.values())).sum(0)
    torch.testing.assert_close(all_[""], whole, atol=1e-9, rtol=1e-6)


def test_weights_beside_rows_are_what_values_are_multiplied_by():
    model = build_any("kimi_linear", 0)
    ids, seen = example_ids_any(model), []
    mixer = mixers(model)[0].write.module
    with replaced("kimi", mixer, lambda values, axis: seen.append(values) or values):
        keep = mixer.o_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model(ids)
        keep.remove()
    v, y = seen[:2]  # [batch, pos, head, d]
    result = ask(model, ids, layers=[0])
    w = weights(result).unflatten(0, (v.shape[2], -1))  # [head, source, batch, pos]
    torch.testing.assert_close(torch.einsum("hsbt,bshd->bthd", w, v), y.view_as(v), **CLOSE)


CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2", "kimi_linear", "rwkv"])
def test_kept_rows_are_the_strongest(model_type):
    model = build_any(model_type, 0)
    ids = example_ids_any(model)
    kept, whole = ask(model, ids, top=3), ask(model, ids)
    strongest = whole.attribution.nan_to_num().abs().sort(0, descending=True).values[:3]
    torch.testing.assert_close(kept.attribution.nan_to_num().abs(), strongest, atol=1e-9, rtol=0)
    assert_sums(kept)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba", "mamba2", "falcon_h1"])
def test_padding_changes_no_row(model_type, left):
    model = build_any(model_type, 0)
    ids = example_ids_any(model)[:1]
    alone = dense(ask(model, ids))
    pad = torch.full((1, 3), 9)
    padded = torch.cat((pad, ids) if left else (ids, pad), 1)
    mask = torch.cat([(x != 9 if x is pad else torch.ones_like(x)).long()
                      for x in ((pad, ids) if left else (ids, pad))], 1)  # fmt: skip
    try:
        found = dense(ask(model, padded, attention_mask=mask))
    except (UnsupportedModelError, InputError):
        pytest.skip("this model is not run on padding of this side")
    for name, rows in alone.items():
        there = slice(3, None) if left else slice(0, ids.shape[1])
        n = ids.shape[1]
        torch.testing.assert_close(found[name][:n, :, there], rows, atol=1e-6, rtol=1e-4)


def test_targets_of_their_own_at_each_position():
    model = build_any("qwen3_next", 0)
    ids = example_ids_any(model)
    unit = SourceTokens(top=None, layers=[0])
    own = direct_logit_attribution(model, ids, NEXT, unit=unit, pos=None)
    for place in range(ids.shape[1] - 1):
        one = direct_logit_attribution(model, ids, ids[:, place + 1], unit=unit, pos=place)
        mine, its = dense(own)["L0"][..., place], dense(one)["L0"]
        torch.testing.assert_close(mine, its.view_as(mine), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba", "mamba2", "kimi_linear"])
def test_coarse_models_are_attributed(model_type, dtype):
    model = build_any(model_type, 0)
    ids, exact = example_ids_any(model), None
    exact = dense(ask(model, ids, sum="heads"))[""]
    found = dense(ask(model.to(dtype), ids, sum="heads"))[""]
    limit = 1e-4 if dtype is torch.float32 else 0.1
    assert float((found - exact).abs().max()) <= limit * float(exact.abs().max())


def test_in_chunks_mixers_are_left_in_the_remainder():
    model = build_any("qwen3_next", 0)
    ids = example_ids_any(model)
    whole, pieces = ask(model, ids), ask(model, ids, chunk_size=3)
    assert_sums(pieces)
    for name, rows in dense(pieces).items():
        expected = dense(whole)[name] if "H" in name else torch.zeros_like(rows)
        torch.testing.assert_close(rows, expected, atol=1e-6, rtol=1e-5)


def test_weights_of_sums_are_means_over_what_was_read():
    model = build_any("qwen3_next", 0)
    ids = example_ids_any(model)
    heads = [f"L1H{head}" for head in range(4)]
    pieces = ask(model, ids, sum="heads", chunk_size=3)
    alone = ask(model, ids, sum="heads", heads=heads)
    torch.testing.assert_close(weights(pieces), weights(alone), **CLOSE)
    whole = ask(model, ids, sum="heads")
    each = weights(ask(model, ids)).unflatten(0, (-1, ids.shape[1])).mean(0)
    torch.testing.assert_close(weights(whole), each, **CLOSE)


def test_layers_choose_mixers_and_heads_leave_them_out():
    model = build_any("falcon_h1", 0)
    ids = example_ids_any(model)
    every = dense(ask(model, ids))
    one = dense(ask(model, ids, layers=[1]))
    assert set(one) == {"L1H0", "L1H1", "L1H2", "L1H3", "L1.1"}
    assert set(dense(ask(model, ids, heads=["L1H2"]))) == {"L1H2"}
    for name, rows in one.items():
        torch.testing.assert_close(rows, every[name], atol=1e-9, rtol=1e-9)
    record = ask(model, ids, layers=[1], pos=-1).records()
    assert {(r["kind"], r["sub"]) for r in record if r["label"].startswith("L1.1<")} == {
        ("layer", 1)
    }


def test_a_mixer_with_hooks_inside_is_left_in_the_remainder():
    model = build_any("qwen3_next", 0)
    ids = example_ids_any(model)
    clean = dense(ask(model, ids))
    inside = mixers(model)[0].write.module.norm
    handle = inside.register_forward_hook(lambda module, args, out: out * 2)
    try:
        hooked = ask(model, ids)
    finally:
        handle.remove()
    assert_sums(hooked)
    assert float(dense(hooked)["L0"].abs().max()) == 0
    assert float(dense(hooked)["L2"].abs().max()) > 0
    assert float(clean["L0"].abs().max()) > 0


class TestWhatCannotBeSplit:
    def bent(self, monkeypatch, change):
        model = build_any("mamba2", 0)
        home = sys.modules[type(mixers(build_any("mamba2", 1))[0].write.module).__module__]
        before = home.mamba2_chunk_scan

        def scan(hidden_states, *args, **kwargs):
            return change(before, hidden_states, *args, **kwargs)

        scan.__signature__ = inspect.signature(before)
        monkeypatch.setattr(home, "mamba2_chunk_scan", scan)
        return model

    def test_a_recurrence_that_is_not_linear_is_refused_by_name(self, monkeypatch):
        model = self.bent(monkeypatch, lambda scan, v, *args, **more: scan(v.tanh(), *args, **more))
        with pytest.raises(UnsupportedModelError, match=r"layers\.0.*not linear in its values"):
            dla_hooks.prepare(model, ANSWER, unit=SourceTokens(layers=[0]))

    def test_a_recurrence_with_a_constant_is_refused_by_name(self, monkeypatch):
        model = self.bent(monkeypatch, lambda scan, *args, **more: scan(*args, **more) + 1)
        with pytest.raises(UnsupportedModelError, match="not linear in its values"):
            dla_hooks.prepare(model, ANSWER, unit=SourceTokens(layers=[0]))

    def test_what_is_added_behind_the_recurrence_is_refused_by_name(self, monkeypatch):
        model = build_any("mamba2", 0)
        norm = type(model.backbone.layers[0].mixer.norm)
        before = norm.forward
        monkeypatch.setattr(norm, "forward", lambda self, x, gate: before(self, x, gate) + gate)
        with pytest.raises(UnsupportedModelError, match="something else than a gate or a norm"):
            dla_hooks.prepare(model, ANSWER, unit=SourceTokens(layers=[0]))

    @pytest.mark.parametrize("model_type", ["recurrent_gemma", "lfm2"])
    def test_mixers_without_a_known_recurrence_stay_in_the_remainder(self, model_type):
        model = build_any(model_type, 0)
        assert not mixers(model)
        with pytest.raises(InputError, match="layer 0"):
            dla_hooks.prepare(model, ANSWER, unit=SourceTokens(layers=[0]))

    def test_models_with_neither_are_refused(self):
        with pytest.raises(UnsupportedModelError, match="no attention heads"):
            dla_hooks.prepare(build_any("xlstm", 0), ANSWER, unit="source")


class TestABrokenMechanismIsRefused:
    @pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "rwkv"])
    def test_without_the_gate(self, monkeypatch, name):
        model = build_any(name, 0)
        monkeypatch.setattr(mixer_form, "_is_scaled", lambda *args: False)
        with pytest.raises(DecompositionError, match="the tokens that"):
            ask(model, example_ids_any(model))

    def test_without_what_one_token_gave(self, monkeypatch):
        model, whole = build_any("mamba", 0), source_mixers.parts_of_output

        def less(*args):
            parts, weights = whole(*args)
            parts[..., 1] = 0
            return parts, weights

        ids = example_ids_any(model)
        mixers(model)
        monkeypatch.setattr(source_mixers, "parts_of_output", less)
        with pytest.raises(DecompositionError, match="the tokens that"):
            ask(model, ids)


class TestTheModelAsFound:
    def scan(self, model):
        return sys.modules[type(mixers(model)[0].write.module).__module__].mamba_selective_scan

    def test_after_a_call(self):
        model = build_any("mamba", 0)
        before, ids = self.scan(model), example_ids_any(model)
        with torch.no_grad():
            logits = model(ids).logits
            ask(model, ids)
            assert torch.equal(model(ids).logits, logits)
        assert self.scan(model) is before
        assert all(p.grad is None for p in model.parameters())

    def test_after_an_exception_in_the_model(self):
        model = build_any("mamba", 0)
        before, ids = self.scan(model), example_ids_any(model)

        def fail(module, args):
            raise RuntimeError("stop here")

        handle = model.backbone.layers[2].mixer.out_proj.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            ask(model, ids)
        handle.remove()
        assert self.scan(model) is before

    def test_under_inference_mode(self):
        model = build_any("mamba2", 0)
        ids = example_ids_any(model)
        expected = dense(ask(model, ids))
        with torch.inference_mode():
            found = dense(ask(model, ids))
        for name, rows in expected.items():
            assert torch.equal(found[name], rows)

    def test_with_two_threads(self):
        models = [build_any("mamba2", seed) for seed in (0, 1)]
        ids = example_ids_any(models[0])
        expected, found = [dense(ask(model, ids)) for model in models], [None, None]

        def run(number):
            for _ in range(3):
                found[number] = dense(ask(models[number], ids))

        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for mine, its in zip(found, expected, strict=True):
            assert all(torch.equal(mine[name], its[name]) for name in its)


def test_under_autocast_mixers_are_left_in_the_remainder():
    model = build_any("qwen3_next", 0).float()
    ids = example_ids_any(model)
    ask(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Its logits are rounded to 16 bits, and so are not held against anything here.
        unit = SourceTokens(top=None)
        found = dense(direct_logit_attribution(model, ids, ANSWER, unit=unit, check=False))
    assert float(found["L0"].abs().max()) == 0
    assert float(found["L1H0"].abs().max()) > 0


def test_generated_text_leaves_mixers_in_the_remainder():
    model = build_any("qwen3_next", 0)
    ids = example_ids_any(model)[:1]
    found = dla_hooks.attribute_generation(
        model, ids, unit=SourceTokens(top=None), max_new_tokens=2, eos_token_id=None
    )
    total = found.attribution.nan_to_num().sum(0) + found.rest + found.remainder + found.bias
    torch.testing.assert_close(total, found.logit, atol=1e-6, rtol=0)
    taken = {row["label"].partition("<")[0] for row in found.records() if row["source"] is not None}
    assert taken == {"L1H0", "L1H1", "L1H2", "L1H3"}
