"""Features: what dictionaries' features wrote, against their vectors put through the model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from oracle_families import (
    family_of,
    final_norm,
    frozen_norm,
    layer_at,
    module_at,
    n_layers,
    post_norms,
    write_modules,
)
from safetensors.torch import save_file
from torch import nn
from zoo import build, example_ids

import dla_hooks
from dla_hooks import Features, InputError, direct_logit_attribution, prepare

ANSWER, INCORRECT = 5, 7
N = 57
SPECS = (
    "gpt2",
    "llama-bias",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "granite",
    "gpt_neox-parallel",
    "gpt_neox-sequential",
    "mixtral",
    "opt",
    "bloom",
    "falcon-7b",
)


class Made:
    """A random dictionary; ``kind`` says what makes its features sparse."""

    def __init__(self, width, kind="relu", seed=0, n=N, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.kind, self.threshold = kind, normal(n).abs()
        self.W_enc, self.W_dec = normal(width, n) / width**0.5, normal(n, width) / width**0.5
        self.b_enc, self.b_dec = 0.3 * normal(n), normal(width)

    def encode(self, x):
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.kind == "jumprelu":
            return pre * (pre > self.threshold)
        if self.kind == "topk":
            values, index = pre.topk(9, dim=-1)
            return torch.zeros_like(pre).scatter_(-1, index, values.relu())
        return pre.relu()

    def decode(self, f):
        return f @ self.W_dec + self.b_dec


def attribute(model, ids, unit, **options):
    options = {"pos": None, **options}
    return direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=unit, **options)


def dense(result):
    """Every row's numbers [row, batch, pos], and its activations; a row that is not there is 0."""
    numbers = torch.zeros(len(result.rows), *result.rest.shape, dtype=result.rest.dtype)
    activations = torch.zeros_like(numbers)
    index = result.index.clamp(min=0)
    there = result.index >= 0
    numbers.scatter_add_(0, index, torch.where(there, result.attribution, 0))
    activations.scatter_add_(0, index, torch.where(there, result.beside["activation"], 0))
    return numbers, activations


def own_scale(kind, norm, x, y):
    """The number that a norm divided by at each position: itself it computes in float32."""
    one = torch.ones_like(x[..., :1])
    beta = frozen_norm(kind, norm, torch.zeros_like(x), one)
    a = frozen_norm(kind, norm, x, one) - beta
    return (a * a).sum(-1, keepdim=True) / (a * (y - beta)).sum(-1, keepdim=True)


class Run:
    """One run of a model with everything kept."""

    def __init__(self, model, ids):
        self.model, self.ids, self.family = model, ids, family_of(model)
        self.seen = {}
        modules = {**write_modules(model), "norm": final_norm(model)}
        modules |= {f"normed {k}": m for k, m in post_norms(model).items()}
        for layer in range(n_layers(model)):
            modules[f"{layer}_z"] = module_at(layer_at(model, layer), self.family.o_proj)
            modules[f"block {layer}"] = layer_at(model, layer)
        handles = [
            m.register_forward_hook(self._keep(k), with_kwargs=True) for k, m in modules.items()
        ]
        with torch.no_grad():
            model(ids, use_cache=False)
        for handle in handles:
            handle.remove()

    def _keep(self, key):
        def keep(module, args, kwargs, out):
            x = args[0] if args else kwargs["hidden_states"]
            out = out[0] if isinstance(out, tuple) else out
            shape = (*self.ids.shape, -1)
            self.seen[key] = x.detach().clone().reshape(shape), out.detach().clone().reshape(shape)

        return keep

    def at(self, place):
        """What stands at a place [batch, pos, width]."""
        layer, _, name = place.partition("_")
        if place == "final_post":
            return self.seen["norm"][0]
        if name == "z":
            return self.seen[place][0]
        if name == "pre":
            return self.seen[f"block {layer}"][0]
        return self.seen.get(f"normed {place}", self.seen[place])[1]

    def in_logits(self, place, vectors):
        """What vectors [..., width] at a place give in the logit difference."""
        name = place.partition("_")[2]
        if name == "z":
            place = place.replace("_z", "_attn_out")
            proj = module_at(layer_at(self.model, int(place.partition("_")[0])), self.family.o_proj)
            W = proj.weight if isinstance(proj, nn.Linear) else proj.weight.T
            vectors = vectors @ W.T
            if f"normed {place}" in self.seen:
                vectors = self._through(post_norms(self.model)[place], f"normed {place}", vectors)
        if name not in ("pre", "post"):
            vectors = vectors * self.family.write_scale(self.model.config)
        normed = self._through(final_norm(self.model), "norm", vectors)
        W = module_at(self.model, self.family.head).weight
        return normed @ (W[ANSWER] - W[INCORRECT]) * self.family.logit_scale(self.model.config)

    def _through(self, norm, key, vectors):
        kind = self.family.norm
        scale = own_scale(kind, norm, *self.seen[key])
        zero = frozen_norm(kind, norm, torch.zeros_like(vectors), scale)
        return frozen_norm(kind, norm, vectors, scale) - zero


