"""What a model is asked on made-up activations, where the answer is easily got wrong."""

from __future__ import annotations

import pytest
import torch
from alter import alter_output
from mapping_zoo import build_any, example_ids_any
from test_custom import DECLARATION, IDS, MadeUpConfig, OddOne
from torch import nn
from zoo import build, example_ids

from dla_hooks import DecompositionError, UnsupportedModelError, direct_logit_attribution, register
from dla_hooks.residual import registry
from dla_hooks.verification.recognise import stream_of


@pytest.fixture
def declared():
    registry.architectures()
    before = dict(registry._registered)
    register(DECLARATION)
    yield
    registry._registered.clear()
    registry._registered.update(before)


def test_scaled_positions_are_exact():
    model = build("gpt2")
    ids = example_ids("gpt2")
    alter_output(model.transformer.drop, lambda out: out * 2)
    after = direct_logit_attribution(model, ids, 5, pos=None)
    row = after.labels.index("pos_embed")
    with torch.no_grad():
        kept = []
        model.transformer.ln_f.register_forward_hook(lambda m, a, out: kept.append(a[0]))
        model(ids)
        norm, x = model.transformer.ln_f, kept[0]
        scale = (x.var(-1, unbiased=False) + norm.eps).sqrt()
        d = norm.weight * model.lm_head.weight[5]
        truth = 2 * model.transformer.wpe.weight[: ids.shape[1]] @ (d - d.mean()) / scale
    torch.testing.assert_close(after.attribution[row], truth)


