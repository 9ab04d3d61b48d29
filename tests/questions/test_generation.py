"""Each token that a model generates, against the finished text and the model's own numbers."""

from __future__ import annotations

import copy
import doctest
import threading
from pathlib import Path

import pytest
import torch
from mapping_zoo import build_any
from zoo import build as build_with
from zoo import example_ids, supports, tiny_tokenizer

import dla_hooks
from dla_hooks import attribute_generation, direct_logit_attribution
from dla_hooks.errors import (
    DecompositionError,
    HookError,
    InputError,
    PositionError,
    TokenError,
    TokenizerMissingError,
    UnsupportedModelError,
)
from dla_hooks.generation import run as generation_run
from dla_hooks.modules.hooks import is_ours
from dla_hooks.results.joined import joined
from dla_hooks.sources import hold

ROOT = Path(__file__).parents[2]
NEW = 20  # more than are held at once
UNITS = ("component", "layer", "head", "neuron", "source")
FAMILIES = {
    "gpt2": UNITS,
    "llama": UNITS,
    "gemma2": UNITS,  # post-norms, a cap, a window of 4 tokens
    "granite": UNITS,  # scales
    "gpt_neox-parallel": UNITS,
    "mixtral": ("component", "head", "source", "expert"),
}
CASES = [(name, unit) for name, units in FAMILIES.items() for unit in units]


def build(name, **options):
    """The model, with attention that computes in the model's own dtype where there is one."""
    return build_with(name, attn="sdpa" if supports(name, "sdpa") else "eager", **options)


def tolerance_of(name):
    """In float64, where eager attention takes its softmax in float32."""
    return 1e-9 if supports(name, "sdpa") else 1e-5


def generate(model, ids, n=NEW, **options):
    """The model's own new tokens."""
    options = {"do_sample": False, "eos_token_id": None, **options}
    return model.generate(ids, max_new_tokens=n, **options)


def ours(model, ids, n=NEW, **options):
    return attribute_generation(model, ids, max_new_tokens=n, **{"eos_token_id": None, **options})


def of_finished(model, text, n, **options):
    """The finished text with explicit answers and positions."""
    places = list(range(-n - 1, -1))
    return direct_logit_attribution(model, text, text[:, -n:], pos=places, **options)


def by_label(result):
    """Every number that is kept, by its row's label and its entry."""
    if isinstance(result, dla_hooks.DirectLogitAttribution):
        values = dict(zip(result.labels, result.attribution, strict=True))
        return {(k, *at): float(v[at]) for k, v in values.items() for at in indices(v)}
    found = {}
    for place in indices(result.index):
        number = int(result.index[place])
        if number >= 0:
            found[result.rows[number].label, *place[1:]] = float(result.attribution[place])
    return found


def indices(x):
    return [tuple(place) for place in torch.ones(x.shape).nonzero().tolist()]


def assert_same(found, expected, tolerance):
    assert found.shape == expected.shape
    for name in ("logit", "bias"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=tolerance, rtol=0, equal_nan=True
        )
    torch.testing.assert_close(
        found.total(), expected.total(), atol=tolerance, rtol=0, equal_nan=True
    )
    a, b = by_label(found), by_label(expected)
    if isinstance(found, dla_hooks.DirectLogitAttribution):
        assert found.labels == expected.labels
    for key in a.keys() & b.keys():
        assert a[key] == pytest.approx(b[key], abs=tolerance, nan_ok=True), key
    for key in a.keys() ^ b.keys():  # as strong as the last that is kept
        weakest = {}
        for (_, *place), value in b.items():
            weakest[tuple(place)] = min(weakest.get(tuple(place), torch.inf), abs(value))
        assert abs({**a, **b}[key]) <= weakest[tuple(key[1:])] + tolerance
    assert torch.equal(found.positions, expected.positions)
    assert found.answer == expected.answer


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# The numbers


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "unit"), CASES)
def test_generation_equals_finished_text_in_every_unit(name, unit, seed):
    model, ids = build(name, seed=seed), example_ids(name, length=5, seed=seed)
    result = ours(model, ids, unit=unit)
    text = generate(model, ids)
    assert torch.equal(result.generated_ids, text[:, 5:])
    assert_same(result, of_finished(model, text, NEW, unit=unit), tolerance_of(name))


