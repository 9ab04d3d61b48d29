"""Effects, against models that are changed by hand and vectors that are kept whole."""

from __future__ import annotations

import contextlib
import copy
import json
import threading

import pytest
import torch
from ablations import (
    Made,
    by_hand,
    experts_of,
    head_slice,
    hooks_on,
    last_map,
    logits,
    o_proj,
    without_inputs,
    writer,
)
from mapping_zoo import build_any, example_ids_any
from oracle import last_stream, logit_parts
from oracle_families import family_of, final_norm, layer_at, n_layers, norm_scale
from zoo import build, example_ids

import dla_hooks
from dla_hooks import (
    ArgumentTypeError,
    Effects,
    Features,
    InputError,
    LabelError,
    UnsupportedModelError,
    direct_logit_attribution,
    effects,
)

A, B = 5, 7
SPECS = (
    *("gpt2", "llama-bias", "gemma2", "gemma3_text-cap", "olmo2-bias-tied", "granite-bias-tied"),
    *("gpt_neox-parallel", "cohere", "falcon-7b", "bloom", "opt", "phi", "mixtral", "qwen3_moe"),
)
SEEDS = (0, 1)


def difference(model, ids, **options):
    out = logits(model, ids, **options).double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        out = cap * torch.atanh(out / cap)
    return out[..., A] - out[..., B]


def assert_whole(found, close=1e-9):
    """The identity, entry by entry."""
    parts = found.own + found.downstream + found.read
    torch.testing.assert_close(parts, found.total, rtol=0, atol=close, equal_nan=True)


# Against the truth


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize("spec", SPECS)
def test_total_is_what_the_model_loses_without_the_part(spec, unit, seed):
    model, ids = build(spec, seed), example_ids(spec, batch=2, length=7, seed=seed)
    found = effects(model, ids, A, B, unit=unit, parts=3, pos=None)
    clean = difference(model, ids)
    direct = direct_logit_attribution(model, ids, A, B, unit=unit, pos=None)
    assert len(found) == 3
    for label in found.labels:
        if unit == "component":
            with by_hand(writer(model, label), torch.zeros_like):
                due = clean - difference(model, ids)
        else:
            layer, head = (int(number) for number in label[1:].split("H"))
            place = head_slice(model, layer, head)
            other = without_inputs(model, lambda m, at=layer: o_proj(m, at), place)
            due = clean - difference(other, ids)
        torch.testing.assert_close(found[label].total.double(), due, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[label].direct, direct[label])
    assert_whole(found, 1e-9)
    assert found.gap < 1e-8
    assert hooks_on(model) == 0


@pytest.mark.parametrize("kind", ["attn", "mlp", "head"])
@pytest.mark.parametrize("spec", ["gpt2", "llama-bias", "gemma2", "granite", "gpt_neox-parallel"])
def test_each_row_is_that_of_the_stored_vectors(spec, kind):
    """A row loses its change, read with the mean of both inverse scales; the rest is read."""
    model, ids = build(spec), example_ids(spec)
    label = "L1H1" if kind == "head" else f"1_{kind}_out"
    held = "1_attn_out" if kind == "head" else label
    found = effects(model, ids, A, B, parts=[label], pos=None)

    def run():
        norm, formula = final_norm(model), family_of(model).norm
        scale = norm_scale(formula, norm, last_stream(model, ids))[..., 0]
        parts = logit_parts(model, ids, A, B)
        return {name: own * scale for name, own in parts.items() if name != "bias"}, scale

    first, s = run()
    if kind == "head":
        place = head_slice(model, 1, 1)

        def change(x):
            x = x.clone()
            x[..., place] = 0
            return x

        with by_hand(o_proj(model, 1), change, at_input=True):
            second, t = run()
    else:
        with by_hand(writer(model, label), torch.zeros_like):
            second, t = run()
    written = {name: (first[name] - second[name]) * (1 / s + 1 / t) / 2 for name in first}
    read = sum((first[name] + second[name]) / 2 * (1 / s - 1 / t) for name in first)
    own = found[label].own
    for number, name in enumerate(found.row_labels):
        lost = found.by_row[0, number] + (own if name == held else 0)
        torch.testing.assert_close(lost.double(), written[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[label].read.double(), read, rtol=0, atol=1e-5)
    # What is set to zero has lost its direct effect, read with both scales.
    if kind != "head" or "gemma" not in spec:
        due = found[label].direct.double() * (1 + s / t) / 2
        torch.testing.assert_close(own.double(), due, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "granite", "cohere", "mixtral"])
