"""What a caller's hooks change is attributed as the caller runs it.

Every number is held against the model's own logits, with the same hooks on, and the rows against
algebra on activations that plain hooks recorded.
"""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from alter import alter_output
from oracle_families import family_of, final_norm, frozen_norm, norm_scale
from torch import nn
from units import UNIT_NAMES
from zoo import build, example_ids

import dla_hooks
from dla_hooks import DecompositionError, UnsupportedModelError, direct_logit_attribution
from dla_hooks.verification.recognise import stream_of

SPECS = ["llama-bias", "gpt2", "gemma2", "olmo2-bias-tied", "granite", "gpt_neox-parallel"]


def hidden(out):
    return out[0] if isinstance(out, tuple) else out


def with_hidden(out, x):
    return (x, *out[1:]) if isinstance(out, tuple) else x


def adds(vector, start=3):
    def hook(module, args, out):
        x = hidden(out).clone()
        x[:, start:] += vector
        return with_hidden(out, x)

    return hook


def adds_in_place(vector, start=3):
    def hook(module, args, out):
        hidden(out)[:, start:].add_(vector)

    return hook


def adds_at_input(vector, start=3):
    def hook(module, args, kwargs):
        if args and isinstance(args[0], torch.Tensor):
            x = args[0].clone()
            x[:, start:] += vector
            return (x, *args[1:]), kwargs
        x = kwargs["hidden_states"].clone()
        x[:, start:] += vector
        return args, {**kwargs, "hidden_states": x}

    return hook


def places(stream):
    """Each place by name: its module, whether a hook is on the input, and the row that it makes."""
    block, first = stream.blocks[1], stream.blocks[0]
    attention, mlp = block.writes[0], block.writes[-1]
    return {
        "block output": (block.module, False, f"{block.layer}_hook"),
        "block input": (block.module, True, f"{block.layer}_hook"),
        "first block input": (first.module, True, f"{first.layer}_hook"),
        "attention output": (attention.module, False, None),
        "mlp output": (mlp.module, False, None),
        "projection output": (attention.heads.proj, False, None),
        "norm input": (stream.final_norm.module, True, "final_hook"),
        "norm output": (stream.final_norm.module, False, "final_hook"),
        "unembedding input": (stream.unembed, True, "logit_hook"),
        "embedding output": (stream.backend.embedding(), False, "embed_hook"),
    }


def holds(model, ids, result):
    """The rows and the bias make up the model's own number, hooks and all."""
    whole = result.attribution[-1] if result.unit == "layer" else result.attribution.sum(0)
    with torch.no_grad():
        logits = model(ids).logits.double()
    if result.softcap is not None:
        logits = result.softcap * torch.atanh(logits / result.softcap)
    truth = logits[..., 5] if result.incorrect is None else logits[..., 5] - logits[..., 7]
    truth = truth if whole.ndim == 2 else truth[:, -1]
    torch.testing.assert_close((whole + result.bias).double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("place", list(places(stream_of(build("gpt2")))))
@pytest.mark.parametrize("spec", SPECS)
def test_vector_added_at_some_positions_is_attributed(spec, place, unit):
    model, ids = build(spec), example_ids(spec, batch=2, length=7)
    stream = stream_of(model)
    module, at_input, label = places(stream)[place]
    vector = torch.randn(stream.d_model, dtype=torch.float64)
    if at_input:
        module.register_forward_pre_hook(adds_at_input(vector), with_kwargs=True)
    else:
        module.register_forward_hook(adds(vector))
    for pos in (-1, None):
        result = direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=pos)
        holds(model, ids, result)
    if unit == "component" and label is not None:
        row = result.attribution[result.labels.index(label)]
        assert row[..., 3:].abs().min() > 0
        assert row[..., :3].abs().max() < 1e-12
    if unit == "head" and place in ("attention output", "projection output"):
        assert "L1hook" in result.labels


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["gemma", "granite", "opt", "gpt2"])
def test_hook_on_embeddings_has_what_it_adds_to_them(name, seed):
    model, ids = build(name, seed=seed), example_ids(name)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: 3 * out)
    result = direct_logit_attribution(model, ids, 5, pos=None)
    holds(model, ids, result)
    torch.testing.assert_close(result["embed_hook"], 2 * result["embed"], rtol=1e-5, atol=1e-7)