@pytest.mark.parametrize("model_type", ["gemma4_text", "doge", "cohere", "qwen3_moe", "gpt_neo"])
def test_generation_of_other_families_equals_finished_text(model_type):
    model = build_any(model_type)
    ids = torch.randint(3, 28, (2, 4), generator=torch.Generator().manual_seed(3))
    result = ours(model, ids, unit=("component", "head"))
    text = generate(model, ids)
    tolerance = 1e-5 if model_type == "gpt_neo" else 1e-9  # which attends in float32
    for unit, one in result.items():
        assert_same(one, of_finished(model, text, NEW, unit=unit), tolerance)


@pytest.mark.lowest
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "granite", "mixtral"])
def test_logits_are_those_of_a_plain_forward_pass(name):
    model, ids = build(name), example_ids(name, length=5)
    result = ours(model, ids)
    with torch.no_grad():
        logits = model(generate(model, ids)).logits[:, 4:-1].double()
    theirs = logits.gather(-1, result.generated_ids[..., None])[..., 0]
    own = result.total() + result.bias
    cap = result.softcap
    own = own if cap is None else cap * torch.tanh(own / cap)
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)


@pytest.mark.lowest
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_narrow_dtypes_are_checked_and_close(name, dtype):
    model, ids = build(name, dtype=dtype), example_ids(name, length=5)
    result = ours(model, ids, unit="head")
    assert result.attribution.dtype == torch.float32
    text = torch.cat((ids, result.generated_ids), 1)
    if dtype == torch.float32:
        assert_same(result, of_finished(model, text, NEW, unit="head"), 1e-5)


@pytest.mark.lowest
@pytest.mark.parametrize("model_type", ["bamba", "jamba"])
def test_hybrid_model_is_attributed_in_one_more_run(model_type):
    model = build_any(model_type)
    ids = torch.randint(3, 28, (1, 4), generator=torch.Generator().manual_seed(3))
    result = ours(model, ids, n=6)
    text = generate(model, ids, n=6)
    assert torch.equal(result.generated_ids, text[:, 4:])
    assert_same(result, of_finished(model, text, 6), 1e-9)


def test_tokens_are_measured_in_the_runs_that_made_them():
    model, ids = build("llama"), example_ids("llama", length=5)
    ours(model, ids, n=2)
    widths = []
    handle = model.model.embed_tokens.register_forward_pre_hook(
        lambda m, a: widths.append(a[0].shape[1])
    )
    ours(model, ids, n=18)
    handle.remove()
    assert widths == [5, *[1] * 17]


def test_few_tokens_are_held_at_a_time(monkeypatch):
    held = []
    measure = generation_run.Generation._measure
    monkeypatch.setattr(
        generation_run.Generation,
        "_measure",
        lambda self, emit: (held.append(len(self._steps)), measure(self, emit))[1],
    )
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    ours(model, ids, n=40)
    assert held == [16, 16, 8]
    held.clear()
    ours(model, ids, n=3, unit="source")
    assert held == [1, 1, 1]


def test_what_is_held_does_not_grow_with_the_text(monkeypatch):
    sizes, measure = [], generation_run.Generation._measure

    def look(self, emit):
        held = [x for step in self._steps for c in step.values() for x in (c.entered, c.left)]
        kept = [x.untyped_storage().nbytes() for x in held if x is not None]
        sizes.append(sum(kept))
        measure(self, emit)

    monkeypatch.setattr(generation_run.Generation, "_measure", look)
    model = build("gpt2")
    for length in (3, 30):
        ours(model, example_ids("gpt2", length=length), n=32, unit="neuron")
    assert len(sizes) == 4
    assert len(set(sizes)) == 1


def test_model_that_runs_twice_for_a_token_is_refused():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)

    class Again:
        def __call__(self, input_ids, scores):
            model(input_ids)
            return scores

    with pytest.raises(HookError, match="2 times for one new token"):
        ours(model, ids, logits_processor=[Again()])
    assert n_hooks(model) == 0


def test_prompt_of_one_token_and_one_new_token():
    model, ids = build("gpt2"), example_ids("gpt2", batch=1, length=1)
    result = ours(model, ids, n=1)
    assert result.attribution.shape[1:] == (1, 1)
    assert_same(result, of_finished(model, generate(model, ids, n=1), 1), 1e-9)


