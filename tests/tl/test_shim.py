"""The TransformerLens-shaped face: against the model's own numbers, and what wrong arguments get.

The same members against TransformerLens itself are in ``test_shim_reference.py``.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM
from zoo import ZOO, build, example_ids, tiny_tokenizer

from dla_hooks import (
    DLAError,
    InputError,
    ShapeMismatchError,
    TokenError,
    TokenizerMissingError,
    TrainingModeError,
    UnsupportedModelError,
    wrap,
)
from dla_hooks.modules import norms
from dla_hooks.modules.linear import matrix
from dla_hooks.residual import registry
from dla_hooks.residual.registry import begins_with_bos
from dla_hooks.tl import weights
from dla_hooks.verification.recognise import stream_of

FLAGS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
RAW = dict.fromkeys(FLAGS, False)
WEIGHTS = ("W_U", "b_U", "W_E", "W_O", "b_O")


@pytest.fixture(scope="module", params=ZOO, ids=str)
def spec(request):
    return request.param


@pytest.fixture(scope="module")
def model(spec):
    return build(spec)


@pytest.fixture(scope="module")
def gpt2():
    return wrap(build("gpt2"), tiny_tokenizer())


@torch.no_grad()
def final_norm_run(model, ids):
    """(what the final norm read, what it made of it, the model's logits)."""
    seen = []
    norm = stream_of(model).final_norm.module
    handle = norm.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    logits = model(ids, use_cache=False).logits
    handle.remove()
    return *seen[-1], logits


# Weights, against the model's own logits


def capped(logits, wrapped):
    cap = wrapped.cfg.output_logits_soft_cap
    return logits if cap < 0 else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("center", [False, True])
def test_raw_unembedding_gives_the_models_logits(spec, model, center):
    wrapped = wrap(model, **{**RAW, "center_unembed": center})
    _, normed, logits = final_norm_run(model, example_ids(spec))
    ours = capped(normed @ wrapped.W_U + wrapped.b_U, wrapped)
    if center and wrapped.cfg.output_logits_soft_cap < 0:
        logits = logits - logits.mean(-1, keepdim=True)
    torch.testing.assert_close(ours, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wrapped(example_ids(spec)), logits, rtol=1e-9, atol=1e-9)


def test_unembedding_behind_a_projection_is_computed_in_tiles():
    """More tokens than one tile holds, and a linear module between the final norm and W_U."""
    config = AutoConfig.for_model("opt", vocab_size=3001, hidden_size=32, num_hidden_layers=1,
                                  ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=16,
                                  max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    ids = torch.tensor([[5, 3000, 7]])
    x, normed, logits = final_norm_run(model, ids)
    wrapped = wrap(model, **RAW)
    assert wrapped.W_U.shape == (32, 3001)
    assert torch.equal(wrapped.W_E, model.get_input_embeddings().weight)
    torch.testing.assert_close(normed @ wrapped.W_U + wrapped.b_U, logits)
    wrapped = wrap(model)
    n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    centred = logits - logits.mean(-1, keepdim=True)
    torch.testing.assert_close(n @ wrapped.W_U + wrapped.b_U, centred, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wrapped.tokens_to_residual_directions(ids), wrapped.W_U.T[ids])


@pytest.mark.parametrize("center", [False, True])
def test_folded_unembedding_reads_the_norms_input_over_its_scale(spec, model, center):
    wrapped = wrap(model, center_unembed=center)
    x, _, logits = final_norm_run(model, example_ids(spec))
    if wrapped.cfg.normalization_type == "LNPre":
        x = x - x.mean(-1, keepdim=True)
    else:
        assert wrapped.cfg.normalization_type == "RMSPre"
    eps = 1e-5 if wrapped.cfg.eps is None else wrapped.cfg.eps  # OLMo's is in no config
    n = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    ours = capped(n @ wrapped.W_U + wrapped.b_U, wrapped)
    if center and wrapped.cfg.output_logits_soft_cap < 0:
        logits = logits - logits.mean(-1, keepdim=True)
        assert wrapped.W_U.mean(-1).abs().max() < 1e-12
    torch.testing.assert_close(ours, logits, rtol=1e-6, atol=1e-5)


def test_directions_are_columns_of_the_unembedding(spec, model):
    ids = example_ids(spec)
    for wrapped in (wrap(model), wrap(model, **RAW)):
        W_U = wrapped.W_U
        for tokens in (ids, ids[0], ids[:1], ids[:, :1, None]):
            ours = wrapped.tokens_to_residual_directions(tokens)
            assert ours.shape == (*tokens.shape, wrapped.cfg.d_model)
            torch.testing.assert_close(ours, W_U.T[tokens], rtol=1e-12, atol=1e-12)
        for one in (7, torch.tensor(7), torch.tensor([7]), torch.tensor([[7]]), np.int64(7)):
            ours = wrapped.tokens_to_residual_directions(one)
            torch.testing.assert_close(ours, W_U[:, 7], rtol=1e-12, atol=1e-12)


def test_raw_output_matrices_make_what_attention_writes(spec, model):
    wrapped = wrap(model, **RAW)
    assert len(wrapped.blocks) == wrapped.cfg.n_layers
    W_O, b_O = wrapped.W_O, wrapped.b_O
    cfg = wrapped.cfg
    assert W_O.shape == (cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model)
    assert b_O.shape == (cfg.n_layers, cfg.d_model)
    for layer, block in enumerate(wrapped.blocks):
        assert torch.equal(block.attn.W_O, W_O[layer])
        assert torch.equal(block.attn.b_O, b_O[layer])
        assert (block.attn.n_heads, block.attn.d_head) == (cfg.n_heads, cfg.d_head)
        (proj,) = (w.heads.proj for w in stream_of(model).blocks[layer].writes if w.heads)
        z = torch.randn(5, cfg.n_heads, cfg.d_head, dtype=torch.float64)
        ours = torch.einsum("nhd,hdm->nm", z, W_O[layer]) + b_O[layer]
        torch.testing.assert_close(ours, proj(z.flatten(1)), rtol=1e-12, atol=1e-12)


def test_centring_follows_the_final_norm(spec, model):
    raw, centred = wrap(model, **RAW), wrap(model, **{**RAW, "center_writing_weights": True})
    for name in ("W_E", "W_O", "b_O"):
        expected = getattr(raw, name)
        if raw.cfg.normalization_type == "LN":
            expected = expected - expected.mean(-1, keepdim=True)
        torch.testing.assert_close(getattr(centred, name), expected, rtol=1e-12, atol=1e-12)


def test_embeddings_begin_the_stream(spec, model):
    wrapped = wrap(model, **RAW)
    if spec.model_type == "bloom":  # a norm stands between
        assert torch.equal(wrapped.W_E, model.get_input_embeddings().weight)
        return
    ids = example_ids(spec)
    seen = []
    stream = stream_of(model)
    handle = stream.blocks[0].module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    expected = wrapped.W_E[ids]
    assert hasattr(wrapped, "W_pos") == (wrapped.cfg.positional_embedding_type == "standard")
    if hasattr(wrapped, "W_pos"):
        assert wrapped.W_pos.shape == (wrapped.cfg.n_ctx, wrapped.cfg.d_model)
        expected = expected + wrapped.W_pos[: ids.shape[1]]
    torch.testing.assert_close(seen[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fold_ln", [True, False])
def test_value_biases_fold_into_the_output_bias(fold_ln):
    settings = {**RAW, "fold_value_biases": True, "fold_ln": fold_ln}
    gpt2 = build("gpt2")
    for block, face in zip(gpt2.transformer.h, wrap(gpt2, **settings).blocks, strict=True):
        c_attn, c_proj = block.attn.c_attn, block.attn.c_proj
        value = c_attn.bias[2 * 36 :]
        if fold_ln:
            value = value + block.ln_1.bias @ c_attn.weight[:, 2 * 36 :]
        expected = value @ c_proj.weight + c_proj.bias
        torch.testing.assert_close(face.attn.b_O, expected, rtol=1e-6, atol=1e-6)
    qwen2 = build("qwen2")  # an RMSNorm has no bias; two heads share one value
    for block, face in zip(qwen2.model.layers, wrap(qwen2, **settings).blocks, strict=True):
        value = block.self_attn.v_proj.bias.reshape(2, 10).repeat_interleave(2, 0).flatten()
        expected = block.self_attn.o_proj.weight @ value
        torch.testing.assert_close(face.attn.b_O, expected, rtol=1e-6, atol=1e-6)


# The guest law


def test_model_is_unchanged_and_nothing_is_kept():
    model = build("gpt2", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    wrapped = wrap(model, tiny_tokenizer())
    for name in (*WEIGHTS, "W_pos", "blocks", "cfg"):
        getattr(wrapped, name)
    wrapped(example_ids("gpt2"), return_type="both")
    wrapped.tokens_to_residual_directions(" cat")
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    held = [*vars(wrapped).values(), *vars(wrapped.cfg).values()]
    assert not any(isinstance(value, torch.Tensor) for value in held)
    assert set(vars(wrapped)) == {"model", "tokenizer", "processing", "_cfg"}
    assert wrapped.model is model
    assert wrapped.W_U is not wrapped.W_U  # made anew


def test_raw_weights_are_views_of_the_models_own():
    for name in ("gpt2", "llama"):
        model = build(name)
        wrapped = wrap(model, **RAW)
        embedding, unembed = model.get_input_embeddings(), model.get_output_embeddings()
        assert wrapped.W_U.data_ptr() == unembed.weight.data_ptr()
        assert wrapped.W_E.data_ptr() == embedding.weight.data_ptr()
        (site, *_) = (w.heads for w in stream_of(model).writes if w.heads)
        assert wrapped.blocks[0].attn.W_O.data_ptr() == site.proj.weight.data_ptr()


def test_a_changed_weight_is_seen():
    model = build("llama")
    wrapped = wrap(model)
    before = wrapped.W_U
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    torch.testing.assert_close(wrapped.W_U, 2 * before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_in_the_models_dtype(dtype):
    wrapped = wrap(build("gpt2", dtype=dtype))
    exact = wrap(build("gpt2", dtype=dtype).double())
    for name in (*WEIGHTS, "W_pos"):
        ours = getattr(wrapped, name)
        assert ours.dtype == dtype
        # Folded in float32 and rounded once (b_O: the projection's own arithmetic).
        expected = getattr(exact, name)
        error = (ours.double() - expected).abs().max() / expected.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps
    assert wrapped.tokens_to_residual_directions(5).dtype == dtype
    assert wrapped.cfg.dtype == dtype


class Adapted(nn.Module):
    """A linear module whose map is more than its weight, as LoRA's."""

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features = base, base.in_features
        self.a = nn.Linear(base.in_features, 3, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(3, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_adapted_projection_gives_its_whole_map():
    model = build("llama-bias")
    torch.manual_seed(0)
    attention = model.model.layers[1].self_attn
    attention.o_proj = Adapted(attention.o_proj).eval()
    wrapped = wrap(model, **RAW)
    z = torch.randn(4, 40, dtype=torch.float64)
    attn = wrapped.blocks[1].attn
    ours = z @ attn.W_O.flatten(0, 1) + attn.b_O
    torch.testing.assert_close(ours, attention.o_proj(z), rtol=1e-12, atol=1e-12)
    assert wrapped.W_O.shape == (2, 4, 10, 40)


def test_matrix_of_wide_module_is_computed_in_tiles():
    base = nn.Linear(7, 600, dtype=torch.float64)
    module = Adapted(base)
    expected = base.weight + module.b.weight @ module.a.weight
    torch.testing.assert_close(matrix(module), expected)


def test_layers_without_heads_are_refused():
    config = AutoConfig.for_model(
        "mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    wrapped = wrap(AutoModelForCausalLM.from_config(config).eval())
    assert wrapped.cfg.n_layers == 2
    assert not wrapped.cfg.attn_only
    assert wrapped.W_U.shape == (16, 64)
    for ask in (
        lambda: wrapped.W_O,
        lambda: wrapped.b_O,
        lambda: wrapped.blocks[1].attn.W_O,
        lambda: wrapped.blocks[1].attn.b_O,
        lambda: wrapped.blocks[1].attn.n_heads,
    ):
        with pytest.raises(UnsupportedModelError, match="has no attention heads, and so no W_O"):
            ask()
    with pytest.raises(AttributeError, match="cfg.n_heads: this model has no attention heads"):
        wrapped.cfg.n_heads  # noqa: B018


def test_heads_without_constant_are_refused_with_advice():
    model = build("gpt_oss")
    with pytest.raises(UnsupportedModelError, match="Use fold_value_biases=False"):
        wrap(model).b_O  # noqa: B018
    assert wrap(model, fold_value_biases=False).b_O.shape == (2, 40)


# cfg, and what is not there


def test_cfg_has_the_models_sizes(gpt2):
    cfg = gpt2.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp) == (3, 36, 4, 9, 144)
    assert (cfg.d_vocab, cfg.d_vocab_out, cfg.n_ctx) == (63, 63, 64)
    assert (cfg.act_fn, cfg.eps, cfg.normalization_type) == ("gelu_new", 1e-5, "LNPre")
    assert (cfg.dtype, cfg.device) == (torch.float64, "cpu")
    assert cfg.model_name == "gpt2"
    assert cfg.original_architecture == "GPT2LMHeadModel"
    assert wrap(gpt2.model, fold_ln=False).cfg.normalization_type == "LN"
    text = repr(cfg)
    assert "n_layers=3,\n" in text
    assert "None" not in text


def test_cfg_names_position_and_block_kinds():
    kinds = {
        "gpt2": ("standard", False),
        "opt": ("standard", False),
        "gptj": ("rotary", True),
        "gpt_neox-sequential": ("rotary", False),
        "llama": ("rotary", False),
        "bloom": ("alibi", False),
        "falcon-rw": ("alibi", False),
        "falcon-7b": ("rotary", True),
        "cohere": ("rotary", True),
    }
    for name, expected in kinds.items():
        cfg = wrap(build(name)).cfg
        assert (cfg.positional_embedding_type, cfg.parallel_attn_mlp) == expected, name
    assert wrap(build("falcon-7b")).cfg.n_key_value_heads == 1
    assert wrap(build("llama")).cfg.n_key_value_heads == 2
    assert wrap(build("gpt2")).cfg.n_key_value_heads is None
    assert wrap(build("gemma2")).cfg.output_logits_soft_cap == pytest.approx(5)
    assert wrap(build("mistral")).cfg.window_size == 4


def test_default_bos_matches_reference():
    with_bos, without = tiny_tokenizer(), tiny_tokenizer()
    without.bos_token = None
    assert wrap(build("gpt2"), with_bos).cfg.default_prepend_bos is True
    assert wrap(build("gpt2"), without).cfg.default_prepend_bos is False
    assert wrap(build("gpt_neox-parallel"), with_bos).cfg.default_prepend_bos is False
    assert wrap(build("gpt2"), with_bos, default_prepend_bos=False).to_tokens("the").shape == (1, 1)
    wrapped = wrap(build("gpt2"), with_bos)
    wrapped.cfg.default_prepend_bos = False  # as notebooks do
    assert wrapped.to_tokens("the").shape == (1, 1)
    assert wrap(build("gpt2"), tiny_tokenizer(True)).cfg.tokenizer_prepends_bos is True
    assert wrapped.cfg.tokenizer_prepends_bos is False
    assert wrap(build("gpt2")).cfg.tokenizer_prepends_bos is None


def test_types_without_bos_are_types_of_transformers():
    begins_with_bos("gpt2")  # loads the lists
    assert registry._without_bos <= set(CONFIG_MAPPING)
    assert begins_with_bos("gpt2")
    assert not begins_with_bos("qwen3")


def test_cfg_follows_the_model():
    model = build("gpt2")
    wrapped = wrap(model)
    model.float()
    assert wrapped.cfg.dtype == torch.float32
    assert wrapped.W_U.dtype == torch.float32


def test_unknown_fields_and_attributes_say_what_to_do(gpt2):
    with pytest.raises(
        AttributeError, match=r"no field 'nonsense'.*wrapped.model.config.*n_layers"
    ):
        gpt2.cfg.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="the Hugging Face model has it: wrapped.model.gener"):
        gpt2.generate  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        gpt2.nonsense  # noqa: B018
    for name in ("run_with_cache", "run_with_hooks", "reset_hooks"):
        assert not hasattr(gpt2, name)
    with pytest.raises(
        AttributeError, match=r"no activation is cached.*direct_logit_attribution\("
    ):
        gpt2.run_with_cache("the cat")
    with pytest.raises(AttributeError, match=r"no hook points.*wrapped.model"):
        gpt2.run_with_hooks("the cat")
    with pytest.raises(AttributeError, match=r"has no W_pos: its positions .*'rotary'"):
        wrap(build("llama")).W_pos  # noqa: B018
    with pytest.raises(IndexError):
        gpt2.blocks[3]


def test_repr_and_copies(gpt2):
    assert repr(gpt2).startswith("Wrapped(GPT2LMHeadModel, gpt2: 3 layers, d_model 36, 63 tokens,")
    assert "weights fold_ln, center_writing_weights" in repr(gpt2)
    assert "no tokenizer; weights as they are" in repr(wrap(gpt2.model, **RAW))
    again = copy.deepcopy(gpt2)
    assert again.model is not gpt2.model
    assert torch.equal(again.W_U, gpt2.W_U)
    assert again.cfg.n_layers == 3


# wrap()'s arguments


def test_only_causal_language_models_are_wrapped(gpt2):
    refused = [
        (None, InputError, "must be a Hugging Face causal language model.*got NoneType"),
        ("gpt2", InputError, "must be a Hugging Face causal language model.*got str"),
        (nn.Linear(2, 2), InputError, "must be a Hugging Face causal language model"),
        (gpt2, InputError, "wrapped already"),
        (gpt2.model.transformer, UnsupportedModelError, "no unembedding"),
        (build("gpt2").train(), TrainingModeError, "model.eval"),
    ]
    t5 = AutoConfig.for_model("t5", vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=2)
    refused.append((AutoModel.from_config(t5).eval(), UnsupportedModelError, "encoder-decoder"))
    for model, error, message in refused:
        with pytest.raises(error, match=message) as caught:
            wrap(model)
        assert isinstance(caught.value, DLAError)


def test_transformer_lens_model_is_not_wrapped():
    kind = type("HookedTransformer", (nn.Module,), {"__module__": "transformer_lens.made_up"})
    with pytest.raises(InputError, match="has this face already"):
        wrap(kind())


@pytest.mark.parametrize("name", [*FLAGS, "default_prepend_bos"])
def test_non_bool_keywords_are_refused(gpt2, name):
    for value in (1, "yes", torch.tensor(True)):
        with pytest.raises(
            InputError, match=f"{name} must be True or False, got {type(value).__name__}"
        ):
            wrap(gpt2.model, **{name: value})


def test_wrong_tokenizer_is_refused(gpt2):
    with pytest.raises(InputError, match="tokenizer must be a tokenizer, got str"):
        wrap(gpt2.model, "gpt2")
    model = build("gpt2")
    model.tokenizer = tiny_tokenizer()
    assert wrap(model).tokenizer is model.tokenizer


# Tokens


def state(tokenizer):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return backend, tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.truncation_side


@pytest.mark.parametrize("add_bos", [False, True])
def test_tokenizer_is_unchanged(gpt2, add_bos):
    tokenizer = tiny_tokenizer(add_bos)
    before = state(tokenizer)
    wrapped = wrap(gpt2.model, tokenizer)
    assert tokenizer.pad_token is None
    wrapped.to_tokens(["the", "the cat" * 50], padding_side="left")
    wrapped.to_tokens(["the", "the cat"], prepend_bos=False)
    wrapped.to_str_tokens("the cat")
    wrapped(["the", "the cat"], padding_side="left")
    assert state(tokenizer) == before
    assert wrapped.tokenizer is tokenizer


def test_padding_and_bos_follow_the_options(gpt2):
    bos, eos = 0, 1
    the, cat = gpt2.to_single_token("the"), gpt2.to_single_token(" cat")
    short, long = [bos, the], [bos, the, cat]
    texts = ["the", "the cat"]
    assert gpt2.to_tokens(texts).tolist() == [[*short, eos], long]
    assert gpt2.to_tokens(texts, padding_side="left").tolist() == [[eos, *short], long]
    assert gpt2.to_tokens(texts, prepend_bos=False).tolist() == [[the, eos], [the, cat]]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = 2
    assert wrap(gpt2.model, tokenizer).to_tokens(texts).tolist() == [[2, *short], long]
    assert gpt2.to_tokens("<bos>the").tolist() == [[bos, bos, the]]  # as in the reference


def test_missing_bos_falls_back_to_eos_or_fails(gpt2):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    wrapped = wrap(gpt2.model, tokenizer)
    assert wrapped.to_tokens("the", prepend_bos=True)[0, 0] == 1
    tokenizer.eos_token = None
    with pytest.raises(TokenError, match="neither BOS nor EOS.*prepend_bos=False"):
        wrapped.to_tokens("the", prepend_bos=True)
    with pytest.raises(TokenError, match="no PAD, EOS or BOS token"):
        wrapped.to_tokens(["the", "the cat"])
    assert wrapped.to_tokens(["the", "cat"]).shape == (2, 1)


def test_long_text_is_truncated(gpt2):
    text = "the" + " cat" * 90
    assert gpt2.to_tokens(text).shape == (1, 64)
    assert gpt2.to_tokens(text, truncate=False).shape == (1, 92)
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = "left"
    left = wrap(gpt2.model, tokenizer).to_tokens(text)
    assert left[0, 0] == 0
    assert (left[0, 1:] == gpt2.to_single_token(" cat")).all()


def test_text_survives_a_round_trip(gpt2):
    text = "When Mary gave the cat to John, the dog drink."
    ids = gpt2.to_tokens(text, prepend_bos=False)
    assert gpt2.to_string(ids) == [text]
    assert gpt2.to_string(ids[0]) == gpt2.to_string(ids[0].tolist()) == text
    assert gpt2.to_string(ids.numpy()) == [text]
    pieces = gpt2.to_str_tokens(text, prepend_bos=False)
    assert "".join(pieces) == text
    assert pieces == gpt2.to_str_tokens(ids) == gpt2.to_str_tokens(ids[0].tolist())
    assert gpt2.to_str_tokens([text, ids[0]], prepend_bos=False) == [pieces, pieces]
    assert gpt2.to_str_tokens(text)[0] == "<bos>"
    assert [gpt2.to_single_str_token(i) for i in ids[0].tolist()] == pieces
    assert gpt2.to_string(7) == gpt2.to_single_str_token(7)
    assert gpt2.to_string([]) == ""
    assert gpt2.to_str_tokens([]) == []


def test_token_positions_are_found(gpt2):
    text = "the cat, the cat."
    assert gpt2.get_token_position(" cat", text) == 2
    assert gpt2.get_token_position(" cat", text, mode="last") == 5
    assert gpt2.get_token_position(" cat", text, prepend_bos=False) == 1
    ids = gpt2.to_tokens(text)
    token = gpt2.to_single_token(",")
    for row in (ids, ids[0], ids[0].tolist()):
        for form in (",", token, torch.tensor(token), torch.tensor([token])):
            assert gpt2.get_token_position(form, row) == 3


WRONG = {
    "to_tokens: int": (lambda w: w.to_tokens(5), InputError, "input must be a string"),
    "to_tokens: empty list": (lambda w: w.to_tokens([]), InputError, "non-empty list of strings"),
    "to_tokens: mixed": (lambda w: w.to_tokens(["a", 1]), InputError, "non-empty list of strings"),
    "to_tokens: bos": (lambda w: w.to_tokens("a", 1), InputError, "prepend_bos must be True, Fal"),
    "to_tokens: side": (
        lambda w: w.to_tokens("a", padding_side="up"), InputError, "padding_side must be 'left'"),
    "to_tokens: truncate": (
        lambda w: w.to_tokens("a", truncate="no"), InputError, "truncate must be True or False"),
    "to_tokens: device": (
        lambda w: w.to_tokens("a", move_to_device="cpu"), InputError, "move_to_device must be"),
    "to_string: text": (lambda w: w.to_string("the"), InputError, "must hold token ids, got str"),
    "to_string: floats": (
        lambda w: w.to_string(torch.ones(2)), InputError, "integer token ids, got torch.float32"),
    "to_string: three axes": (
        lambda w: w.to_string(torch.ones(1, 1, 2).long()), ShapeMismatchError, r"\[1, 1, 2\]"),
    "to_string: ragged": (lambda w: w.to_string([[1], [1, 2]]), InputError, "must hold token ids"),
    "to_string: negative": (lambda w: w.to_string([-1]), TokenError, "token id -1"),
    "to_string: beyond": (lambda w: w.to_string([3, 999]), TokenError, r"id 999.*\(0 to 62\)"),
    "to_str_tokens: int": (lambda w: w.to_str_tokens(5), InputError, "got int: 5"),
    "to_str_tokens: rows": (
        lambda w: w.to_str_tokens(torch.ones(2, 3).long()), ShapeMismatchError, r"\[2, 3\]"),
    "to_str_tokens: bos": (lambda w: w.to_str_tokens([1], "yes"), InputError, "prepend_bos must"),
    "to_str_tokens: side": (
        lambda w: w.to_str_tokens("a", None, "up"), InputError, "padding_side must"),
    "to_single_token: several": (
        lambda w: w.to_single_token("the cat"), TokenError, r"is 2 tokens \('the', ' cat'\)"),
    "to_single_token: none": (lambda w: w.to_single_token(""), TokenError, "no token at all"),
    "to_single_token: int": (lambda w: w.to_single_token(5), InputError, "must be a string, got"),
    "to_single_str_token: text": (
        lambda w: w.to_single_str_token("a"), InputError, "int_token must be an int, got str"),
    "to_single_str_token: bool": (
        lambda w: w.to_single_str_token(True), InputError, "int_token must be an int, got bool"),
    "to_single_str_token: beyond": (lambda w: w.to_single_str_token(99), TokenError, "token id 99"),
    "get_token_position: absent": (
        lambda w: w.get_token_position(" dog", "the cat"), TokenError, "' dog' does not occur"),
    "get_token_position: absent id": (
        lambda w: w.get_token_position(5, "the cat"), TokenError, "id 5 does not occur"),
    "get_token_position: mode": (
        lambda w: w.get_token_position("the", "the", mode="all"), InputError, "mode must be"),
    "get_token_position: rows": (
        lambda w: w.get_token_position(5, torch.ones(2, 2).long()), ShapeMismatchError, "one row"),
    "get_token_position: two tokens": (
        lambda w: w.get_token_position(torch.tensor([1, 2]), "the"), InputError, "one token, got"),
    "get_token_position: bos": (
        lambda w: w.get_token_position(5, "the", "first", 1), InputError, "prepend_bos must"),
    "get_token_position: side": (
        lambda w: w.get_token_position(5, "the", padding_side=1), InputError, "padding_side must"),
    "directions: None": (
        lambda w: w.tokens_to_residual_directions(None), InputError, "must hold token ids"),
    "directions: float": (
        lambda w: w.tokens_to_residual_directions(1.5), InputError, "must hold integer token ids"),
    "directions: empty": (
        lambda w: w.tokens_to_residual_directions([]), InputError, "tokens is empty"),
    "directions: negative": (
        lambda w: w.tokens_to_residual_directions(-1), TokenError, "token id -1"),
    "directions: several": (
        lambda w: w.tokens_to_residual_directions("the cat"), TokenError, "is 2 tokens"),
    "call: return type": (
        lambda w: w("the", return_type="logit"), InputError, "return_type must be 'logits'"),
    "call: per token": (
        lambda w: w("the", loss_per_token=1), InputError, "loss_per_token must be True or False"),
    "call: bos": (lambda w: w(torch.ones(1, 2).long(), prepend_bos=1), InputError, "prepend_bos"),
    "call: side": (lambda w: w("the", padding_side="up"), InputError, "padding_side must be"),
    "call: mask of text": (
        lambda w: w("the", attention_mask=torch.ones(1, 2)), InputError, "goes with token ids"),
    "call: mask's shape": (
        lambda w: w(torch.ones(1, 2).long(), attention_mask=torch.ones(1, 3)),
        ShapeMismatchError, "attention_mask has shape"),
    "call: nothing": (lambda w: w(None), InputError, "input must be a string"),
    "call: empty text": (
        lambda w: w("", prepend_bos=False), InputError, "the prompt is empty"),
    "call: beyond": (lambda w: w(torch.tensor([[99]])), TokenError, "token id 99"),
    "call: loss of one": (
        lambda w: w(torch.tensor([[5]]), return_type="loss"), InputError, "at least two tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(gpt2, case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        call(gpt2)
    assert type(caught.value) is error
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w.to_tokens("the"),
        lambda w: w.to_string([5]),
        lambda w: w.to_str_tokens([5]),
        lambda w: w.to_single_token("the"),
        lambda w: w.to_single_str_token(5),
        lambda w: w.get_token_position("the", [5]),
        lambda w: w.tokens_to_residual_directions("the"),
        lambda w: w("the"),
    ],
)
def test_text_needs_a_tokenizer(gpt2, call):
    with pytest.raises(TokenizerMissingError, match=r"needs a tokenizer: wrap\(model, Auto"):
        call(wrap(gpt2.model))


def test_ids_need_no_tokenizer(gpt2):
    bare = wrap(gpt2.model)
    ids = example_ids("gpt2")
    assert torch.equal(bare(ids), gpt2(ids))
    assert bare.get_token_position(int(ids[0, 3]), ids[0]) <= 3
    assert bare.tokens_to_residual_directions(ids).shape == (2, 7, 36)


@pytest.mark.parametrize("name", ["W_O", "b_O"])
def test_stacked_weights_probe_the_final_norm_once(gpt2, monkeypatch, name):
    probed = []
    probe = weights.norms.probe

    def counted(module, *rest):
        probed.append(module)
        return probe(module, *rest)

    monkeypatch.setattr(weights.norms, "probe", counted)
    assert len(getattr(gpt2, name)) == 3
    assert probed.count(gpt2.model.transformer.ln_f) == 1


# Calls


@torch.no_grad()
def test_calls_match_the_model(spec, model):
    ids = example_ids(spec)
    wrapped = wrap(model, **RAW)
    logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(wrapped(ids), logits, rtol=1e-9, atol=1e-9)
    # Some families compute attention in float32, where a row alone is not a row of a batch.
    first = model(ids[:1], use_cache=False).logits
    torch.testing.assert_close(wrapped.forward(ids[0]), first, rtol=1e-9, atol=1e-9)
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for one in (wrapped, wrap(model)):
        torch.testing.assert_close(one(ids, "loss", loss_per_token=True), losses)
        torch.testing.assert_close(one(ids, return_type="loss"), losses.mean())


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_left_padding_changes_no_logits(name):
    wrapped = wrap(build(name, attn="sdpa"), tiny_tokenizer())
    texts = ["the cat", "When Mary gave the cat to John"]
    alone = [wrapped(text)[0] for text in texts]
    ids = wrapped.to_tokens(texts, padding_side="left")
    mask = torch.ones_like(ids)
    mask[0, : len(alone[1]) - len(alone[0])] = 0
    for logits in (
        wrapped(texts, padding_side="left"),
        wrapped(ids, padding_side="left"),  # leading EOS are taken for padding
        wrapped(ids, attention_mask=mask),
    ):
        torch.testing.assert_close(logits[0, -len(alone[0]) :], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[1], alone[1], rtol=0, atol=1e-5)
    seen = wrapped(texts, padding_side="right")
    torch.testing.assert_close(seen[0, : len(alone[0])], alone[0], rtol=0, atol=1e-5)
    expected = sum(wrapped(text, "loss", loss_per_token=True).sum() for text in texts)
    loss = wrapped(texts, "loss", padding_side="left")
    mean = expected / sum(len(one) - 1 for one in alone)
    torch.testing.assert_close(loss, mean, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bos_that_is_also_the_pad_token_is_kept():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token  # as GPT-2's
    tokenizer.padding_side = "left"
    wrapped = wrap(build("gpt2", attn="sdpa"), tokenizer)
    texts = ["the cat", "When Mary gave the cat to John"]
    ids = wrapped.to_tokens(texts)
    torch.testing.assert_close(wrapped(ids)[0, -3:], wrapped("the cat")[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(wrapped(texts), wrapped(ids), equal_nan=True)
    only_bos = torch.zeros(1, 1, dtype=torch.long)
    assert wrapped(only_bos, prepend_bos=False).isfinite().all()


def test_gradients_reach_the_weights(gpt2):
    loss = gpt2(example_ids("gpt2"), return_type="loss")
    (gradient,) = torch.autograd.grad(loss, gpt2.model.get_input_embeddings().weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["W_O", "b_O"])
def test_final_norm_is_measured_once_for_all_layers(monkeypatch, name):
    wrapped, probed, probe = wrap(build("gpt2")), [], norms.probe

    def counted(module, *rest):
        probed.append(module)
        return probe(module, *rest)

    assert wrapped.cfg.n_layers > 1
    getattr(wrapped, name)  # what is measured once of a model
    monkeypatch.setattr(norms, "probe", counted)
    getattr(wrapped, name)
    assert len(probed) <= 1
