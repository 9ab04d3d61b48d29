"""Which models are taken, which are refused and how, and that the model is left as it was."""

from __future__ import annotations

import copy
import re
import threading

import pytest
import torch
from alter import alter_output
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
)
from units import EVERY_UNIT, UNIT_NAMES
from zoo import build, example_ids

import dla_hooks.modules.hooks
from dla_hooks import (
    Architecture,
    DecompositionError,
    DLAError,
    InputError,
    NonFiniteError,
    TrainingModeError,
    UnsupportedModelError,
    Write,
    architectures,
    direct_logit_attribution,
    register,
)
from dla_hooks.modules import version
from dla_hooks.residual import registry

pytestmark = pytest.mark.lowest

IDS = example_ids("gpt2")


def small(model_type: str, auto=AutoModelForCausalLM, **config):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return auto.from_config(AutoConfig.for_model(model_type, **{**sizes, **config})).eval()


@pytest.mark.parametrize("model", [None, "gpt2", nn.Linear(3, 3), object()])
def test_non_language_model_is_refused(model):
    with pytest.raises(InputError, match="must be a Hugging Face causal language model"):
        direct_logit_attribution(model, IDS, 5)


def test_labels_of_an_encoder_decoder_are_refused():
    t5 = small(
        "t5", AutoModelForSequenceClassification, d_model=32, d_ff=64, num_layers=2, num_heads=4,
        d_kv=8, decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"a dense layer and an activation stand"):
        direct_logit_attribution(t5, IDS, 0)


def test_an_encoder_is_refused():
    bert = small("bert", AutoModelForMaskedLM)
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        direct_logit_attribution(bert, IDS, 5)


def test_a_model_without_a_head_is_refused():
    headless = small("llama", AutoModel)
    with pytest.raises(UnsupportedModelError, match="pass the whole model"):
        direct_logit_attribution(headless, IDS, 5)


def test_post_norm_opt_is_refused():
    model = small("opt", do_layer_norm_before=False, ffn_dim=64, word_embed_proj_dim=32)
    with pytest.raises((UnsupportedModelError, DecompositionError)):
        direct_logit_attribution(model, IDS, 5)


def test_containers_made_after_eval_have_no_training_mode():
    model = build("gpt2")
    kept = model.transformer.h[0]
    kept.mlp.act = nn.Sequential(kept.mlp.act, nn.Identity())
    model.transformer.h = nn.ModuleList([kept])
    assert model.transformer.h.training
    assert kept.mlp.act.training
    result = direct_logit_attribution(model, IDS, 5)
    assert result.labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out"]


@pytest.mark.parametrize("part", ["transformer.h.1", "transformer.h.1.attn.resid_dropout"])
def test_part_in_training_mode_is_refused_by_name(part):
    model = build("gpt2")
    model.get_submodule(part).training = True
    with pytest.raises(TrainingModeError, match=f"training mode \\(in {part}\\)"):
        direct_logit_attribution(model, IDS, 5)


def test_call_walks_over_modules_once(monkeypatch):
    model = build("gpt2")
    direct_logit_attribution(model, IDS, 5)
    walks, modules_of = [], version.modules_of

    def counted(root):
        walks.append(root)
        return modules_of(root)

    monkeypatch.setattr(version, "modules_of", counted)
    monkeypatch.setattr(model, "named_modules", None)  # the two that torch has for it
    monkeypatch.setattr(model, "modules", None)
    direct_logit_attribution(model, IDS, 5)
    assert walks == [model]


def test_a_model_in_training_mode_is_refused():
    model = build("gpt2")
    model.train()
    with pytest.raises(TrainingModeError, match=r"model\.eval\(\)"):
        direct_logit_attribution(model, IDS, 5)
    model.eval()
    model.transformer.h[1].mlp.train()
    with pytest.raises(TrainingModeError, match=r"transformer\.h\.1\.mlp"):
        direct_logit_attribution(model, IDS, 5)