def test_ranked_means_are_those_of_the_finished_text():
    model, ids = build("llama"), example_ids("llama", length=5)
    result = ours(model, ids, unit="neuron")
    expected = of_finished(model, generate(model, ids), NEW, unit="neuron")
    torch.testing.assert_close(result.mean_rows, expected.mean_rows, atol=1e-9, rtol=0)


# What is compared


def test_against_a_token_subtracts_its_logit():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    result, text = ours(model, ids, against=7), generate(model, ids)
    other = torch.full_like(text[:, 5:], 7)
    places = list(range(-NEW - 1, -1))
    expected = direct_logit_attribution(model, text, text[:, 5:], other, pos=places)
    assert_same(result, expected, 1e-9)


@pytest.mark.lowest
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_runner_up_is_the_second_most_likely_token(name):
    model, ids = build(name), example_ids(name, length=5)
    result, text = ours(model, ids, against="runner-up"), generate(model, ids)
    with torch.no_grad():
        second = model(text).logits[:, 4:-1].topk(2).indices[..., 1]
    places = list(range(-NEW - 1, -1))
    expected = direct_logit_attribution(model, text, text[:, 5:], second, pos=places)
    assert_same(result, expected, tolerance_of(name))
    assert result.incorrect == expected.incorrect
    assert (result.logit > 0).all()


def test_runner_up_of_a_second_choice_is_the_first():
    model, ids = build("llama"), example_ids("llama", batch=1, length=5)

    class TakeSecond:
        def __call__(self, input_ids, scores):
            top = scores.topk(1).indices
            return scores.scatter(1, top, -torch.inf)

    result = ours(model, ids, n=3, against="runner-up", logits_processor=[TakeSecond()])
    assert (result.logit < 0).all()


def test_runner_up_goes_with_models_that_run_once_more():
    model = build_any("bamba")
    ids = torch.randint(3, 28, (1, 4), generator=torch.Generator().manual_seed(3))
    result = ours(model, ids, n=4, against="runner-up")
    assert (result.logit > 0).all()


# The tokens


@pytest.mark.lowest
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}])
def test_sampled_tokens_are_those_of_generate(options):
    model, ids = build("llama"), example_ids("llama", length=5)
    torch.manual_seed(5)
    theirs = generate(model, ids, do_sample=True, **options)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    result = ours(model, ids, do_sample=True, **options)
    assert torch.equal(result.generated_ids, theirs[:, 5:])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    steps = list(ours(model, ids, do_sample=True, stream=True, **options))
    assert torch.equal(torch.cat([one.generated_ids for one in steps], 1), theirs[:, 5:])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.lowest
def test_processors_of_generate_are_followed():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    options = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    result = ours(model, ids, **options)
    assert torch.equal(result.generated_ids, generate(model, ids, **options)[:, 5:])
    assert not torch.equal(result.generated_ids, generate(model, ids)[:, 5:])


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"min_new_tokens": 3},
        {"max_time": 100.0},
    ],
)
def test_other_ways_to_run_give_the_same_numbers(options):
    model, ids = build("llama"), example_ids("llama", length=5)
    expected = ours(model, ids, n=6, unit=("component", "source"))
    for unit, one in ours(model, ids, n=6, unit=("component", "source"), **options).items():
        assert torch.equal(one.generated_ids, expected[unit].generated_ids)
        assert_same(one, expected[unit], 1e-9)


def test_cache_of_fixed_length_is_refused_where_its_places_are_read():
    model, ids = build("llama"), example_ids("llama", length=5)
    static = {"cache_implementation": "static"}
    assert_same(ours(model, ids, n=6, **static), ours(model, ids, n=6), 1e-9)
    with pytest.raises(InputError, match="static"):
        ours(model, ids, n=6, unit="source", **static)


def test_generation_that_runs_out_of_time_gives_what_there_is():
    model, ids = build("llama"), example_ids("llama", length=5)
    result = ours(model, ids, max_time=1e-9)
    assert result.generated_ids.shape == (2, 1)
    assert result.attribution.shape[1:] == (2, 1)


