"""Whatever fails in a run on made-up tokens is a refusal that names the module."""

from __future__ import annotations

import copy

import pytest
import torch
from units import UNIT_NAMES
from zoo import build, example_ids

import dla_hooks
from dla_hooks import UnsupportedModelError, direct_logit_attribution

PLACES = {
    "llama": ("", "model", "layers.1", "layers.1.self_attn", "self_attn.o_proj", "norm", "lm_head"),
    "gpt2": ("", "transformer", "h.1", "h.1.mlp", "attn.c_proj", "ln_f", "wte", "lm_head"),
}
CASES = [(name, place) for name, places in PLACES.items() for place in places]


def first_tensor(args, kwargs):
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))


def names_a_position(x):
    return x[:, 4]


def expects_its_batch(x):
    assert len(x) == 2


def looks_for_what_is_not_there(x):
    return x.shape[1] == 7 or next(iter(()))


def replace_forward(module, look):
    """Put a function in the place of ``forward`` that looks at the first tensor."""
    inner = module.forward

    def forward(*args, **kwargs):
        look(first_tensor(args, kwargs))
        return inner(*args, **kwargs)

    module.forward = forward


def module_at(model, place):
    """The module whose path ends so; where several do, the last."""
    if not place:
        return "", model
    return [(p, m) for p, m in model.named_modules() if f".{p}".endswith(f".{place}")][-1]


def state_of(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, torch.get_rng_state().tolist(), model.training


def same_numbers(model, other, ids):
    for unit in UNIT_NAMES:
        found, expected = (direct_logit_attribution(m, ids, 5, unit=unit) for m in (model, other))
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=0, atol=1e-5)


@pytest.mark.parametrize("look", [names_a_position, expects_its_batch, looks_for_what_is_not_there])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_forward_that_takes_one_prompt_only_is_refused_by_name_and_leaves_nothing(
    name, place, look
):
    for seed in (0, 1):
        model, ids = build(name, seed=seed), example_ids(name, seed=seed)
        plain = copy.deepcopy(model)
        path, module = module_at(model, place)
        replace_forward(module, look)
        model(ids)  # it runs on the prompt itself
        before = state_of(model)
        said = rf"with \d+ rows of \d+ tokens, ({path} \()?{type(module).__name__}\)? fails"
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match=said):
                direct_logit_attribution(model, ids, 5, unit="head")
            assert state_of(model) == before
        del module.forward
        same_numbers(model, plain, ids)


@pytest.mark.parametrize("place", ["lm_head", "self_attn.o_proj", "norm", "self_attn", "layers.1"])
def test_forward_that_expects_three_axes_is_attributed(place):
    def look(x):
        assert x.ndim == 3

    for seed in (0, 1):
        model, ids = build("llama", seed=seed), example_ids("llama", seed=seed)
        plain = copy.deepcopy(model)
        replace_forward(module_at(model, place)[1], look)
        same_numbers(model, plain, ids)


MEASUREMENTS = {
    "padding": lambda model, ids: direct_logit_attribution(
        model, ids, 5, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    ),
    "holes": lambda model, ids: direct_logit_attribution(
        model, ids, 5, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1], [1] * 7])
    ),
    "chunks": lambda model, ids: direct_logit_attribution(model, ids, 5, chunk_size=3),
    "mid streams": lambda model, ids: direct_logit_attribution(model, ids, 5, unit="layer"),
    "heads": lambda model, ids: dla_hooks.stack_head_results(model, ids),
    "neurons": lambda model, ids: dla_hooks.stack_neuron_results(model, ids),
    "value biases": lambda model, ids: direct_logit_attribution(
        model, ids, 5, unit=dla_hooks.Heads(fold_value_biases=True)
    ),
    "biases": lambda model, ids: dla_hooks.wrap(model).b_O,
    "verification": lambda model, ids: dla_hooks.verify(model, show=False),
}


@pytest.mark.parametrize("what", MEASUREMENTS)
def test_every_later_measurement_that_fails_is_a_refusal(what):
    """The first measurement goes well; then nothing runs but the prompts' own lengths."""
    model, ids = build("llama"), example_ids("llama")
    direct_logit_attribution(model, ids, 5)
    runs = []

    def fails_later(x):
        runs.append(x)
        assert len(runs) < 2 or x.shape[:2] == ids.shape

    model.model.layers[1].mlp.forward = Counting(model.model.layers[1].mlp, fails_later)
    with pytest.raises(UnsupportedModelError, match=r"fails? \(|could not|cannot be run in chunks"):
        MEASUREMENTS[what](model, ids)


class Counting:
    """A ``forward`` that looks at what it is given."""

    def __init__(self, module, look):
        self.inner, self.look = module.forward, look

    def __call__(self, x):
        self.look(x)
        return self.inner(x)


def test_model_that_fails_with_and_without_its_hook_is_not_stuck_with_either():
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    plain = copy.deepcopy(model)
    model.lm_head.double()

    def cast(module, args):
        assert args[0].shape[0] == len(ids)
        return (args[0].double(),)

    handle = model.lm_head.register_forward_pre_hook(cast)
    for _ in range(3):
        with pytest.raises(UnsupportedModelError, match="With your hooks"):
            direct_logit_attribution(model, ids, 5)
    handle.remove()
    # One that takes any batch, without which the model does not run ...
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    found = direct_logit_attribution(model, ids, 5).logit
    expected = direct_logit_attribution(plain, ids, 5).logit
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)
    # ... and once it runs without, hooks are the prompt's again.
    handle.remove()
    model.lm_head.float()
    seen = []
    inside = model.model.layers[1].mlp.gate_proj
    inside.register_forward_hook(lambda m, args, out: seen.append(out[:, 4].shape))
    same_numbers(model, plain, ids)
    assert len(seen) == len(UNIT_NAMES)


def test_out_of_memory_stays_what_it_is():
    model, ids = build("llama"), example_ids("llama")

    def full(x):
        raise torch.OutOfMemoryError("no")

    replace_forward(model.model.layers[1], full)
    with pytest.raises(torch.OutOfMemoryError):
        direct_logit_attribution(model, ids, 5)
