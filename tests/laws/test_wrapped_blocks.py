"""Wrappers of the caller's around blocks: what they write is a row, as what hooks write is.

Every number is held against the model's own logits with the wrapper in place, and the wrapper's row
against algebra on what plain hooks recorded.
"""

from __future__ import annotations

import threading

import pytest
import torch
from doors import by_name
from oracle_families import family_of, final_norm, frozen_norm, norm_scale
from torch import Tensor, nn
from units import UNIT_NAMES
from zoo import build, example_ids

import dla_hooks
from dla_hooks import InputError, attribute_many, direct_logit_attribution
from dla_hooks.verification.recognise import stream_of

SPECS = ["llama-bias", "gpt2", "gemma2", "olmo2-bias-tied", "granite", "gpt_neox-parallel", "bloom"]
LAYER = 1


def hidden(out):
    return out if isinstance(out, Tensor) else out[0]


def with_hidden(out, x):
    return x if isinstance(out, Tensor) else (x, *out[1:])


class Around(nn.Module):
    """A wrapper that changes nothing."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        return self.block(x, *args, **kwargs)


class Steers(Around):
    """Adds a vector from one position on, and takes nothing but the prompt's own shape."""

    def __init__(self, block: nn.Module, shape, vector: Tensor) -> None:
        super().__init__(block)
        self.shape, self.vector, self.start = tuple(shape), vector, 3

    def forward(self, x, *args, **kwargs):
        if x.shape[:2] != self.shape:
            raise RuntimeError("not the prompt's shape")
        out = self.block(x, *args, **kwargs)
        y = hidden(out).clone()
        y[:, self.start :] += self.vector.to(y)
        return with_hidden(out, y)


class KeepsItsSize(Around):
    """Adds a vector and brings each position back to its size, as control vectors may."""

    def forward(self, x, *args, **kwargs):
        out = self.block(x, *args, **kwargs)
        y = hidden(out)
        moved = y + torch.linspace(-1, 1, y.shape[-1]).to(y)
        return with_hidden(
            out, moved / moved.norm(dim=-1, keepdim=True) * y.norm(dim=-1)[..., None]
        )