def test_effects_are_a_comparison_with_the_ablated_run(spec):
    model, ids = build(spec), example_ids(spec)
    found = effects(model, ids, A, B, parts=["0_mlp_out", "L1H1"], pos=None)
    for number, label in enumerate(found.labels):
        other = dla_hooks.compare(
            model,
            input=ids,
            answer_tokens=A,
            incorrect_tokens=B,
            other_context=lambda label=label: dla_hooks.ablated(model, label),
            pos=None,
        )
        written = found.own[number] + found.downstream[number]
        torch.testing.assert_close(other.written.sum(0), written, rtol=0, atol=1e-9)
        torch.testing.assert_close(other.read.sum(0), found.read[number], rtol=0, atol=1e-9)
        torch.testing.assert_close(other.logit, found.total[number], rtol=0, atol=1e-9)


@pytest.mark.parametrize("ablation", ["zero", "mean", "tensor"])
@pytest.mark.parametrize(
    "part", ["neuron", "feature", "error", "expert", "shared", "write", "head"]
)
def test_parts_of_every_kind_are_taken_out(part, ablation):
    kind = {"expert": "mixtral", "shared": "deepseek_v3"}.get(part, "olmo2")
    model = build_any(kind)
    ids, last = example_ids_any(model, batch=2, length=9), model.config.num_hidden_layers - 1
    made = Made(model.config.hidden_size)
    label = {
        "neuron": "L0N5",
        "feature": "L0F3",
        "error": "0_mlp_out[error]",
        "expert": f"L{last}E1",
        "shared": f"L{last}S0",
        "write": "0_mlp_out",
        "head": "L0H1",
    }[part]
    unit = Features({"0_mlp_out": made}) if part in ("feature", "error") else None
    width = 1 if part == "neuron" else model.config.hidden_size
    if part == "head":
        place = head_slice(model, 0, 1)
        width = place.stop - place.start
    if ablation == "tensor":
        ablation = torch.linspace(-1, 1, width, dtype=torch.float64)
    found = effects(
        model, ids, A, B, unit=unit or "head", parts=[label], ablation=ablation, pos=None
    )
    options = {"input": ids} if isinstance(ablation, str) else {}
    clean = difference(model, ids)
    with dla_hooks.ablated(model, label, ablation, unit=unit, **options):
        due = clean - difference(model, ids)
    torch.testing.assert_close(found[label].total.double(), due.double(), rtol=0, atol=1e-5)
    assert_whole(found)
    # Nothing that stands before the part loses anything.
    held = f"{last if kind != 'olmo2' else 0}_{'attn' if part == 'head' else 'mlp'}_out"
    before = found.by_row[0, : found.row_labels.index(held)]
    assert float(before.abs().max()) < 1e-9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("spec", ["gpt2", "llama-bias", "granite"])
def test_mean_is_that_of_the_part_over_the_real_tokens_of_a_padded_batch(spec, seed):
    model, ids = build(spec, seed, attn="sdpa"), example_ids(spec, batch=3, length=8, seed=seed)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :5] = 0
    options = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
    }
    found = effects(
        model, ids, A, B, parts=["1_mlp_out"], ablation="mean", attention_mask=mask, pos=None
    )
    seen = []
    with by_hand(writer(model, "1_mlp_out"), lambda x: seen.append(x.detach()) or x):
        clean = difference(model, ids, **options)
    mean = seen[0][mask.bool()].mean(0)
    with by_hand(writer(model, "1_mlp_out"), lambda x: mean.expand_as(x)):
        due = clean - difference(model, ids, **options)
    real = mask.bool()
    torch.testing.assert_close(found.total[0][real].double(), due[real], rtol=0, atol=1e-5)
    assert found.total[0][~real].isnan().all()
    assert len(found.records()) == int(mask.sum())
    assert {line["position"] for line in found.records() if line["row"] == 2} == {0, 1, 2}
    assert_whole(found)


