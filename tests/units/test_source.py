"""Sources: what each head took from each token, against the products that models compute."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
import transformers
from mapping_zoo import build_any, example_ids_any
from oracle_sources import source_effects, source_slopes
from packaging.version import Version
from transformers import modeling_utils
from zoo import ZOO, build, example_ids, supports

import dla_hooks
from dla_hooks import (
    DecompositionError,
    Heads,
    InputError,
    SourceTokens,
    UnsupportedModelError,
    direct_logit_attribution,
)
from dla_hooks.modules.attention_interface import why_unseen
from dla_hooks.projection import attention_reads

if why_unseen() is not None:
    pytest.skip("this transformers shows no attention function", allow_module_level=True)

ANSWER, INCORRECT = 5, 7
# These compute attention in a loop of their own; the last two until transformers 5.24.
LOOPS = ["bloom", "falcon", "gpt_neo", "mpt", "xglm", "cpmant"]
if Version(transformers.__version__) < Version("5.24"):
    LOOPS += ["gptj", "codegen"]
SPECS = [spec for spec in ZOO if spec.model_type not in LOOPS]
REGISTRY = modeling_utils.ALL_ATTENTION_FUNCTIONS


def dense(result) -> torch.Tensor:
    """Every row's value at every entry [run, source, *batch_and_pos], 0 where it is not kept."""
    shape = len(result.rows), *result.attribution.shape[1:]
    found = torch.zeros(shape, dtype=torch.float64)
    kept = result.index >= 0
    values = result.attribution.double().nan_to_num().where(kept, 0)
    found.scatter_add_(0, result.index.clamp_min(0), values)
    return found.unflatten(0, (-1, result.rows.runs[0].n))


def ranked(model, ids, **options):
    """The result of a call, with options of the unit and of the call."""
    call = {key: options.pop(key) for key in ("attention_mask", "chunk_size") if key in options}
    pos = options.pop("pos", None)
    unit = SourceTokens(**options)
    return direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=unit, pos=pos, **call)


def sources(model, ids, **options) -> torch.Tensor:
    """All rows [run, source, *batch_and_pos]."""
    return dense(ranked(model, ids, top=None, **options))


def assert_near(one, other, relative=1e-6):
    assert one.shape == other.shape
    size = float(other.abs().max())
    assert float((one - other).abs().max()) <= relative * size


@pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_rows_are_weight_times_value_through_the_output(spec, attn, seed):
    if not supports(spec, attn):
        pytest.skip("not this implementation")
    ids = example_ids(spec, seed=seed)
    truth = source_effects(build(spec, seed), ids, ANSWER, INCORRECT)
    found = sources(build(spec, seed, attn=attn), ids)
    truth = truth.flatten(0, 1).movedim(-1, 1)  # [head, source, batch, pos]
    assert_near(found, truth)
    assert bool((found[:, 1:, :, 0] == 0).all())  # nobody reads what comes later


@pytest.mark.parametrize("spec", ["gpt2", "mistral", "gemma2", "gpt_oss", "olmo2"])
def test_weights_beside_rows_are_the_models_own(spec):
    model, ids = build(spec), example_ids(spec)
    result = direct_logit_attribution(model, ids, ANSWER, unit=SourceTokens(top=7), pos=None)
    own = torch.stack(model(ids, output_attentions=True, use_cache=False).attentions)
    own = own.transpose(1, 2).flatten(0, 1).movedim(-1, 1).flatten(0, 1)  # [row, batch, pos]
    kept = result.index >= 0
    expected = own.gather(0, result.index.clamp_min(0)).where(kept, 0).double()
    torch.testing.assert_close(result.beside["weight"], expected, rtol=0, atol=1e-6)


# Gates, latent values wider or narrower than keys, sinks, caps, shared keys and values, indexers.
KINDS = (
    *("qwen3_next", "qwen3_5_text", "afmoe", "beam", "dots3_note_text", "laguna", "lfm3", "axk2"),
    *("bailing_hybrid", "deepseek_v3", "deepseek_v32", "longcat_flash", "minicpm3", "granite_swa"),
    *("mimo_v2_flash", "vaultgemma", "gemma4_text", "llama4_text", "cohere2", "doge", "ctrl"),
    *("biogpt", "whisper", "zaya", "glm_moe_dsa"),
)


@pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
@pytest.mark.parametrize("model_type", KINDS)
def test_rows_of_other_attention_are_derivatives_times_what_was_read(model_type, seed):
    model = build_any(model_type, seed)
    ids = example_ids_any(model)
    units = SourceTokens(top=None), Heads(fold_value_biases=False)
    plan = dla_hooks.prepare(model, ANSWER, INCORRECT, unit=units)
    both = plan(ids, pos=None)
    found, layers = dense(both["source"]), plan._data.units["source"].layers
    names = [run.label[:-3] for run in both["source"].rows.runs]
    names = [name for name in names if "H" in name or "X" in name]  # mixers come behind
    found = found[: len(names)]
    heads = torch.stack([both["head"][name].double() for name in names])
    assert_near(found.sum(1), heads)
    model.set_attn_implementation("eager")
    target = torch.zeros(1, dtype=torch.long)
    slopes = source_slopes(
        model,
        ids,
        {layer.label: ours.site.proj for layer, ours in layers},
        {layer.label: ours.at_output.of(target)[0] for layer, ours in layers},
    )
    for layer, _ in layers:
        of_layer = slopes[layer.label]  # [head, batch, pos, source]
        sums = of_layer.sum(-1)
        # The scales of norms: one number for all heads of a layer at each position.
        scale = (heads[layer.place] * sums).sum(0) / sums.square().sum(0)
        assert_near(found[layer.place], (of_layer * scale[..., None]).movedim(-1, 1), 1e-4)