class HandsOn(KeepsItsSize):
    """As wrappers do that must pass for the block: attributes are those of what is in it."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class ChangesItsInput(Around):
    def forward(self, x, *args, **kwargs):
        x = x.clone()
        x[:, 2] = -x[:, 2]
        return self.block(x, *args, **kwargs)


class Casts(Around):
    """The model needs it: the block in it is of another dtype."""

    def forward(self, x, *args, **kwargs):
        kwargs = {k: _cast(v) for k, v in kwargs.items()}
        out = self.block(x.double(), *map(_cast, args), **kwargs)
        return with_hidden(out, hidden(out).to(x.dtype))


def _cast(value):
    if isinstance(value, tuple):
        return tuple(map(_cast, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def wrap(model, make, layer=LAYER):
    block = stream_of(model).blocks[layer]
    holder, _, name = block.name.rpartition(".")
    wrapper = make(block.module).eval()
    model.get_submodule(holder)[int(name)] = wrapper
    return wrapper


def holds(model, ids, result, token=5):
    logits = model(ids, use_cache=False).logits[..., token]
    capped = result.logit
    if result.softcap is not None:
        capped = result.softcap * torch.tanh(result.logit / result.softcap)
    torch.testing.assert_close(capped, logits.to(capped), rtol=0, atol=1e-5)
    own = result.total() + result.bias
    torch.testing.assert_close(own, result.logit, rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("make", [KeepsItsSize, HandsOn, ChangesItsInput, Around])
@pytest.mark.parametrize("spec", SPECS)
def test_wrapper_around_a_block_is_attributed(spec, make, unit):
    model, ids = build(spec), example_ids(spec)
    plain = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
    wrap(model, make)
    found = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
    holds(model, ids, found)
    if make is Around:
        assert found.labels == plain.labels
        torch.testing.assert_close(found.attribution, plain.attribution, rtol=0, atol=1e-9)
        _, labels = dla_hooks.decompose_resid(model, ids, return_labels=True)
        assert f"{LAYER}_hook" not in labels


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", ["llama-bias", "gpt2", "olmo2-bias-tied", "bloom"])
def test_wrapper_that_steers_at_some_positions_is_the_row_of_what_it_adds(spec, seed):
    model, ids = build(spec, seed=seed), example_ids(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    width = stream_of(model).d_model
    vector = torch.randn(width, generator=generator, dtype=torch.float64)
    wrap(model, lambda block: Steers(block, ids.shape, vector))
    found = direct_logit_attribution(model, ids, 5, pos=None)
    holds(model, ids, found)
    row = found.attribution[found.labels.index(f"{LAYER}_hook")]
    kind, norm, seen = family_of(model).norm, final_norm(model), []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, use_cache=False)
    handle.remove()
    scale = norm_scale(kind, norm, seen[0])
    ends = frozen_norm(kind, norm, torch.stack((vector.expand_as(seen[0]), 0 * seen[0])), scale)
    due = (ends[0] - ends[1]) @ model.get_output_embeddings().weight[5].double()
    due[:, :3] = 0
    torch.testing.assert_close(row, due, rtol=0, atol=1e-6)
    stack, labels = dla_hooks.decompose_resid(model, ids, pos_slice=-1, return_labels=True)
    own = stack[labels.index(f"{LAYER}_hook"), 0].double()
    torch.testing.assert_close(own, vector, rtol=0, atol=1e-6)


@torch.no_grad()
def test_wrapper_that_changes_between_calls_is_followed():
    model, ids = build("llama"), example_ids("llama")
    wrapper = wrap(model, lambda block: Steers(block, ids.shape, torch.zeros(1)))
    for size in (0.0, 1.0, -2.0):
        wrapper.vector = torch.full((1,), size)
        holds(model, ids, direct_logit_attribution(model, ids, 5, pos=None))


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
@torch.no_grad()
def test_wrapper_that_fails_in_made_up_runs_does_not_spend_a_hook_that_acts_once(family):
    model, ids = build(family), example_ids(family)
    stream, shape, acted = stream_of(model), ids.shape, []
    write = stream.writes[-1]
    holder, _, name = write.name.rpartition(".")

    class OfOneShape(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, *args, **kwargs):
            if x.shape[:2] != shape:
                raise ValueError("made for one prompt")
            return self.inner(x, *args, **kwargs)

    setattr(model.get_submodule(holder), name, OfOneShape(write.module).eval())

    def once(module, args, out):
        acted.append(1)
        return with_hidden(out, hidden(out) * 1.5) if len(acted) == 1 else None

    stream.blocks[0].module.register_forward_hook(once)
    found = direct_logit_attribution(model, ids, 5, pos=None)
    assert len(acted) == 1
    acted.clear()
    logits = model(ids, use_cache=False).logits[..., 5]
    torch.testing.assert_close(found.logit, logits.to(found.logit), rtol=0, atol=1e-6)


@torch.no_grad()
def test_hooks_on_a_wrapper_and_on_the_block_in_it_are_each_counted_once():
    model, ids = build("llama"), example_ids("llama")
    wrapper = wrap(model, KeepsItsSize)
    for module in (wrapper, wrapper.block):
        module.register_forward_hook(lambda m, a, out: with_hidden(out, hidden(out) * 1.1))
        module.register_forward_pre_hook(lambda m, a: (a[0] + 0.2, *a[1:]))
    for unit in UNIT_NAMES:
        holds(model, ids, direct_logit_attribution(model, ids, 5, unit=unit, pos=None))
    given = {"pos_slice": None, "return_labels": True}
    dla_hooks.decompose_resid(model, ids, **given)  # held against the stream
    dla_hooks.accumulated_resid(model, ids, incl_mid=True, **given)


@torch.no_grad()
def test_wrapper_that_the_model_needs_stays_in_made_up_runs():
    model, ids = build("llama", dtype=torch.float32), example_ids("llama")
    wrapper = wrap(model, Casts)
    wrapper.block.double()
    found = direct_logit_attribution(model, ids, 5, pos=None)
    logits = model(ids, use_cache=False).logits[..., 5]
    torch.testing.assert_close(found.logit, logits.to(found.logit), rtol=0, atol=1e-4)


@torch.no_grad()
def test_wrapper_is_left_as_it_was_also_after_an_error():
    model, ids = build("llama"), example_ids("llama")
    wrapper = wrap(model, lambda block: Steers(block, (1, 1), torch.zeros(1)))
    with pytest.raises(RuntimeError, match="not the prompt's shape"):
        direct_logit_attribution(model, ids, 5)
    assert "forward" not in vars(wrapper)


@torch.no_grad()
def test_made_up_run_in_one_thread_leaves_the_wrapper_to_another():
    model, ids = build("llama"), example_ids("llama")
    wrapper = wrap(model, KeepsItsSize)
    due = model(ids, use_cache=False).logits
    inside, done, found = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread().name == "asks":
            inside.set()
            done.wait(10)

    class Slow(nn.Module):
        def forward(self, x):
            wait()
            return x

    wrapper.block.mlp = nn.Sequential(wrapper.block.mlp, Slow()).eval()

    def ask():
        found.append(direct_logit_attribution(model, ids, 5, pos=None))

    thread = threading.Thread(target=ask, name="asks")
    thread.start()
    assert inside.wait(10)
    other = model(ids, use_cache=False).logits  # while the other thread is in a made-up run
    done.set()
    thread.join()
    torch.testing.assert_close(other, due, rtol=0, atol=0)
    holds(model, ids, found[0])
    assert "forward" not in vars(wrapper)


@torch.no_grad()
def test_many_prompts_and_a_wrapper_that_counts_positions_are_each_as_alone():
    class FromThird(Around):
        def forward(self, x, *args, **kwargs):
            out = self.block(x, *args, **kwargs)
            y = hidden(out).clone()
            y[:, 3:] += 1
            return with_hidden(out, y)

    model = build("llama")
    wrap(model, FromThird)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 60, (n,), generator=generator) for n in (4, 9, 6, 9)]
    for ids, result in zip(prompts, attribute_many(model, prompts, 5), strict=True):
        due = model(ids[None], use_cache=False).logits[:, -1, 5]
        torch.testing.assert_close(result.logit, due.to(result.logit), rtol=0, atol=1e-5)


def test_folder_to_resume_with_a_wrapper_or_a_forward_of_the_callers_asks_for_a_tag(tmp_path):
    prompts = [[3, 4, 5], [6, 7, 8]]
    model = build("llama")
    wrap(model, KeepsItsSize)
    with pytest.raises(InputError, match=r"layers\.1 is a wrapper of yours"):
        list(attribute_many(model, prompts, 5, resume=tmp_path / "a"))
    assert len(list(attribute_many(model, prompts, 5, resume=tmp_path / "a", tag="x"))) == 2
    model = build("llama")
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: 2 * plain(x)
    with pytest.raises(InputError, match=r"layers\.0\.mlp has a forward of yours"):
        list(attribute_many(model, prompts, 5, resume=tmp_path / "b"))


class AtPosition(nn.Module):
    """Around a sublayer: adds a vector at one position, which a short prompt does not have."""

    def __init__(self, inner: nn.Module, vector: Tensor) -> None:
        super().__init__()
        self.inner, self.vector = inner, vector

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        y = hidden(out).clone()
        y[:, 4] = y[:, 4] + self.vector.to(y)
        if y.shape[1] < 5:
            raise IndexError("there is no position 4")
        return with_hidden(out, y)


@torch.no_grad()
@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("which", [0, -1], ids=["attention", "mlp"])
@pytest.mark.parametrize("spec", ["llama-bias", "gpt2", "gemma2", "granite", "mixtral"])
def test_wrapper_around_a_sublayer_that_names_a_position_is_attributed(spec, which, unit):
    model, ids = build(spec), example_ids(spec)
    write = stream_of(model).blocks[LAYER].writes[which]
    path = next(path for path, module in model.named_modules() if module is write.module)
    holder, _, name = path.rpartition(".")
    vector = torch.linspace(-1, 1, stream_of(model).d_model)
    setattr(model.get_submodule(holder), name, AtPosition(write.module, vector).eval())
    found = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
    holds(model, ids, found)
    if unit == "head" and which == 0:
        row = found.attribution[found.labels.index(f"L{LAYER}hook")]
        assert row[:, 4].abs().min() > 0
        assert not row[:, :4].any()


@torch.no_grad()
def test_wrapper_in_an_encoder_that_takes_one_shape_only_leaves_the_decoder_to_be_attributed():
    case = next(iter(by_name("seq2seq").cases("t5", seed=0)))
    model = case.model
    block = model.encoder.block[0]

    class OneShape(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x, *args, **kwargs):
            if x.shape[:2] != case.asked["input_ids"].shape:
                raise RuntimeError("not the prompt's shape")
            return self.block(x, *args, **kwargs)

    model.encoder.block[0] = OneShape().eval()
    found = direct_logit_attribution(model, case.asked, case.answer, case.incorrect, **case.options)
    due = case.logits[..., case.columns[0]] - case.logits[..., case.columns[1]]
    torch.testing.assert_close(found.logit, due.to(found.logit), rtol=0, atol=1e-5)
