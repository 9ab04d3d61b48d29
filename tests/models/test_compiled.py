"""Models under ``torch.compile``: the numbers of the plain model, and still compiled after that."""

from __future__ import annotations

import threading

import pytest
import torch
from units import UNIT_NAMES
from zoo import build, example_ids

from dla_hooks import HookError, direct_logit_attribution, verify, wrap

CONVENTIONS = {"center_unembed": True, "fold_value_biases": True}


@pytest.fixture
def backend():
    """A compiler that compiles nothing, and keeps what it was given."""
    torch._dynamo.reset()
    graphs = []

    def compile(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile.graphs = graphs
    yield compile
    torch._dynamo.reset()


def whole(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def forward(model, **options):
    model.forward = torch.compile(model.forward, **options)
    return model


def layers_in_place(model, **options):
    for layer in model.model.layers:
        layer.compile(**options)
    return model


def layers_forward(model, **options):
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, **options)
    return model


def layers_wrapped(model, **options):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, **options)
    return model


def single_modules(model, **options):
    """The ones that are asked on their own, outside of any run of the model."""
    model.lm_head = torch.compile(model.lm_head, **options)
    model.model.norm = torch.compile(model.model.norm, **options)
    for layer in model.model.layers:
        o_proj = layer.self_attn.o_proj
        o_proj.forward = torch.compile(o_proj.forward, **options)
    return model


def a_function_within(model, **options):
    for layer in model.model.layers:
        layer.inner = torch.compile(layer.forward, **options)
        layer.forward = lambda *args, layer=layer, **kwargs: layer.inner(*args, **kwargs)
    return model


def a_class(model, **options):
    """A class whose own forward is compiled, as a decorator does it."""
    layer = type(model.model.layers[0])
    compiled = type("Compiled", (layer,), {"forward": torch.compile(layer.forward, **options)})
    for layer in model.model.layers:
        layer.__class__ = compiled
    return model


FORMS = (
    whole,
    in_place,
    forward,
    layers_in_place,
    layers_forward,
    layers_wrapped,
    single_modules,
    a_function_within,
    a_class,
)


def run(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def stance():
    return torch._dynamo.eval_frame._stance.stance


@pytest.mark.parametrize(
    ("form", "ran_before"),
    # That the new ones are not compiled by our runs is the same for all forms but these.
    [(form, True) for form in FORMS] + [(form, False) for form in (whole, layers_in_place)],
)
def test_compiled_model_matches_plain_and_stays_compiled(form, ran_before, backend):
    plain, ids = build("llama", dtype=torch.float32), example_ids("llama")
    model = form(build("llama", dtype=torch.float32), backend=backend)
    if ran_before:
        run(model, ids)
    compiled = len(backend.graphs)
    for unit in UNIT_NAMES:
        found = direct_logit_attribution(model, ids, 5, unit=unit, pos=None, **CONVENTIONS)
        expected = direct_logit_attribution(plain, ids, 5, unit=unit, pos=None, **CONVENTIONS)
        torch.testing.assert_close(found.attribution, expected.attribution)
        assert found.model == expected.model
    assert verify(model, show=False).ok
    torch.testing.assert_close(wrap(model).W_U, wrap(plain).W_U)
    assert len(backend.graphs) == compiled, "our runs were compiled"
    assert stance() == "default"

    torch.testing.assert_close(run(model, ids), run(plain, ids))
    compiled_then = len(backend.graphs)
    assert compiled_then == compiled if ran_before else compiled_then > 0, "it was compiled anew"
    run(model, ids)
    assert len(backend.graphs) == compiled_then
    code = "".join(graph.code for graph in backend.graphs)
    assert "dla_hooks" not in code


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["gpt2", "gemma2", "mixtral"])
def test_compiled_families_match_plain(spec, backend):
    plain, ids = build(spec), example_ids(spec)
    model = whole(build(spec), backend=backend)
    run(model, ids)
    compiled = len(backend.graphs)
    for unit in UNIT_NAMES:
        found = direct_logit_attribution(model, ids, 5, unit=unit, **CONVENTIONS)
        expected = direct_logit_attribution(plain, ids, 5, unit=unit, **CONVENTIONS)
        torch.testing.assert_close(found.attribution, expected.attribution)
    run(model, ids)
    assert len(backend.graphs) == compiled


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("form", [whole, in_place])
def test_compiled_peft_model_matches_plain(form, backend):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "lm_head"], init_lora_weights=False)
    adapted, ids = peft.get_peft_model(build("llama"), config).eval(), example_ids("llama")
    expected = direct_logit_attribution(adapted, ids, 5, unit="head")
    model = form(adapted, backend=backend)
    run(model, ids)
    compiled = len(backend.graphs)
    found = direct_logit_attribution(model, ids, 5, unit="head")
    torch.testing.assert_close(found.attribution, expected.attribution)
    run(model, ids)
    assert len(backend.graphs) == compiled