@torch.no_grad()
def test_norm_between_attention_and_projection_is_frozen():
    model = build_any("bitnet", 0)
    ids = example_ids_any(model)
    plan = dla_hooks.prepare(model, ANSWER, INCORRECT, unit=SourceTokens(top=None))
    found = dense(plan(ids, pos=None))
    seen = {}
    block = model.model.layers[1].self_attn
    norm = block.attn_sub_norm
    handle = norm.register_forward_hook(lambda m, args, out: seen.update(a=args[0], z=out))
    scale = model.model.norm.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True, use_cache=False).attentions[1]
    handle.remove()
    scale.remove()
    final = (seen["x"].square().mean(-1) + model.model.norm.variance_epsilon).sqrt()
    layer, ours = plan._data.units["source"].layers[1]
    u = ours.folded.of(torch.zeros(1, dtype=torch.long))[0]
    frozen = (seen["a"].square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    # Changing values moves z through the norm's weights over its frozen scale.
    along = (u * norm.weight / frozen).unflatten(-1, (weights.shape[1], -1))  # [b, t, h, d]
    n_shared = block.v_proj.weight.shape[0] // along.shape[-1]
    values = {}
    handle = block.v_proj.register_forward_hook(lambda m, args, out: values.update(v=out))
    model(ids, use_cache=False)
    handle.remove()
    v = values["v"].unflatten(-1, (n_shared, -1)).repeat_interleave(along.shape[2] // n_shared, 2)
    expected = (
        weights.double() * torch.einsum("bthd,bshd->bhts", along, v) / final[:, None, :, None]
    )
    assert_near(found[layer.place], expected.permute(1, 3, 0, 2), 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama-mqa", "gpt_oss"])
def test_sums_over_heads_and_layers_are_reductions_of_rows(name):
    model, ids = build(name), example_ids(name)
    rows = sources(model, ids)
    n_layers = len({run.layer for run in ranked(model, ids).rows.runs})
    layers = direct_logit_attribution(
        model, ids, ANSWER, INCORRECT, unit=SourceTokens(top=None, sum="layer"), pos=None
    )
    assert_near(dense(layers), rows.unflatten(0, (n_layers, -1)).sum(1), 1e-9)
    heads = direct_logit_attribution(
        model, ids, ANSWER, INCORRECT, unit=SourceTokens(top=None, sum="heads"), pos=None
    )
    assert_near(dense(heads), rows.sum(0, keepdim=True), 1e-9)
    assert (layers.rows[8].label, heads.rows[3].label) == ("L1<1", "<3")
    for result in (layers, heads):
        whole = result.attribution.sum(0) + result.rest + result.remainder + result.bias
        torch.testing.assert_close(whole, result.logit)
        read = result.beside["weight"].sum(0)
        assert bool((read < n_layers + 1e-6).all())


@pytest.mark.parametrize("sum", [None, "layer", "heads"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_kept_rows_are_the_strongest_at_every_position(name, sum):
    model, ids = build(name), example_ids(name)
    every, top = ranked(model, ids, top=None, sum=sum), ranked(model, ids, top=4, sum=sum)
    all_rows = dense(every).flatten(0, 1)
    strongest = all_rows.abs().topk(4, dim=0).values
    torch.testing.assert_close(top.attribution.abs(), strongest)
    kept = top.index >= 0
    torch.testing.assert_close(
        all_rows.gather(0, top.index.clamp_min(0)).where(kept, 0), top.attribution
    )
    torch.testing.assert_close(top.rest, all_rows.sum(0) - top.attribution.sum(0))
    torch.testing.assert_close(top.remainder, every.remainder)
    # At the first position each head reads one token.
    n = {None: 12, "layer": 3, "heads": 1}[sum]
    assert int((every.index[:, 0, 0] >= 0).sum()) == n


@pytest.mark.parametrize("name", ["llama-mqa", "gemma2", "gpt2"])
def test_chosen_heads_have_the_rows_that_they_have_among_all(name):
    model, ids = build(name), example_ids(name)
    rows = sources(model, ids)
    n_heads = ranked(model, ids).rows.runs[-1].index + 1
    picked = ranked(model, ids, heads=["L1H2", (0, 1)], top=None)
    assert [picked.rows[0].label, picked.rows[-1].label] == ["L0H1<0", "L1H2<6"]
    assert (picked.rows[8].layer, picked.rows[8].index, picked.rows[8].source) == (1, 2, 1)
    assert_near(dense(picked), rows[[1, n_heads + 2]], 1e-9)
    whole = picked.attribution.sum(0) + picked.rest + picked.remainder + picked.bias
    torch.testing.assert_close(whole, picked.logit)
    of_layer = ranked(model, ids, layers=[1], top=None)
    assert_near(dense(of_layer), rows[n_heads : 2 * n_heads], 1e-9)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("sum", [None, "heads"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral", "gpt2"])
def test_padding_changes_no_row(name, left, sum):
    model = build(name, attn="sdpa")
    ids = example_ids(name, batch=3)
    n, pads = ids.shape[1], (0, 2, 4)
    mask = torch.ones_like(ids)
    padded = ids.clone()
    for row, pad in enumerate(pads):
        mask[row, slice(0, pad) if left else slice(n - pad, n)] = 0
        place = slice(pad, n) if left else slice(0, n - pad)
        padded[row, place] = ids[row, : n - pad]
    got = dense(ranked(model, padded, attention_mask=mask, pos=-1, top=None, sum=sum))
    for row, pad in enumerate(pads):
        own = dense(ranked(model, ids[row : row + 1, : n - pad], pos=-1, top=None, sum=sum))
        assert_near(got[:, : n - pad, row], own[:, :, 0])
        assert bool((got[:, n - pad :, row] == 0).all())
    result = ranked(model, padded, attention_mask=mask, top=None, sum=sum)
    whole = result.attribution.sum(0) + result.rest + result.remainder + result.bias
    torch.testing.assert_close(whole, result.logit, equal_nan=True)


def test_masks_with_holes_leave_no_row_of_a_masked_token():
    model, ids = build("gpt2", attn="sdpa"), example_ids("gpt2")
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    got = dense(ranked(model, ids, attention_mask=mask, pos=-1, top=None))
    own = dense(ranked(model, ids[:1, [0, 1, 2, 4, 5, 6]], pos=-1, top=None))
    assert got.shape[1] == 7
    assert bool((got[:, 6, 0] == 0).all())  # that row has six tokens
    assert_near(got[:, :6, 0], own[:, :, 0])


def test_rows_of_a_batch_are_those_of_its_prompts():
    model, ids = build("gemma2"), example_ids("gemma2", batch=3)
    order = torch.tensor([2, 0, 1])
    rows = sources(model, ids)
    assert_near(sources(model, ids[order]), rows[:, :, order], 1e-9)
    for row in range(3):
        assert_near(sources(model, ids[row : row + 1]), rows[:, :, row : row + 1], 1e-9)


@pytest.mark.parametrize("sum", [None, "layer", "heads"])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_chunks_have_the_rows_of_one_run(name, size, sum):
    model, ids = build(name), example_ids(name, length=9)
    whole = sources(model, ids, sum=sum)
    assert_near(sources(model, ids, sum=sum, chunk_size=size), whole)
    last = sources(model, ids, sum=sum, chunk_size=size, pos=-1)
    assert_near(last, whole[..., -1])


def test_targets_of_their_own_at_each_position():
    model, ids = build("gemma2"), example_ids("gemma2")
    answers = torch.randint(3, 60, ids.shape, generator=torch.Generator().manual_seed(0))
    unit = SourceTokens(top=None)
    got = dense(direct_logit_attribution(model, ids, answers, unit=unit, pos=None))
    for row, column in ((0, 6), (1, 3), (0, 0)):
        answer = int(answers[row, column])
        own = dense(direct_logit_attribution(model, ids, answer, unit=unit, pos=None))
        assert_near(got[..., row, column], own[..., row, column], 1e-9)
    answers = torch.tensor([[5], [9]])
    got = dense(direct_logit_attribution(model, ids, answers, unit=unit, pos=None))
    own = dense(direct_logit_attribution(model, ids, 9, unit=unit, pos=None))
    assert_near(got[..., 1, :], own[..., 1, :], 1e-9)


def test_gated_attention_with_targets_of_their_own_and_in_chosen_heads():
    model = build_any("qwen3_next", 0)
    ids = example_ids_any(model)
    answers = (torch.arange(ids.numel()).reshape(ids.shape) * 7) % 50 + 3
    unit = SourceTokens(top=None)
    got = dense(direct_logit_attribution(model, ids, answers, unit=unit, pos=None))
    own = dense(direct_logit_attribution(model, ids, int(answers[0, 5]), unit=unit, pos=None))
    assert_near(got[..., 0, 5], own[..., 0, 5], 1e-9)
    name = f"L{plan_layer(model)}H2"
    one = SourceTokens(heads=[name], top=None)
    one = dense(direct_logit_attribution(model, ids, answers, unit=one, pos=None))
    assert_near(one, got[2:3], 1e-9)


def plan_layer(model) -> int:
    return direct_logit_attribution(model, [5, 6], 4, unit="source").rows[0].layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "mistral"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_coarse_models_are_attributed(name, attn, dtype):
    if not supports(name, attn):
        pytest.skip("not this implementation")
    model, ids = build(name, dtype=dtype, attn=attn), example_ids(name)
    found = sources(model, ids)
    truth = sources(build(name, attn=attn), ids)
    assert_near(found, truth, 1e-4 if dtype == torch.float32 else 0.2)


def test_what_hooks_write_to_z_is_in_the_remainder():
    model, ids = build("llama"), example_ids("llama")
    clean = ranked(model, ids, top=None, layers=[2])

    def without_head_1(module, args):
        z = args[0].clone()
        z[..., 10:20] = 0
        return (z,)

    handle = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(without_head_1)
    result = ranked(model, ids, top=None, layers=[2])
    handle.remove()
    scale = dense(result)[0] / dense(clean)[0]  # the final norm's scale is another
    assert_near(dense(result), dense(clean) * scale[:1].nan_to_num())
    whole = result.attribution.sum(0) + result.rest + result.remainder + result.bias
    torch.testing.assert_close(whole, result.logit)


def test_logits_are_those_of_a_run_without_taps():
    model, ids = build("gpt2", attn="sdpa", dtype=torch.float32), example_ids("gpt2")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
    ranked(model, ids)
    handle.remove()
    assert torch.equal(seen[-1], own[:, -seen[-1].shape[1] :])


class TestABrokenMechanismIsRefused:
    """The tokens of a head are held against its z; so is the form of what stands between."""

    @pytest.fixture
    def without(self, monkeypatch):
        """A run in which the library does not see one option of the attention function."""

        def without(option):
            weights = attention_reads.attention_weights

            def changed(call, *rest):
                if option == "mask":
                    return weights(dataclasses.replace(call, mask=None), *rest)
                if option == "order":
                    flipped = call.key.flip(2)
                    return weights(dataclasses.replace(call, key=flipped), *rest)
                options = {**call.options, option: None}
                return weights(dataclasses.replace(call, options=options), *rest)

            monkeypatch.setattr(attention_reads, "attention_weights", changed)

        return without

    @pytest.mark.parametrize(
        ("name", "option"),
        [
            ("gemma2", "softcap"),
            ("gpt_oss", "s_aux"),
            ("mistral", "mask"),
            ("gpt2", "mask"),
            ("granite", "scaling"),
            ("llama", "order"),
        ],
    )
    def test_without_an_option(self, without, name, option):
        model, ids = build(name), example_ids(name)
        without(option)
        with pytest.raises(DecompositionError, match="the tokens that L0H"):
            ranked(model, ids)

    def test_without_the_gate(self, monkeypatch):
        def no_gates(call, z, row, queries, dtype):
            return torch.ones(len(queries), z.shape[-1], dtype=dtype)

        monkeypatch.setattr(attention_reads, "gates", no_gates)
        model = build_any("qwen3_next", 0)
        with pytest.raises(DecompositionError, match="the tokens that L"):
            ranked(model, example_ids_any(model))

    def test_with_values_of_another_head_group(self, monkeypatch):
        values = attention_reads.read_values

        def tiled(call, row, block, u):
            return values(dataclasses.replace(call, value=call.value.flip(1)), row, block, u)

        monkeypatch.setattr(attention_reads, "read_values", tiled)
        with pytest.raises(DecompositionError, match="the tokens that L"):
            ranked(build("llama"), example_ids("llama"))

    def test_a_channel_that_cancels_behind_a_gate_is_refused(self):
        model = build_any("afmoe", 0)
        ids = example_ids_any(model)
        attention = model.model.layers[0].self_attn
        own = modeling_utils.AttentionInterface._global_mapping["sdpa"]

        def zeroed(module, *args, **more):
            out, weights = own(module, *args, **more)
            if module is attention and out.shape[1] == ids.shape[1]:
                out = out.clone()
                out[..., 0, 3] = 0
            return out, weights

        ranked(model, ids)
        REGISTRY["sdpa"] = zeroed
        try:
            with pytest.raises(DecompositionError, match="exactly zero"):
                ranked(model, ids)
        finally:
            del REGISTRY["sdpa"]


class TestTheModelAsFound:
    def state(self, model):
        tables = REGISTRY._global_mapping, REGISTRY._local_mapping
        return (
            *(dict(table) for table in tables),
            dict(vars(REGISTRY)),
            model.config.to_dict(),
            model.config._attn_implementation,
        )

    def test_after_a_call(self):
        model = build("gpt2", attn="sdpa")
        before = self.state(model)
        ranked(model, example_ids("gpt2"))
        assert self.state(model) == before
        assert "get_interface" not in vars(REGISTRY)

    def test_after_an_exception_in_the_model(self):
        model = build("llama", attn="sdpa")
        ranked(model, example_ids("llama"))
        before = self.state(model)

        def fail(*_):
            raise RuntimeError("inside")

        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            ranked(model, example_ids("llama"))
        handle.remove()
        assert self.state(model) == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_a_replaced_method_of_the_callers_is_put_back(self, monkeypatch):
        calls, own = [], REGISTRY.get_interface

        def mine(*args, **kwargs):
            calls.append(args)
            return own(*args, **kwargs)

        monkeypatch.setattr(REGISTRY, "get_interface", mine)
        ranked(build("llama"), example_ids("llama"))
        assert REGISTRY.get_interface is mine
        assert calls

    def test_with_two_threads(self):
        models = [build("llama", seed, attn="sdpa") for seed in (0, 1)]
        ids = example_ids("llama")
        alone = [sources(model, ids) for model in models]
        found, failed = {}, []
        start = threading.Barrier(3)

        def work(number):
            start.wait()
            try:
                for turn in range(6):
                    found[number, turn] = sources(models[number % 2], ids)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        for (number, _), rows in found.items():
            assert torch.equal(rows, alone[number % 2])
        assert "get_interface" not in vars(REGISTRY)

    def test_another_thread_gets_the_function_itself(self):
        model, ids = build("llama", attn="sdpa"), example_ids("llama")
        got = []

        def look(*_):
            def other():
                got.append(REGISTRY.get_interface("sdpa", None))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        handle = model.model.layers[1].mlp.register_forward_hook(look)
        ranked(model, ids)
        handle.remove()
        assert got == [REGISTRY["sdpa"]]


class TestRefusals:
    @pytest.mark.parametrize("model_type", LOOPS)
    def test_attention_in_a_loop_of_its_own_is_refused_before_the_run(self, model_type):
        model = build_any(model_type, 0)
        with pytest.raises(UnsupportedModelError, match="loop of its own"):
            dla_hooks.prepare(model, ANSWER, unit="source")

    def test_differential_attention_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="called 2 times"):
            dla_hooks.prepare(build_any("diffllama", 0), ANSWER, unit="source")

    def test_a_layer_without_attention_is_refused_where_it_is_asked_for(self):
        model = build_any("lfm2", 0)
        layer = plan_layer(model)
        other = next(one for one in range(4) if one != layer)
        with pytest.raises((UnsupportedModelError, InputError), match=f"{other}"):
            dla_hooks.prepare(model, ANSWER, unit=SourceTokens(layers=[other]))

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"top": 0}, "top takes whole numbers from 1"),
            ({"top": True}, "top takes whole numbers from 1"),
            ({"top": 1.5}, "top takes whole numbers from 1"),
            ({"sum": "head"}, "sum must be"),
            ({"heads": "L1H2"}, "heads must be"),
            ({"heads": ["3H5"]}, "heads must hold"),
            ({"heads": [(1, -2)]}, "heads must hold"),
            ({"heads": []}, "empty"),
            ({"layers": "3"}, "layers takes"),
            ({"layers": [-1]}, "layers takes"),
            ({"layers": []}, "empty"),
        ],
        ids=str,
    )
    def test_options_of_a_wrong_kind(self, options, said):
        with pytest.raises(InputError, match=said):
            SourceTokens(**options)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"heads": ["L1H9"]}, "heads 0 to 3"),
            ({"heads": [(9, 0)]}, "no head L9H0"),
            ({"heads": ["L1.1H0"]}, "no head L1.1H0"),
            ({"layers": [9]}, "layers 0 to 2"),
            ({"layers": [1], "heads": ["L0H0"]}, "give one of the two"),
        ],
        ids=str,
    )
    def test_heads_and_layers_that_are_not_there(self, options, said):
        with pytest.raises(InputError, match=said):
            dla_hooks.prepare(build("gpt2"), ANSWER, unit=SourceTokens(**options))

    def test_an_attention_function_that_does_more_is_refused(self):
        def twice(module, query, key, value, mask, **more):
            out, weights = REGISTRY["sdpa"](module, query, key, value, mask, **more)
            return out * 2, weights

        modeling_utils.AttentionInterface.register("twice", twice)
        try:
            model = build("llama", attn="sdpa")
            model.config._attn_implementation = "twice"
            with pytest.raises(UnsupportedModelError, match="does more than softmax"):
                dla_hooks.prepare(model, ANSWER, unit="source")
        finally:
            del REGISTRY._global_mapping["twice"]