def test_largest_direct_effects_are_taken_out():
    model, ids = build("llama-bias"), example_ids("llama-bias")
    for unit, options in [
        ("component", {}),
        ("head", {}),
        ("neuron", {}),
        ("neuron", {"pos": None}),
    ]:
        of = dla_hooks.Neurons(top=None) if unit == "neuron" else unit
        result = direct_logit_attribution(model, ids, A, B, unit=of, **options)
        means = dict(result.top(10**6))
        known = [x for x in means if x not in ("embed", "pos_embed", "remainder")]
        due = sorted(known, key=lambda label: -abs(means[label]))[:4]
        found = effects(model, ids, A, B, unit=unit, parts=4, **options)
        assert found.labels == due
        assert found.unit == unit
        assert_whole(found)
        for label in due:
            torch.testing.assert_close(found[label].direct, result[label])


def test_model_that_repairs_itself_is_shown():
    """The direct effect of a head is large, and the model hardly misses it."""
    model, tokenizer = dla_hooks.demo.load()
    prompt = "The keys near the cabinet"
    found = effects(model, prompt, " are", " is", parts=24, tokenizer=tokenizer)
    label = next(label for label in found.made_up if abs(float(found[label].direct)) > 0.3)
    one = found[label]
    assert abs(float(one.own + one.downstream)) < 0.5 * abs(float(one.own))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    are, iss = (tokenizer(word).input_ids[-1] for word in (" are", " is"))
    layer, head = map(int, label[1:].split("H"))
    place = head_slice(model, layer, head)
    other = without_inputs(model, lambda m: o_proj(m, layer), place)
    due = logits(model, ids)[:, -1] - logits(other, ids)[:, -1]
    torch.testing.assert_close(one.total, due[:, are] - due[:, iss], rtol=0, atol=1e-4)
    rows = found.downstream_rows(label)
    assert abs(sum(value for _, value in rows) - float(one.downstream)) < 1e-4
    assert rows[0][1] * float(one.own) < 0
    assert (
        abs(sum(v for _, v in found.downstream_rows(label, unit="head")) - float(one.downstream))
        < 1e-4
    )
    assert "make up for at least half of what is lost: " in repr(found)


@pytest.mark.parametrize("spec", ["gpt2", "gemma2-no-caps", "granite"])
def test_hooks_of_the_callers_own_are_in_both_runs(spec):
    model, ids = build(spec), example_ids(spec)
    vector = torch.randn(model.config.hidden_size, dtype=torch.float64)
    model.lm_head.register_forward_hook(lambda m, a, out: out * 1.5)
    final_norm(model).register_forward_hook(lambda m, a, out: out + vector)
    final_norm(model).register_forward_pre_hook(lambda m, args: (args[0] + vector,))
    before = hooks_on(model)
    found = effects(model, ids, A, B, parts=["0_mlp_out", "L1H1"], pos=None)
    clean = difference(model, ids)
    with by_hand(writer(model, "0_mlp_out"), torch.zeros_like):
        due = clean - difference(model, ids)
    torch.testing.assert_close(found["0_mlp_out"].total.double(), due, rtol=0, atol=1e-5)
    assert_whole(found)
    assert hooks_on(model) == before


def test_different_answers_by_position_have_their_own_effects():
    model, ids = build("gpt2"), example_ids("gpt2", batch=2, length=6)
    answers = torch.randint(0, 60, (2, 6))
    found = effects(model, ids, answers, parts=["L0H1"], pos=None)
    other = without_inputs(model, lambda m: o_proj(m, 0), head_slice(model, 0, 1))
    due = (logits(model, ids) - logits(other, ids)).gather(-1, answers[..., None])[..., 0]
    torch.testing.assert_close(found["L0H1"].total, due, rtol=0, atol=1e-5)
    assert_whole(found)


