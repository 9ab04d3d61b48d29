"""Corners where a check or a probe could be fooled: nothing, too much, and what is not a number."""

from __future__ import annotations

import pytest
import torch
from alter import alter_output
from transformers import AutoConfig, AutoModelForCausalLM
from units import UNIT_NAMES
from zoo import build, example_ids, tiny_tokenizer

from dla_hooks import (
    Architecture,
    CheckpointError,
    DecompositionError,
    DirectLogitAttribution,
    InputError,
    NonFiniteError,
    TokenError,
    UnsupportedModelError,
    Write,
    demo,
    direct_logit_attribution,
    register,
    verify,
)

pytestmark = pytest.mark.lowest


def default_model(model_type: str, **changes):
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**sizes, **changes})
    ).eval()


# Not a number


@pytest.mark.parametrize("where", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_is_named_even_if_unread(where, value):
    model = build("llama")
    ids = example_ids("llama")
    unused = next(
        i for i in range(model.config.vocab_size) if i not in ids.tolist() and i not in (5, 7)
    )
    with torch.no_grad():
        model.get_parameter(where)[unused, 0] = value
    ran = []
    model.register_forward_hook(lambda *_: ran.append(1))
    for call in (
        lambda: direct_logit_attribution(model, ids, 5, 7),
        lambda: verify(model, show=False),
    ):
        with pytest.raises(NonFiniteError, match=where):
            call()
    assert not ran


def test_non_finite_weight_after_good_call_is_named():
    model = build("gpt2")
    ids = example_ids("gpt2")
    direct_logit_attribution(model, ids, 5)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"h\.0\.attn\.c_attn\.weight"):
        direct_logit_attribution(model, ids, 5)


def masking(model, tokens):
    def mask(module, args, out):
        out = out.clone()
        out[..., tokens] = -torch.inf
        return out

    model.get_output_embeddings().register_forward_hook(mask)


def test_partly_masked_vocabulary_is_attributed():
    model = build("llama")
    ids = example_ids("llama")
    expected = direct_logit_attribution(model, ids, 5).attribution
    masking(model, [0, 9])
    masked = direct_logit_attribution(model, ids, 5)
    torch.testing.assert_close(masked.attribution[:-1], expected)
    assert masked.labels[-1] == "logit_hook"
    assert not masked.attribution[-1].any()
    with pytest.raises((NonFiniteError, DecompositionError)):
        direct_logit_attribution(model, ids, 9)