def test_config_of_generation_is_followed():
    from transformers import GenerationConfig

    model, ids = build("llama"), example_ids("llama", length=5)
    config = GenerationConfig(do_sample=True, top_k=3, eos_token_id=None)
    with pytest.raises(InputError, match="do_sample"):
        attribute_generation(model, ids, max_new_tokens=3, generation_config=config)
    torch.manual_seed(2)
    result = attribute_generation(
        model, ids, max_new_tokens=3, do_sample=True, generation_config=config
    )
    torch.manual_seed(2)
    theirs = model.generate(ids, generation_config=config, max_new_tokens=3)
    assert torch.equal(result.generated_ids, theirs[:, 5:])


def test_mapping_of_a_tokenizer_is_read():
    model, ids = build("llama"), example_ids("llama", length=5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    given = {"input_ids": ids, "attention_mask": mask}
    expected = ours(model, ids, n=3, attention_mask=mask)
    torch.testing.assert_close(ours(model, given, n=3).logit, expected.logit)


@pytest.mark.parametrize("path", ["", "model"])
def test_hook_on_an_output_of_several_tensors(path):
    model, ids = build("llama"), example_ids("llama", length=5)
    model.config.output_hidden_states = True

    def change(module, args, output):
        name = "last_hidden_state" if path else "logits"
        output[name] = output[name] * 1.3
        return output

    handle = model.get_submodule(path).register_forward_hook(change)
    result, text = ours(model, ids, n=6), generate(model, ids, n=6)
    assert_same(result, of_finished(model, text, 6), 1e-9)
    handle.remove()


def test_rows_of_a_padded_batch_are_those_of_prompts_alone():
    name = "llama"
    model, ids = build(name), example_ids(name, length=6)
    rows = [ids[0].tolist(), ids[1, :3].tolist()]
    for unit in ("component", "source"):
        together = ours(model, rows, unit=unit)
        for number, row in enumerate(rows):
            alone = ours(model, [row], unit=unit)
            part = together.prompt(number)
            assert part.generated_ids.tolist() == alone.generated_ids.tolist()
            assert part.generated == alone.generated
            assert part.tokens == alone.tokens
            assert_same(part, alone, 1e-9)


def with_ends(model, ids, n):
    """A token that the first row comes to, and the second does not or later."""
    new = generate(model, ids, n)[:, ids.shape[1] :].tolist()
    for at, token in enumerate(new[0]):
        if 1 <= at < n - 2 and token not in new[0][:at] and token not in new[1][: at + 2]:
            return token, at
    raise AssertionError("choose another seed")


@pytest.mark.parametrize("unit", ["component", "neuron", "source"])
def test_row_that_ends_early_is_nan_behind_its_end(unit):
    model, ids = build("llama"), example_ids("llama", length=5, seed=1)
    token, at = with_ends(model, ids, 8)
    result = ours(model, ids, n=8, unit=unit, eos_token_id=token, pad_token_id=0)
    theirs = generate(model, ids, n=8, eos_token_id=token, pad_token_id=0)
    assert torch.equal(result.generated_ids, theirs[:, 5:])
    assert len(result.generated[0]) == at + 1
    assert len(result.tokens[0]) == 5 + at + 1
    assert result.attribution[:, 0, at + 1 :].isnan().all()
    assert result.logit[0, at + 1 :].isnan().all()
    assert (result.positions[0, at + 1 :] == -1).all()
    whole = of_finished(model, generate(model, ids, n=8), 8, unit=unit)
    torch.testing.assert_close(
        result.total()[0, : at + 1], whole.total()[0, : at + 1], atol=1e-9, rtol=0
    )
    n = result.generated_ids.shape[1]
    torch.testing.assert_close(result.total()[1, : at + 2], whole.total()[1, : at + 2])
    assert n >= at + 2


@pytest.mark.lowest
def test_model_s_own_end_of_text_ends_a_row():
    model, ids = build("llama"), example_ids("llama", length=5, seed=1)
    token, at = with_ends(model, ids, 8)
    model.generation_config.eos_token_id = [token]
    model.generation_config.pad_token_id = 0
    before = copy.deepcopy(model.generation_config)
    result = attribute_generation(model, ids, max_new_tokens=8)
    assert result.logit[0, at + 1 :].isnan().all()
    assert not result.logit[0, : at + 1].isnan().any()
    assert model.generation_config.to_dict() == before.to_dict()


@pytest.mark.parametrize("kind", ["id", "ids", "callable", "one bool", "strings"])
def test_stop_ends_a_row_with_the_token_that_says_so(kind):
    model, tokenizer = build("llama"), tiny_tokenizer()
    ids = example_ids("llama", batch=1, length=5)
    new = generate(model, ids, n=8)[0, 5:].tolist()
    at = next(n for n in range(1, 8) if new[n] not in new[:n])
    stops = {
        "id": new[at],
        "ids": [new[at]],
        "callable": lambda ids, scores: ids[:, -1] == new[at],
        "one bool": lambda ids, scores: ids.shape[1] == 5 + at + 1,
        "strings": ["never there", tokenizer.decode(new[: at + 1])],
    }
    result = ours(model, ids, n=8, stop=stops[kind], tokenizer=tokenizer)
    assert result.generated_ids.tolist() == [new[: at + 1]]


def test_strings_are_read_and_named_with_the_tokenizer():
    model, tokenizer = dla_hooks.demo.load()
    prompts = ["The keys near the cabinet", "The dog"]
    result = attribute_generation(
        model, prompts, max_new_tokens=2, tokenizer=tokenizer, against=" is", stop="zzz"
    )
    assert result.generated[0][0] == " are"
    assert result.tokens[1][:2] == ["The", " dog"]
    assert result.tokens[1][2:] == result.generated[1]
    assert result.incorrect == [" is"]


# Streams


@pytest.mark.lowest
def test_stream_yields_each_position_as_it_comes():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    whole = ours(model, ids, n=6, unit="head")
    steps = list(ours(model, ids, n=6, unit="head", stream=True))
    assert len(steps) == 6
    for n, step in enumerate(steps):
        assert step.attribution.shape == whole.attribution.shape[:2]
        torch.testing.assert_close(step.attribution, whole.attribution[..., n])
        assert torch.equal(step.positions, whole.positions[:, n])
        assert torch.equal(step.generated_ids, whole.generated_ids[:, n : n + 1])
        assert step.generated == [row[n : n + 1] for row in whole.generated]
        assert len(step.tokens[0]) == 5 + n + 1
    assert n_hooks(model) == 0


@pytest.mark.parametrize("model_type", ["bamba", "recurrent_gemma"])
def test_stream_of_a_model_that_runs_once_more(model_type):
    model = build_any(model_type)
    ids = torch.randint(3, 28, (1, 4), generator=torch.Generator().manual_seed(3))
    steps = list(ours(model, ids, n=4, stream=True))
    assert torch.equal(
        torch.cat([one.generated_ids for one in steps], 1), generate(model, ids, n=4)[:, 4:]
    )


def test_stream_of_several_units_yields_dictionaries():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    for step in ours(model, ids, n=2, unit=("component", "source"), stream=True):
        assert set(step) == {"component", "source"}
        torch.testing.assert_close(step["component"].logit, step["source"].logit)


def test_model_may_be_used_while_a_stream_waits():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    expected = ours(model, ids, n=4)
    for n, step in enumerate(ours(model, ids, n=4, stream=True)):
        other = direct_logit_attribution(model, ids[:, :3], 5)
        assert other.attribution.shape[1:] == (2,)
        torch.testing.assert_close(step.attribution, expected.attribution[..., n])


@pytest.mark.parametrize("how", ["close", "forgotten", "error"])
def test_unfinished_stream_leaves_nothing_behind(how):
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    n_threads = threading.active_count()
    stream = ours(model, ids, n=20, stream=True)
    next(stream)
    assert n_hooks(model) > 0
    if how == "close":
        stream.close()
    elif how == "forgotten":
        del stream
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError("mine"))
    assert n_hooks(model) == 0
    assert threading.active_count() == n_threads


