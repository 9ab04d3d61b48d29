"""What was measured of a model follows the model, with and without the check."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example_ids

import dla_hooks
from dla_hooks import direct_logit_attribution
from dla_hooks.backends import backend_of

FAMILIES = ["llama", "qwen3_moe-mixed", "olmo2"]


def own_logit(model, ids, token=5):
    """The model's own logit at the last position, before any cap."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        logit = model(ids, use_cache=False).logits[:, -1, token]
    return logit if cap is None else cap * torch.atanh(logit / cap)


def holds(model, ids, **options):
    result = direct_logit_attribution(model, ids, 5, check=False, **options)
    summed = result.bias + (
        result.attribution[-1] if result.unit == "layer" else result.attribution.sum(0)
    )
    torch.testing.assert_close(summed, own_logit(model, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.logit, own_logit(model, ids), rtol=1e-5, atol=1e-5)
    return result


def restack(model, layers):
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    model.eval()


@pytest.mark.parametrize(("name", "field"), [("granite", "logits_scaling"), ("cohere", None)])
def test_logit_scale_that_changes_after_a_call_is_followed_without_a_check(name, field):
    model, ids = build(name), example_ids(name)
    before = holds(model, ids)
    if field is None:
        model.logit_scale = 2.0  # a number that the module keeps
    else:
        setattr(model.config, field, 5.0)
    after = holds(model, ids)
    assert not torch.allclose(before.logit, after.logit)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text-cap"])
def test_softcap_switched_off_after_a_call_is_followed(name):
    model, ids = build(name), example_ids(name)
    assert direct_logit_attribution(model, ids, 5).softcap is not None
    model.config.final_logit_softcapping = None
    assert holds(model, ids).softcap is None
    model.config.final_logit_softcapping = 9.0
    assert direct_logit_attribution(model, ids, 5).softcap == pytest.approx(9.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_come_twice_or_go_are_followed_without_a_check(name):
    model, ids = build(name), example_ids(name)
    layers = list(model.model.layers)
    n_rows = len(holds(model, ids).labels)
    holds(model, ids, unit="layer")
    restack(model, [*layers[:-1], layers[-2], layers[-1]])
    doubled = holds(model, ids)
    assert len(doubled.labels) == n_rows + 2
    assert len(holds(model, ids, unit="layer").labels) == 2 * len(layers) + 3
    restack(model, layers)
    assert len(holds(model, ids).labels) == n_rows
    restack(model, layers[:1])
    assert len(holds(model, ids).labels) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_early_exit_by_config_is_followed_there_and_back(name):
    model, ids = build(name), example_ids(name)
    n_layers = model.config.num_hidden_layers
    n_rows = len(holds(model, ids).labels)
    model.config.num_hidden_layers = 1
    assert len(holds(model, ids).labels) == 3
    assert direct_logit_attribution(model, ids, 5).logit_gap < 1e-5
    model.config.num_hidden_layers = n_layers
    assert len(holds(model, ids).labels) == n_rows


def test_blocks_made_parallel_after_a_call_lose_their_mid_streams():
    model, ids = build("gpt_neox-sequential"), example_ids("gpt_neox-sequential")
    assert "1_mid" in holds(model, ids, unit="layer").labels
    for block in model.gpt_neox.layers:
        block.use_parallel_residual = True
    model.config.use_parallel_residual = True
    assert "1_mid" not in holds(model, ids, unit="layer").labels


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "rms_norm_eps", 0.3),
        lambda model: setattr(model.model.norm, "variance_epsilon", 0.3),
        lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 0.3),
        lambda model: model.set_attn_implementation("sdpa"),
        lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Tanh()),
        lambda model: setattr(model.model.layers[0], "forward", lambda x, **_: x),
        lambda model: setattr(model.config, "rope_parameters", {"rope_type": "default"}),
    ],
    ids=["config", "last-norm", "norm", "attention", "function", "forward", "table"],
)
def test_version_moves_with_what_is_no_weight(change):
    model = build("llama", attn="eager")
    before = backend_of(model).state.version
    assert backend_of(model).state.version == before
    change(model)
    assert backend_of(model).state.version != before