@pytest.mark.parametrize("sum", [None, "layer", "heads"])
@pytest.mark.parametrize("pos", [-1, None])
@pytest.mark.parametrize("top", [7, None])
def test_a_prompt_of_a_batch_has_no_rows_of_tokens_that_only_others_have(sum, pos, top):
    model, prompts = build("llama", dtype=torch.float32), [[3, 4], [5, 6, 7, 8, 9]]
    options = {"unit": SourceTokens(sum=sum, top=top), "pos": pos}
    alone = direct_logit_attribution(model, prompts[:1], ANSWER, **options)
    batch = direct_logit_attribution(model, prompts, ANSWER, **options)
    swept = next(dla_hooks.attribute_many(model, prompts, ANSWER, **options))
    assert len(swept.rows) == len(alone.rows)
    assert swept.attribution.shape == alone.attribution.shape == swept.beside["weight"].shape
    for found in (swept, batch.prompt(0)):
        assert found.rows == alone.rows
        assert "2 more rows" not in repr(found)
        assert "<2" not in found
        assert "L0H0<2" not in found
        there = {row.label: values for row, values in found}
        assert there.keys() == {row.label for row, _ in alone}
        for label, values in there.items():
            values = values[~values.isnan()]
            expected = alone[label][~alone[label].isnan()]
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)


def test_layers_may_be_one_layer():
    assert SourceTokens(layers=1).layers == SourceTokens(layers=torch.tensor([1])).layers == (1,)
