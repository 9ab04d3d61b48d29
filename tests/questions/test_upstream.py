"""Who wrote what a head read: against the source unit's rows, and by hand."""

from __future__ import annotations

import pytest
import torch
from mapping_zoo import build_any
from zoo import build, example_ids

import dla_hooks
from dla_hooks import (
    Direction,
    InputError,
    PositionError,
    SourceTokens,
    UnsupportedModelError,
    direct_logit_attribution,
    upstream,
)
from dla_hooks.modules.attention_interface import why_unseen

if why_unseen() is not None:
    pytest.skip("this transformers shows no attention function", allow_module_level=True)

FAMILIES = (
    *("gpt2", "gpt_neox-parallel", "opt", "llama", "llama-bias", "mistral", "qwen2", "qwen3"),
    *("gemma2", "gemma3_text", "olmo", "olmo2", "cohere", "cohere-qknorm-untied", "granite"),
    *("phi", "phi3", "gpt_oss", "mixtral", "stablelm-parallel", "starcoder2"),
)
ANSWER, INCORRECT, SOURCE = 5, 7, 4


def row_of(result, label, entry=()):
    """One row of a ranked result at one entry."""
    index = result.index[(slice(None), *entry)].tolist()
    values = result.attribution[(slice(None), *entry)].tolist()
    found = [
        v for i, v in zip(index, values, strict=True) if i >= 0 and result.rows[i].label == label
    ]
    return found[0] if found else 0.0


@pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_sum_to_the_row_of_the_source_unit(family, seed):
    model, ids = build(family, seed), example_ids(family, seed=seed)
    head = f"L{model.config.num_hidden_layers - 1}H1"
    unit = SourceTokens(heads=[head], top=None)
    rows = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=unit, pos=[-1, 5])
    result = upstream(model, ids, ANSWER, INCORRECT, part=f"{head}<{SOURCE}", pos=[-1, 5])
    label = f"{head}<{SOURCE}"
    expected = [[row_of(rows, label, (b, p)) for p in (0, 1)] for b in (0, 1)]
    torch.testing.assert_close(result.logit, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    whole = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(whole, result.logit, rtol=0, atol=1e-9)
    assert result.positions.tolist() == [[SOURCE] * 2] * 2
    assert bool(result.logit.abs().max() > 0)


def test_shares_of_writes_are_what_their_vectors_give_by_hand():
    """GPT-2, from its weights: no code is shared with the library."""
    model, ids = build("gpt2"), example_ids("gpt2")
    last, stored, head = model.transformer.h[2], {}, 1
    handles = [
        model.transformer.h[1].mlp.register_forward_hook(
            lambda m, a, out: stored.update({"1_mlp_out": out})
        ),
        model.transformer.h[0].attn.register_forward_hook(
            lambda m, a, out: stored.update({"0_attn_out": out[0]})
        ),
        last.register_forward_pre_hook(lambda m, args: stored.update(x=args[0])),
        model.transformer.ln_f.register_forward_pre_hook(
            lambda m, args: stored.update(end=args[0])
        ),
    ]
    with torch.no_grad():
        weights = model(ids, use_cache=False, output_attentions=True).attentions[2]
    for handle in handles:
        handle.remove()
    attn, final = last.attn, model.transformer.ln_f
    n, width = attn.num_heads, ids.shape[1]
    W_V = attn.c_attn.weight.detach()[:, -attn.embed_dim :]
    d = attn.embed_dim // n
    here = slice(head * d, (head + 1) * d)
    u = model.lm_head.weight[ANSWER] - model.lm_head.weight[INCORRECT]
    u = (u * final.weight).detach()
    u = u - u.mean()
    end, x = stored["end"][:, -1], stored["x"][:, SOURCE]
    s = (end.var(-1, unbiased=False) + final.eps).sqrt()
    p = weights[:, head, width - 1, SOURCE]
    through = W_V[:, here] @ (attn.c_proj.weight.detach()[here] @ u) * last.ln_1.weight
    inner = (x.var(-1, unbiased=False) + last.ln_1.eps).sqrt()
    result = upstream(model, ids, ANSWER, INCORRECT, part=f"L2H{head}<{SOURCE}")
    for label in ("1_mlp_out", "0_attn_out"):
        write = stored[label][:, SOURCE]
        share = p / s * ((write - write.mean(-1, keepdim=True)) @ through) / inner
        found = result.attribution[result.labels.index(label)]
        torch.testing.assert_close(found, share.detach().double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "cohere"])