def test_positions_normed_with_tokens_are_no_part():
    model = build_any("mbart")
    model.config.model_type = "mbart_of_tomorrow"
    result = direct_logit_attribution(model, example_ids_any(model), 5)
    assert "pos_embed" not in result.labels


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gate_on_another_term_is_refused_in_every_dtype(dtype):
    class Gated(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.mixer, self.mlp, self.after_mlp = block.mixer, block.mlp, block.after_mlp
            self.norm1 = block.norm1

        def forward(self, x, twist=None):
            gate = torch.sigmoid(self.norm1(x).sum(-1, keepdim=True))
            return x + gate * self.mixer(self.norm1(x)) + self.after_mlp(self.mlp(x))

    model = OddOne(MadeUpConfig())
    model.stack = nn.ModuleList(Gated(block) for block in model.stack[:2])
    model = model.to(dtype).eval()
    for check in (True, False):
        with pytest.raises(UnsupportedModelError, match=r"stack\.0 is no sum"):
            direct_logit_attribution(model, IDS, 5, check=check)


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_channels_are_refused_in_every_dtype(dtype):
    model = OddOne(MadeUpConfig()).to(dtype)
    mix = torch.randn(20, 20, generator=torch.Generator().manual_seed(3)).to(dtype) / 20**0.5
    for block in model.stack:
        alter_output(block, lambda out: out + 0.05 * out @ mix)
        break
    with pytest.raises(UnsupportedModelError, match=r"stack\.0 is no sum"):
        direct_logit_attribution(model, IDS, 5)


@pytest.mark.usefixtures("declared")
def test_shared_blocks_have_constants_per_use():
    model = OddOne(MadeUpConfig())
    result = direct_logit_attribution(model, IDS, 5, unit="head", fold_value_biases=True)
    raw = direct_logit_attribution(model, IDS, 5, unit="head")
    torch.testing.assert_close(result.attribution.sum(0), raw.attribution.sum(0))
    assert not torch.allclose(result.attribution, raw.attribution)


@pytest.mark.parametrize("model_type", ["cpmant", "moshi", "gpt_neo", "longcat_flash"])
def test_value_biases_fold_for_every_projection_layout(model_type):
    model = build_any(model_type)
    ids = example_ids_any(model)
    raw = direct_logit_attribution(model, ids, 5, unit="head")
    folded = direct_logit_attribution(model, ids, 5, unit="head", fold_value_biases=True)
    torch.testing.assert_close(folded.attribution.sum(0), raw.attribution.sum(0))


def test_two_attentions_in_one_block_have_separate_heads():
    model = build_any("longcat_flash")
    labels = direct_logit_attribution(model, example_ids_any(model), 5, unit="head").labels
    assert {"L0H0", "L0.1H0"} <= set(labels)
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize("cap", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_low_softcap_is_measured(cap, dtype):
    model = build("gemma2", dtype=dtype)
    model.config.final_logit_softcapping = cap
    result = direct_logit_attribution(model, example_ids("gemma2"), 5, 7)
    assert result.softcap == pytest.approx(cap, rel=0.01)


def test_truncated_vocabulary_is_centred_by_its_own_mean():
    model = build_any("inkling_text")
    ids = example_ids_any(model)
    result = direct_logit_attribution(model, ids, 5, center_unembed=True)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(result.logit, logits[:, 5] - logits.mean(-1), rtol=0, atol=1e-5)


def test_norm_that_squares_in_half_precision_is_measured():
    class Plain(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight

    model = build("llama", dtype=torch.float16)
    model.model.norm = Plain(model.config.hidden_size).half().eval()
    direct_logit_attribution(model, example_ids("llama"), 5, 7)


def test_model_made_in_inference_mode_is_exact():
    with torch.inference_mode():
        model = build("llama")
    direct_logit_attribution(model, example_ids("llama"), 5)


@pytest.mark.parametrize("spec", ["gpt2", "gpt_neo"])
def test_undeclared_model_prefers_declaration_with_positions_and_heads(spec):
    model = build(spec)
    model.config.model_type = "undeclared"
    stream = stream_of(model)
    assert stream.positions is not None
    assert direct_logit_attribution(model, example_ids(spec), 5, unit="head").labels[0] == "L0H0"


@pytest.mark.parametrize("model_type", ["rwkv", "recurrent_gemma", "pegasus"])
def test_padding_that_changes_the_numbers_is_refused(model_type):
    model = build_any(model_type, dtype=torch.float32)
    ids = example_ids_any(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(UnsupportedModelError, match=r"padded on the left|no attention mask"):
        direct_logit_attribution(model, ids, 5, attention_mask=mask)
    direct_logit_attribution(model, ids, 5, attention_mask=torch.ones_like(ids))


def test_a_failed_check_is_a_not_implemented_error_that_names_the_model():
    model = build("llama")
    noise = torch.randn(7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    block = model.model.layers[1]
    alter_output(block, lambda out: out + noise if out.shape[1] == 7 else out)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM \(llama\)") as caught:
        direct_logit_attribution(model, example_ids("llama"), 5)
    assert isinstance(caught.value, DecompositionError)


@pytest.mark.parametrize(("name", "runs"), [("gpt2", 2), ("gemma2", 2), ("nanochat", 4)])
def test_first_call_measures_in_one_run(name, runs):
    """A run reads all weights of a model on disk. Nanochat's final norm runs twice in each."""
    model, ids = build_any(name), example_ids_any(name)
    seen = []
    alter_output(model.get_input_embeddings(), lambda out: seen.append(1) or out)
    direct_logit_attribution(model, ids, 5)
    direct_logit_attribution(model, ids, 5)
    assert len(seen) == runs + 1


def test_declared_write_that_never_runs_is_refused():
    model, ids = build("gpt2"), example_ids("gpt2")
    block = model.transformer.h[1]

    def without_mlp(hidden_states, *_, **options):
        mask = options.get("attention_mask")
        return hidden_states + block.attn(block.ln_1(hidden_states), attention_mask=mask)[0]

    block.forward = without_mlp
    result = direct_logit_attribution(model, ids, 5)
    assert "1_attn_out" in result.labels
    assert "1_mlp_out" not in result.labels


def test_model_that_keeps_its_state_is_read_from_the_start_and_left_as_found():
    """RecurrentGemma of transformers 4 goes on from the run before, where it is to use no cache."""
    for seed in (0, 1):
        model = build_any("recurrent_gemma", dtype=torch.float32, seed=seed)
        ids = example_ids_any(model)
        with torch.no_grad():
            truth = model(ids, use_cache=True).logits[:, -1, 5]
        units = [module for module in model.modules() if hasattr(module, "recurrent_states")]
        before = [module.recurrent_states for module in units]
        for _ in range(2):
            result = direct_logit_attribution(model, ids, 5)
            found = result.softcap * torch.tanh(result.logit / result.softcap)
            torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)
        if hasattr(type(model.model), "_setup_cache"):
            after = [module.recurrent_states for module in units]
            assert all(one is other for one, other in zip(after, before, strict=True))
