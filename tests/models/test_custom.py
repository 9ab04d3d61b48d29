"""A made-up architecture, declared at run time as docs/models.md shows, with every oddity."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from units import UNIT_NAMES

import dla_hooks
from dla_hooks import (
    Architecture,
    Heads,
    UnsupportedModelError,
    Write,
    direct_logit_attribution,
    verify,
)
from dla_hooks.residual import registry

D, HEADS, VOCAB = 20, 4, 31


class Mixer(nn.Module):
    """Attention of one kind or another: all that matters is the projection at its end."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x <- gain * x + 0.3 * mixer; x <- x + norm(mlp) + a bias that no module puts out."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.RMSNorm(D)
        self.mixer = Mixer()
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.after_mlp = nn.RMSNorm(D)
        self.gain, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x, twist=None):
        x = self.gain * x + 0.3 * self.mixer(self.norm1(x))
        x = x + self.after_mlp(self.mlp(self.norm2(x))) + self.bias
        if twist == "norm on the sum":
            return self.norm1(x)
        if twist == "gate on the tokens":
            return x * torch.sigmoid(x.mean(-1, keepdim=True))
        return x


class MadeUpConfig(PretrainedConfig):
    model_type = "odd_one"

    def __init__(self, twist=None, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.vocab_size, self.num_attention_heads = D, VOCAB, HEADS
        self.twist = twist


class OddOne(PreTrainedModel):
    """Two blocks, the first used twice; 5 * tanh(0.7 * logits / 5) at the end."""

    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        first, second = Block(), Block()
        self.stack = nn.ModuleList([first, second, first])
        self.embed, self.last = nn.Embedding(VOCAB, D), nn.LayerNorm(D)
        self.between, self.head = nn.Linear(D, D), nn.Linear(D, VOCAB)
        self.double()
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.4 * noise
        self.eval()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False, return_dict=True):
        x = self.embed(input_ids) * 2
        for block in self.stack:
            x = block(x, self.config.twist)
        y = self.between(self.last(x))
        if self.config.twist == "readout":
            y = y.tanh()
        return SimpleNamespace(logits=5 * torch.tanh(0.7 * self.head(y) / 5))


DECLARATION = Architecture(
    model_types=("odd_one",),
    layers="stack",
    final_norm="last",
    writes=(
        Write("attn_out", "mixer", heads=Heads("mixer.out")),
        Write("mlp_out", "mlp", post_norm="after_mlp"),
    ),
    after_norm=("between",),
)
IDS = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def declared():
    registry.architectures()
    before = dict(registry._registered)
    dla_hooks.register(DECLARATION)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.mark.usefixtures("declared")
def test_custom_architecture_is_exact():
    model = OddOne(MadeUpConfig())
    with torch.no_grad():
        logits = model(IDS).logits
    uncapped = 5 * torch.atanh(logits / 5)
    for unit in UNIT_NAMES:
        result = direct_logit_attribution(model, IDS, 5, 7, unit=unit, pos=None)
        whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        assert result.gap < 1e-12
        torch.testing.assert_close(whole + result.bias, uncapped[..., 5] - uncapped[..., 7])
        assert result.softcap == pytest.approx(5)
    parts = direct_logit_attribution(model, IDS, 5).labels
    assert parts == [
        "embed",
        *(f"{i}_{w}" for i in range(3) for w in ("attn_out", "mlp_out", "constant")),
    ]
    assert verify(model, show=False).ok


@pytest.mark.usefixtures("declared")
def test_heads_of_shared_block_are_exact():
    """Held against removing one head's slice in one of the two uses, with every scale frozen."""
    model = OddOne(MadeUpConfig())
    result = direct_logit_attribution(model, IDS, 5, unit="head", pos=None)
    assert result.labels[:2] + result.labels[-2:] == ["L0H0", "L0H1", "L2H3", "remainder"]
    kept = {}
    model.last.register_forward_hook(lambda m, a, out: kept.update(x=a[0]))
    z = []
    model.stack[0].mixer.out.register_forward_hook(lambda m, a, out: z.append(a[0]))
    with torch.no_grad():
        model(IDS)
        x, first, second = kept["x"], model.stack[0], model.stack[1]
        scale = (x.var(-1, unbiased=False, keepdim=True) + model.last.eps).sqrt()
        for use, gains in ((0, second.gain * first.gain), (1, torch.ones(D).double())):
            for head in range(HEADS):
                part = torch.zeros_like(z[use])
                width = slice(head * D // HEADS, (head + 1) * D // HEADS)
                part[..., width] = z[use][..., width]
                write = 0.3 * part @ first.mixer.out.weight.T * gains
                normed = model.last.weight * (write - write.mean(-1, keepdim=True)) / scale
                effect = 0.7 * normed @ model.between.weight.T @ model.head.weight[5]
                row = result.labels.index(f"L{2 * use}H{head}")
                torch.testing.assert_close(result.attribution[row], effect)


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize(
    ("twist", "said"),
    [
        ("norm on the sum", r"stack\.0 is no sum"),
        ("gate on the tokens", r"stack\.0 is no sum"),
        ("readout", "not the unembedding of the final norm's output"),
    ],
)
def test_block_that_is_no_sum_is_refused(twist, said):
    model = OddOne(MadeUpConfig(twist=twist))
    for unit in UNIT_NAMES:
        with pytest.raises(UnsupportedModelError, match=said):
            direct_logit_attribution(model, IDS, 5, unit=unit)


def test_undeclared_model_is_refused_with_a_sketch():
    with pytest.raises(UnsupportedModelError, match="has no declaration") as caught:
        direct_logit_attribution(OddOne(MadeUpConfig()), IDS, 5)
    lines = str(caught.value).partition("start from these lines:\n")[2]
    names = {"dla_hooks": SimpleNamespace(register=lambda a: a), "Architecture": Architecture,
             "Write": Write, "Heads": Heads}  # fmt: skip
    start = eval(lines.strip(), names)
    assert isinstance(start, Architecture)
    assert (start.layers, start.final_norm) == (DECLARATION.layers, DECLARATION.final_norm)
    assert start.writes[0].module == "mixer"


def test_recipe_of_the_docs_is_a_valid_declaration():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (recipe,) = (snippet for snippet in snippets if "dla_hooks.register(" in snippet)
    registry.architectures()
    before = dict(registry._registered)
    try:
        exec(recipe, {})
        assert registry.adapter_for("my_model").layers == "model.layers"
    finally:
        registry._registered.clear()
        registry._registered.update(before)