def test_hook_on_embeddings_before_a_norm_is_within_embed():
    model, ids = build("bloom"), example_ids("bloom")
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.abs())
    result = direct_logit_attribution(model, ids, 5)
    assert "embed_hook" not in result.labels
    holds(model, ids, result)


@pytest.mark.parametrize("spec", SPECS)
def test_in_place_hook_is_told_from_the_block(spec):
    model, ids = build(spec), example_ids(spec)
    vector = torch.randn(stream_of(model).d_model, dtype=torch.float64)
    copies, in_place = (build(spec) for _ in range(2))
    stream_of(copies).blocks[1].module.register_forward_hook(adds(vector))
    stream_of(in_place).blocks[1].module.register_forward_hook(adds_in_place(vector))
    expected, found = (
        direct_logit_attribution(m, ids, 5, pos=None).attribution for m in (copies, in_place)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("spec", SPECS)
def test_patched_activation_is_attributed(spec):
    """A stream of another prompt is put in at one position."""
    model, ids = build(spec), example_ids(spec, batch=1, length=7)
    other = (ids + 1) % 11
    block = stream_of(model).blocks[0].module
    kept = []
    handle = block.register_forward_hook(lambda m, a, out: kept.append(hidden(out).clone()))
    with torch.no_grad():
        model(other)
    handle.remove()

    def patch(module, args, out):
        x = hidden(out).clone()
        x[:, 4] = kept[0][:, 4]
        return with_hidden(out, x)

    block.register_forward_hook(patch)
    for unit in UNIT_NAMES:
        holds(model, ids, direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=None))


def test_hook_that_takes_itself_off_is_spent_on_the_callers_run():
    model, ids = build("llama"), example_ids("llama")
    clean = direct_logit_attribution(model, ids, 5)

    def once(module, args, out):
        handle.remove()
        return torch.zeros_like(out)

    handle = model.model.layers[1].mlp.register_forward_hook(once)
    changed = direct_logit_attribution(model, ids, 5)
    assert not changed.attribution[changed.labels.index("1_mlp_out")].any()
    assert torch.equal(direct_logit_attribution(model, ids, 5).attribution, clean.attribution)


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_recording_hook_sees_the_callers_run_alone(unit):
    model, ids = build("llama-bias"), example_ids("llama-bias")
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape)))
    direct_logit_attribution(model, ids, 5, unit=unit, fold_value_biases=True)
    assert seen == [(*ids.shape, model.config.hidden_size)]


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_new_hook_costs_no_further_run(unit):
    model, ids = build("llama"), example_ids("llama")
    runs = []
    alter_output(model.get_input_embeddings(), lambda out: runs.append(1) or out)
    direct_logit_attribution(model, ids, 5, unit=unit)
    runs.clear()
    model.model.layers[1].register_forward_hook(adds(1.0))
    direct_logit_attribution(model, ids, 5, unit=unit)
    assert len(runs) == 1


def test_plan_follows_hooks_that_come_and_go():
    model, ids = build("llama"), example_ids("llama")
    plan = dla_hooks.prepare(model, 5, unit=("component", "head"))
    before = plan(ids)["component"].attribution
    handle = model.model.layers[1].register_forward_hook(adds(1.0))
    steered = plan(ids)
    assert "1_hook" in steered["component"].labels
    for result in steered.values():
        holds(model, ids, result)
    handle.remove()
    assert torch.equal(plan(ids)["component"].attribution, before)


def test_hooks_stay_with_their_handles_and_order():
    model, ids = build("llama"), example_ids("llama")
    order = []
    layer = model.model.layers[0]
    first = layer.register_forward_hook(lambda *_: order.append("first"))
    layer.register_forward_hook(lambda *_: order.append("second"), always_call=True)
    tables = dict(layer._forward_hooks)
    direct_logit_attribution(model, ids, 5)
    assert dict(layer._forward_hooks) == tables
    assert order == ["first", "second"]
    first.remove()
    direct_logit_attribution(model, ids, 5)
    assert order == ["first", "second", "second"]


def test_synthetic_run_in_one_thread_leaves_hooks_to_another():
    """The first call of one thread measures the model while another thread runs it, hooks on."""
    for _ in range(3):
        model, ids = build("llama"), example_ids("llama")
        vector = torch.randn(model.config.hidden_size, dtype=torch.float64)
        model.model.layers[0].register_forward_hook(adds(vector))
        with torch.no_grad():
            expected = model(ids).logits
        found, errors = [], []

        def attribute(model=model, ids=ids, errors=errors):
            try:
                holds(model, ids, direct_logit_attribution(model, ids, 5))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=attribute) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with torch.no_grad():
                found.append(model(ids).logits)
        assert not errors
        assert all(torch.equal(logits, expected) for logits in found)


