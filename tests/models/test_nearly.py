"""Models and modules that are almost Hugging Face's, held against the models' own logits."""

from __future__ import annotations

import dataclasses
import types
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.pytorch_utils import Conv1D
from units import UNIT_NAMES
from zoo import build

import dla_hooks
from dla_hooks import (
    Architecture,
    DLAError,
    Heads,
    InputError,
    UnsupportedModelError,
    Write,
    direct_logit_attribution,
    verify,
)
from dla_hooks.residual import registry

IDS = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))
FAMILIES = ("llama", "gpt2")
CLASSES = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}


def _model(family: str) -> Any:
    return build(family)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits[:, -1].double()


def _with_forward(family: str, forward: Any) -> Any:
    """A model of the family's class, but for its forward."""
    model = _model(family)
    model.__class__ = type(
        f"Own{family}", (CLASSES[family],), {"forward": forward(CLASSES[family])}
    )
    return model


def _assert_units_right(model: Any, expected: torch.Tensor, **options: Any) -> None:
    """Every unit's rows and the bias make the expected logits [batch, vocabulary] of token 7."""
    for unit in UNIT_NAMES:
        result = direct_logit_attribution(model, IDS, 7, unit=unit, **options)
        whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        found = (whole + result.bias).double()
        torch.testing.assert_close(found, expected[:, 7], rtol=1e-5, atol=1e-5)


def only_two_arguments(base):
    def forward(self, input_ids, attention_mask=None):
        return base.forward(self, input_ids, attention_mask=attention_mask)

    return forward


def returns_a_tuple(base):
    def forward(self, input_ids=None, **options):
        return (base.forward(self, input_ids, **options).logits, "something else")

    return forward


def returns_a_tensor(base):
    def forward(self, input_ids):
        return base.forward(self, input_ids).logits

    return forward


def returns_a_dict(base):
    def forward(self, input_ids=None, **options):
        logits = base.forward(self, input_ids, **options).logits
        return {"loss": logits.mean(), "logits": logits}

    return forward


def counts_logits_from_the_end(base):
    def forward(self, input_ids=None, logits_to_keep: int = 0, **options):
        output = base.forward(self, input_ids, **options)
        output.logits = output.logits[:, -logits_to_keep:]
        return output

    return forward


def keeps_one_logit(base):
    def forward(self, input_ids=None, logits_to_keep=0, **options):
        return base.forward(self, input_ids, logits_to_keep=1, **options)

    return forward


def names_no_logits_to_keep(base):
    def forward(self, input_ids=None):
        output = base.forward(self, input_ids)
        output.logits = output.logits[:, -1:]
        return output

    return forward