def test_stream_that_was_never_begun_starts_nothing():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    n_threads = threading.active_count()
    stream = ours(model, ids, n=20, stream=True)
    assert threading.active_count() == n_threads
    assert n_hooks(model) == 0
    stream.close()


@pytest.mark.parametrize("taken_inside", [True, False])
def test_stream_has_the_settings_of_the_thread_that_asked(taken_inside):
    model, ids = build("gpt2", dtype=torch.float32), example_ids("gpt2", length=5)
    for setting in (torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)):
        with setting():
            whole = ours(model, ids, n=3, check=False)
            stream = ours(model, ids, n=3, check=False, stream=True)
            steps = list(stream) if taken_inside else []
        steps = steps or list(stream)
        for n, step in enumerate(steps):
            torch.testing.assert_close(step.logit, whole.logit[:, n])


def test_error_in_a_stream_reaches_who_takes_it():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)

    def stop(ids, scores):
        if ids.shape[1] > 6:
            raise ZeroDivisionError("mine")
        return False

    stream = ours(model, ids, n=20, stream=True, stop=stop)
    next(stream)
    with pytest.raises(ZeroDivisionError, match="mine"):
        list(stream)
    assert n_hooks(model) == 0


def test_two_threads_generate_on_one_model():
    model = build("gpt2")
    prompts = [example_ids("gpt2", length=5, seed=seed) for seed in (0, 1)]
    expected = [ours(model, ids, n=8) for ids in prompts]
    found = [None, None]

    def work(number):
        found[number] = ours(model, prompts[number], n=8)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.generated_ids, other.generated_ids)
        torch.testing.assert_close(one.attribution, other.attribution)