@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "granite-bias-tied"])
def test_effects_on_a_direction_are_those_on_the_stream_there(spec):
    model, ids = build(spec), example_ids(spec)
    last = n_layers(model) - 1
    vector = torch.randn(model.config.hidden_size, dtype=torch.float64)
    target, seen = dla_hooks.Direction(vector, at=f"{last}_pre"), []

    def keep(_, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).detach() @ vector)

    handle = layer_at(model, last).register_forward_pre_hook(keep, with_kwargs=True)
    found = effects(model, ids, target, parts=["0_mlp_out", "L0H1"], pos=None)
    seen.clear()
    logits(model, ids)
    with by_hand(writer(model, "0_mlp_out"), torch.zeros_like):
        logits(model, ids)
    handle.remove()
    torch.testing.assert_close(found["0_mlp_out"].total.double(), seen[0] - seen[1])
    assert float(found.read.abs().max()) == 0  # nothing scales the stream there
    assert_whole(found)
    with pytest.raises(LabelError):
        effects(model, ids, target, parts=[f"{last}_mlp_out"])


def test_effects_on_a_routers_logit_are_those_on_its_output():
    model, ids = build("mixtral"), example_ids("mixtral", batch=2, length=6)
    router, seen = model.model.layers[1].mlp.gate, []
    target = dla_hooks.Output("model.layers.1.mlp.gate", 2)
    found = effects(model, ids, target, parts=["0_mlp_out", "L0E1", "L1H0"], pos=None)
    norm = model.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_hook(
        lambda m, a, out: seen.append((out @ router.weight[2]).detach().reshape(ids.shape))
    )
    logits(model, ids)
    with by_hand(writer(model, "0_mlp_out"), torch.zeros_like):
        logits(model, ids)
    handle.remove()
    torch.testing.assert_close(
        found["0_mlp_out"].total.double(), seen[0] - seen[1], rtol=0, atol=1e-5
    )
    assert_whole(found)


def test_float32_holds_to_rounding():
    model, ids = build("llama-bias", dtype=torch.float32), example_ids("llama-bias")
    found = effects(model, ids, A, B, parts=5)
    assert found.total.dtype == torch.float32
    assert found.gap < 1e-4
    assert_whole(found, 1e-4)


# Runs


def test_model_runs_once_and_once_for_each_part():
    model, ids = build("llama"), example_ids("llama")
    for ablation, unit, due in [("zero", "head", 4), ("mean", "head", 5), ("zero", "component", 4)]:
        effects(model, ids, A, B, unit=unit, parts=3, ablation=ablation)  # measures the model
        runs = []
        with counted(model, runs):
            effects(model, ids, A, B, unit=unit, parts=3, ablation=ablation)
        assert len(runs) == due


@contextlib.contextmanager
def counted(model, runs):
    """Count the model's runs by a hook that is the model's own, as far as anyone can tell."""
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_nothing_is_left_behind_when_one_of_the_runs_fails(nth):
    model, ids = build("llama"), example_ids("llama")
    effects(model, ids, A, B, parts=1)
    seen = []

    def fail(module, args):
        seen.append(1)
        if len(seen) == nth:
            raise RuntimeError("mine")

    model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        effects(model, ids, A, B, parts=["1_mlp_out", "L0H1"])
    assert hooks_on(model) == 1


def test_two_threads_do_not_disturb_each_other():
    model, ids = build("gpt2"), example_ids("gpt2")
    due = {
        unit: effects(model, ids, A, B, unit=unit, parts=3).total for unit in ("component", "head")
    }
    clean, wrong = logits(model, ids), []

    def ask(unit):
        for _ in range(3):
            found = effects(model, ids, A, B, unit=unit, parts=3).total
            if not torch.equal(found, due[unit]):
                wrong.append(unit)

    def run():
        for _ in range(30):
            if not torch.equal(logits(model, ids), clean):
                wrong.append("plain")

    threads = [threading.Thread(target=ask, args=(unit,)) for unit in due]
    threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert hooks_on(model) == 0


def test_weight_that_was_changed_without_a_trace_is_measured_anew():
    model, ids = build("llama"), example_ids("llama")
    effects(model, ids, A, B, parts=2)
    model.model.norm.weight.data.mul_(1.7)
    found = effects(model, ids, A, B, parts=["0_mlp_out"])
    clean = difference(model, ids)[:, -1]
    with by_hand(writer(model, "0_mlp_out"), torch.zeros_like):
        due = clean - difference(model, ids)[:, -1]
    torch.testing.assert_close(found["0_mlp_out"].total.double(), due, rtol=0, atol=1e-5)


