"""TransformerLens models and caches that cannot be attributed are refused as the reference does."""

from __future__ import annotations

import inspect

import pytest
import torch
from parity import UNITS, assert_same, hold
from tl_models import bridged, has_hooked, hooked

from dla_hooks import direct_logit_attribution as ours

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
    pytest.mark.skipif(
        "cache" not in inspect.signature(ours).parameters, reason="raw models only, so far"
    ),
]

IDS = torch.arange(3, 17).reshape(2, 7)
KINDS = ("bridged", "hooked") if has_hooked() else ("bridged",)


def theirs(*args, **kwargs):
    from transformer_lens.tools.analysis import direct_logit_attribution

    return direct_logit_attribution(*args, **kwargs)


def raises_as_theirs(error, *args, **kwargs):
    with pytest.raises(error):
        theirs(*args, **kwargs)
    with pytest.raises(error):
        ours(*args, **kwargs)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("unit", UNITS)
def test_bridge_outside_compatibility_mode_is_refused(references, name, unit):
    model = references.bridged(name, compatible=False)
    raises_as_theirs(ValueError, model, IDS, 5, unit=unit)
    _, cache = model.run_with_cache(IDS)
    raises_as_theirs(ValueError, model, None, 5, unit=unit, cache=cache)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("processing", ["fold_ln", "no_processing"])
def test_bridge_with_unfolded_final_norm_is_refused(references, name, processing):
    """3.9.0 lets it pass, with wrong numbers."""
    model = references.bridged(name, **{processing: processing == "no_processing"})
    with pytest.raises(ValueError):  # noqa: PT011 - the builtin is the contract
        ours(model, IDS, 5)
    if not has_hooked():
        with pytest.raises(ValueError):  # noqa: PT011
            theirs(model, IDS, 5)


@pytest.fixture
def training(request, references, tmp_path):
    """A model of its own, since the mode is changed."""
    builder = {"bridged": bridged, "hooked": hooked}[request.param]
    return builder(references.raw("gpt2"), tmp_path).train()


@pytest.mark.parametrize("training", KINDS, indirect=True)
def test_model_in_training_mode_is_refused(training):
    """3.9.0 lets it pass. A HookedTransformer has no dropout, and comes in training mode."""
    if type(training).__name__ == "HookedTransformer":
        assert_same(ours(training, IDS, 5), theirs(training, IDS, 5))
    else:
        with pytest.raises(ValueError, match="eval"):
            ours(training, IDS, 5)
    if not has_hooked():
        with pytest.raises(ValueError, match="evaluation"):
            theirs(training, IDS, 5)
    assert training.training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_checks_run_in_fixed_order(references, kind, cached):
    """Unit, answer, the model's own, the prompt: each mistake hides those after it."""
    model = getattr(references, kind)("gpt2")
    more = {"cache": model.run_with_cache(IDS)[1]} if cached else {}
    with pytest.raises(ValueError, match="unit"):
        ours(model, None, None, unit="token", **more)
    with pytest.raises(ValueError, match="answer_tokens"):
        ours(model, None, None, **more)
    if not cached:
        with pytest.raises(ValueError, match="input.*cache|cache.*input"):
            ours(model, None, 5)
    raw_bridge = references.bridged("gpt2", compatible=False)
    with pytest.raises(ValueError, match="unit"):
        ours(raw_bridge, None, 5, unit="token", **more)
    with pytest.raises(ValueError, match="answer_tokens"):
        ours(raw_bridge, None, None, **more)
    with pytest.raises(ValueError, match="compatib"):
        ours(raw_bridge, None, 5, **more)


# Without one of the names that a unit is made of, in one layer
MISSING = [
    ("component", "blocks.1.hook_attn_out"),
    ("component", "blocks.0.hook_mlp_out"),
    ("component", "ln_final.hook_scale"),
    ("layer", "blocks.1.hook_resid_mid"),
    ("layer", "ln_final.hook_scale"),
    ("head", "blocks.1.attn.hook_z"),
    ("head", "ln_final.hook_scale"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("unit", "missing"), MISSING)
def test_cache_without_a_name_is_refused(references, kind, unit, missing):
    from test_reference_kinds import ALWAYS, LEAST

    model = getattr(references, kind)("gpt2")
    wanted = (*ALWAYS, *LEAST[unit])

    def cache():
        return model.run_with_cache(
            IDS, names_filter=lambda name: name.endswith(wanted) and name != missing
        )[1]

    if missing == "ln_final.hook_scale" and not has_hooked():
        with pytest.raises(KeyError, match=missing):  # there an IndexError, on the way to one
            ours(model, None, 5, unit=unit, cache=cache())
    else:
        raises_as_theirs(KeyError, model, None, 5, unit=unit, cache=cache())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", ["hook_embed", "hook_pos_embed"])
def test_cache_without_an_embedding_is_refused(references, kind, missing):
    """The reference leaves the part out without a word, and the rest is no logit any more."""
    model = getattr(references, kind)("gpt2")
    cache = model.run_with_cache(IDS, names_filter=lambda name: name != missing)[1]
    assert missing.removeprefix("hook_") not in theirs(model, None, 5, cache=cache).labels
    if missing == "hook_embed":  # what enters the first block still says it
        whole = model.run_with_cache(IDS)[1]
        assert_same(ours(model, None, 5, cache=cache), theirs(model, None, 5, cache=whole))
    else:
        with pytest.raises(KeyError, match=missing):
            ours(model, None, 5, cache=cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pos", [7, -8, [7], (), (0, 1, 2, 3), "last", 1.5], ids=str)
@pytest.mark.parametrize("rows", [True, False])
def test_positions_missing_in_cache_are_refused(references, kind, pos, rows):
    model = getattr(references, kind)("gpt2")
    given, there = (model.run_with_cache(IDS[:1], remove_batch_dim=not rows)[1] for _ in "12")
    hold(
        lambda: ours(model, None, 5, pos=pos, cache=given),
        lambda: theirs(model, None, 5, pos=pos, cache=there),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "answer", [torch.arange(3), torch.full((3, 7), 5), torch.full((2, 3), 5), " Paris Berlin", 1.5]
)
@pytest.mark.parametrize("rows", [True, False])
def test_answers_that_do_not_fit_cache_are_refused(references, kind, answer, rows):
    model = getattr(references, kind)("gpt2")
    given, there = (
        model.run_with_cache(IDS if rows else IDS[:1], remove_batch_dim=not rows)[1] for _ in "12"
    )
    hold(
        lambda: ours(model, None, answer, pos=None, cache=given),
        lambda: theirs(model, None, answer, pos=None, cache=there),
    )


def test_parallel_blocks_have_no_stream_in_the_middle(references):
    """The reference fails on them; ours leaves the entry out."""
    model = references.bridged("gpt_neox-parallel")
    with pytest.raises(KeyError, match="hook_resid_mid"):
        theirs(model, IDS, 5, unit="layer")
    assert ours(model, IDS, 5, unit="layer").labels == ["0_pre", "1_pre", "2_pre", "final_post"]