def test_unknown_units_are_listed():
    with pytest.raises(InputError, match=re.escape(f"{EVERY_UNIT}, got 'token'")):
        direct_logit_attribution(build("gpt2"), IDS, 5, unit="token")
    with pytest.raises(InputError, match="got None"):
        direct_logit_attribution(build("gpt2"), IDS, 5, unit=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_weights_that_are_not_finite_are_named(value, unit):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        direct_logit_attribution(model, example_ids("llama"), 5, unit=unit)


def test_a_final_norm_that_is_not_finite_is_named():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        direct_logit_attribution(model, example_ids("llama"), 5)


def test_activations_that_overflow_are_located():
    model = build("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e4)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
    with pytest.raises(NonFiniteError, match="1_mlp_out.*float16"):
        direct_logit_attribution(model, example_ids("llama"), 5)


# The model is a guest


def everything_about(model):
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": [p.requires_grad for p in model.parameters()],
        "config": model.config.to_dict(),
        "training": [m.training for m in model.modules()],
        "hooks": [
            (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one == other


@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "granite", "falcon-7b", "gpt_oss"])
@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_model_is_unchanged_after_call(spec, unit):
    model = build(spec)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, o: seen.append(1))
    before = everything_about(model)
    logits = model(IDS).logits
    fold = spec != "gpt_oss"
    direct_logit_attribution(model, IDS, 5, unit=unit, center_unembed=True, fold_value_biases=fold)
    assert same(before, everything_about(model))
    assert torch.equal(logits, model(IDS).logits)
    assert len(seen) >= 3  # the caller's own hook still fires


@pytest.mark.parametrize("unit", ["component", "head"])
def test_model_is_unchanged_after_exception(unit):
    model = build("gpt2")
    before = everything_about(model)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.transformer.h[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        direct_logit_attribution(model, IDS, 5, unit=unit)
    handle.remove()
    assert same(before, everything_about(model))
    direct_logit_attribution(model, IDS, 5, unit=unit)


def test_hooks_are_removed_when_registration_fails(monkeypatch):
    model = build("gpt2")
    put_on, calls = dla_hooks.modules.hooks.Tap.put_on, []

    def fails_at_the_fourth(tap, thread):
        calls.append(tap)
        if len(calls) == 4:
            raise RuntimeError("no more")
        return put_on(tap, thread)

    monkeypatch.setattr(dla_hooks.modules.hooks.Tap, "put_on", fails_at_the_fourth)
    with pytest.raises(RuntimeError, match="no more"):
        direct_logit_attribution(model, IDS, 5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_enabled_gradients_are_not_computed():
    model = build("gpt2").requires_grad_(True)
    with torch.enable_grad():
        result = direct_logit_attribution(model, IDS, 5, unit="head")
    assert not result.attribution.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_threads_may_share_a_model():
    model = build("gpt2")
    prompts = [example_ids("gpt2", seed=seed) for seed in range(4)]
    alone = [direct_logit_attribution(model, ids, 5, unit="head").attribution for ids in prompts]
    found: dict[tuple[int, int], torch.Tensor] = {}
    failures = []

    def work(which: int) -> None:
        try:
            for turn in range(15):
                result = direct_logit_attribution(model, prompts[which], 5, unit="head")
                found[which, turn] = result.attribution
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(found) == 60
    for (which, _), values in found.items():
        torch.testing.assert_close(values, alone[which])


def test_use_cache_in_config_builds_no_cache():
    model = build("llama")
    model.config.use_cache = True
    kept = []
    model.register_forward_hook(lambda m, a, out: kept.append(out.past_key_values))
    direct_logit_attribution(model, example_ids("llama"), 5)
    assert set(kept) == {None}


# Model types without a declaration


class MadeUpConfig(PretrainedConfig):
    model_type = "made_up"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.num_attention_heads, self.vocab_size = 24, 3, 61


class MadeUp(PreTrainedModel):
    """GPT-2's blocks under other names, called piece by piece: no block runs as a whole."""

    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        inner = GPT2Config(
            n_embd=24, n_head=3, n_layer=2, vocab_size=61, bos_token_id=0, eos_token_id=1
        )
        inner._attn_implementation = "eager"
        gpt2 = GPT2LMHeadModel(inner)
        self.blocks, self.norm = gpt2.transformer.h, gpt2.transformer.ln_f
        self.embed, self.head = gpt2.transformer.wte, gpt2.lm_head
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.2 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(0)
                )
        self.eval()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False, return_dict=True):
        x = self.embed(input_ids)
        causal = torch.full((input_ids.shape[1],) * 2, -1e9).triu(1)[None, None]
        for block in self.blocks:
            x = _block(block, x, causal)
        return type("Output", (), {"logits": self.head(self.norm(x))})()


def _block(block, x, mask):
    x = x + block.attn(block.ln_1(x), attention_mask=mask)[0]
    return x + block.mlp(block.ln_2(x))


@pytest.fixture
def declared():
    """Declare an architecture for one test."""
    registry.architectures()
    before = dict(registry._registered)
    yield register
    registry._registered.clear()
    registry._registered.update(before)


def test_undeclared_model_of_unknown_shape_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"'made_up'[^$]*dla_hooks\.register"):
        direct_logit_attribution(MadeUp(MadeUpConfig()), IDS, 5)


def test_undeclared_model_of_known_shape_is_verified_and_accepted():
    model = build("llama")
    expected = direct_logit_attribution(model, IDS, 5, unit="head").attribution
    model.config.model_type = "llama_of_tomorrow"
    found = direct_logit_attribution(model, IDS, 5, unit="head").attribution
    assert torch.equal(found, expected)


def test_undeclared_model_that_fails_verification_is_refused_with_place():
    model = build("llama")
    model.config.model_type = "llama_of_tomorrow"
    alter_output(model.model.layers[1], lambda out: out + 0.1 * out**2)
    with pytest.raises(
        UnsupportedModelError, match=r"taken for llama: .*model\.layers\.1 is no sum"
    ):
        direct_logit_attribution(model, IDS, 5)


def test_architecture_declared_at_run_time_is_exact(declared):
    declared(
        Architecture(
            model_types=("made_up",),
            layers="blocks",
            final_norm="norm",
            writes=(Write("attn_out", "attn"), Write("mlp_out", "mlp")),
        )
    )
    model = MadeUp(MadeUpConfig())
    # Its blocks are called piece by piece, so that no block as a whole ever runs.
    with pytest.raises(DLAError, match="no block of blocks runs as a whole"):
        direct_logit_attribution(model, IDS, 5)


def test_every_declared_type_is_listed_once():
    types = [name for architecture in architectures() for name in architecture.model_types]
    assert len(types) == len(set(types)) >= 25


def test_a_declaration_that_does_not_fit_goes_on_to_the_other_shapes():
    model = copy.deepcopy(build("llama"))
    expected = direct_logit_attribution(model, IDS, 5)
    model.config.model_type = "gpt2"
    found = direct_logit_attribution(model, IDS, 5)
    torch.testing.assert_close(found.attribution, expected.attribution)