def test_callers_stance_is_restored_after_errors(backend):
    model, ids = in_place(build("llama"), backend=backend), example_ids("llama")
    run(model, ids)

    def fail(module, args):
        raise ValueError("from a hook of the caller's")

    with torch.compiler.set_stance("fail_on_recompile"):
        direct_logit_attribution(model, ids, 5)
        assert stance() == "fail_on_recompile"
        run(model, ids)
        handle = model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="the caller's"):
            direct_logit_attribution(model, ids, 5)
        handle.remove()
        assert stance() == "fail_on_recompile"
    assert stance() == "default"


def test_stance_is_restored_after_concurrent_threads(backend):
    ids = example_ids("llama")
    models = [in_place(build("llama", seed), backend=backend) for seed in (0, 1)]
    expected = [direct_logit_attribution(build("llama", seed), ids, 5) for seed in (0, 1)]
    logits = [run(model, ids) for model in models]
    wrong: list[object] = []

    def attribute(which):
        for _ in range(6):
            found = direct_logit_attribution(models[which], ids, 5)
            if not torch.allclose(found.attribution, expected[which].attribution):
                wrong.append(which)

    def use(which):
        for _ in range(20):
            if not torch.allclose(run(models[which], ids), logits[which]):
                wrong.append("compiled")

    threads = [threading.Thread(target=attribute, args=(which,)) for which in (0, 1, 0)]
    threads.append(threading.Thread(target=use, args=(0,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert stance() == "default"


def test_plain_model_does_not_touch_the_compiler(monkeypatch):
    def set_stance(*_):
        raise AssertionError("the stance was set for a model without compiled parts")

    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    direct_logit_attribution(build("llama"), example_ids("llama"), 5, unit="head")


def test_call_inside_compiled_function_is_refused(backend):
    model, ids = in_place(build("llama"), backend=backend), example_ids("llama")

    @torch.compile(backend=backend)
    def within(x):
        y = 2 * x
        torch._dynamo.graph_break()
        return y + direct_logit_attribution(model, ids, 5).logit.sum()

    with pytest.raises(HookError, match="outside"):
        within(torch.ones(2))
    assert stance() == "default"
    direct_logit_attribution(model, ids, 5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, on import
@pytest.mark.slow
def test_inductor_model_matches_plain():
    """Inductor, which needs a C compiler where it runs on a CPU."""
    torch._dynamo.reset()
    plain, ids = build("llama", dtype=torch.float32), example_ids("llama")
    model = torch.compile(build("llama", dtype=torch.float32))
    try:
        before = run(model, ids)
    except Exception as error:
        pytest.skip(f"nothing can be compiled here: {type(error).__name__}")
    found = direct_logit_attribution(model, ids, 5, unit="head")
    expected = direct_logit_attribution(plain, ids, 5, unit="head")
    torch.testing.assert_close(found.attribution, expected.attribution)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(model, ids), before)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_part_runs_as_is(how):
    model, ids = build("llama"), example_ids("llama")
    expected = direct_logit_attribution(model, ids, 5, unit="head").attribution
    for layer in model.model.layers:
        plain = torch.nn.SiLU().eval()
        layer.mlp.act_fn = (
            torch.jit.script(plain) if how == "script" else torch.jit.trace(plain, torch.ones(3))
        )
    found = direct_logit_attribution(model, ids, 5, unit="head").attribution
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