def test_hook_that_the_model_needs_stays_on():
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    model.lm_head.double()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    result = direct_logit_attribution(model, ids, 5)
    with torch.no_grad():
        truth = model(ids).logits[:, -1, 5]
    torch.testing.assert_close(result.logit, truth.to(result.logit), rtol=0, atol=1e-5)


def test_model_that_does_not_run_without_its_hook_is_refused_with_the_reason():
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    model.lm_head.double()

    def cast(module, args):
        assert args[0].shape[0] == len(ids)
        return (args[0].double(),)

    model.lm_head.register_forward_pre_hook(cast)
    with pytest.raises(UnsupportedModelError, match=r"With your hooks \(lm_head has one\)"):
        direct_logit_attribution(model, ids, 5)


def test_arguments_bound_to_forward_belong_to_the_prompt():
    model, ids = build("llama"), example_ids("llama", batch=1, length=7)
    positions = torch.arange(3, 10)[None]
    model.forward = functools.partial(model.forward, position_ids=positions)
    holds(model, ids, direct_logit_attribution(model, ids, 5, 7))


def test_global_hook_is_refused():
    model, ids = build("llama"), example_ids("llama")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedModelError, match="global module hook"):
            direct_logit_attribution(model, ids, 5)
    finally:
        handle.remove()


def test_bias_on_the_logits_is_a_row():
    model, ids = build("llama"), example_ids("llama")
    bias = torch.linspace(-1, 1, model.config.vocab_size, dtype=torch.float64)
    model.lm_head.register_forward_hook(lambda m, a, out: out + bias)
    result = direct_logit_attribution(model, ids, 5, 7, pos=None)
    row = result.attribution[result.labels.index("logit_hook")]
    torch.testing.assert_close(row, (bias[5] - bias[7]).expand_as(row))
    holds(model, ids, result)


@pytest.mark.parametrize("spec", ["llama", "gpt2"])
def test_forward_behind_the_stream_that_changes_one_position_is_refused(spec):
    """No row shows what a replaced forward does; the check looks at every position."""
    model, ids = build(spec), example_ids(spec, batch=2, length=40)
    decoder = model.base_model
    forward = decoder.forward

    def halved(*args, **kwargs):
        out = forward(*args, **kwargs)
        if out.last_hidden_state.shape[1] > 5:
            out.last_hidden_state[:, 5] *= 0.5
        return out

    decoder.forward = halved
    plan = dla_hooks.prepare(model, 7)
    for pos in (None, slice(0, 30)):
        with pytest.raises(dla_hooks.DecompositionError):
            plan(ids, pos=pos)


def changes_output(name, change):
    """A hook that changes a tensor of the output in place, puts another there, or changes none."""

    def hook(module, args, out):
        if change == "nothing":
            return None
        x = getattr(out, name)
        if change == "in place":
            x[:, 3:].mul_(0.5).add_(0.3)
            return None
        x = x.clone()
        x[:, 2] += torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
        return type(out)(**{**out, name: x})

    return hook


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("change", ["in place", "another", "nothing"])
@pytest.mark.parametrize("place", ["model", "decoder"])
@pytest.mark.parametrize(
    "spec", ["llama-bias", "gpt2", "gemma2-no-caps", "granite", "bloom", "opt"]
)
def test_hook_on_the_output_of_the_model_or_decoder_is_a_row(spec, place, change, seed):
    model, ids = build(spec, seed=seed), example_ids(spec, batch=2, length=7)
    plan = dla_hooks.prepare(model, 5, 7, unit=tuple(UNIT_NAMES))
    clean = plan(ids, pos=None)
    inner = getattr(model.base_model, "decoder", model.base_model)  # OPT goes past its own
    module, name, label = {
        "model": (model, "logits", "logit_hook"),
        "decoder": (inner, "last_hidden_state", "final_hook"),
    }[place]
    module.register_forward_hook(changes_output(name, change))
    for pos in (None, 3, slice(2, 5)):
        for result in plan(ids, pos=pos).values():
            whole = result.attribution[-1] if result.unit == "layer" else result.attribution.sum(0)
            with torch.no_grad():
                logits = model(ids).logits.double()
            due = (logits[..., 5] - logits[..., 7])[:, pos if pos is not None else slice(None)]
            torch.testing.assert_close((whole + result.bias).double(), due, rtol=0, atol=1e-5)
    found, before = plan(ids, pos=None)["component"], clean["component"]
    assert (label in found.labels) == (change != "nothing")
    if change != "nothing":
        moved = (found.logit - before.logit).double()
        torch.testing.assert_close(found[label].double(), moved, rtol=1e-5, atol=1e-6)
        assert found[label][:, 3 if change == "in place" else 2].abs().min() > 0