FORWARDS = (
    only_two_arguments,
    returns_a_tuple,
    returns_a_tensor,
    returns_a_dict,
    counts_logits_from_the_end,
    keeps_one_logit,
    names_no_logits_to_keep,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forward", FORWARDS)
def test_forward_of_another_form_gives_the_plain_numbers(family, forward):
    expected = _logits(_model(family))
    model = _with_forward(family, forward)
    _assert_units_right(model, expected)
    assert verify(model, show=False).ok


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forward", [keeps_one_logit, names_no_logits_to_keep])
def test_positions_without_logits_are_refused(family, forward):
    model = _with_forward(family, forward)
    with pytest.raises(DLAError):
        direct_logit_attribution(model, IDS, 7, pos=[1, -1])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_counted_from_the_end_serve_every_position(family):
    expected = direct_logit_attribution(_model(family), IDS, 7, pos=None)
    found = direct_logit_attribution(
        _with_forward(family, counts_logits_from_the_end), IDS, 7, pos=None
    )
    torch.testing.assert_close(found.attribution, expected.attribution)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_without_logits_is_refused_with_the_way_out(family):
    def forward(base):
        return lambda self, input_ids: {"nothing": "here"}

    with pytest.raises(UnsupportedModelError, match="without logits .* let its forward return"):
        direct_logit_attribution(_with_forward(family, forward), IDS, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_factorised_embedding_gives_the_models_own_logits(family):
    model = _model(family)
    table = model.get_input_embeddings()
    small = nn.Sequential(
        nn.Embedding(table.num_embeddings, 8), nn.Linear(8, table.embedding_dim)
    ).eval()
    model.set_input_embeddings(small.to(table.weight.dtype))
    _assert_units_right(model, _logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_unembedding_that_is_not_implemented_is_found_by_name(family):
    model = _model(family)

    def refuse(self):
        raise NotImplementedError

    methods = {"get_output_embeddings": refuse}
    model.__class__ = type("Without", (CLASSES[family],), methods)
    _assert_units_right(model, _logits(model))


Named = namedtuple("Named", ["weights", "hidden"])


@dataclasses.dataclass(frozen=True)
class Record:
    note: str
    hidden: Any


WRAPS = {
    "ModelOutput": (lambda x: BaseModelOutput(last_hidden_state=x), lambda o: o.last_hidden_state),
    "dict": (lambda x: {"aux": torch.zeros(1), "hidden_states": x}, lambda o: o["hidden_states"]),
    "namedtuple": (lambda x: Named(None, x), lambda o: o.hidden),
    "dataclass": (lambda x: Record("x", x), lambda o: o.hidden),
    "None first": (lambda x: (None, x), lambda o: o[1]),
    "list": (lambda x: [x, 3], lambda o: o[0]),
    "object": (lambda x: types.SimpleNamespace(ids=x.new_ones(1).long(), out=x), lambda o: o.out),
}


class Wrapped(nn.Module):
    """An MLP whose output is packed."""

    def __init__(self, inner: nn.Module, pack: Any) -> None:
        super().__init__()
        self.inner, self.pack = inner, pack

    def forward(self, x):
        return self.pack(self.inner(x))


def _packed(family: str, kind: str) -> Any:
    """A model whose MLPs return their write in another form, which their blocks unpack."""
    model, (pack, unpack) = _model(family), WRAPS[kind]

    class LlamaLike(LlamaDecoderLayer):
        def forward(self, hidden_states, **options):
            x = hidden_states
            x = x + self.self_attn(hidden_states=self.input_layernorm(x), **options)[0]
            return x + unpack(self.mlp(self.post_attention_layernorm(x)))

    class GPT2Like(GPT2Block):
        def forward(self, hidden_states, *args, **options):
            options.pop("encoder_hidden_states", None)
            options.pop("encoder_attention_mask", None)
            x = hidden_states + self.attn(self.ln_1(hidden_states), *args[:1], **options)[0]
            return x + unpack(self.mlp(self.ln_2(x)))

    blocks = model.model.layers if family == "llama" else model.transformer.h
    for block in blocks:
        block.__class__ = LlamaLike if family == "llama" else GPT2Like
        block.mlp = Wrapped(block.mlp, pack).eval()
    return model


@pytest.mark.parametrize("kind", WRAPS)
def test_write_in_another_form_is_read_and_replaced(kind):
    model = _packed("llama", kind)
    _assert_units_right(model, _logits(_model("llama")))


# --- a decoder of thirty lines, after nanoGPT


@dataclasses.dataclass
class NanoConfig:
    block_size: int = 16
    vocab_size: int = 61
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32


class NanoAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x):
        parts = self.c_attn(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in parts)
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(z.transpose(1, 2).flatten(2))


class NanoBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        n = config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(n), nn.LayerNorm(n)
        self.attn = NanoAttention(config)
        self.mlp = nn.Sequential(nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Nano(nn.Module):
    def __init__(self, config, tied=True):
        super().__init__()
        self.config, n = config, config.n_embd
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, n),
                "wpe": nn.Embedding(config.block_size, n),
                "h": nn.ModuleList([NanoBlock(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(n),
            }
        )
        self.lm_head = nn.Linear(n, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.transformer.wte.weight
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        self.eval()

    def forward(self, idx, targets=None):
        places = torch.arange(idx.shape[1])
        x = self.transformer.wte(idx) + self.transformer.wpe(places)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x)[:, [-1], :]), None


NANO = Architecture(
    model_types=("Nano",),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    writes=(
        Write("attn_out", "attn", heads=Heads("attn.c_proj", count="n_head")),
        Write("mlp_out", "mlp"),
    ),
    positions="transformer.wpe",
    position_limit="block_size",
)


@pytest.fixture
def registered():
    registry.architectures()
    kept = dict(registry._registered), dict(registry._earlier)
    dla_hooks.register(NANO)
    yield
    for now, before in zip((registry._registered, registry._earlier), kept, strict=True):
        now.clear()
        now.update(before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("as_dict", [True, False])
def test_plain_module_with_a_declaration_serves_all_units(tied, as_dict):
    model = Nano(NanoConfig(), tied)
    if as_dict:
        model.config = dataclasses.asdict(model.config)
    with torch.no_grad():
        expected = model(IDS)[0][:, -1].double()
    _assert_units_right(model, expected)
    labels = direct_logit_attribution(model, IDS, 7).labels
    assert labels[:3] == ["embed", "pos_embed", "0_attn_out"]
    assert verify(model, show=False).ok
    with pytest.raises(InputError, match="positions for 16"):
        direct_logit_attribution(model, IDS.repeat(1, 3), 7)


@pytest.mark.filterwarnings("ignore::dla_hooks.DLAWarning")
def test_prompt_beyond_a_position_table_is_refused_without_a_declared_limit(registered):
    dla_hooks.register(dataclasses.replace(NANO, position_limit=None))
    with pytest.raises(
        InputError, match="fails on a prompt of 18 tokens, and has positions for 16"
    ):
        direct_logit_attribution(Nano(NanoConfig()), IDS.repeat(1, 3), 7)


@pytest.mark.usefixtures("registered")
def test_head_of_a_plain_module_is_what_its_ablation_removes():
    model = Nano(NanoConfig()).double()
    result = direct_logit_attribution(model, IDS, 7, unit="head")
    kept: dict[str, torch.Tensor] = {}
    last, final = model.transformer.h[-1], model.transformer.ln_f
    handles = [
        last.attn.c_proj.register_forward_hook(lambda m, a, out: kept.update(z=a[0])),
        final.register_forward_hook(lambda m, a, out: kept.update(x=a[0])),
    ]
    with torch.no_grad():
        model(IDS)
        scale = (kept["x"][:, -1].var(-1, unbiased=False, keepdim=True) + final.eps).sqrt()
        part = torch.zeros_like(kept["z"][:, -1])
        part[:, 8:16] = kept["z"][:, -1, 8:16]
        write = part @ last.attn.c_proj.weight.T
        normed = final.weight * (write - write.mean(-1, keepdim=True)) / scale
        expected = normed @ model.lm_head.weight[7]
    for handle in handles:
        handle.remove()
    found = result.attribution[result.labels.index("L1H1")]
    torch.testing.assert_close(found, expected)


def test_plain_module_of_a_known_shape_needs_no_declaration():
    model = Nano(NanoConfig(n_layer=3))
    with torch.no_grad():
        expected = model(IDS)[0][:, -1].double()
    _assert_units_right(model, expected)
    assert len(direct_logit_attribution(model, IDS, 7, unit="head").labels) == 13


def test_plain_module_of_another_shape_gets_lines_to_start_from():
    model = Nano(NanoConfig())
    model.transformer["stack"] = model.transformer.pop("h")
    with pytest.raises(UnsupportedModelError, match="has no declaration") as caught:
        direct_logit_attribution(model, IDS, 7)
    assert "model_types=('Nano',)" in str(caught.value)


def test_module_that_is_no_decoder_is_an_input_error():
    with pytest.raises(InputError, match="must be a Hugging Face causal language model"):
        direct_logit_attribution(nn.Linear(3, 3).eval(), IDS, 7)


# --- linear modules that do not say how wide they are


class InFloat32(nn.Sequential):
    """The cast that many fine-tuning scripts put on the head."""

    def forward(self, x):
        return super().forward(x).to(torch.float64)


class NormHead(nn.Module):
    """A head of normed rows, as Baichuan's."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


class Scaled(nn.Module):
    """A projection of an own class."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class PerHead(nn.Module):
    """A weight with an axis for the heads, no axis of which is the width that it reads."""

    def __init__(self, linear):
        super().__init__()
        plain = _plain(linear)
        self.kernel = nn.Parameter(plain.weight.detach().unflatten(1, (2, -1)))

    def forward(self, x):
        return torch.einsum("...nd,ond->...o", x.unflatten(-1, self.kernel.shape[1:]), self.kernel)


class InEightBits(nn.Module):
    """A quantised weight, which is a buffer."""

    def __init__(self, linear):
        super().__init__()
        weight = _plain(linear).weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("quantised", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.quantised.to(x.dtype) * self.scale).T


def _plain(linear: nn.Module) -> nn.Linear:
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    made.weight = nn.Parameter(weight.detach().clone())
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone())
    return made


def _two_in_a_row(linear: nn.Module) -> nn.Module:
    plain = _plain(linear)
    width = plain.in_features
    first = nn.Linear(width, width // 2, bias=False).to(plain.weight.dtype)
    second = nn.Linear(width // 2, plain.out_features).to(plain.weight.dtype)
    return nn.Sequential(first, second)


HEADS = {
    "Sequential that casts": lambda head: InFloat32(head),
    "NormHead": lambda head: NormHead(head.weight),
    "two linear maps": _two_in_a_row,
    "own class": Scaled,
    "Sequential of an own class": lambda head: nn.Sequential(Scaled(head)),
    "an axis for the heads": PerHead,
    "a buffer of 8 bits": InEightBits,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", HEADS)
def test_unembedding_of_any_linear_class_gives_the_models_own_logits(family, kind):
    model = _model(family)
    model.lm_head = HEADS[kind](model.lm_head).eval()
    _assert_units_right(model, _logits(model))


PROJECTIONS = {
    "Sequential": lambda proj: nn.Sequential(proj, nn.Identity()),
    "two linear maps": _two_in_a_row,
    "own class": Scaled,
    "an axis for the heads": PerHead,
    "a buffer of 8 bits": InEightBits,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_head_projection_of_any_linear_class_serves_all_units(family, kind):
    model = _model(family)
    for block in model.model.layers if family == "llama" else model.transformer.h:
        attention, name = (
            (block.self_attn, "o_proj") if family == "llama" else (block.attn, "c_proj")
        )
        setattr(attention, name, PROJECTIONS[kind](getattr(attention, name)).eval())
    _assert_units_right(model, _logits(model))


class Bent(nn.Module):
    """A projection that is not linear, and that runs on one shape only."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        assert x.ndim == 3
        return torch.tanh(self.inner(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_that_cannot_be_read_refuses_heads_alone(family):
    model = _model(family)
    block = model.model.layers[1] if family == "llama" else model.transformer.h[1]
    attention, name = (block.self_attn, "o_proj") if family == "llama" else (block.attn, "c_proj")
    setattr(attention, name, Bent(getattr(attention, name)).eval())
    expected = _logits(model)[:, 7]
    for unit in ("component", "layer"):
        result = direct_logit_attribution(model, IDS, 7, unit=unit)
        whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        torch.testing.assert_close((whole + result.bias).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="Bent"):
        direct_logit_attribution(model, IDS, 7, unit="head")
    with pytest.raises(UnsupportedModelError, match="Bent"):
        dla_hooks.stack_head_results(model, IDS)
    assert verify(model, show=False).ok


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bound", [True, False])
def test_replaced_forward_on_every_module_keeps_all_units(family, bound):
    """What tracing libraries do: the forward of each instance is replaced."""
    model = _model(family)
    expected = _logits(model)

    def replace(module):
        forward = types.MethodType(type(module).forward, module)
        module.forward = forward if bound else lambda *args, **options: forward(*args, **options)

    for module in model.modules():
        if bound or isinstance(module, (nn.Linear, Conv1D)):
            replace(module)
    _assert_units_right(model, expected)