def test_version_stays_while_a_model_runs():
    for name in ("gpt2", "phi3", "gemma3_text", "mixtral"):
        model, ids = build(name), example_ids(name)
        direct_logit_attribution(model, ids, 5, unit="head")
        before = backend_of(model).state.version
        direct_logit_attribution(model, ids.repeat(1, 4), 5, unit="layer")
        assert backend_of(model).state.version == before


def test_state_is_read_while_another_thread_puts_something_on_a_module(monkeypatch):
    model = build("llama")
    norm = model.model.norm
    norm.own = lambda: None  # at which the walk looks

    def looks(function):
        norm.passing = function  # as the other thread's forward does meanwhile
        return False

    monkeypatch.setattr("dla_hooks.modules.version.is_compiled_function", looks)
    before = backend_of(model).state.version
    assert norm.passing is norm.own
    assert backend_of(model).state.version == before


@pytest.mark.parametrize("shrink", [100, 300, 1e5])
@pytest.mark.parametrize("name", ["llama", "gpt2-untied", "gemma2", "granite"])
def test_mid_streams_do_not_depend_on_the_size_of_the_embeddings(name, shrink):
    ids = example_ids(name)
    expected = direct_logit_attribution(build(name), ids, 5, unit="layer").labels
    model = build(name)
    with torch.no_grad():
        model.get_input_embeddings().weight /= shrink
        if name.startswith("gpt2"):
            model.transformer.wpe.weight /= shrink
    assert direct_logit_attribution(model, ids, 5, unit="layer", check=False).labels == expected


class Shifted(nn.Module):
    """A block with a constant that it finds elsewhere, which leaves no trace on the module."""

    def __init__(self, block, settings):
        super().__init__()
        self.block, self.change = block, lambda x: settings["gain"] * x + settings["shift"]

    def forward(self, *args, **kwargs):
        out = self.block(*args, **kwargs)
        return (self.change(out[0]), *out[1:]) if isinstance(out, tuple) else self.change(out)


@pytest.mark.parametrize("setting", ["gain", "shift"])
@pytest.mark.parametrize("name", ["stablelm-sequential", "gemma3_text", "granite"])
def test_block_that_changes_without_a_trace_is_followed_without_a_check(name, setting):
    model, ids = build(name), example_ids(name)
    direction = torch.linspace(-1, 1, model.config.hidden_size, dtype=torch.float64)
    settings = {"gain": 1.2, "shift": direction}
    model.model.layers[1] = Shifted(model.model.layers[1], settings)
    plan = dla_hooks.prepare(model, 5, check=False)
    for factor in (1, 2, 0.5):
        settings[setting] = settings[setting] * factor
        holds(model, ids)
        found = plan(ids)
        torch.testing.assert_close(
            found.attribution.sum(0) + found.bias, own_logit(model, ids), rtol=1e-5, atol=1e-5
        )


def test_hooked_model_that_does_not_add_up_is_run_once_without_a_check():
    model, ids = build("olmo2"), example_ids("olmo2")
    runs = []
    direct_logit_attribution(model, ids, 5)
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    inner = model.model.layers[1].self_attn.o_proj
    inner.register_forward_hook(lambda *_: None)

    def put_on(module, args):  # a hook that is put on while the model runs is not seen
        runs.append(2)
        handles.append(
            model.model.layers[2].register_forward_hook(
                lambda m, a, out: handles.pop().remove() or 2 * out
            )
        )

    handles = []
    model.model.layers[0].register_forward_pre_hook(put_on)
    for _ in range(3):
        direct_logit_attribution(model, ids, 5, check=False)
    assert runs.count(1) == 3


def test_model_whose_config_turns_it_into_an_encoder_decoder_is_refused_after_a_call():
    model, ids = build("llama"), example_ids("llama")
    direct_logit_attribution(model, ids, 5)
    model.config.is_encoder_decoder = True
    with pytest.raises(dla_hooks.UnsupportedModelError, match="encoder-decoder"):
        direct_logit_attribution(model, ids, 5)