def test_hook_on_capped_logits_is_refused_where_it_changes_them():
    """Behind a cap nothing adds up."""
    model, ids = build("gemma2"), example_ids("gemma2")
    handle = model.register_forward_hook(changes_output("logits", "nothing"))
    holds(model, ids, direct_logit_attribution(model, ids, 5))
    handle.remove()
    model.register_forward_hook(changes_output("logits", "in place"))
    with pytest.raises(dla_hooks.DecompositionError, match="behind their cap"):
        direct_logit_attribution(model, ids, 5)


def test_hook_on_the_model_sees_all_its_logits():
    model, ids = build("llama"), example_ids("llama", batch=2, length=12)
    seen = []
    model.register_forward_hook(lambda m, a, out: seen.append(tuple(out.logits.shape)))
    result = direct_logit_attribution(model, ids, 5, 7, pos=None)
    holds(model, ids, result)
    assert seen[0][:2] == (2, 12)


def test_many_prompts_leave_hooks_to_the_prompts():
    model, ids = build("llama"), list(range(2, 14))
    seen = []

    def once(module, args, out):
        seen.append(tuple(out.shape))
        out = out.clone()
        out[:, 8] = 0
        handle.remove()
        return out

    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(once)
    with torch.no_grad():
        truth = model(torch.tensor([ids])).logits[0, -1, 7]
    handle = mlp.register_forward_hook(once)
    seen.clear()
    (result,) = dla_hooks.attribute_many(model, [ids], 7)
    torch.testing.assert_close(result.logit.squeeze(), truth, rtol=0, atol=1e-6)
    assert seen == [(1, 12, model.config.hidden_size)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spec", ["llama", "llama-mqa", "gpt2", "gpt2-odd-width", "gemma", "olmo"])
def test_parts_of_a_silenced_stream_are_divided_by_the_root_of_the_epsilon(spec, dtype):
    """A last block set to zero leaves parts that cancel, and a norm without a scale to read off."""
    model, ids = build(spec, dtype=dtype), example_ids(spec)
    norm, seen = final_norm(model), {}

    def silence(module, args, out):
        x = hidden(out).clone()
        x[:, 3:] = 0
        return with_hidden(out, x)

    stream_of(model).blocks[-1].module.register_forward_hook(silence)
    first = stream_of(model).blocks[0].module
    first.register_forward_pre_hook(lambda module, args: seen.update(embed=args[0].double()))
    result = direct_logit_attribution(model, ids, 5, 7, pos=None)
    with torch.no_grad():
        kind, x = family_of(model).norm, seen["embed"]
        scale = norm_scale(kind, norm, torch.zeros_like(x))
        zero = frozen_norm(kind, norm, torch.zeros_like(x), scale)
        effects = (frozen_norm(kind, norm, x, scale) - zero) @ model.lm_head.weight.double().T
    rows = dict(zip(result.labels, result.attribution.double(), strict=True))
    embed = rows["embed"] + rows.get("pos_embed", 0)
    due = (effects[..., 5] - effects[..., 7])[:, 3:]
    torch.testing.assert_close(embed[:, 3:], due, rtol=1e-4, atol=1e-4)


def test_heads_that_a_hook_silences_are_divided_by_the_root_of_the_post_norms_epsilon():
    model, ids = build("olmo2"), example_ids("olmo2")
    attention = model.model.layers[1].self_attn
    norm, seen = model.model.layers[1].post_attention_layernorm, {}
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(z=args[0]))
    attention.register_forward_hook(lambda m, a, out: with_hidden(out, torch.zeros_like(out[0])))
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    result = direct_logit_attribution(model, ids, 5, pos=None, unit="head")
    holds(model, ids, result)
    with torch.no_grad():
        width = seen["z"].shape[-1] // model.config.num_attention_heads
        wrote = seen["z"][..., :width] @ attention.o_proj.weight[:, :width].T
        wrote = norm.weight * wrote / norm.variance_epsilon**0.5
        final = model.model.norm
        wrote = final.weight * wrote / norm_scale("rms", final, seen["x"])
        due = wrote @ model.lm_head.weight[5]
    row = result.attribution[result.labels.index("L1H0")]
    torch.testing.assert_close(row, due, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("verb", ["decompose_resid", "logit_attrs", "apply_ln_to_stack"])
@pytest.mark.parametrize("spec", ["llama", "gpt2"])
def test_hook_on_the_unembedding_sees_all_positions_in_primitives(spec, verb):
    model, ids = build(spec), example_ids(spec, batch=2, length=7)
    stack = dla_hooks.decompose_resid(model, ids)
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape[:2])))
    if verb == "decompose_resid":
        dla_hooks.decompose_resid(model, ids)
    elif verb == "logit_attrs":
        dla_hooks.logit_attrs(model, ids, stack, 5)
    else:
        dla_hooks.apply_ln_to_stack(model, ids, stack)
    assert seen == [(2, 7)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ask", ["plan", "once", "primitive"])
def test_hook_that_acts_once_behind_a_cap_is_refused_after_other_calls(ask, seed):
    """A second run, without the hook, would add up."""
    model, ids = build("gemma2", seed=seed), example_ids("gemma2")
    plan = dla_hooks.prepare(model, 5)
    stack = dla_hooks.decompose_resid(model, ids)
    asks = {
        "plan": lambda: plan(ids),
        "once": lambda: direct_logit_attribution(model, ids, 5),
        "primitive": lambda: dla_hooks.logit_attrs(model, ids, stack, 5),
    }
    before = asks[ask]()

    def once(module, args, out):
        handle.remove()
        out.logits.mul_(0.5).add_(0.3)

    handle = model.register_forward_hook(once)
    other = model.register_forward_hook(lambda *_: None)
    with pytest.raises(dla_hooks.DecompositionError, match="has a hook of yours"):
        asks[ask]()
    other.remove()
    after = asks[ask]()
    assert torch.equal(getattr(after, "attribution", after), getattr(before, "attribution", before))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("place", ["model", "decoder"])
@pytest.mark.parametrize("spec", ["llama", "gpt2"])
def test_hook_that_acts_once_behind_the_stream_is_spent_on_the_callers_run(spec, place, seed):
    model, ids = build(spec, seed=seed), example_ids(spec)
    module, name = {
        "model": (model, "logits"),
        "decoder": (model.base_model, "last_hidden_state"),
    }[place]

    def once(module, args, out):
        handle.remove()
        getattr(out, name).mul_(0.5).add_(0.3)

    handle = module.register_forward_hook(once)
    with torch.no_grad():
        due = model(ids).logits[:, -1, 5]
        plain = model(ids).logits[:, -1, 5]
    for expected in (due, plain):
        if expected is due:
            handle = module.register_forward_hook(once)
        result = direct_logit_attribution(model, ids, 5)
        torch.testing.assert_close(result.logit, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(result.attribution.sum(0) + result.bias, expected)


def test_weight_changed_without_a_trace_beside_a_hook_is_measured_anew_by_the_next_call():
    model, ids = build("llama"), example_ids("llama")
    plan = dla_hooks.prepare(model, 5)
    model.model.layers[0].register_forward_hook(adds(1.0))
    holds(model, ids, plan(ids))
    model.model.norm.weight.data[::2].mul_(1.5)
    with pytest.raises(dla_hooks.DecompositionError, match="call again"):
        plan(ids)
    holds(model, ids, plan(ids))


@pytest.mark.parametrize("place", ["model.layers.1.self_attn.o_proj", "lm_head", "model.norm"])
@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_hook_inside_a_wrapper_sees_the_callers_run_alone(place, unit):
    """A module without a plain weight is read by running it, with whatever is inside of it."""
    model, ids = build("llama-bias"), example_ids("llama-bias")
    holder, _, name = place.rpartition(".")
    inner, seen = model.get_submodule(place), []
    setattr(model.get_submodule(holder), name, nn.Sequential(inner, nn.Identity()).eval())
    inner.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape[:2])))
    inner.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape[:2])))
    result = direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=None)
    assert seen == [tuple(ids.shape)] * 2
    holds(model, ids, result)