# The guest


def test_nothing_is_left_on_the_model():
    model, ids = build("mixtral"), example_ids("mixtral", length=5)
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    ours(model, ids, n=4, unit=("component", "expert"))
    with pytest.raises(ZeroDivisionError):
        ours(model, ids, n=4, stop=lambda ids, scores: 1 / 0)
    assert n_hooks(model) == 0
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert not model.training
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


def add_to_output(module, args, output):
    first = output[0] if isinstance(output, tuple) else output
    new = first + 0.3 * torch.sin(first)
    return (new, *output[1:]) if isinstance(output, tuple) else new


@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize(
    "path", ["model.layers.0", "model.layers.0.self_attn", "model.norm", "lm_head", ""]
)
def test_what_hooks_of_the_caller_write_has_its_rows(path, unit):
    model, ids = build("llama"), example_ids("llama", length=5)

    def change(module, args, output):
        if not path:
            output.logits = output.logits + 0.3 * torch.sin(output.logits)
            return output
        return add_to_output(module, args, output)

    handle = model.get_submodule(path).register_forward_hook(change)
    result = ours(model, ids, n=8, unit=unit)
    text = generate(model, ids, n=8)
    expected = of_finished(model, text, 8, unit=unit)
    handle.remove()
    assert torch.equal(result.generated_ids, text[:, 5:])
    assert_same(result, expected, 1e-9)
    assert n_hooks(model) == 0


