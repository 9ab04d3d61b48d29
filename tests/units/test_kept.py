"""What a plan keeps for its next call, what hooks read at once, and what waits until it is read."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from units import UNIT_NAMES
from zoo import build, example_ids

import dla_hooks
from dla_hooks import DecompositionError, direct_logit_attribution, prepare
from dla_hooks.projection.one_column import OneColumn
from dla_hooks.results.seen import Seen
from dla_hooks.units.plan import Recording

SPECS = ["gpt2", "llama", "gemma2", "gpt_neox-parallel", "olmo2-bias-tied"]


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def attention_of(block):
    return next(getattr(block, n) for n in ("attn", "self_attn", "attention") if hasattr(block, n))


@contextmanager
def hooked(module, change):
    """A hook that changes the hidden states that leave a module."""

    def hook(_, __, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def tensors_of(result):
    """Every number of a result, copied."""
    seen = result.seen
    found = [result.attribution, result.bias, result.logit, seen.rank, seen.log_probability]
    return [one.clone() for one in (*found, seen.top_ids, seen.top_probability)]


def assert_same(found, expected, exactly=True):
    assert found.labels == expected.labels
    for own, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
        bounds = {"rtol": 0, "atol": 0} if exactly else {}
        torch.testing.assert_close(own, theirs, equal_nan=True, **bounds)


class TestNextCall:
    @pytest.mark.parametrize("unit", ["head", "component", "layer"])
    @pytest.mark.parametrize("spec", SPECS)
    def test_a_plan_gives_what_a_call_gives_whatever_it_was_asked_before(self, spec, unit):
        model, ids = build(spec), example_ids(spec)
        plan, block = prepare(model, 5, 7, unit=unit), blocks_of(model)[0]

        def check(*args, **more):
            assert_same(
                plan(*args, **more), direct_logit_attribution(model, *args, 5, 7, unit=unit, **more)
            )

        check(ids[:1])
        check(ids[1:])
        with hooked(block, lambda out: 1.5 * out):
            check(ids[1:])
        check(ids[1:])
        check(ids)
        check(ids[:1], pos=[1, -1])
        check(ids.flip(0))
        with hooked(attention_of(block), lambda out: -out):
            check(ids)
        check(ids, pos=None)
        check(ids[:, 1:])
        with torch.no_grad():
            attention_of(block).register_buffer("unused", torch.zeros(1))
            next(attention_of(block).parameters()).mul_(1.1)
        check(ids[:, 1:])

    @pytest.mark.parametrize("spec", ["gpt2", "gpt_neox-parallel", "bloom"])
    def test_what_is_taken_off_the_heads_is_counted_once(self, spec, monkeypatch):
        model, ids = build(spec), example_ids(spec)
        unit = dla_hooks.Heads(fold_value_biases=True)
        plan, prompts = prepare(model, 5, unit=unit), (ids, ids.flip(0), ids)
        due = [direct_logit_attribution(model, one, 5, unit=unit) for one in prompts]
        finish, runs = Recording.finish, []
        monkeypatch.setattr(Recording, "finish", lambda own: runs.append(1) or finish(own))
        for one, expected in zip(prompts, due, strict=True):
            assert_same(plan(one), expected)
        assert len(runs) == len(prompts)  # a check that failed would have run each once more

    @pytest.mark.parametrize("unit", ["head", "component"])
    @pytest.mark.parametrize("spec", SPECS)
    def test_results_stay_as_they_are(self, spec, unit):
        model, ids = build(spec), example_ids(spec)
        plan = prepare(model, 5, unit=unit)
        results = [plan(prompt[None]) for prompt in ids]
        due = [tensors_of(one) for one in results]
        for prompt in ids.flip(0):
            for number in plan(prompt[None]).attribution:
                number.fill_(77)
        for one, numbers in zip(results, due, strict=True):
            for own, theirs in zip(tensors_of(one), numbers, strict=True):
                assert torch.equal(own, theirs)

    def test_threads_share_a_plan(self):
        model, ids = build("gpt2"), example_ids("gpt2", batch=4)
        plan = prepare(model, 5, unit="head")
        due = [direct_logit_attribution(model, row[None], 5, unit="head") for row in ids]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: plan(ids[n % 4][None]), range(40)))
        for n, one in enumerate(found):
            assert_same(one, due[n % 4])

    def test_a_run_that_fails_leaves_nothing_behind(self, monkeypatch):
        model, ids = build("gpt2"), example_ids("gpt2")[:1]
        plan, addmm, calls = prepare(model, 5, unit="head"), torch.addmm, []
        due = plan(ids)

        def failing(*args, **kwargs):
            calls.append(1)
            return addmm(*args, **kwargs) if len(calls) < 9 else 1 / 0

        with monkeypatch.context() as patch:
            patch.setattr(torch, "addmm", failing)
            with pytest.raises(ZeroDivisionError):
                plan(ids)
        assert_same(plan(ids), due)

    @pytest.mark.parametrize("unit", ["head", "component"])
    def test_modes_of_torch_change_from_call_to_call(self, unit):
        model, ids = build("gpt2"), example_ids("gpt2")
        due = direct_logit_attribution(model, ids, 5, unit=unit)
        plan = prepare(model, 5, unit=unit)
        with torch.inference_mode():
            assert_same(plan(ids), due)
            plan(ids)
        later = plan(ids)
        with torch.inference_mode():
            assert torch.equal(later.rank, due.rank)
        later.rank.add_(1)
        with torch.enable_grad():
            assert_same(plan(ids), due)

    def test_a_plan_and_its_model_go_when_nobody_has_them(self):
        model, ids = build("gpt2"), example_ids("gpt2")[:1]
        plan = prepare(model, 5, unit="head")
        result = plan(ids)
        plan(ids)
        gone = weakref.ref(model)
        gc.collect()
        gc.disable()  # in no circle, then
        try:
            del plan, model
            assert gone() is None
        finally:
            gc.enable()
        assert int(result.rank) > 0


class TestToldByHeads:
    @pytest.mark.parametrize("spec", ["gpt2", "llama"])
    def test_untouched_attention_has_no_hook_of_ours(self, spec):
        model, ids = build(spec), example_ids(spec)
        attention, norm, found = attention_of(blocks_of(model)[0]), blocks_of(model)[1], []
        forward = norm.forward

        def counting(*args, **kwargs):
            found.append(len(attention._forward_hooks))
            return forward(*args, **kwargs)

        direct_logit_attribution(model, ids, 5, unit="head")
        norm.forward = counting
        for unit, due in (("head", 0), ("component", 1), (("head", "component"), 1)):
            direct_logit_attribution(model, ids, 5, unit=unit)
            assert found.pop() == due

    @pytest.mark.parametrize("spec", ["gpt2", "llama", "gpt_neox-parallel"])
    def test_attention_that_writes_something_else_is_refused_by_name(self, spec, monkeypatch):
        model, ids = build(spec), example_ids(spec)
        kind = type(attention_of(blocks_of(model)[0]))
        forward = kind.forward

        def halved(self, *args, **kwargs):
            out, *rest = forward(self, *args, **kwargs)
            return (out / 2, *rest)

        plan = prepare(model, 5, unit="head")
        monkeypatch.setattr(kind, "forward", halved)
        for call in (plan, lambda ids: direct_logit_attribution(model, ids, 5, unit="head")):
            with pytest.raises(DecompositionError, match="the heads in"):
                call(ids)

    @pytest.mark.parametrize("where", ["class", "instance"])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_layers_that_exchange_what_they_write_are_refused(self, when, where, monkeypatch):
        model, ids = build("llama"), example_ids("llama")
        first, second = (attention_of(block) for block in blocks_of(model)[1:3])
        other = {first: second.o_proj, second: first.o_proj}
        kind, forward = type(first), type(first).forward

        def exchanged(self, *args, **kwargs):
            if self not in other:
                return forward(self, *args, **kwargs)
            own, self.o_proj = self.o_proj, other[self]
            try:
                return forward(self, *args, **kwargs)
            finally:
                self.o_proj = own

        if when == "after":
            plan = prepare(model, 5, unit="head")
            plan(ids)
        if where == "class":
            monkeypatch.setattr(kind, "forward", exchanged)
        else:
            for one in other:
                one.forward = exchanged.__get__(one)
        if when == "before":
            plan = prepare(model, 5, unit="head")
        with pytest.raises(DecompositionError, match="the heads in"):
            plan(ids)

    @pytest.mark.parametrize("place", ["self_attn", "mlp"])
    def test_a_second_run_does_not_stand_for_the_first(self, place):
        model, ids = build("llama"), example_ids("llama")
        module, left = getattr(blocks_of(model)[1], place), []
        forward = module.forward

        def once(*args, **kwargs):
            out = forward(*args, **kwargs)
            if not left:
                return out
            left.pop()
            return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out

        due = direct_logit_attribution(model, ids, 5, unit="head")
        module.forward = once
        plan = prepare(model, 5, unit="head")
        left.append(1)
        try:
            found = plan(ids)
        except DecompositionError:
            return
        assert not torch.allclose(found.logit, due.logit)

    @pytest.mark.parametrize("spec", SPECS)
    def test_two_ways_to_split_heads_hold_in_one_run(self, spec):
        model, ids = build(spec), example_ids(spec)
        units = {fold: dla_hooks.Heads(fold_value_biases=fold) for fold in (True, False)}
        found = direct_logit_attribution(model, ids, 5, unit={str(k): v for k, v in units.items()})
        for fold, unit in units.items():
            alone = direct_logit_attribution(model, ids, 5, unit=unit)
            assert_same(found[str(fold)], alone, exactly=False)


class TestAtOnce:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("spec", [*SPECS, "gpt_neo", "gptj", "bloom", "mixtral"])
    def test_numbers_are_those_of_the_kernels(self, spec, dtype, monkeypatch):
        model, ids = build(spec, dtype=dtype), example_ids(spec)
        units = [
            unit for unit in ("component", "layer", "head") if (spec, unit) != ("mamba", "head")
        ]
        found = [direct_logit_attribution(model, ids, 5, 7, unit=unit) for unit in units]
        monkeypatch.setattr(OneColumn, "of", lambda view: None)
        for one in found:
            other = direct_logit_attribution(model, ids, 5, 7, unit=one.unit)
            assert_same(one, other, exactly=False)

    @pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12])
    def test_streams_of_any_size_reach_the_norm(self, size):
        model, ids = build("llama", dtype=torch.float32), example_ids("llama")
        norm = model.model.norm
        handle = norm.register_forward_pre_hook(lambda _, args: (size * args[0],))
        own = model(ids).logits[:, -1, 5]
        result = direct_logit_attribution(model, ids, 5, unit="component")
        handle.remove()
        torch.testing.assert_close(result.logit, own.detach(), rtol=1e-4, atol=0)

    def test_no_number_is_made_of_a_stream_that_is_none(self):
        model, ids = build("llama", dtype=torch.float32), example_ids("llama")
        model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] * torch.nan,))
        result = direct_logit_attribution(model, ids, 5, unit="head", check=False)
        assert result.attribution.isnan().all()

    def test_activations_of_another_kind_are_read_all_the_same(self):
        class Marked(torch.Tensor):
            pass

        model, ids = build("gpt2", dtype=torch.float32), example_ids("gpt2")
        due = direct_logit_attribution(model, ids, 5, unit="head")
        for block in blocks_of(model):
            forward = block.mlp.forward
            block.mlp.forward = lambda x, forward=forward: forward(x).as_subclass(Marked)
        assert_same(direct_logit_attribution(model, ids, 5, unit="head"), due, exactly=False)


class TestWaiting:
    @pytest.mark.parametrize("unit", UNIT_NAMES)
    def test_what_is_read_late_is_what_the_model_said(self, unit):
        model, ids = build("llama"), example_ids("llama")
        kept = []
        handle = model.register_forward_hook(lambda _, __, out: kept.append(out.logits))
        result = direct_logit_attribution(model, ids, 5, unit=unit)
        handle.remove()
        logits = kept[-1][:, -1].clone()
        for one in kept:
            one.zero_()  # the model's output is its caller's
        assert type(result.seen) is not Seen
        above = (logits > logits[:, 5:6]).sum(-1) + 1
        assert torch.equal(result.rank, above)
        assert type(result.seen) is Seen
        torch.testing.assert_close(result.log_probability, logits.log_softmax(-1)[:, 5])
        assert torch.equal(result.seen.top_ids.T, logits.topk(5).indices)

    @pytest.mark.parametrize(
        "how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
    )
    def test_copies_say_the_same(self, how):
        model, ids = build("gpt2"), example_ids("gpt2")
        due = direct_logit_attribution(model, ids, 5)
        assert int(due.rank[0]) > 0
        result = direct_logit_attribution(model, ids, 5)
        other = how(result)
        assert other.seen == due.seen
        assert result.seen == due.seen
        assert repr(result.seen) == repr(due.seen)
        assert not hasattr(result.seen, "nothing_of_the_kind")

    def test_threads_read_one_result(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        plan = prepare(model, 5)
        due = plan(ids).rank
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        reads = [lambda one: one.rank, lambda one: pickle.loads(pickle.dumps(one)).rank] * 2
        try:
            with ThreadPoolExecutor(4) as pool:
                for _ in range(100):
                    one = plan(ids)
                    for rank in pool.map(lambda read, one=one: read(one.seen), reads):
                        assert torch.equal(rank, due)
        finally:
            sys.setswitchinterval(interval)

    def test_what_cannot_be_read_fails_where_it_is_read(self):
        class Broken:
            broken = False

            def encode(self, *_, **__):
                return [5]

            def convert_ids_to_tokens(self, i):
                return f"{i}"

            def decode(self, _):
                if self.broken:
                    raise ValueError("no longer there")
                return ""

        model, ids, tokenizer = build("gpt2"), example_ids("gpt2"), Broken()
        result = direct_logit_attribution(model, ids, 5, tokenizer=tokenizer)
        tokenizer.broken = True
        for _ in range(40):
            direct_logit_attribution(model, ids, 5)
        with pytest.raises(ValueError, match="no longer there"):
            result.seen.names  # noqa: B018
        tokenizer.broken = False
        assert int(result.rank[0]) > 0

    def test_few_results_hold_logits(self):
        model, ids = build("gpt2"), example_ids("gpt2")
        plan = prepare(model, 5)
        results = [plan(ids) for _ in range(40)]
        assert sum(type(one.seen) is not Seen for one in results) == 16
        for one in results:
            assert one.seen == results[0].seen

    @pytest.mark.parametrize("pos", [-1, None])
    def test_a_result_that_waits_holds_no_model(self, pos):
        model, ids = build("gpt2"), example_ids("gpt2")
        result = direct_logit_attribution(model, ids, 5, unit="head", pos=pos)
        gone = [weakref.ref(module) for module in model.modules()]
        del model
        gc.collect()
        assert {one() for one in gone} == {None}
        assert len(result.rank) == len(ids)