@pytest.mark.parametrize("place", ["model.layers.1.self_attn.o_proj", "lm_head"])
def test_hook_inside_a_wrapper_that_changes_something_is_in_no_wrong_row(place):
    model, ids = build("llama-bias"), example_ids("llama-bias")
    holder, _, name = place.rpartition(".")
    inner = model.get_submodule(place)
    setattr(model.get_submodule(holder), name, nn.Sequential(inner, nn.Identity()).eval())
    inner.register_forward_hook(adds(0.7))
    for unit in UNIT_NAMES:
        try:
            result = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
        except dla_hooks.DLAError:
            continue
        holds(model, ids, result)


@pytest.mark.parametrize("pos", [-1, None])
@pytest.mark.parametrize("at_input", [True, False])
@pytest.mark.parametrize("keep", [slice(-1, None), slice(1, None)], ids=["last", "all but first"])
@pytest.mark.parametrize("name", ["stablelm-parallel", "bloom"])
def test_hook_that_keeps_some_positions_at_the_unembedding_is_refused(name, keep, at_input, pos):
    model, ids = build(name), example_ids(name)
    if at_input:
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0][:, keep],))
    else:
        model.lm_head.register_forward_hook(lambda module, args, out: out[:, keep])
    with pytest.raises(UnsupportedModelError, match="hooks on the unembedding"):
        direct_logit_attribution(model, ids, 5, 7, pos=pos)
    assert len(model.lm_head._forward_hooks) + len(model.lm_head._forward_pre_hooks) == 1


