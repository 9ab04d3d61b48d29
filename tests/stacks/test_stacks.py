"""Stacks of vectors from raw models, held against the model's own activations and weights."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example_ids

import dla_hooks
from dla_hooks import InputError, UnsupportedModelError

SPECS = ("gpt2", "llama", "gemma2", "olmo2", "granite", "gpt_neox-parallel", "opt", "bloom")


@pytest.fixture(scope="module", params=SPECS)
def pair(request):
    return build(request.param), example_ids(request.param)


def hidden_states(model, ids):
    """The stream before every block, and the last one before its norm."""
    seen = []
    norm = [m for n, m in model.named_modules() if n.endswith(("norm", "ln_f", "final_layer_norm"))]
    handles = [m.register_forward_pre_hook(lambda m, a: seen.append((m, a[0]))) for m in norm]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return [*states[:-1], seen[-1][1]]


def test_the_writes_sum_to_the_stream_before_every_block(pair):
    model, ids = pair
    streams = hidden_states(model, ids)
    for layer in (0, 1, len(streams) - 1):
        stack, labels = dla_hooks.decompose_resid(model, ids, layer=layer, return_labels=True)
        assert len(labels) == len(stack)
        torch.testing.assert_close(stack.sum(0), streams[layer], rtol=1e-6, atol=1e-6)


def test_accumulated_is_the_stream(pair):
    model, ids = pair
    streams = hidden_states(model, ids)
    stack, labels = dla_hooks.accumulated_resid(model, ids, return_labels=True)
    assert labels == [*(f"{layer}_pre" for layer in range(len(streams) - 1)), "final_post"]
    torch.testing.assert_close(stack, torch.stack(streams), rtol=1e-6, atol=1e-6)


def test_accumulated_with_mid_streams_ends_in_the_models_logits(pair):
    model, ids = pair
    stack = dla_hooks.accumulated_resid(model, ids, incl_mid=True, apply_ln=True, pos_slice=-1)
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
        own = model.get_output_embeddings()(stack[-1])
    cap = getattr(model.config, "final_logit_softcapping", None)
    own = own if cap is None else cap * torch.tanh(own / cap)
    own = own / getattr(model.config, "logits_scaling", 1.0)
    torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pos_slice", [None, -1, (1, 4), [0, 2]], ids=str)
def test_heads_and_remainder_make_up_the_stream_and_the_attribution(pair, pos_slice):
    model, ids = pair
    stack, labels = dla_hooks.stack_head_results(
        model, ids, incl_remainder=True, pos_slice=pos_slice, return_labels=True
    )
    whole = dla_hooks.accumulated_resid(model, ids, pos_slice=pos_slice)[-1]
    torch.testing.assert_close(stack.sum(0), whole, rtol=1e-6, atol=1e-6)
    result = dla_hooks.direct_logit_attribution(model, ids, 5, unit="head", pos=pos_slice)
    assert labels == result.labels
    attrs = dla_hooks.logit_attrs(model, ids, stack, 5, pos_slice=pos_slice)
    torch.testing.assert_close(attrs, result.attribution, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("answer", [5, torch.tensor([[5], [9]]), torch.tensor([5, 9])], ids=str)
def test_logit_attrs_of_components_is_the_attribution(pair, answer):
    model, ids = pair
    stack = dla_hooks.decompose_resid(model, ids)
    wrong = 3 * torch.ones_like(torch.as_tensor(answer))
    attrs = dla_hooks.logit_attrs(model, ids, stack, answer, wrong)
    result = dla_hooks.direct_logit_attribution(model, ids, answer, wrong, pos=None)
    torch.testing.assert_close(attrs, result.attribution, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["gpt2", "llama", "gpt_neox-parallel", "opt", "granite", "gemma2", "olmo2"]
)
def test_neurons_and_the_bias_make_up_the_mlps(spec):
    model, ids = build(spec), example_ids(spec)
    stack, labels = dla_hooks.stack_neuron_results(
        model, ids, layer=2, incl_remainder=True, pos_slice=-1, return_labels=True
    )
    assert labels[0] == "L0N0"
    assert labels[-1] == "remainder"
    whole = dla_hooks.accumulated_resid(model, ids, layer=2, pos_slice=-1)[-1]
    torch.testing.assert_close(stack.sum(0), whole, rtol=1e-6, atol=1e-6)
    # The neurons alone are the MLPs' writes, less what the down projections add to nothing.
    mlps = dla_hooks.decompose_resid(
        model, ids, layer=2, mode="mlp", incl_embeds=False, pos_slice=-1
    )
    rest = mlps.sum(0) - stack[:-1].sum(0)
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=1e-6, atol=1e-6)


def test_neurons_along_a_direction_are_never_built_whole():
    model, ids = build("gpt2"), example_ids("gpt2")
    onto = torch.randn(model.config.n_embd, 3, dtype=torch.float64)
    whole = dla_hooks.stack_neuron_results(model, ids, incl_remainder=True, apply_ln=True)
    along = dla_hooks.stack_neuron_results(
        model, ids, incl_remainder=True, apply_ln=True, project_output_onto=onto
    )
    torch.testing.assert_close(along, whole @ onto, rtol=1e-8, atol=1e-8)
    one = dla_hooks.stack_neuron_results(
        model, ids, neuron_slice=[4, 1], project_output_onto=onto[:, 0]
    )
    assert one.shape == (2 * model.config.n_layer, *ids.shape)
    plain = dla_hooks.stack_neuron_results(model, ids, neuron_slice=[4, 1])
    torch.testing.assert_close(one, plain @ onto[:, 0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mlp_input", [False, True], ids=["attention", "mlp"])
@pytest.mark.parametrize(("spec", "norms"), [("gpt2", "ln_"), ("llama", "layernorm")])
def test_the_norm_in_the_middle_is_the_one_that_reads_the_stream(spec, norms, mlp_input):
    model, ids = build(spec), example_ids(spec)
    stack = dla_hooks.decompose_resid(model, ids, layer=1, apply_ln=True, mlp_input=mlp_input)
    block = (model.transformer.h if spec == "gpt2" else model.model.layers)[1]
    names = [n for n, _ in block.named_children() if norms in n]
    norm = getattr(block, names[mlp_input])
    seen = []
    handle = norm.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    handle.remove()
    bias = norm.bias if getattr(norm, "bias", None) is not None else 0
    torch.testing.assert_close(stack.sum(0) * norm.weight + bias, seen[0], rtol=1e-5, atol=1e-5)


def test_batch_slices_take_rows_of_stack_and_scale():
    model, ids = build("gpt2"), example_ids("gpt2", batch=3)
    stack = dla_hooks.decompose_resid(model, ids)
    every = dla_hooks.apply_ln_to_stack(model, ids, stack)
    some = dla_hooks.apply_ln_to_stack(model, ids, stack, batch_slice=[2, 0])
    torch.testing.assert_close(some, every[:, [2, 0]])
    one = dla_hooks.apply_ln_to_stack(model, ids[:1], stack[:, 0], has_batch_dim=False)
    torch.testing.assert_close(one, every[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m, i: dla_hooks.decompose_resid(m, i, mode="heads"), InputError, "'mlp'"),
        (lambda m, i: dla_hooks.decompose_resid(m, i, layer=9), InputError, "from 0 to"),
        (lambda m, i: dla_hooks.decompose_resid(m, i, layer=True), InputError, "layer"),
        (lambda m, i: dla_hooks.decompose_resid(m), InputError, "either `input`"),
        (lambda m, i: dla_hooks.decompose_resid(m, i, mlp_input=True), InputError, "mlp_input"),
        (lambda m, i: dla_hooks.decompose_resid(m, i, pos_slice="x"), InputError, "pos"),
        (lambda m, i: dla_hooks.decompose_resid(m, i, pos_slice=99), IndexError, "99"),
        (lambda m, i: dla_hooks.decompose_resid(m, i, colour=1), TypeError, "colour"),
        (
            lambda m, i: dla_hooks.stack_neuron_results(m, i, project_output_onto=torch.ones(3)),
            InputError,
            "d_model",
        ),
        (lambda m, i: dla_hooks.accumulated_resid(None, i), InputError, "model must be"),
    ],
)
def test_wrong_arguments(call, error, says):
    model, ids = build("gpt2"), example_ids("gpt2")
    with pytest.raises(error, match=says):
        call(model, ids)


def test_experts_have_no_neurons_to_stack():
    model, ids = build("mixtral"), example_ids("mixtral")
    with pytest.raises(UnsupportedModelError, match="experts"):
        dla_hooks.stack_neuron_results(model, ids)


def test_a_post_norm_block_has_no_norm_before_attention():
    model, ids = build("olmo2"), example_ids("olmo2")
    with pytest.raises(UnsupportedModelError, match="no norm before"):
        dla_hooks.decompose_resid(model, ids, layer=1, apply_ln=True)


def test_a_wrapped_models_stacks_are_read_as_its_attribution_is():
    model, ids = build("gpt2"), example_ids("gpt2")
    wrapped = dla_hooks.wrap(model)
    stack = dla_hooks.decompose_resid(wrapped, ids)
    attrs = dla_hooks.logit_attrs(wrapped, ids, stack, 5)
    result = dla_hooks.direct_logit_attribution(wrapped, ids, 5, pos=None)
    torch.testing.assert_close(attrs, result.attribution, rtol=1e-5, atol=1e-5)
    raw = dla_hooks.direct_logit_attribution(model, ids, 5, pos=None)
    assert not torch.allclose(raw.attribution, result.attribution, atol=1e-3)
    torch.testing.assert_close(
        result.logit, wrapped(ids)[..., 5], rtol=1e-5, atol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda stack: {"tokens": -1}, dla_hooks.TokenError, "-1"),
        (lambda stack: {"tokens": 5, "incorrect_tokens": 10**6}, dla_hooks.TokenError, "1000000"),
        (lambda stack: {"tokens": 5, "residual_stack": stack[..., :3]}, RuntimeError, "shape"),
        (lambda stack: {"tokens": 5, "residual_stack": stack[:, :, -1]}, RuntimeError, "pos_slice"),
    ],
)
def test_logit_attrs_of_what_does_not_fit(change, error, says):
    model, ids = build("gpt2"), example_ids("gpt2")
    stack = dla_hooks.decompose_resid(model, ids)
    with pytest.raises(error, match=says):
        dla_hooks.logit_attrs(model, ids, **{"residual_stack": stack, **change(stack)})