def test_prompt_in_chunks_has_the_same_effects():
    model, ids = build("llama-bias", attn="sdpa"), example_ids("llama-bias", batch=1, length=12)
    whole = effects(model, ids, A, B, parts=3, ablation="mean")
    pieces = effects(model, ids, A, B, parts=3, ablation="mean", chunk_size=5)
    assert whole.labels == pieces.labels
    torch.testing.assert_close(whole.total, pieces.total, rtol=0, atol=1e-6)


# The result


@pytest.fixture(scope="module")
def some():
    model = build("llama-bias")
    return effects(model, example_ids("llama-bias", batch=2, length=5), A, B, parts=4, pos=[-1, 1])


def test_records_have_the_documented_columns(some):
    lines = some.records()
    assert len(lines) == 4 * 2 * 2
    assert list(lines[0]) == [
        *("label", "row", "position", "direct", "own", "downstream", "read", "total")
    ]
    for line in lines:
        parts = line["own"] + line["downstream"] + line["read"]
        assert abs(parts - line["total"]) < 1e-9
    frame = some.to_dataframe()
    assert list(frame.columns) == list(lines[0])
    assert len(frame) == len(lines)
    assert len(some.to_csv().splitlines()) == len(lines) + 1


def test_saved_effects_come_back_whole(some, tmp_path):
    path = some.save(tmp_path / "effects.safetensors")
    for other in (dla_hooks.load(path), Effects.load(path)):
        assert isinstance(other, Effects)
        assert other.labels == some.labels
        assert other.records() == some.records()
        assert other.downstream_rows(some.labels[0]) == some.downstream_rows(some.labels[0])
        assert other.downstream_rows(some.labels[0], unit="head")
        assert repr(other) == repr(some)
        assert repr(other.clean) == repr(some.clean)
    assert json.loads(some.to_json())["labels"] == some.labels


def test_pictures_draw_the_means_of_every_part(some):
    for kind, names in ((None, ("direct", "total")), ("split", ("own", "downstream", "read"))):
        picture = some.plot(kind)
        assert isinstance(picture, dla_hooks.Picture)
        drawn = dict(picture.values)
        assert len(drawn) == len(names) * len(some.labels)
        for label in some.labels:
            for name in names:
                mean = float(getattr(some[label], name).mean())
                assert drawn[f"{label} · {name}"] == pytest.approx(mean, abs=1e-6)
                mark = (
                    f'data-label="{label} · {name}" data-value="{drawn[f"{label} · {name}"]:.7g}"'
                )
                assert mark in picture.to_svg()
    last = some.labels[-1]
    assert [name for name, _ in some.plot(rows=[last]).values] == [
        f"{last} · direct",
        f"{last} · total",
    ]
    assert len(some.plot(rows=2).values) == 4
    with pytest.raises(dla_hooks.LabelError):
        some.plot(rows=["L9H9"])
    with pytest.raises(dla_hooks.InputError, match="kind must be one of effects, split"):
        some.plot("bars")


def test_views_show_every_part(some):
    pytest.importorskip("altair")
    chart = json.dumps(some.to_altair().to_dict())
    for label in some.labels:
        assert label in repr(some)
        assert label in some._repr_html_()
        assert label in chart
        assert label in some
    assert "= own" in repr(some)
    assert max(len(line) for line in repr(some).splitlines()) <= 110


def test_rows_downstream_sum_to_the_whole(some):
    for label in some.labels:
        whole = float(some[label].downstream.mean())
        for unit in ("component", "head"):
            rows = some.downstream_rows(label, unit=unit)
            assert abs(sum(value for _, value in rows) - whole) < 1e-9
            assert [abs(v) for _, v in rows] == sorted((abs(v) for _, v in rows), reverse=True)
    assert len(some.downstream_rows(some.labels[0], 2)) == 2


