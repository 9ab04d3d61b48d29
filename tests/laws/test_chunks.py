"""Prompts in chunks, against the model's own cache: the same numbers, or a refusal."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from mapping_zoo import build_any
from rotary import length_dependent
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from units import UNIT_NAMES
from zoo import build, example_ids, tiny_tokenizer

from dla_hooks import DLAWarning, InputError, UnsupportedModelError, direct_logit_attribution
from dla_hooks.sources import live as chunks_module

pytestmark = pytest.mark.lowest

# Their layers attend to all tokens, to a window of 3 or 4, or to both; some norm what they write.
SPECS = ["gpt2", "gpt_neo", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "granite"]


class Calls:
    """How many columns each forward pass of a model was given, and where taps were on.

    It counts in ``forward``, since a hook would be the caller's, who is spared automatic chunks.
    """

    def __init__(self, model, watched=None):
        self.widths, self.tapped = [], []
        forward = model.forward

        @functools.wraps(forward)
        def counted(*args, **kwargs):
            self.widths.append(kwargs["input_ids"].shape[1])
            if watched is not None:
                self.tapped.append(bool(watched._forward_hooks))
            return forward(*args, **kwargs)

        model.forward = counted


def spread(result) -> float:
    return float(result.logit.max() - result.logit.min())


@pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("spec", SPECS)
def test_chunks_match_one_run(spec, unit, seed):
    model = build(spec, seed=seed)
    ids = example_ids(spec, batch=2, length=19, seed=seed)
    calls = Calls(model)
    whole = direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=None)
    calls.widths.clear()
    parts = direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=None, chunk_size=6)
    assert calls.widths[-4:] == [6, 6, 6, 1]
    # transformers computes softmax and rotary tables in float32, in blocks of other shapes here.
    difference = (parts.attribution - whole.attribution).abs().max()
    assert float(difference) <= 1e-5 * spread(whole)
    torch.testing.assert_close(parts.logit, whole.logit, rtol=0, atol=1e-5 * spread(whole))
    assert torch.equal(parts.positions, whole.positions)
    assert parts.gap < 1e-9 * spread(whole)
    assert parts.logit_gap == parts.logit_gap  # it was held against the model's own logits


@pytest.mark.parametrize("pos", [-1, 0, [2, 11, 18], (3, 14, 4), slice(-3, None)], ids=str)
@pytest.mark.parametrize("spec", ["gpt2", "gemma2"])
def test_positions_in_several_chunks_match_one_run(spec, pos):
    model, ids = build(spec), example_ids(spec, batch=3, length=19)
    whole = direct_logit_attribution(model, ids, 5, unit="head", pos=pos)
    parts = direct_logit_attribution(model, ids, 5, unit="head", pos=pos, chunk_size=5)
    torch.testing.assert_close(parts.attribution, whole.attribution, rtol=0, atol=1e-5)


@pytest.mark.parametrize("conventions", [True, False])
@pytest.mark.parametrize("spec", ["gpt2", "gpt_neox-parallel", "llama-bias"])
def test_target_at_every_position_matches_one_run(spec, conventions):
    model, ids = build(spec), example_ids(spec, batch=2, length=19)
    options = {
        "unit": "head",
        "pos": None,
        "center_unembed": conventions,
        "fold_value_biases": conventions,
    }
    whole = direct_logit_attribution(model, ids[:, :-1], ids[:, 1:], **options)
    parts = direct_logit_attribution(model, ids[:, :-1], ids[:, 1:], chunk_size=7, **options)
    torch.testing.assert_close(parts.attribution, whole.attribution, rtol=0, atol=1e-5)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("spec", ["gpt2", "llama", "mistral"])
def test_padded_rows_in_chunks_match_one_run(spec, left):
    model, ids = build(spec, attn="sdpa"), example_ids(spec, batch=2, length=17)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 7) if left else slice(10, None)] = 0  # more than one chunk of padding
    padded = {"attention_mask": mask, "unit": "head", "pos": None}
    whole = direct_logit_attribution(model, ids, 5, **padded)
    parts = direct_logit_attribution(model, ids, 5, chunk_size=4, **padded)
    torch.testing.assert_close(
        parts.attribution, whole.attribution, rtol=0, atol=1e-5, equal_nan=True
    )
    alone = direct_logit_attribution(model, ids[0][mask[0] == 1], 5, unit="head", pos=None)
    here = parts.attribution[:, 0, mask[0] == 1]
    torch.testing.assert_close(here, alone.attribution[:, 0], rtol=0, atol=1e-5)


def test_strings_in_chunks_match_one_run():
    model, tokenizer = build("gpt2"), tiny_tokenizer()
    text = "the cat sat on the mat the cat sat on the mat"
    whole = direct_logit_attribution(model, text, 5, tokenizer=tokenizer)
    parts = direct_logit_attribution(model, text, 5, tokenizer=tokenizer, chunk_size=3)
    torch.testing.assert_close(parts.attribution, whole.attribution, rtol=0, atol=1e-5)
    assert parts.tokens == whole.tokens


def test_chunks_without_a_selected_position_are_not_tapped():
    model, ids = build("gpt2"), example_ids("gpt2", length=20)
    calls = Calls(model, watched=model.transformer.h[0].attn.c_proj)
    direct_logit_attribution(model, ids, 5, unit="head", chunk_size=6)
    assert calls.tapped[-4:] == [False, False, False, True]
    direct_logit_attribution(model, ids, 5, unit="head", pos=[1, 13], chunk_size=6)
    assert calls.tapped[-4:] == [True, False, True, False]
    assert not model.transformer.h[0].attn.c_proj._forward_hooks


def test_chunk_of_prompt_length_equals_whole_prompt():
    model, ids = build_any("mamba"), example_ids("gpt2", length=9)
    calls = Calls(model)
    direct_logit_attribution(model, ids, 5, chunk_size=9)
    assert calls.widths[-1] == 9


def test_long_prompt_is_chunked_by_default(monkeypatch):
    monkeypatch.setattr(chunks_module, "LONG_PROMPT", 16)
    monkeypatch.setattr(chunks_module, "AUTOMATIC_CHUNK", 8)
    model = build("llama")
    for length, widths in ((16, [16]), (17, [8, 8, 1])):
        calls = Calls(model)
        direct_logit_attribution(model, example_ids("llama", length=length), 5)
        assert calls.widths[-len(widths) :] == widths
        del model.forward


def test_long_prompt_that_chunks_change_runs_whole_with_warning(monkeypatch):
    monkeypatch.setattr(chunks_module, "LONG_PROMPT", 16)
    recurrent, ids = build_any("mamba"), example_ids("gpt2", length=20)
    calls = Calls(recurrent)
    with pytest.warns(DLAWarning, match="runs at once instead of in chunks of 2048") as caught:
        direct_logit_attribution(recurrent, ids, 5)
    assert calls.widths[-1] == 20
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "20 tokens" in str(caught[0].message)
    direct_logit_attribution(recurrent, ids, 5, chunk_size=20)  # asked for: nothing to warn of


def test_long_prompt_with_library_hooks_is_still_chunked(monkeypatch):
    monkeypatch.setattr(chunks_module, "LONG_PROMPT", 16)
    monkeypatch.setattr(chunks_module, "AUTOMATIC_CHUNK", 8)
    model, ids = build("llama"), example_ids("llama", length=20)

    def keep(module, args, output, kept):
        kept.append(output)

    keep.__module__ = "transformers.utils.output_capturing"
    model.model.layers[0].register_forward_hook(functools.partial(keep, kept=[]))
    calls = Calls(model)
    direct_logit_attribution(model, ids, 5)
    assert calls.widths[-3:] == [8, 8, 4]


def test_hooks_are_removed_when_a_later_chunk_fails():
    model, ids = build("gpt2"), example_ids("gpt2", length=20)
    direct_logit_attribution(model, ids, 5, chunk_size=6)  # asks its questions
    runs = []

    def fail(*_):
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt

    handle = model.transformer.h[1].register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt), pytest.warns(DLAWarning, match="a hook of yours"):
            direct_logit_attribution(model, ids, 5, pos=None, chunk_size=6)
    finally:
        handle.remove()
    left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not left


@pytest.mark.parametrize("wrong", [0, -3, True, 2.0, "8", [4]], ids=str)
def test_chunk_size_of_wrong_value_is_refused(wrong):
    model, ids = build("gpt2"), example_ids("gpt2")
    with pytest.raises(InputError, match=r"chunk_size must be a positive number of tokens"):
        direct_logit_attribution(model, ids, 5, chunk_size=wrong)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "gives other logits in chunks than at once"),
        ("jamba", "gives other logits in chunks than at once"),
        ("deepseek_v32", "DynamicIndexedLayer"),
        ("recurrent_gemma", "hands on no cache"),
        ("cpmant", "must match the size"),
    ],
)
def test_chunks_on_models_they_change_are_refused(model_type, reason):
    old = int(transformers.__version__.split(".")[0]) < 5
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    model = build_any(model_type)
    ids = torch.randint(5, 40, (1, 12), generator=torch.Generator().manual_seed(0))
    # Why transformers 4 cannot do it differs; that it is refused does not.
    reason = "chunks" if old else reason
    with pytest.raises(UnsupportedModelError, match=reason) as raised:
        direct_logit_attribution(model, ids, 7, chunk_size=5)
    assert "cannot be run in chunks" in str(raised.value)
    assert "Leave chunk_size out" in str(raised.value)
    direct_logit_attribution(model, ids, 7)  # as a whole it can be run


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_chunks_with_length_dependent_positions_are_refused(kind):
    model = length_dependent(kind)
    ids = torch.randint(5, 40, (1, 24), generator=torch.Generator().manual_seed(0))
    short = direct_logit_attribution(model, ids[:, :20], 7, unit="head", chunk_size=4)
    whole = direct_logit_attribution(model, ids[:, :20], 7, unit="head")
    torch.testing.assert_close(short.attribution, whole.attribution, rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match=f"rotary positions \\({kind}\\) depend on how"):
        direct_logit_attribution(model, ids, 7, chunk_size=4)


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="padding is refused there altogether"
)
@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2", "lfm2", "nemotron_h"])
def test_chunks_with_padding_in_recurrent_layers_are_refused(model_type):
    """On its own a token is a step of generation, where these models expect no padding."""
    model = build_any(model_type)
    ids = torch.randint(5, 40, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pytest.raises(UnsupportedModelError, match=r"padded as this one is"):
        direct_logit_attribution(model, ids, 7, attention_mask=mask, chunk_size=1)
    whole = direct_logit_attribution(model, ids, 7, pos=None)
    parts = direct_logit_attribution(model, ids, 7, pos=None, chunk_size=1)
    assert float((parts.attribution - whole.attribution).abs().max()) < 1e-5 * spread(whole)


def test_chunks_on_rwkv_batches_are_refused():
    model = build_any("rwkv")
    ids = torch.randint(5, 40, (2, 13), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModelError, match="cannot be run in chunks"):
        direct_logit_attribution(model, ids, 7, chunk_size=6)


def test_long_prompt_with_callers_hooks_is_not_chunked(monkeypatch):
    monkeypatch.setattr(chunks_module, "LONG_PROMPT", 16)
    monkeypatch.setattr(chunks_module, "AUTOMATIC_CHUNK", 8)
    model, ids = build("llama"), example_ids("llama", length=20)

    def ablate(module, args, out):
        if out.shape[1] == 20:
            out[:, 5] = 0
        return out

    handle = model.model.layers[0].mlp.register_forward_hook(ablate)
    with torch.no_grad():
        truth = model(ids).logits[:, -1, 5]
    with pytest.warns(DLAWarning, match="model.layers.0.mlp has a hook of yours"):
        found = direct_logit_attribution(model, ids, 5)
    handle.remove()
    torch.testing.assert_close(found.logit, truth, rtol=0, atol=1e-6)


def test_long_prompt_with_a_wrapper_of_the_callers_is_not_chunked(monkeypatch):
    class Around(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, **kwargs):
            out = self.block(x, **kwargs).clone()
            out[:, 5:6] += 1
            return out

    monkeypatch.setattr(chunks_module, "LONG_PROMPT", 16)
    monkeypatch.setattr(chunks_module, "AUTOMATIC_CHUNK", 8)
    model, ids = build("llama"), example_ids("llama", length=20)
    model.model.layers[0] = Around(model.model.layers[0]).eval()
    with torch.no_grad():
        truth = model(ids).logits[:, -1, 5]
    with pytest.warns(DLAWarning, match="Around is a wrapper of yours"):
        found = direct_logit_attribution(model, ids, 5)
    torch.testing.assert_close(found.logit, truth, rtol=0, atol=1e-6)
    with pytest.warns(DLAWarning, match="as a wrapper of yours does"):
        direct_logit_attribution(model, ids, 5, chunk_size=8)
