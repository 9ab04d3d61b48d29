"""TransformerLens models and caches on the same path (extra ``tl``): what comes out, and what not.

The numbers themselves are compared with the reference's in ``test_reference*.py``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tl_models import has_hooked, ids_for

import dla_hooks
from dla_hooks import (
    CacheEntryError,
    DecompositionError,
    InputError,
    TrainingModeError,
    UnsupportedModelError,
    direct_logit_attribution,
)

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
]

UNITS = ("component", "layer", "head")
KINDS = ("bridged", "hooked") if has_hooked() else ("bridged",)


@pytest.fixture(params=KINDS)
def model(request, references):
    return getattr(references, request.param)("gpt2")


@pytest.fixture
def ids(model):
    return torch.randint(3, model.cfg.d_vocab, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("unit", UNITS)
def test_parts_and_bias_sum_to_model_logit(model, ids, unit):
    result = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
    with torch.no_grad():
        logits = model(ids)[..., 5]
    total = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
    torch.testing.assert_close(total + result.bias, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.logit, logits, rtol=1e-4, atol=1e-5)


def test_further_arguments_of_a_forward_are_refused(model, ids):
    inputs = {"input_ids": ids, "position_ids": torch.arange(7)[None]}
    with pytest.raises(InputError, match="holds position_ids, and a model of TransformerLens"):
        direct_logit_attribution(model, inputs, 5)
    whole = torch.ones(2, 1, 7, 7).bool()
    with pytest.raises(InputError, match="holds attention_mask"):
        direct_logit_attribution(model, ids, 5, attention_mask=whole)
    expected = direct_logit_attribution(model, ids, 5)
    found = direct_logit_attribution(model, {"input_ids": ids.tolist()}, 5)
    assert torch.equal(found.attribution, expected.attribution)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pos", [-1, None, (1, 4)], ids=str)
def test_cache_matches_run(model, ids, unit, pos):
    run = direct_logit_attribution(model, ids, 5, 7, unit=unit, pos=pos)
    _, cache = model.run_with_cache(ids)
    held = set(cache.cache_dict)
    stored = direct_logit_attribution(
        model, answer_tokens=5, incorrect_tokens=7, unit=unit, pos=pos, cache=cache
    )
    torch.testing.assert_close(stored.attribution, run.attribution, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored.bias, run.bias)
    assert stored.labels == run.labels
    assert set(cache.cache_dict) == held, "the cache was written to"
    without_model = direct_logit_attribution(None, answer_tokens=5, cache=cache, unit=unit)
    assert without_model.labels == run.labels


@pytest.mark.parametrize("unit", UNITS)
def test_names_filter_is_sufficient_and_minimal(model, ids, unit):
    run = direct_logit_attribution(model, ids, 5, unit=unit)
    names = dla_hooks.cache_names(model, unit)
    _, cache = model.run_with_cache(ids, names_filter=names)
    stored = direct_logit_attribution(model, answer_tokens=5, unit=unit, cache=cache)
    torch.testing.assert_close(stored.attribution, run.attribution, rtol=1e-5, atol=1e-5)
    for missing in names:
        kept = {name: value for name, value in cache.cache_dict.items() if name != missing}
        poorer = type(cache)(kept, model)
        with pytest.raises(CacheEntryError, match="cache_names") as caught:
            direct_logit_attribution(model, answer_tokens=5, unit=unit, cache=poorer)
        assert isinstance(caught.value, KeyError)
        assert missing in str(caught.value) or missing == "hook_embed"


def test_names_filter_of_reference_layers_is_sufficient(model, ids):
    names = [
        f"blocks.{layer}.hook_resid_{at}"
        for layer in range(model.cfg.n_layers)
        for at in ("pre", "mid")
    ]
    names += [f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", "ln_final.hook_scale"]
    _, cache = model.run_with_cache(ids, names_filter=names)
    stored = direct_logit_attribution(model, answer_tokens=5, unit="layer", cache=cache)
    run = direct_logit_attribution(model, ids, 5, unit="layer")
    torch.testing.assert_close(stored.attribution, run.attribution, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("pos", "shape"), [(-1, ()), (None, (7,)), ([0, 2], (2,))], ids=str)
def test_cache_without_batch_axis_matches_run(model, ids, unit, pos, shape, tmp_path):
    _, cache = model.run_with_cache(ids[:1], remove_batch_dim=True)
    stored = direct_logit_attribution(model, answer_tokens=5, unit=unit, pos=pos, cache=cache)
    run = direct_logit_attribution(model, ids[:1], 5, unit=unit, pos=pos)
    assert stored.attribution.shape == (len(run.labels), *shape)
    torch.testing.assert_close(stored.attribution, run.attribution[:, 0], rtol=1e-5, atol=1e-5)
    assert stored.bias.shape == stored.logit.shape == shape
    assert len(stored.records()) == stored.attribution.numel()
    assert stored.labels[0] in repr(stored)
    loaded = dla_hooks.DirectLogitAttribution.load(stored.save(tmp_path / "r.safetensors"))
    assert torch.equal(loaded.attribution, stored.attribution)


def test_changed_cache_is_refused(model, ids):
    _, cache = model.run_with_cache(ids)
    cache.cache_dict["blocks.1.hook_mlp_out"] = cache.cache_dict["blocks.1.hook_mlp_out"] + 1.0
    cache.cache_dict["blocks.1.hook_mlp_out"][..., 0] += 9
    with pytest.raises(DecompositionError, match="the cache"):
        direct_logit_attribution(model, answer_tokens=5, cache=cache)


def small_caches(model, ids):
    """Caches that hold little more than unit "layer" reads, which add up whatever they hold."""
    blocks, last = range(model.cfg.n_layers), f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    streams = [f"blocks.{layer}.hook_resid_{at}" for layer in blocks for at in ("pre", "mid")]
    least = dla_hooks.cache_names(model, "layer")
    for names in (least, [*least, last], [*streams, last, "ln_final.hook_scale"]):
        yield names, lambda names=names: model.run_with_cache(ids, names_filter=names)[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_changed_entry_of_a_small_layer_cache_is_refused(model, ids, seed):
    run = direct_logit_attribution(model, ids, 5, unit="layer")
    for names, kept in small_caches(model, ids):
        stored = direct_logit_attribution(model, answer_tokens=5, unit="layer", cache=kept())
        torch.testing.assert_close(stored.attribution, run.attribution, rtol=1e-5, atol=1e-5)
        for name in names:
            if "resid" in name and not name.endswith("post"):
                continue  # a stream between two writes: what it ends begins the next
            cache = kept()
            entry = cache.cache_dict[name]
            noise = torch.randn(entry.shape, generator=torch.Generator().manual_seed(seed))
            cache.cache_dict[name] = entry + noise
            with pytest.raises(DecompositionError, match="its entries were changed"):
                direct_logit_attribution(model, answer_tokens=5, unit="layer", cache=cache)


def test_changed_minimal_cache_can_be_read_without_the_check(model, ids):
    _, cache = model.run_with_cache(ids, names_filter=dla_hooks.cache_names(model, "layer"))
    cache.cache_dict["ln_final.hook_scale"] = 2 * cache.cache_dict["ln_final.hook_scale"]
    options = {"answer_tokens": 5, "unit": "layer", "cache": cache}
    with pytest.raises(DecompositionError, match="or a hook set the scale"):
        direct_logit_attribution(model, **options)
    halved = direct_logit_attribution(model, check=False, **options)
    run = direct_logit_attribution(model, ids, 5, unit="layer")
    torch.testing.assert_close(2 * halved.attribution, run.attribution, rtol=1e-5, atol=1e-5)


def test_missing_entry_of_a_stack_says_how_to_keep_it(model, ids):
    _, cache = model.run_with_cache(ids, names_filter=["ln_final.hook_scale"])
    with pytest.raises(CacheEntryError, match="which this stack reads.*without a names_filter"):
        dla_hooks.decompose_resid(model, cache=cache)


def test_unusable_caches_are_refused(model, ids, references):
    _, cache = model.run_with_cache(ids)
    with pytest.raises(InputError, match="ActivationCache"):
        direct_logit_attribution(model, answer_tokens=5, cache=dict(cache.cache_dict))
    with pytest.raises(InputError, match="another model"):
        direct_logit_attribution(references.raw("gpt2"), answer_tokens=5, cache=cache)
    with pytest.raises(InputError, match="keeps no ActivationCache"):
        dla_hooks.cache_names(references.raw("gpt2"))
    with pytest.raises(InputError, match="unit must be"):
        dla_hooks.cache_names(model, "token")


def test_strings_follow_default_prepend_bos(model):
    text, answer = "Paris is the city of", " Paris"
    result = direct_logit_attribution(model, text, answer)
    tokens = model.to_tokens(text)
    same = direct_logit_attribution(model, tokens, model.to_single_token(answer))
    assert torch.equal(result.attribution, same.attribution)
    assert len(result.tokens[0]) == tokens.shape[1]
    without = direct_logit_attribution(model, text, answer, prepend_bos=False)
    assert len(without.tokens[0]) == tokens.shape[1] - int(tokens[0, 0] == 0)


def test_ragged_rows_are_read_at_their_last_tokens(model):
    texts = ["Paris is the city of", "Berlin of"]
    batch = direct_logit_attribution(model, texts, 5)
    for row, text in enumerate(texts):
        alone = direct_logit_attribution(model, text, 5)
        torch.testing.assert_close(
            batch.attribution[:, row], alone.attribution[:, 0], rtol=1e-4, atol=1e-5
        )


def test_model_is_unchanged_after_call(model, ids):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    handle = model.hook_dict["blocks.0.hook_mlp_out"].register_forward_hook(
        lambda module, args, out: seen.append(out.shape)
    )
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    direct_logit_attribution(model, ids, 5, unit="head")
    handle.remove()
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == hooks - 1
    assert torch.Size([2, 7, model.cfg.d_model]) in seen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ablated_hook_point_matches_ablated_model(model, ids):
    hook = ("blocks.1.hook_mlp_out", lambda value, hook: value * 0)
    with model.hooks(fwd_hooks=[hook]):
        result = direct_logit_attribution(model, ids, 5)
        with torch.no_grad():
            logits = model(ids)[:, -1, 5]
    torch.testing.assert_close(result.logit, logits, rtol=1e-4, atol=1e-5)
    assert float(result.attribution[result.labels.index("1_mlp_out")].abs().max()) == 0


def test_unprepared_bridge_is_refused(references):
    raw = references.raw("gpt2")
    ids = ids_for(raw)
    with pytest.raises(ValueError, match="compatibility mode"):
        direct_logit_attribution(references.bridged("gpt2", compatible=False), ids, 5)
    with pytest.raises(ValueError, match=r"final norm's weight.*Hugging Face model"):
        direct_logit_attribution(references.bridged("gpt2", fold_ln=False), ids, 5)
    bridge = references.bridged("gpt2", seed=1)
    bridge.train()
    try:
        with pytest.raises(TrainingModeError, match="eval"):
            direct_logit_attribution(bridge, ids, 5)
    finally:
        bridge.eval()


def test_a_hybrid_bridge_is_refused_with_the_way_out(references, monkeypatch):
    bridge = references.bridged("gpt2", seed=1)
    monkeypatch.setattr(type(bridge), "layer_types", lambda self: ["attn+mlp", "mamba+mlp"])
    with pytest.raises(NotImplementedError, match=r"hybrid.*Hugging Face model"):
        direct_logit_attribution(bridge, ids_for(references.raw("gpt2")), 5)


@pytest.mark.skipif(not has_hooked(), reason="HookedTransformer was removed in 4.0")
@pytest.mark.parametrize("norm", [None, "LN", "RMS", "LNPre"])
@pytest.mark.parametrize("positions", ["standard", "rotary", "shortformer"])
def test_hooked_transformer_from_config_is_exact(norm, positions):
    """Toy models: without norms, with norms that are not folded, without MLPs."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    for attn_only in (False, True):
        torch.manual_seed(0)
        cfg = HookedTransformerConfig(
            n_layers=2, d_model=24, n_ctx=16, d_head=6, n_heads=4, d_vocab=31, act_fn="relu",
            d_mlp=32, normalization_type=norm, positional_embedding_type=positions,
            attn_only=attn_only, seed=0,
        )  # fmt: skip
        model = HookedTransformer(cfg)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        ids = torch.randint(31, (2, 9))
        for unit in UNITS:
            result = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
            with torch.no_grad():
                logits = model(ids)[..., 5]
            torch.testing.assert_close(result.logit, logits, rtol=1e-4, atol=1e-4)
            _, cache = model.run_with_cache(ids)
            stored = direct_logit_attribution(
                model, answer_tokens=5, unit=unit, pos=None, cache=cache
            )
            torch.testing.assert_close(stored.attribution, result.attribution, rtol=1e-4, atol=1e-4)
        assert ("pos_embed" in direct_logit_attribution(model, ids, 5).labels) == (
            positions == "standard"
        )
        with pytest.raises(InputError, match="16"):
            direct_logit_attribution(model, torch.zeros(1, 17, dtype=torch.long), 5)