def test_hook_that_goes_away_meanwhile_is_refused():
    model, ids = build("llama"), example_ids("llama", length=5)
    calls = []

    def change(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            handle.remove()
        return add_to_output(module, args, output)

    handle = model.model.layers[0].register_forward_hook(change)
    with pytest.raises((HookError, DecompositionError)):
        ours(model, ids, n=8)
    assert n_hooks(model) == 0


def test_hooks_of_ours_know_each_other():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    stream = ours(model, ids, n=3, stream=True)
    next(stream)
    hooks = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert hooks
    assert all(map(is_ours, hooks))
    stream.close()


def test_weights_changed_without_a_trace_are_measured_anew():
    model, ids = build("llama"), example_ids("llama", length=5)
    ours(model, ids, n=3)
    model.model.norm.weight.data.mul_(1.7)
    result, text = ours(model, ids, n=8), generate(model, ids, n=8)
    assert_same(result, of_finished(model, text, 8), 1e-9)


# What makes it fail


hold_last_column = hold.last_column


def test_wrong_column_is_refused_by_the_check(monkeypatch):
    model, ids = build("gpt2"), example_ids("gpt2", length=5)

    def first_column(x, batch, width):
        found = hold_last_column(x, batch, width)
        return x[:, :1].clone() if x.ndim == 3 and x.shape[1] > 1 else found

    ours(model, ids, n=3)
    monkeypatch.setattr(hold, "last_column", first_column)
    with pytest.raises(DecompositionError):
        ours(model, ids, n=3)
    assert n_hooks(model) == 0


def test_held_columns_are_copies():
    """A model may add to an activation in place."""
    for shape in ((2, 5, 3), (2, 1, 3), (1, 5, 3), (5, 3), (10, 3)):
        x = torch.ones(shape)
        found = hold.last_column(x, 2, 5 if shape != (2, 1, 3) else 1)
        x.zero_()
        assert bool((found == 1).all()), shape


@pytest.mark.parametrize(
    ("shape", "batch", "width", "expected"),
    [
        ((2, 5, 3), 2, 5, (slice(None), -1)),
        ((1, 5, 3), 2, 5, (slice(None), -1)),  # shared by the rows
        ((5, 3), 2, 5, (slice(-1, None),)),
        ((2, 1, 3), 2, 5, (slice(None), -1)),  # logits of the last token alone
        ((2, 7, 3), 2, 5, (slice(None), -1)),  # with positions of the model's own
    ],
)
def test_newest_column_is_found_in_every_form(shape, batch, width, expected):
    x = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    found = hold.last_column(x, batch, width)
    torch.testing.assert_close(found[:, 0], x[expected])


def test_newest_column_of_flattened_rows_is_each_row_s():
    x = torch.arange(30.0).reshape(10, 3)
    assert hold.last_column(x, 2, 5)[:, 0].tolist() == [x[4].tolist(), x[9].tolist()]
    assert hold.last_column(x[None], 2, 5)[:, 0].tolist() == [x[4].tolist(), x[9].tolist()]
    assert hold.last_column(torch.zeros(7), 2, 5) is None
    assert hold.last_column(torch.zeros(9, 2), 2, 5) is None


def test_joined_rows_that_a_piece_lacks_are_zero():
    def piece(labels, values):
        return dla_hooks.DirectLogitAttribution(
            attribution=torch.tensor(values)[:, None, None],
            labels=labels,
            unit="component",
            bias=torch.zeros(1, 1),
            logit=torch.tensor([[sum(values)]]),
            gap=0.0,
            positions=torch.zeros(1, 1, dtype=torch.long),
            tokens=[["a"]],
        )

    found = joined([piece(["embed"], [1.0]), piece(["embed", "final_hook"], [2.0, 3.0])], 2)
    assert found.labels == ["embed", "final_hook"]
    assert found.attribution[:, 0].tolist() == [[1.0, 2.0], [0.0, 3.0]]


def test_generation_that_is_not_the_one_seen_is_refused():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    plain = model.generate

    def other(**options):
        return torch.cat((plain(**options), ids[:, :1]), 1)

    model.generate = other
    with pytest.raises(HookError, match="new tokens"):
        ours(model, ids, n=3)


# Wrong arguments


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"max_new_tokens": 0}, InputError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, InputError, "max_new_tokens"),
        ({"max_new_tokens": 61}, InputError, "positions"),
        ({"num_beams": 2}, InputError, "num_beams"),
        ({"num_return_sequences": 2}, InputError, "num_return_sequences"),
        ({"assistant_model": object()}, InputError, "assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, InputError, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 2.0}, InputError, "guidance_scale"),
        ({"stop_strings": ["a"]}, InputError, "stop="),
        ({"stopping_criteria": []}, InputError, "stop="),
        ({"max_length": 9}, InputError, "max_new_tokens"),
        ({"past_key_values": object()}, InputError, "past_key_values"),
        ({"output_scores": True}, InputError, "generated_ids"),
        ({"cache_implementation": "quantized"}, InputError, "quantized"),
        ({"no_such_option": 1}, InputError, "no_such_option"),
        ({"do_sample": 1}, InputError, "do_sample"),
        ({"stream": None}, InputError, "stream"),
        ({"progress": "yes"}, InputError, "progress"),
        ({"stop": ""}, InputError, "stop"),
        ({"stop": []}, InputError, "stop"),
        ({"stop": [1, "a"]}, InputError, "stop"),
        ({"stop": 2.5}, InputError, "stop"),
        ({"stop": "a"}, TokenizerMissingError, "stop"),
        ({"stop": lambda ids, scores: torch.zeros(3)}, InputError, "rows"),
        ({"against": [5, 6]}, InputError, "against"),
        ({"against": 10**6}, TokenError, "against"),
        ({"against": "runner-ups"}, TokenizerMissingError, "against"),
        ({"unit": "no such unit"}, InputError, "unit"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2)}, InputError, "left"),
    ],
)
def test_wrong_options_are_refused_by_name(options, error, said):
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    with pytest.raises(error, match=said):
        attribute_generation(model, ids, **{"max_new_tokens": 3, **options})
    assert n_hooks(model) == 0