def test_check_with_infinite_logits_still_runs():
    model = build("llama")
    ids = example_ids("llama")
    masking(model, [0])
    noise = torch.randn(7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    alter_output(model.model.layers[0], lambda out: out + noise if out.shape[1] == 7 else out)
    with pytest.raises(DecompositionError):
        direct_logit_attribution(model, ids, 5)


# Nothing


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_stream_of_zeros_gives_zero_parts(unit):
    model = default_model("llama", pad_token_id=0)
    ids = torch.tensor([[0, 0, 5, 6]])  # transformers leaves the padding's embedding at zero
    mask = torch.ones_like(ids)
    result = direct_logit_attribution(model, ids, 3, unit=unit, pos=None, attention_mask=mask)
    assert result.attribution[:, 0, 0].abs().max() == 0
    with torch.no_grad():
        torch.testing.assert_close(result.logit[0], model(ids).logits[0, :, 3])


@pytest.mark.parametrize("spec", ["gemma2", "olmo2"])
def test_post_norm_with_zero_gain_is_exact(spec):
    model = build(spec)
    weight = model.model.layers[0].post_attention_layernorm.weight
    with torch.no_grad():
        weight.fill_(-1 if spec == "gemma2" else 0)
    result = direct_logit_attribution(model, example_ids(spec), 5, unit="head")
    n_heads = model.config.num_attention_heads
    assert result.attribution[:n_heads].abs().max() == 0


def test_final_norm_with_zero_gain_is_exact():
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
    result = direct_logit_attribution(model, example_ids("gpt2"), 5)
    assert result.attribution.abs().max() == 0
    torch.testing.assert_close(result.logit, result.bias)


@pytest.mark.parametrize("spec", ["gpt2", "llama"])
def test_norm_without_epsilon_is_exact(spec):
    model = build(spec)
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    ids = example_ids(spec)
    for unit in ("component", "head"):
        result = direct_logit_attribution(model, ids, 5, unit=unit)
        with torch.no_grad():
            truth = model(ids).logits[:, -1, 5]
        torch.testing.assert_close(result.logit, truth, rtol=1e-5, atol=1e-5)


def test_vocabulary_of_one_token_is_attributed():
    model = default_model("llama", vocab_size=1, bos_token_id=0, eos_token_id=0)
    result = direct_logit_attribution(model, torch.zeros(1, 3, dtype=torch.long), 0)
    torch.testing.assert_close(result.attribution.sum(0) + result.bias, result.logit)


def test_empty_positions_give_empty_result():
    model, tokenizer = demo.load()
    result = direct_logit_attribution(
        model, "The keys near the cabinet", " are", pos=slice(3, 1), tokenizer=tokenizer
    )
    assert result.attribution.shape == (10, 1, 0)
    assert "nan" not in repr(result).lower() or "no position" in repr(result)
    with pytest.raises(InputError, match="nothing to draw"):
        result.plot()


# Too much


def test_check_tolerates_large_equal_logits():
    model = default_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        common = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.mul_(0.05).add_(30 * common)
    for unit in ("component", "head"):
        direct_logit_attribution(model, torch.tensor([[4, 5, 6]]), 3, unit=unit, pos=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_check_tolerates_cancelled_massive_activation(dtype):
    model = build("gpt2").float()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias[3] += 3000
        model.transformer.h[-1].mlp.c_proj.bias[3] -= 3000
    model = model.to(dtype)
    for unit in UNIT_NAMES:
        direct_logit_attribution(model, example_ids("gpt2"), 5, 7, unit=unit, pos=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_saturated_softcap_is_handled(dtype, seed):
    model = build("gemma2-no-caps", seed=seed, dtype=dtype)
    model.config.final_logit_softcapping = 3.0
    ids = example_ids("gemma2-no-caps", seed=seed)
    for unit in ("component", "head"):
        result = direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=None)
        assert result.softcap == 3.0
    model.config.final_logit_softcapping = None
    with torch.no_grad():
        logits = model(ids).logits.double()
    truth = logits[..., 5] - logits[..., 7]
    spread = float((logits.amax(-1) - logits.amin(-1)).mean())
    loose = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    torch.testing.assert_close(result.logit.double(), truth, rtol=0, atol=loose * spread)


def test_norm_that_deviates_at_one_position_is_refused():
    model = build("llama")
    ids = example_ids("llama", length=40)
    noise = torch.zeros(40, model.config.hidden_size).double()
    noise[5] = 0.3

    alter_output(model.model.norm, lambda out: out + noise if out.shape[1] == 40 else out)
    with pytest.raises(DecompositionError, match=r"model\.norm did something else"):
        direct_logit_attribution(model, ids, 5, pos=None)


# Labels


def test_mid_streams_do_not_depend_on_weights():
    model, tokenizer = demo.load()
    prompt = "The keys near the cabinet"
    expected = direct_logit_attribution(model, prompt, " are", unit="layer", tokenizer=tokenizer)
    assert "2_mid" in expected.labels
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for block in model.transformer.h:  # a zero-initialised residual branch
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.bias.zero_()
    zeroed = direct_logit_attribution(model, prompt, " are", unit="layer", tokenizer=tokenizer)
    assert zeroed.labels == expected.labels
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.bias.add_(100 * torch.randn(96))
    biased = direct_logit_attribution(model, prompt, " are", unit="layer", tokenizer=tokenizer)
    assert biased.labels == expected.labels
    model.load_state_dict(kept)
    again = direct_logit_attribution(model, prompt, " are", unit="layer", tokenizer=tokenizer)
    torch.testing.assert_close(again.attribution, expected.attribution)


def test_a_ragged_batch_names_each_rows_own_answer():
    model, tokenizer = demo.load()
    prompts = [
        "The keys near the cabinet",
        "When Mary and John went to the store, John gave a drink to",
    ]
    result = direct_logit_attribution(
        model, prompts, [" are", " Mary"], [" is", " John"], pos=None, tokenizer=tokenizer
    )
    n = result.attribution.shape[-1]
    assert result.answer == [" are"] * n + [" Mary"] * n
    assert result.incorrect == [" is"] * n + [" John"] * n
    assert "endoftext" not in repr(result)


# Arguments


def test_answers_at_padding_may_hold_anything():
    model = build("gpt2", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    answers = torch.tensor([[2, 3, 9, -100], [5, 6, 7, 9]])
    result = direct_logit_attribution(model, ids, answers, pos=None, attention_mask=mask)
    assert result.attribution.isnan().any(0).tolist() == [[False] * 3 + [True], [False] * 4]
    with pytest.raises(TokenError, match="-100"):
        direct_logit_attribution(model, ids, answers, pos=None)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"answer_tokens": 2**64}, TokenError, "outside the model's vocabulary"),
        ({"attention_mask": "abc"}, InputError, "attention_mask must be a tensor"),
        ({"tokenizer": "gpt2"}, InputError, "tokenizer must be a tokenizer, got str"),
        ({"pos": torch.tensor([True, False])}, InputError, "mask of 2 for a prompt of 7"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        direct_logit_attribution(
            build("gpt2"), **{"input": example_ids("gpt2"), "answer_tokens": 5, **arguments}
        )


def test_model_types_as_one_string_are_refused():
    with pytest.raises(InputError, match="tuple of names"):
        register(Architecture("abc", "layers", "norm", (Write("mlp_out", "mlp"),)))


def test_nonlinear_unembedding_is_refused_and_scaled_one_is_not():
    class Gated(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sigmoid()

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model, ids = build("llama"), example_ids("llama")
    model.lm_head.__class__ = Gated
    with pytest.raises(UnsupportedModelError, match=r"the unembedding \(Gated\) is not linear"):
        direct_logit_attribution(model, ids, 5)
    model.lm_head.__class__ = Scaled
    found = direct_logit_attribution(model, ids, 5, center_unembed=True)
    expected = direct_logit_attribution(build("llama"), ids, 5, center_unembed=True)
    torch.testing.assert_close(found.attribution, 3 * expected.attribution)


def test_unwritable_and_unreadable_results_are_refused(tmp_path):
    from safetensors.torch import save_file

    result = direct_logit_attribution(build("gpt2"), example_ids("gpt2"), 5)
    with pytest.raises(CheckpointError, match="cannot be written"):
        result.save(tmp_path / "missing" / "r.safetensors")
    for header in ("not json", "{}", '{"unit": 1, "nonsense": 2}'):
        header = {"format": "dla_hooks.result", "version": "1", "result": header}
        save_file({"attribution": torch.zeros(1)}, tmp_path / "r.safetensors", metadata=header)
        with pytest.raises(CheckpointError, match="damaged"):
            DirectLogitAttribution.load(tmp_path / "r.safetensors")


def test_nan_is_ranked_last():
    attribution = torch.tensor([float("nan"), 1.0, -1.0])
    rest = torch.zeros(())
    result = DirectLogitAttribution(attribution, ["x", "up", "down"], "head", rest, rest, 0.0)
    assert [label for label, _ in result.top(3)] == ["up", "down", "x"]
    assert [label for label, _ in result.bottom(3)] == ["down", "up", "x"]
    with pytest.raises(InputError, match=r"2\.5"):
        result.top(2.5)


def test_a_sentencepiece_like_token_keeps_its_space():
    from dla_hooks.inputs.prompts import to_strings

    class Pieces:
        def decode(self, ids):
            return ["The", "Eiffel"][ids[0]]

        def convert_ids_to_tokens(self, i):
            return ["\u2581The", "\u2581Eiffel"][i]

    assert to_strings([0, 1], Pieces()) == [" The", " Eiffel"]
    assert to_strings(tiny_tokenizer().encode("the")[:1], tiny_tokenizer())