def test_transformer_lens_is_not_imported_for_other_models():
    code = (
        "import sys, zoo, dla_hooks; m = zoo.build('gpt2')\n"
        "dla_hooks.direct_logit_attribution(m, zoo.example_ids('gpt2'), 5)\n"
        "dla_hooks.wrap(m)\n"
        "assert 'transformer_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="tests/helpers")


def test_an_encoder_is_refused():
    with pytest.raises((InputError, UnsupportedModelError)):
        direct_logit_attribution(torch.nn.Linear(3, 3), torch.tensor([1, 2]), 1)


def test_hooks_for_the_prompt_skip_synthetic_runs(model, ids):
    _, clean = model.run_with_cache(ids.flip(0))
    names = ("hook_mlp_out", "attn.hook_z", "hook_attn_out")
    for name in (f"blocks.1.{name}" for name in names):

        def patch(value, hook, name=name):
            value = value.clone()
            value[:, 5] = clean[name][:, 5]
            return value

        for unit in ("component", "head"):
            with model.hooks(fwd_hooks=[(name, patch)]):
                with torch.no_grad():
                    logits = model(ids)[..., 5]
                result = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
                if unit == "head" and name.endswith("hook_attn_out"):
                    assert "L1hook" in result.labels  # no head wrote it
                assert len(model.hook_dict[name].fwd_hooks) == 1
            torch.testing.assert_close(result.logit, logits, rtol=1e-4, atol=1e-4)
            total = result.attribution.sum(0) + result.bias
            torch.testing.assert_close(total, logits, rtol=1e-4, atol=1e-4)


def test_vector_added_between_writes_is_reported_missing(model, ids):
    def steer(value, hook):
        return value + 3.0 * torch.arange(value.shape[-1]).to(value)

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", steer)]),
        pytest.raises(DecompositionError, match="hooks of your own"),
    ):
        direct_logit_attribution(model, ids, 5)


@pytest.mark.parametrize("unit", UNITS)
def test_converted_cache_matches_run(model, ids, unit):
    _, cache = model.run_with_cache(ids)
    run = direct_logit_attribution(model, ids, 5, unit=unit)
    coarse = type(cache)({k: v.bfloat16() for k, v in cache.cache_dict.items()}, model)
    stored = direct_logit_attribution(model, answer_tokens=5, unit=unit, cache=coarse)
    torch.testing.assert_close(stored.attribution, run.attribution, rtol=0.1, atol=0.1)


def test_several_answers_without_batch_axis_are_refused(model, ids):
    _, cache = model.run_with_cache(ids[:1], remove_batch_dim=True)
    with pytest.raises(RuntimeError, match="without its batch axis"):
        direct_logit_attribution(model, answer_tokens=torch.tensor([5, 9]), cache=cache)