def test_options_of_the_model_s_own_config_are_refused_too():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    model.generation_config.num_beams = 3
    with pytest.raises(InputError, match="num_beams=3"):
        ours(model, ids, n=3)
    assert ours(model, ids, n=3, num_beams=1).generated_ids.shape == (2, 3)


@pytest.mark.parametrize("input", [None, {"input_ids": [[5, 6]], "token_type_ids": [[0, 0]]}])
def test_input_that_cannot_be_gone_on_from_is_refused(input):
    with pytest.raises(InputError):
        attribute_generation(build("gpt2"), input, max_new_tokens=2)


@pytest.mark.tl
def test_models_of_transformerlens_are_refused(references):
    pytest.importorskip("transformer_lens")
    model = references.bridged("gpt2")
    with pytest.raises(UnsupportedModelError, match="Hugging Face model itself"):
        attribute_generation(model, torch.tensor([[5, 6]]), max_new_tokens=2)


def test_classifiers_are_refused():
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(build("gpt2").config).eval()
    with pytest.raises(UnsupportedModelError, match="generate"):
        ours(model, example_ids("gpt2"), n=2)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiled_model_generates_as_its_plain_code():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    expected = ours(model, ids, n=3)
    model.compile()
    assert_same(ours(model, ids, n=3), expected, 1e-9)


def test_models_that_do_not_generate_are_refused():
    model = build("gpt2")
    model.can_generate = lambda: False
    with pytest.raises(UnsupportedModelError, match="generate"):
        ours(model, example_ids("gpt2"), n=2)


# What comes back


def test_saved_result_has_what_was_generated(tmp_path):
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    for unit in ("component", "neuron"):
        result = ours(model, ids, n=3, unit=unit)
        back = dla_hooks.load(result.save(tmp_path / f"{unit}.safetensors"))
        assert back.generated == result.generated
        assert torch.equal(back.generated_ids, result.generated_ids)
        assert len(result.records()) > 0
    plain = direct_logit_attribution(model, ids, 5)
    assert plain.generated is None
    assert dla_hooks.load(plain.save(tmp_path / "plain.safetensors")).generated_ids is None


def test_one_prompt_and_one_position_of_it_are_cut_out():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    result = ours(model, ids, n=4, unit="source")
    assert result.prompt(1).generated == result.generated[1:]
    one = result.prompt(1).position(2)
    assert one.answer == [result.generated[1][2]] == one.generated[0]
    with pytest.raises(PositionError):
        result.prompt(2)


def test_several_units_come_by_their_names():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    found = ours(model, ids, n=4, unit={"a": "component", "b": dla_hooks.Heads()})
    assert list(found) == ["a", "b"]
    assert found["a"].generated == found["b"].generated


def test_wrapped_model_brings_its_conventions_along():
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    result = attribute_generation(dla_hooks.wrap(model), ids, max_new_tokens=4, eos_token_id=None)
    plain = ours(model, ids, n=4, center_unembed=True, fold_value_biases=True)
    torch.testing.assert_close(result.attribution, plain.attribution)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_model_with_an_adapter_generates_with_it():
    peft = pytest.importorskip("peft")
    model, ids = build("llama"), example_ids("llama", length=5)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["o_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    found = ours(adapted, ids, n=6, unit=("component", "adapter"))
    text = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(found["component"].generated_ids, text[:, 5:])
    for unit, result in found.items():
        assert_same(result, of_finished(adapted, text, 6, unit=unit), 1e-6)


def test_bar_counts_tokens(capsys):
    model, ids = build("gpt2"), example_ids("gpt2", length=5)
    ours(model, ids, n=3, progress=True)
    assert "3/3" in capsys.readouterr().err
    list(ours(model, ids, n=3, progress=True, stream=True))
    assert "3/3" in capsys.readouterr().err
    ours(model, ids, n=3, progress=False)
    assert capsys.readouterr().err == ""


def test_examples_of_the_page_run():
    page = ROOT / "docs" / "questions" / "generation.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted > 5
    assert found.failed == 0