def test_unknown_labels_and_units_are_named(some):
    with pytest.raises(LabelError, match="no row of this effects result"):
        some["L9H9"]
    with pytest.raises(InputError, match="'component', 'head'"):
        some.downstream_rows(some.labels[0], unit="neuron")


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"unit": "source"}, InputError, "take out heads"),
        ({"unit": "layer"}, InputError, "running sums"),
        ({"unit": "adapter"}, InputError, "disable_adapter"),
        ({"unit": ("head", "component")}, InputError, "one unit"),
        ({"parts": 0}, InputError, "parts"),
        ({"parts": []}, InputError, "empty"),
        ({"parts": True}, ArgumentTypeError, "labels"),
        ({"parts": ["L0H1<2"]}, InputError, "ablate the head"),
        ({"parts": ["embed"]}, InputError, "inputs_embeds"),
        ({"parts": ["L7H0"]}, LabelError, "layers"),
        ({"ablation": "median"}, InputError, "zero"),
        ({"parts": ["L0F1"]}, InputError, "Features"),
    ],
)
def test_bad_arguments_are_refused_before_any_run(options, error, says):
    model, ids = build("llama"), example_ids("llama")
    with pytest.raises(error, match=says):
        effects(model, ids, A, B, **options)
    assert hooks_on(model) == 0


def test_missing_answers_and_parts_are_refused():
    model, ids = build("llama"), example_ids("llama")
    with pytest.raises(InputError, match="answer_tokens"):
        effects(model, ids)
    with pytest.raises(InputError, match="input"):
        effects(model, None, A)
    with pytest.raises(UnsupportedModelError, match="experts"):
        effects(model, ids, A, unit="expert")
    with pytest.raises(UnsupportedModelError, match="neurons"):
        effects(build("mixtral"), example_ids("mixtral"), A, unit="neuron")
    with pytest.raises(dla_hooks.TrainingModeError):
        effects(model.train(), ids, A)


def test_expert_effects_of_a_mixture():
    model, ids = build("qwen3_moe"), example_ids("qwen3_moe", batch=2, length=7)
    found = effects(model, ids, A, B, unit="expert", parts=2)
    assert found.unit == "expert"
    for label in found.labels:
        layer, number = (int(n) for n in label[1:].split("E"))
        other = copy.deepcopy(model)
        with torch.no_grad():
            experts_of(other, layer).down_proj[number] = 0
        due = (difference(model, ids) - difference(other, ids))[:, -1]
        torch.testing.assert_close(found[label].total.double(), due, rtol=0, atol=1e-5)
    assert_whole(found)


def test_feature_effects_of_a_dictionary():
    model, ids = build("llama"), example_ids("llama")
    made = Made(model.config.hidden_size)
    unit = Features({"0_mlp_out": made})
    found = effects(model, ids, A, B, unit=unit, parts=3)
    result = direct_logit_attribution(
        model, ids, A, B, unit=Features({"0_mlp_out": made}, top=None)
    )
    for label in found.labels:
        torch.testing.assert_close(found[label].direct, result[label])
        number = int(label.partition("F")[2])

        def without(x, number=number):
            return x - made.encode(x)[..., number, None] * made.W_dec[number]

        with by_hand(model.model.layers[0].mlp, without):
            due = difference(model, ids)[:, -1]
        due = difference(model, ids)[:, -1] - due
        torch.testing.assert_close(found[label].total.double(), due, rtol=0, atol=1e-5)
        # Nothing else in the same write is touched.
        assert float(found.by_row[0, found.row_labels.index("0_mlp_out")].abs().max()) == 0
    assert found.unit == "feature"
    assert_whole(found)


def test_neuron_is_read_out_of_the_last_map():
    model, ids = build("gpt2"), example_ids("gpt2")
    found = effects(model, ids, A, B, unit="neuron", parts=2)
    for label in found.labels:
        layer, number = (int(n) for n in label[1:].split("N"))
        place = slice(number, number + 1)
        other = without_inputs(model, lambda m, at=layer: last_map(m, at), place)
        due = (difference(model, ids) - difference(other, ids))[:, -1]
        torch.testing.assert_close(found[label].total.double(), due, rtol=0, atol=1e-5)
    assert n_layers(model) == 3