def test_a_path_ends_in_the_row_of_the_step_before(family):
    model, ids = build(family), example_ids(family)
    first, second = f"L{model.config.num_hidden_layers - 1}H1<4", "L0H2<3"
    unit = SourceTokens(layers=[0], top=None)
    step = upstream(model, ids, ANSWER, INCORRECT, part=first, unit=unit)
    result = upstream(model, ids, ANSWER, INCORRECT, part=[first, second])
    expected = torch.tensor([row_of(step, second, (b,)) for b in (0, 1)]).double()
    torch.testing.assert_close(result.logit, expected, rtol=1e-5, atol=1e-9)
    whole = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(whole, result.logit, rtol=0, atol=1e-9)
    assert result.answer[0].startswith(f"{second} of {first} of ")


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_every_unit_splits_the_same_row(family):
    model, ids = build(family), example_ids(family)
    units = ("component", "layer", "head", "source", "expert" if family == "mixtral" else "neuron")
    found = upstream(model, ids, ANSWER, part="L1H0<4", unit=units)
    for unit, result in found.items():
        sums = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        if hasattr(result, "rest"):
            sums = sums + result.rest + result.remainder
        torch.testing.assert_close(sums + result.bias, result.logit, rtol=0, atol=1e-6)


def test_any_target_is_split_further():
    model, ids = build("llama"), example_ids("llama")
    probe = Direction(torch.randn(40, generator=torch.Generator().manual_seed(0)), at="2_pre")
    rows = direct_logit_attribution(model, ids, probe, unit=SourceTokens(top=None))
    result = upstream(model, ids, probe, part="L1H2<3")
    expected = [row_of(rows, "L1H2<3", (b,)) for b in (0, 1)]
    torch.testing.assert_close(result.logit, torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_padded_rows_give_what_they_give_alone():
    model = build("llama", attn="sdpa")
    ids = example_ids("llama", batch=1, length=9)[0]
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    both = torch.stack((torch.cat((torch.full((4,), 3), ids[:5])), ids))
    batch = upstream(model, both, ANSWER, INCORRECT, part="L2H3<2", attention_mask=mask)
    for number, row in enumerate((ids[:5], ids)):
        alone = upstream(model, row[None], ANSWER, INCORRECT, part="L2H3<2")
        torch.testing.assert_close(
            batch.attribution[:, number], alone.attribution[:, 0], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["deepseek_v3", "minicpm3", "llama4_text", "exaone4", "bitnet"])
def test_latent_values_and_odd_norms_are_read_through(kind):
    model, ids = build_any(kind), torch.randint(3, 50, (2, 7), generator=torch.Generator())
    head = f"L{model.config.num_hidden_layers - 1}H1"
    unit = SourceTokens(heads=[head], top=None)
    rows = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=unit)
    result = upstream(model, ids, ANSWER, INCORRECT, part=f"{head}<{SOURCE}")
    expected = [row_of(rows, f"{head}<{SOURCE}", (b,)) for b in (0, 1)]
    torch.testing.assert_close(result.logit, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    whole = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(whole, result.logit, rtol=0, atol=1e-9)


def test_keys_and_values_of_an_earlier_layer_are_refused():
    model = build_any("gemma4_text", num_kv_shared_layers=1)
    head = f"L{model.config.num_hidden_layers - 1}H1"
    with pytest.raises(UnsupportedModelError, match="earlier layer"):
        upstream(model, torch.arange(3, 10)[None], ANSWER, part=f"{head}<4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
def test_shares_sum_to_the_row_in_other_dtypes(family, dtype):
    model, ids = build(family, dtype=dtype), example_ids(family)
    result = upstream(model, ids, ANSWER, INCORRECT, part="L1H1<3", pos=None)
    whole = result.attribution.sum(0) + result.bias
    close = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(whole, result.logit, rtol=0, atol=close)


def test_inference_mode_changes_nothing():
    model, ids = build("llama"), example_ids("llama")
    plain = upstream(model, ids, ANSWER, INCORRECT, part="L1H1<3")
    with torch.inference_mode():
        found = upstream(model, ids.clone(), ANSWER, INCORRECT, part="L1H1<3")
    torch.testing.assert_close(found.attribution, plain.attribution, rtol=0, atol=1e-12)


def test_a_hook_on_values_is_refused_and_one_on_the_stream_is_a_part():
    model, ids = build("llama"), example_ids("llama")
    values = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, a, out: 2 * out)
    with pytest.raises(UnsupportedModelError, match="hooks of yours"):
        upstream(model, ids, ANSWER, part="L1H1<3")
    values.remove()
    model.model.layers[0].register_forward_hook(lambda m, a, out: 1.5 * out)
    result = upstream(model, ids, ANSWER, part="L1H1<3")
    assert "0_hook" in result.labels
    whole = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(whole, result.logit, rtol=0, atol=1e-9)


def test_positions_that_do_not_see_the_token_are_zero_and_none_at_all_is_refused():
    model, ids = build("llama"), example_ids("llama")
    result = upstream(model, ids, ANSWER, part="L1H0<4", pos=[2, 5])
    assert bool((result.logit[:, 0] == 0).all() and (result.attribution[:, :, 0] == 0).all())
    with pytest.raises(InputError, match="comes later"):
        upstream(model, ids, ANSWER, part="L1H0<4", pos=[1, 2])


def test_nothing_is_left_on_the_model():
    model, ids = build("gemma2"), example_ids("gemma2")
    before = model(ids).logits
    upstream(model, ids, ANSWER, part="L1H0<4")
    with pytest.raises(InputError):
        upstream(model, ids, ANSWER, part="L1H0<4", pos=1)
    assert torch.is_grad_enabled()
    assert torch.equal(model(ids).logits, before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("part", "error", "match"),
    [
        ("L1H0", InputError, "L9H6<5"),
        ("1_mlp_out", InputError, "L9H6<5"),
        ("L1N3", InputError, "Output"),
        ([], InputError, "part must be"),
        (3, InputError, "part must be"),
        ("L9H0<1", InputError, "no head L9H0"),
        ("L1H9<1", InputError, "no head 9"),
        ("L1H0<99", PositionError, "out of range"),
        (["L1H0<4", "L1H1<2"], InputError, "writes nothing"),
        (["L1H0<4", "L2H1<2"], InputError, "writes nothing"),
    ],
)
def test_what_is_no_part_is_said(part, error, match):
    with pytest.raises(error, match=match):
        upstream(build("llama"), example_ids("llama"), ANSWER, part=part)


@pytest.mark.parametrize("family", ["bloom", "falcon-new"])
def test_a_loop_of_its_own_is_refused(family):
    with pytest.raises(UnsupportedModelError):
        upstream(build(family), example_ids(family), ANSWER, part="L1H0<4")


def test_no_answer_is_refused():
    with pytest.raises(InputError, match="answer_tokens"):
        upstream(build("llama"), example_ids("llama"), part="L1H0<4")
    assert dla_hooks.upstream is upstream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_token_that_is_hardly_read_at_all_has_a_row_of_nearly_nothing(name, dtype):
    """With attention weights whose squares, and those of their products, are no numbers but 0."""
    model, ids = build(name, dtype=dtype), example_ids(name, 1, 6)
    module = model.transformer.h[1].attn if name == "gpt2" else model.model.layers[1].self_attn
    for factor in (8.0, 20.0, 60.0, 300.0, 2000.0):
        module.scaling = factor
        for position in range(3):
            found = upstream(model, ids, 3, 5, part=f"L1H1<{position}", pos=None)
            parts = found.attribution.sum(0) + found.bias
            torch.testing.assert_close(parts, found.logit, rtol=1e-3, atol=1e-5, equal_nan=True)