class Louder(nn.Module):
    """A wrapper of the unembedding that names a position."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x)
        out[:, 3:4] *= 2
        return out


@pytest.mark.parametrize("pos", [3, None, -1])
@pytest.mark.parametrize("name", ["gemma2-no-caps", "llama", "gpt2-untied"])
def test_wrapped_unembedding_that_names_a_position_is_seen(name, pos):
    """It would do nothing in a run that makes the logits of the selected positions only."""
    model, ids = build(name), example_ids(name, batch=2, length=7)
    model.lm_head = Louder(model.lm_head)
    if pos == -1:
        holds(model, ids, direct_logit_attribution(model, ids, 5, pos=pos))
    else:
        with pytest.raises(dla_hooks.DecompositionError):
            direct_logit_attribution(model, ids, 5, pos=pos)


class Around(nn.Module):
    """A wrapper that the caller puts around a module, with a change of one position."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        x = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        if x.ndim == 3 and x.shape[1] > 5:
            x[:, 5] *= 0.5
        return out


@pytest.mark.parametrize("ask", ["once", "plan", "primitive"])
@pytest.mark.parametrize("place", ["lm_head", "decoder"])
@pytest.mark.parametrize("spec", ["llama", "gpt2"])
def test_wrapper_behind_the_stream_that_changes_one_position_is_refused(spec, place, ask):
    """The model makes logits at a few positions only, where such a wrapper sees others."""
    model, ids = build(spec), example_ids(spec, batch=2, length=40)
    stack = dla_hooks.decompose_resid(model, ids)
    name = "lm_head" if place == "lm_head" else model.base_model_prefix
    setattr(model, name, Around(getattr(model, name)).eval())
    asks = {
        "once": lambda pos: direct_logit_attribution(model, ids, 5, pos=pos),
        "plan": lambda pos: dla_hooks.prepare(model, 5)(ids, pos=pos),
        "primitive": lambda pos: dla_hooks.logit_attrs(model, ids, stack, 5),
    }
    for pos in (None, 5, slice(0, 30)):
        with pytest.raises(dla_hooks.DLAError):
            asks[ask](pos)


def halves_in_place(module, args):
    args[0][:, 2:].mul_(0.5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_hook_that_writes_in_place_into_what_a_norm_reads_is_refused_with_what_to_do(name):
    """It changes the stream behind the library's back; a changed copy is the norm's alone."""
    model, ids = build(name), example_ids(name)
    block = stream_of(model).blocks[1].module
    norm = next(one for one in block.children() if "Norm" in type(one).__name__)
    handle = norm.register_forward_pre_hook(halves_in_place)
    with pytest.raises(DecompositionError, match="writes in place there.*put it on the block"):
        direct_logit_attribution(model, ids, 5)
    handle.remove()
    norm.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    holds(model, ids, direct_logit_attribution(model, ids, 5, 7))