def tolerance(spec):
    return 1e-6 if "gemma" in spec else 1e-9  # Gemma's norms add one to their weights in float32


def check_place(model, ids, place, dictionary, result, atol):
    """Every row of a result with all rows of one dictionary."""
    run, (found, activations) = Run(model, ids), dense(result)
    x = run.at(place)
    flat = x.reshape(-1, x.shape[-1])
    f = dictionary.encode(flat).reshape(*ids.shape, -1)
    torch.testing.assert_close(activations[:-2], f.movedim(-1, 0), rtol=0, atol=1e-9)
    for feature in range(f.shape[-1]):
        expected = run.in_logits(place, f[..., feature, None] * dictionary.W_dec[feature])
        torch.testing.assert_close(found[feature], expected, rtol=0, atol=atol)
    b_dec = run.in_logits(place, dictionary.b_dec.expand(x.shape))
    rebuilt = dictionary.decode(f.reshape(-1, f.shape[-1])).reshape(x.shape)
    torch.testing.assert_close(found[-2], b_dec, rtol=0, atol=atol)
    torch.testing.assert_close(found[-1], run.in_logits(place, x - rebuilt), rtol=0, atol=atol)
    assert bool((f > 0).any())
    assert bool((f == 0).any())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_the_features_vectors_put_through_the_model(spec, seed):
    model, ids = build(spec, seed), example_ids(spec, seed=seed)
    d_model = model.config.hidden_size
    z = Run(model, ids).at("1_z").shape[-1]
    kinds = ("relu", "topk", "jumprelu")
    places = ("0_mlp_out", "1_attn_out", "1_pre", "final_post", "1_z")
    components, layers = attribute(model, ids, "component"), attribute(model, ids, "layer")
    for number, place in enumerate(places):
        width = z if place == "1_z" else d_model
        dictionary = Made(width, kinds[number % 3], seed + number)
        result = attribute(model, ids, Features({place: dictionary}, top=None))
        check_place(model, ids, place, dictionary, result, tolerance(spec))
        whole = result.attribution.sum(0) + result.rest + result.remainder + result.bias
        torch.testing.assert_close(whole, result.logit, rtol=1e-9, atol=1e-9)
        if place != "1_z":
            of_place = (layers if place in layers.labels else components)[place]
            total = result.attribution.sum(0) + result.rest
            torch.testing.assert_close(total, of_place, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spec", ["gpt2", "llama", "gemma2", "olmo2", "granite"])
def test_mid_streams_are_split(spec):
    model, ids = build(spec), example_ids(spec)
    dictionary = Made(model.config.hidden_size)
    result = attribute(model, ids, Features({"1_mid": dictionary}))
    mid = attribute(model, ids, "layer")["1_mid"]
    total = result.attribution.sum(0) + result.rest
    torch.testing.assert_close(total, mid, rtol=0, atol=1e-9)
    assert result.rows[3].label == "L1F3"


@pytest.mark.parametrize("top", [1, 5, 100, None])
def test_the_strongest_of_several_dictionaries_are_kept_at_each_position(top):
    model, ids = build("gemma2"), example_ids("gemma2", batch=3, length=9)
    z = Run(model, ids).at("1_z").shape[-1]
    dictionaries = {"2_mlp_out": Made(36, seed=1), "1_pre": Made(36, "topk", n=30), "2_z": Made(z)}
    everything, _ = dense(attribute(model, ids, Features(dictionaries, top=None)))
    result = attribute(model, ids, Features(dictionaries, top=top))
    labels = [row.label for row in result.rows]
    assert labels[0] == "L1F0"
    assert labels[30:34] == ["1_pre[b_dec]", "1_pre[error]", "L2F0@z", "L2F1@z"]
    assert labels[-3:] == [f"L2F{N - 1}@mlp_out", "2_mlp_out[b_dec]", "2_mlp_out[error]"]
    n = len(labels) if top is None else min(top, len(labels))
    strongest = everything.abs().sort(0, descending=True).values[:n]
    torch.testing.assert_close(result.attribution.abs(), strongest)
    total = result.attribution.sum(0) + result.rest
    torch.testing.assert_close(total, everything.sum(0))
    torch.testing.assert_close(result.mean_rows, everything.mean((1, 2)), rtol=1e-9, atol=1e-9)
    records = result.records()
    kept = [record for record in records if record["kind"] == "feature"]
    assert {record["feature"] for record in kept} <= set(range(N))
    assert all(record["activation"] > 0 for record in kept)
    path = result.rows[2]
    assert (path.kind, path.layer, path.index) == ("feature", 1, 2)


def test_a_feature_that_is_alone_gives_its_own_vectors_attribution():
    """One-hot features: the row is W_dec's own."""
    model, ids = build("llama"), example_ids("llama")
    made = Made(40)
    made.encode = lambda x: torch.eye(N, dtype=x.dtype)[3].expand(len(x), N)
    result = attribute(model, ids, Features({"2_mlp_out": made}, top=3))
    expected = Run(model, ids).in_logits("2_mlp_out", made.W_dec[3].expand(*ids.shape, 40))
    torch.testing.assert_close(result["L2F3"], expected, rtol=0, atol=1e-9)
    assert {result.rows[i].label for i in result.index.flatten().tolist() if i >= 0} == {
        "L2F3",
        "2_mlp_out[b_dec]",
        "2_mlp_out[error]",
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_padding_positions_targets_and_chunks(seed):
    model = build("llama-bias", seed, torch.float32, attn="sdpa")
    ids = example_ids("llama-bias", batch=2, length=12, seed=seed)
    made = Made(40, dtype=torch.float32)
    unit = Features({"1_mlp_out": made, "0_attn_out": made}, top=6)
    whole = direct_logit_attribution(model, ids[:, :-1], ids[:, 1:], unit=unit, pos=None)
    pieces = direct_logit_attribution(
        model, ids[:, :-1], ids[:, 1:], unit=unit, pos=None, chunk_size=4
    )
    torch.testing.assert_close(whole.attribution, pieces.attribution, rtol=1e-4, atol=1e-4)
    one = direct_logit_attribution(model, ids[:1, :6], ids[:1, 6], unit=unit)
    torch.testing.assert_close(whole.attribution[:, :1, 5], one.attribution, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = attribute(model, ids, unit, attention_mask=mask, pos=-1)
    alone = attribute(model, ids[:1, 5:], unit, pos=-1)
    torch.testing.assert_close(padded.attribution[:, :1], alone.attribution, rtol=1e-4, atol=1e-4)


def test_tiles_make_no_difference(monkeypatch):
    from dla_hooks.projection import tiles

    model, ids = build("gpt2"), example_ids("gpt2")
    unit = Features({"1_mlp_out": Made(36), "0_pre": Made(36)}, top=7)
    whole = attribute(model, ids, unit)
    monkeypatch.setitem(tiles._TILE_ELEMENTS, "cpu", 3 * N)
    small = attribute(model, ids, unit)
    torch.testing.assert_close(small.attribution, whole.attribution)
    assert torch.equal(small.index, whole.index)


@pytest.mark.parametrize("place", ["1_mlp_out", "1_z", "1_pre", "2_pre"])
@pytest.mark.parametrize("spec", ["gemma2", "gpt2"])
def test_hooks_of_the_callers_are_told_apart(spec, place):
    model, ids = build(spec), example_ids(spec)
    width = Run(model, ids).at("1_z").shape[-1] if place == "1_z" else 36
    write_modules(model)["1_mlp_out"].register_forward_hook(lambda m, args, out: 1.2 * out)
    module_at(layer_at(model, 1), family_of(model).o_proj).register_forward_hook(
        lambda m, args, out: out + 0.2
    )
    layer_at(model, 1).register_forward_pre_hook(lambda m, args: (1.1 * args[0], *args[1:]))
    result = attribute(model, ids, Features({place: Made(width)}, top=4))
    whole = result.attribution.sum(0) + result.rest + result.remainder + result.bias
    torch.testing.assert_close(whole, result.logit, rtol=1e-9, atol=1e-9)
    if place != "1_z":
        unit = "layer" if place.endswith("pre") else "component"
        expected = attribute(model, ids, unit)[place]
        total = result.attribution.sum(0) + result.rest
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


# Folders


def folder(path, made, architecture="standard", weights=(), **cfg):
    path.mkdir(exist_ok=True, parents=True)
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    tensors = {name: getattr(made, name).contiguous() for name in names}
    tensors |= dict(weights)
    save_file({k: v for k, v in tensors.items() if v is not None}, path / "sae_weights.safetensors")
    cfg = {"architecture": architecture, "apply_b_dec_to_input": True, **cfg}
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk", "old topk"])
def test_folders_give_the_numbers_of_the_object(kind, seed, tmp_path):
    made = Made(40, kind.replace("batchtopk", "jumprelu").removeprefix("old "), seed)
    more = {"threshold": made.threshold} if "jump" in kind or "batch" in kind else {}
    cfg = {
        "relu": {},
        "jumprelu": {"architecture": "jumprelu", "normalize_activations": "none"},
        "topk": {"architecture": "topk", "k": 9},
        "batchtopk": {"architecture": "batchtopk"},
        "old topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 9}},
    }[kind]
    path = folder(tmp_path / "sae", made, weights=more, **cfg)
    model, ids = build("llama", seed), example_ids("llama", seed=seed)
    for place in ("1_mlp_out", "2_pre"):
        expected = attribute(model, ids, Features({place: made}, top=8))
        for given in (path, str(path)):
            found = attribute(model, ids, Features({place: given}, top=8))
            assert torch.equal(found.index, expected.index)
            torch.testing.assert_close(found.attribution, expected.attribution)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_dictionaries_that_norm_each_token_are_exact(norm, tmp_path):
    made, model, ids = Made(36), build("gpt2"), example_ids("gpt2")
    path = folder(tmp_path, made, normalize_activations=norm, apply_b_dec_to_input=False)
    result = attribute(model, ids, Features({"2_mlp_out": path}, top=None))
    found, activations = dense(result)
    run = Run(model, ids)
    x = run.at("2_mlp_out")
    if norm == "layer_norm":
        offset = x.mean(-1, keepdim=True)
        by = (x - offset).std(-1, keepdim=True)
        given = (x - offset) / (by + 1e-5)
    else:
        offset, by = torch.zeros_like(x[..., :1]), x.norm(dim=-1, keepdim=True) / 6
        given = x / by
    f = (given @ made.W_enc + made.b_enc).relu()
    torch.testing.assert_close(activations[:-2], f.movedim(-1, 0))
    for feature in range(N):
        expected = run.in_logits("2_mlp_out", f[..., feature, None] * by * made.W_dec[feature])
        torch.testing.assert_close(found[feature], expected, rtol=0, atol=1e-9)
    constant = by * made.b_dec + offset
    torch.testing.assert_close(found[-2], run.in_logits("2_mlp_out", constant), rtol=0, atol=1e-9)
    error = x - by * (f @ made.W_dec) - constant
    torch.testing.assert_close(found[-1], run.in_logits("2_mlp_out", error), rtol=0, atol=1e-9)


def test_layer_norm_dictionaries_keep_the_mean_in_b_dec_where_the_model_reads_it(tmp_path):
    made, model, ids = Made(40), build("llama"), example_ids("llama")
    path = folder(tmp_path, made, normalize_activations="layer_norm")
    result = attribute(model, ids, Features({"2_mlp_out": path}, top=None))
    total = result.attribution.sum(0)
    expected = attribute(model, ids, "component")["2_mlp_out"]
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-9)


def test_gated_and_rescaled_dictionaries_are_exact(tmp_path):
    made, model, ids = Made(40), build("llama"), example_ids("llama")
    generator = torch.Generator().manual_seed(3)
    r_mag, b_mag, b_gate = torch.randn(3, N, generator=generator, dtype=torch.float64)
    gated = {"r_mag": r_mag, "b_mag": b_mag, "b_gate": b_gate, "b_enc": None}
    path = folder(tmp_path / "gated", made, "gated", gated)
    _, activations = dense(attribute(model, ids, Features({"1_mlp_out": path}, top=None)))
    x = Run(model, ids).at("1_mlp_out") - made.b_dec
    opened = x @ made.W_enc + b_gate > 0
    expected = opened * (x @ made.W_enc * r_mag.exp() + b_mag).relu()
    torch.testing.assert_close(activations[:-2], expected.movedim(-1, 0))
    path = folder(tmp_path / "topk", made, "topk", k=9, rescale_acts_by_decoder_norm=True)
    found, activations = dense(attribute(model, ids, Features({"1_mlp_out": path}, top=None)))
    norm = made.W_dec.norm(dim=-1)
    pre = (x @ made.W_enc + made.b_enc) * norm
    values, index = pre.topk(9)
    f = torch.zeros_like(pre).scatter_(-1, index, values.relu())
    torch.testing.assert_close(activations[:-2], f.movedim(-1, 0))
    vectors = f[..., 5, None] * made.W_dec[5] / norm[5]
    expected = Run(model, ids).in_logits("1_mlp_out", vectors)
    torch.testing.assert_close(found[5], expected, rtol=0, atol=1e-9)


def test_centred_dictionaries_read_less_the_mean(tmp_path):
    made, model, ids = Made(36), build("gpt2"), example_ids("gpt2")
    found = dense(attribute(model, ids, Features({"1_pre": made}, top=None, centred=True)))
    x = Run(model, ids).at("1_pre")
    f = made.encode((x - x.mean(-1, keepdim=True)).reshape(-1, 36)).reshape(*ids.shape, -1)
    torch.testing.assert_close(found[1][:-2], f.movedim(-1, 0))
    path = folder(
        tmp_path, made, metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    )
    other = dense(attribute(model, ids, Features({"1_pre": path}, top=None)))
    torch.testing.assert_close(other, found)
    plain = dense(attribute(model, ids, Features({"1_pre": made}, top=None)))
    assert (plain[1] - found[1]).abs().max() > 1e-3
    with pytest.raises(InputError, match="LayerNorms only"):
        prepare(build("llama"), ANSWER, unit=Features({"1_pre": Made(40)}, centred=True))


BAD = {
    "expected average": ({"normalize_activations": "expected_average_only_in"}, {}, "fold"),
    "unknown norm": ({"normalize_activations": "covariance_whitening"}, {}, "covariance"),
    "transcoder": ({"architecture": "transcoder"}, {}, "'transcoder'"),
    "skip": ({}, {"W_skip": torch.ones(40, 40)}, "W_skip"),
    "batchtopk": ({"architecture": "batchtopk"}, {}, "threshold"),
    "topk": ({"architecture": "topk"}, {}, "must say k"),
    "function": ({"activation_fn_str": "tanh-relu"}, {}, "tanh-relu"),
    "input": ({"apply_b_dec_to_input": None}, {}, "apply_b_dec_to_input"),
    "reshaped": ({"reshape_activations": "hook_z"}, {}, "reshape_activations"),
    "one head": ({"metadata": {"hook_head_index": 3}}, {}, "hook_head_index"),
    "scaled": ({}, {"scaling_factor": torch.full((N,), 2.0)}, "scaling_factor"),
    "shape": ({}, {"b_enc": torch.ones(3)}, "do not fit"),
    "no matrix": ({}, {"W_enc": torch.ones(40)}, "no matrix"),
    "nan": ({}, {"b_enc": torch.full((N,), torch.nan)}, "NaN or infinite in part: .'b_enc'"),
    "named by a list": ({"architecture": ["standard"]}, {}, "is not read"),
    "k in a list": ({"architecture": "topk", "activation_fn_kwargs": [9]}, {}, "must say k"),
    "k is true": ({"architecture": "topk", "k": True}, {}, "must say k"),
    "old norm": ({"normalize_activations": True}, {}, "fold the factor"),
    "old head": ({"hook_point_head_index": 3}, {}, "hook_head_index"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_cannot_be_read_are_refused_by_name(case, tmp_path):
    cfg, weights, what = BAD[case]
    path = folder(tmp_path, Made(40), weights=weights, **cfg)
    with pytest.raises(InputError, match=what):
        prepare(build("llama"), ANSWER, unit=Features({"1_mlp_out": path}))


def test_broken_folders_are_refused(tmp_path):
    def refused(what):
        with pytest.raises(InputError, match=what):
            prepare(build("llama"), ANSWER, unit=Features({"1_mlp_out": tmp_path / "sae"}))

    refused("no such folder")
    path = folder(tmp_path / "sae", Made(40))
    (path / "cfg.json").write_text("{")
    refused("cfg.json cannot be read")
    (path / "cfg.json").unlink()
    refused("cfg.json is missing")
    folder(tmp_path / "sae", Made(40))
    (path / "sae_weights.safetensors").write_bytes(b"nothing")
    refused("cannot be read")
    (path / "sae_weights.safetensors").unlink()
    refused("one file of weights")
    (path / "params.npz").write_bytes(b"")
    refused("params.npz")
    folder(tmp_path / "sae", Made(36))
    refused("36 wide, and the place is 40 wide")


def test_features_that_are_the_largest_either_way_keep_their_signs(tmp_path):
    made, model, ids = Made(40), build("llama"), example_ids("llama")
    path = folder(tmp_path, made, "abstopk", k=9)
    _, activations = dense(attribute(model, ids, Features({"1_mlp_out": path}, top=None)))
    pre = (Run(model, ids).at("1_mlp_out") - made.b_dec) @ made.W_enc + made.b_enc
    least = pre.abs().sort(-1, descending=True).values[..., 8:9]
    expected = pre * (pre.abs() >= least)
    torch.testing.assert_close(activations[:-2], expected.movedim(-1, 0))
    assert bool((expected < 0).any())


def test_folders_of_the_first_saelens_take_b_dec_off_what_they_read(tmp_path):
    made, model, ids = Made(40), build("llama"), example_ids("llama")
    path = folder(tmp_path, made)
    old = {"hook_point": "blocks.1.hook_mlp_out", "hook_point_head_index": None, "d_sae": N}
    (path / "cfg.json").write_text(json.dumps(old))
    found = attribute(model, ids, Features({"1_mlp_out": path}, top=8))
    expected = attribute(model, ids, Features({"1_mlp_out": made}, top=8))
    torch.testing.assert_close(found.attribution, expected.attribution)
    (path / "cfg.json").write_text("{}")  # nobody's
    with pytest.raises(InputError, match="apply_b_dec_to_input"):
        attribute(model, ids, Features({"1_mlp_out": path}))


def test_settings_that_are_no_mappings_say_nothing(tmp_path):
    made, model, ids = Made(40), build("llama"), example_ids("llama")
    path = folder(tmp_path, made, metadata=[1], model_from_pretrained_kwargs=["x"])
    found = attribute(model, ids, Features({"1_mlp_out": path}, top=8))
    expected = attribute(model, ids, Features({"1_mlp_out": made}, top=8))
    torch.testing.assert_close(found.attribution, expected.attribution)


@pytest.mark.parametrize(
    ("hook", "place", "here"),
    [
        ("blocks.1.hook_resid_post", "1_pre", "2_pre"),
        ("blocks.2.hook_resid_post", "2_pre", "final_post"),
        ("blocks.1.hook_resid_pre", "2_pre", "1_pre"),
        ("blocks.0.hook_mlp_out", "1_mlp_out", "0_mlp_out"),
        ("blocks.1.attn.hook_z", "1_attn_out", "1_z"),
        ("blocks.1.hook_resid_post", "2_pre", None),
        ("blocks.2.hook_resid_post", "final_post", None),
        ("blocks.1.hook_mlp_out", "1_mlp_out", None),
        ("model.layers.0", "1_mlp_out", None),
    ],
)
def test_dictionaries_of_another_place_are_warned_of(hook, place, here, tmp_path):
    model, made = build("llama"), Made(40)
    made.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook))
    for given in (made, folder(tmp_path, made, metadata={"hook_name": hook})):
        if here is None:
            prepare(model, ANSWER, unit=Features({place: given}))
            continue
        with pytest.warns(dla_hooks.DLAWarning, match=f"trained at {here} .{hook}"):
            prepare(model, ANSWER, unit=Features({place: given}))


def test_objects_that_say_they_are_centred_are_given_centred_streams():
    made, model, ids = Made(36), build("gpt2"), example_ids("gpt2")
    expected = attribute(model, ids, Features({"1_pre": made}, top=8, centred=True))
    kwargs = {"center_writing_weights": True}
    made.cfg = SimpleNamespace(metadata={"model_from_pretrained_kwargs": kwargs})
    found = attribute(model, ids, Features({"1_pre": made}, top=8))
    torch.testing.assert_close(found.attribution, expected.attribution)
    # TransformerLens centres no model of RMSNorms, whatever it is told.
    other, plain = Made(40), Made(40)
    other.cfg = made.cfg
    model, ids = build("llama"), example_ids("llama")
    found = attribute(model, ids, Features({"1_pre": other}, top=8))
    expected = attribute(model, ids, Features({"1_pre": plain}, top=8))
    torch.testing.assert_close(found.attribution, expected.attribution)


# What is no dictionary, and no place


class Bent(Made):
    def decode(self, f):
        return (f @ self.W_dec).tanh()


class Batchwise(Made):
    def encode(self, x):
        f = super().encode(x)
        return f * (f >= f.flatten().topk(8).values[-1])


class Wider(Made):
    def decode(self, f):
        return torch.nn.functional.pad(super().decode(f), (0, 1))


class Broken(Made):
    def encode(self, x):
        return super().encode(x) * torch.nan


class Tuples(Made):
    def encode(self, x):
        return super().encode(x), None


class OfTwoPlaces(Made):
    cfg = SimpleNamespace(normalize_activations="none", d_out=40)


class SkipTranscoder(Made):
    pass


class Normed(Made):
    cfg = {"normalize_activations": "layer_norm"}  # noqa: RUF012


class Remembering(Made):
    def encode(self, x):
        self.size = x.norm(dim=-1, keepdim=True)
        return super().encode(x / self.size)

    def decode(self, f):
        return super().decode(f) * (self.size if len(self.size) == len(f) else self.size[:1])


class Complex(Made):
    def encode(self, x):
        return super().encode(x).to(torch.complex128)


@pytest.mark.parametrize(
    ("places", "what"),
    [
        ({"1_mlp_out": OfTwoPlaces(40)}, "transcoder"),
        ({"1_mlp_out": SkipTranscoder(40)}, "transcoder"),
        ({"1_mlp_out": Normed(40)}, "norms what it reads"),
        ({"1_mlp_out": Remembering(40)}, "encoded last"),
        ({"1_mlp_out": Complex(40)}, "one tensor"),
        ({"1_mlp_out": __file__}, "it is a file"),
        ({"1_mlp_out": Made(36)}, "the place is 40 wide"),
        ({"1_mlp_out": object()}, "no encode and decode"),
        ({"1_mlp_out": Bent(40)}, "not affine"),
        ({"1_mlp_out": Batchwise(40)}, "others stand beside"),
        ({"1_mlp_out": Tuples(40)}, "one tensor"),
        ({"1_mlp_out": Wider(40)}, r"makes \[3, 41\] of activations"),
        ({"1_mlp_out": Broken(40)}, "NaN or infinite"),
        ({"1_mlp_out": Made(40, dtype=torch.float16)}, "float16"),
        ({"7_mlp_out": Made(40)}, "'7_mlp_out' is no place"),
        ({"mlp": Made(40)}, "'mlp' is no place"),
        ({3: Made(40)}, "3 is no place"),
        ({"1_pre": Made(40), "0_mlp_out": Made(40)}, "count twice"),
        ({"1_pre": Made(40), "2_pre": Made(40)}, "count twice"),
        ({"1_attn_out": Made(40), "1_mid": Made(40)}, "count twice"),
        ({"1_z": Made(40), "1_attn_out": Made(40)}, "count twice"),
        ({}, "need dictionaries"),
    ],
)
def test_bad_dictionaries_and_places_are_refused_before_the_run(places, what):
    model = build("llama")
    with pytest.raises(InputError, match=what):
        prepare(model, ANSWER, unit=Features(places))
    assert all(not module._forward_hooks for module in model.modules())


def test_bad_options_are_refused():
    for options in ({"top": 0}, {"top": True}, {"centred": 1}, {"dictionaries": [1]}):
        with pytest.raises(InputError):
            Features(**options)
    with pytest.raises(InputError, match="need dictionaries"):
        prepare(build("llama"), ANSWER, unit="feature")
    with pytest.raises(InputError, match="no place"):
        prepare(build("gpt_neox-parallel"), ANSWER, unit=Features({"1_mid": Made(48)}))


def test_objects_of_saelens_that_norm_are_refused_and_those_for_heads_are_given_heads():
    made = Made(40)
    made.cfg = SimpleNamespace(normalize_activations="layer_norm")
    with pytest.raises(InputError, match="layer_norm.*folder"):
        prepare(build("llama"), ANSWER, unit=Features({"1_mlp_out": made}))
    model, ids = build("llama"), example_ids("llama")
    plain = Made(40)

    class OnHeads(Made):
        hook_z_reshaping_mode = True

        def encode(self, x):
            assert x.ndim == 3
            return super().encode(x.flatten(-2))

        def decode(self, f):
            return super().decode(f).unflatten(-1, (4, -1))

    expected = attribute(model, ids, Features({"1_z": plain}, top=5))
    found = attribute(model, ids, Features({"1_z": OnHeads(40)}, top=5))
    torch.testing.assert_close(found.attribution, expected.attribution)


class Module(nn.Module):
    def __init__(self, width, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = nn.Linear(width, N, dtype=dtype)
            self.decoder = nn.Linear(N, width, dtype=dtype)

    def encode(self, x):
        return self.encoder(x).relu()

    def decode(self, f):
        return self.decoder(f)


def test_modules_in_another_dtype_are_exact_and_left_as_found():
    for dtype in (torch.float64, torch.bfloat16):
        model, ids = build("llama", dtype=dtype), example_ids("llama")
        made = Module(40)
        made.decoder.register_forward_hook(lambda m, args, out: None)
        before = {name: p.clone() for name, p in made.named_parameters()}
        rng = torch.get_rng_state()
        result = attribute(model, ids, Features({"1_mlp_out": made}, top=5))
        assert torch.equal(rng, torch.get_rng_state())
        assert made.training
        assert len(made.decoder._forward_hooks) == 1
        for name, parameter in made.named_parameters():
            assert torch.equal(parameter, before[name])
            assert parameter.requires_grad
            assert parameter.grad is None
        total = result.attribution.sum(0) + result.rest
        expected = attribute(model, ids, "component")["1_mlp_out"]
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["1_mlp_out", "1_z"])
def test_dictionaries_are_read_outside_of_autocast(place):
    model = build("llama", dtype=torch.float32)
    unit = Features({place: Made(40, dtype=torch.float32)}, top=5)
    ids = example_ids("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = prepare(model, ANSWER, INCORRECT, unit=unit)
    expected = attribute(model, ids, unit)
    torch.testing.assert_close(plan(ids, pos=None).attribution, expected.attribution)


def test_no_position_at_all_has_no_feature():
    model, ids = build("llama"), example_ids("llama")
    unit = Features({"1_mlp_out": Made(40)}, top=5)
    assert attribute(model, ids, unit, pos=[]).records() == []
    assert dla_hooks.promoted_tokens(model, ids, unit=unit, pos=[], k=2).records() == []


def test_a_dictionary_that_changes_after_it_was_read_is_read_again():
    model, ids, made = build("llama"), example_ids("llama"), Made(40)
    unit = Features({"2_mlp_out": made})
    plan = prepare(model, ANSWER, INCORRECT, unit=unit)
    before = plan(ids, pos=None)
    made.W_dec = made.W_dec * 1.5
    after = plan(ids, pos=None)
    torch.testing.assert_close(after.attribution, attribute(model, ids, unit).attribution)
    assert (after["L2F3"] - before["L2F3"]).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("place", ["2_mlp_out", "1_pre", "1_mid", "final_post"])
def test_directions_that_are_not_the_decoders_are_seen(monkeypatch, place, dtype):
    from dla_hooks.projection.features import ProjectedDictionary

    model, ids = build("llama", dtype=dtype), example_ids("llama")
    own = ProjectedDictionary.__init__

    def wrong(self, *args):
        own(self, *args)
        self._folded = self._folded.then(lambda d_KF: 1.01 * d_KF)

    attribute(model, ids, Features({place: Made(40, dtype=dtype)}))
    monkeypatch.setattr(ProjectedDictionary, "__init__", wrong)
    with pytest.raises(dla_hooks.DecompositionError, match=f"b_dec and error at {place}"):
        attribute(model, ids, Features({place: Made(40, dtype=dtype)}))


def test_several_units_and_prompts_and_files(tmp_path):
    model, ids = build("llama"), example_ids("llama")
    unit = Features({"1_mlp_out": Made(40)}, top=4)
    both = attribute(model, ids, ("component", unit))
    assert set(both) == {"component", "feature"}
    path = both["feature"].save(tmp_path / "found.safetensors")
    again = dla_hooks.RankedAttribution.load(path)
    assert again.records() == both["feature"].records()
    assert again.beside["activation"].shape == again.attribution.shape
