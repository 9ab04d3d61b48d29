"""Heads of labels: classifiers, reward models, spans, held against the models' own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
)
from units import UNIT_NAMES
from zoo import BY_NAME as SPECS
from zoo import _config, _randomise, build

import dla_hooks
from dla_hooks import (
    InputError,
    TokenError,
    UnsupportedModelError,
    attribute_many,
    direct_logit_attribution,
    verify,
)

PAD = 2
IDS = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))
FAMILIES = ("llama", "gpt2", "qwen2", "gpt_neox-parallel", "opt")


def _build(auto: Any, family: str, n_labels: int = 3, pad: int | None = PAD) -> Any:
    config = _config(SPECS[family])
    config.num_labels, config.pad_token_id = n_labels, pad
    config._attn_implementation = "eager" if family == "bloom" else "sdpa"
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(config).double().eval()
    _randomise(model, torch.Generator().manual_seed(0))
    return model


def _assert_units_right(
    model: Any, ids: torch.Tensor, label: Any, expected: torch.Tensor, **options: Any
) -> None:
    for unit in UNIT_NAMES:
        result = direct_logit_attribution(model, ids, label, unit=unit, **options)
        whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        found = (whole + result.bias).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_labels", [1, 3])
def test_sequence_classifier_label_is_the_sum_of_the_parts(family, n_labels):
    model = _build(AutoModelForSequenceClassification, family, n_labels)
    with torch.no_grad():
        expected = model(IDS).logits
    for label in range(n_labels):
        _assert_units_right(model, IDS, label, expected[:, label])
    assert verify(model, show=False).ok
    if n_labels > 1:
        _assert_units_right(model, IDS, 2, expected[:, 2] - expected[:, 0], incorrect_tokens=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reward_in_float32_passes_the_check(family):
    model = _build(AutoModelForSequenceClassification, family, 1).float()
    with torch.no_grad():
        expected = model(IDS).logits[:, 0].double()
    _assert_units_right(model, IDS, 0, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_head_of_a_classifier_is_what_its_ablation_removes(family):
    model = _build(AutoModelForSequenceClassification, family)
    result = direct_logit_attribution(model, IDS, 1, unit="head")
    last = model.model.layers[-1] if family == "llama" else model.transformer.h[-1]
    norm = model.model.norm if family == "llama" else model.transformer.ln_f
    project = last.self_attn.o_proj if family == "llama" else last.attn.c_proj
    kept: dict[str, torch.Tensor] = {}
    handles = [
        project.register_forward_hook(lambda m, a, out: kept.update(z=a[0])),
        norm.register_forward_hook(lambda m, a, out: kept.update(x=a[0], y=out)),
    ]
    with torch.no_grad():
        model(IDS)
        n_heads = model.config.num_attention_heads
        z = kept["z"][:, -1].unflatten(-1, (n_heads, -1)).clone()
        z[:, [h for h in range(n_heads) if h != 1]] = 0
        weight = project.weight.T if family == "llama" else project.weight
        write, x = z.flatten(1) @ weight, kept["x"][:, -1]
        if family == "llama":
            normed = (
                norm.weight
                * write
                * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
            )
        else:
            scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            normed = norm.weight * (write - write.mean(-1, keepdim=True)) / scale
        expected = normed @ model.score.weight[1]
    for handle in handles:
        handle.remove()
    layer = model.config.num_hidden_layers - 1
    found = result.attribution[result.labels.index(f"L{layer}H1")]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_reads_each_rows_last_real_token(family, side):
    model = _build(AutoModelForSequenceClassification, family)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    where = slice(0, 2) if side == "left" else slice(4, 6)
    ids[1, where], mask[1, where] = PAD, 0
    alone = IDS[1:, 2:] if side == "left" else IDS[1:, :4]
    with torch.no_grad():
        expected = torch.stack([model(IDS[:1]).logits[0, 1], model(alone).logits[0, 1]])
    _assert_units_right(model, ids, 1, expected, attention_mask=mask)
    found = attribute_many(model, [IDS[0], alone[0]], 1)
    values = [float(one.attribution.sum() + one.bias) for one in found]
    torch.testing.assert_close(torch.tensor(values).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_that_ends_with_the_pad_token_is_refused(family):
    model = _build(AutoModelForSequenceClassification, family)
    ids = IDS.clone()
    ids[0, -1] = PAD
    with pytest.raises(InputError, match="row 0 of the input ends with the model's pad token"):
        direct_logit_attribution(model, ids, 1)
    (found,) = attribute_many(model, [ids[0]], 1)
    assert isinstance(found, InputError)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_classifier_without_a_pad_token_serves_a_single_prompt(family):
    model = _build(AutoModelForSequenceClassification, family, pad=None)
    with torch.no_grad():
        expected = model(IDS[:1]).logits[:, 1]
    _assert_units_right(model, IDS[:1], 1, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_token_classifier_serves_every_position(family):
    model = _build(AutoModelForTokenClassification, family)
    with torch.no_grad():
        expected = model(IDS).logits[..., 2]
    _assert_units_right(model, IDS, 2, expected, pos=None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_span_head_scores_start_and_end(family):
    model = _build(AutoModelForQuestionAnswering, family)
    with torch.no_grad():
        output = model(IDS)
    _assert_units_right(model, IDS, "start", output.start_logits, pos=None)
    _assert_units_right(model, IDS, 1, output.end_logits, pos=None)


def test_label_is_given_by_its_name():
    model = _build(AutoModelForSequenceClassification, "llama")
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    by_name = direct_logit_attribution(model, IDS, "good", "bad")
    by_index = direct_logit_attribution(model, IDS, 2, 0)
    torch.testing.assert_close(by_name.attribution, by_index.attribution)
    assert (by_name.answer, by_name.incorrect) == (["good"], ["bad"])
    (one,) = attribute_many(model, [IDS[0]], "good", "bad")
    assert (one.answer, one.incorrect) == (["good"], ["bad"])
    with pytest.raises(TokenError, match="'great' is no label of the model; its labels are 'bad'"):
        direct_logit_attribution(model, IDS, "great")
    with pytest.raises(TokenError, match="outside"):
        direct_logit_attribution(model, IDS, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_adapted_classifier_gives_its_own_logits(family, merged):
    peft = pytest.importorskip("peft")
    model = _build(AutoModelForSequenceClassification, family)
    targets = ["q_proj", "o_proj"] if family == "llama" else ["c_attn", "c_proj"]
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=targets, init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).double().eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
        expected = adapted(input_ids=IDS).logits[:, 1]
    asked = adapted.merge_and_unload() if merged else adapted
    _assert_units_right(asked, IDS, 1, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_classifier_that_changes_its_heads_output_is_refused(family):
    model = _build(AutoModelForSequenceClassification, family)
    base = type(model)

    def forward(self, input_ids=None, **options):
        output = base.forward(self, input_ids, **options)
        output.logits = 1.01 * output.logits
        return output

    model.__class__ = type("Louder", (base,), {"forward": forward})
    with pytest.raises(UnsupportedModelError, match="returns something else than what score"):
        direct_logit_attribution(model, IDS, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("read", [0, 2, -2])
def test_classifier_that_reads_another_position_is_refused(family, read):
    model = _build(AutoModelForTokenClassification, family)
    base = type(model)

    def forward(self, input_ids=None, **options):
        output = base.forward(self, input_ids, **options)
        output.logits = output.logits[:, min(read, output.logits.shape[1] - 1)]
        return output

    model.__class__ = type("Reads", (base,), {"forward": forward})
    with pytest.raises(UnsupportedModelError, match="reads another position than the last token"):
        direct_logit_attribution(model, IDS, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_classifier_with_a_bent_head_is_refused(family):
    model = _build(AutoModelForSequenceClassification, family)
    width = model.score.in_features
    model.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    model.score.double().eval()
    with pytest.raises(UnsupportedModelError, match="linear"):
        direct_logit_attribution(model, IDS, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoder_without_a_head_asks_for_the_whole_model(family):
    model = _build(AutoModel, family)
    with pytest.raises(UnsupportedModelError, match="pass the whole model") as caught:
        direct_logit_attribution(model, IDS, 1)
    assert "AutoModelForCausalLM" not in str(caught.value)


def _slow(*families):
    return [pytest.param(family, marks=pytest.mark.slow) for family in families]


class ValueHead(nn.Module):
    """A dropout and one number, as trl's."""

    def __init__(self, width, n_hidden=0):
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.hidden = nn.Sequential(nn.Linear(width, n_hidden), nn.ReLU()) if n_hidden else None
        self.summary = nn.Linear(n_hidden or width, 1)

    def forward(self, stream):
        stream = self.dropout(stream)
        return self.summary(stream if self.hidden is None else self.hidden(stream))


class WithValue(nn.Module):
    """A language model with a value head beside it, as trl wraps one."""

    def __init__(self, model, **options):
        super().__init__()
        self.pretrained_model, self.config = model, model.config
        self.v_head = ValueHead(model.config.hidden_size, **options).to(model.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            nn.init.normal_(self.v_head.summary.weight)
            nn.init.normal_(self.v_head.summary.bias)

    def forward(self, input_ids=None, attention_mask=None, **options):
        options["output_hidden_states"] = True
        output = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask, **options
        )
        value = self.v_head(output.hidden_states[-1]).squeeze(-1)
        return output.logits.float(), output.loss, value


@pytest.mark.parametrize(
    "family", ["gpt2", "gemma2", *_slow("gpt_neox-parallel", "granite", "mixtral")]
)
def test_value_is_the_sum_of_the_parts_at_every_position(family):
    model = WithValue(build(family)).eval()
    with torch.no_grad():
        expected = model(IDS)[2]
    _assert_units_right(model, IDS, "value", expected, pos=None)
    _assert_units_right(model, IDS, 0, expected, pos=None)
    assert direct_logit_attribution(model, IDS, dla_hooks.TOP).answer == ["value"]
    assert verify(model, show=False).ok


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_value_of_a_padded_batch_is_that_of_each_row_alone(family):
    model = WithValue(build(family, attn="sdpa")).eval()
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :2], mask[1, :2] = PAD, 0
    with torch.no_grad():
        expected = torch.stack([model(IDS[:1])[2][0, -1], model(IDS[1:, 2:])[2][0, -1]])
    _assert_units_right(model, ids, "value", expected, attention_mask=mask)


def test_value_model_asked_for_a_token_names_the_model_inside():
    model = WithValue(build("llama")).eval()
    with pytest.raises(TokenError, match=r"labels are 'value'.*model\.pretrained_model"):
        direct_logit_attribution(model, IDS, " the")
    assert direct_logit_attribution(model.pretrained_model, IDS, 1).gap < 1e-9


def test_value_head_with_a_hidden_layer_is_refused():
    model = WithValue(build("llama"), n_hidden=8).eval()
    with pytest.raises(UnsupportedModelError, match="not linear in its input"):
        direct_logit_attribution(model, IDS, "value")


def test_value_model_in_training_mode_is_refused():
    with pytest.raises(dla_hooks.TrainingModeError, match=r"v_head\.dropout|call model\.eval"):
        direct_logit_attribution(WithValue(build("llama").train()), IDS, "value")


@pytest.mark.parametrize("seed", [0, 1])
def test_double_heads_are_asked_for_their_tokens(seed):
    with torch.random.fork_rng(devices=[]):
        model = GPT2DoubleHeadsModel(_config(SPECS["gpt2"])).double().eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(IDS).logits[..., 7]
    _assert_units_right(model, IDS, 7, expected, pos=None)


# Where a classifier reads


@pytest.mark.parametrize("family", ["llama", *_slow("gpt2")])
def test_classifier_that_does_not_know_its_padding_is_refused(family):
    """Without a pad token it reads the last column, which is padding here."""
    model = _build(AutoModelForSequenceClassification, family, pad=None)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with pytest.raises(UnsupportedModelError, match="another position than the last token"):
        direct_logit_attribution(model, IDS[:1], 1, attention_mask=mask)


@pytest.mark.parametrize("family", ["llama", *_slow("gpt2")])
def test_classifier_of_embeddings_is_read_where_it_reads(family):
    model = _build(AutoModelForSequenceClassification, family)
    embeds = model.get_input_embeddings()(IDS).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits[:, 1]
    result = direct_logit_attribution(model, {"inputs_embeds": embeds}, 1)
    torch.testing.assert_close(result.total() + result.bias, expected, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    with pytest.raises(UnsupportedModelError, match="another position than the last token"):
        direct_logit_attribution(model, {"inputs_embeds": embeds, "attention_mask": mask}, 1)


@pytest.mark.parametrize("family", ["llama", *_slow("gpt2")])
def test_classifier_in_chunks_is_as_at_once(family):
    model = _build(AutoModelForSequenceClassification, family)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, 3:], mask[1, 3:] = PAD, 0
    whole = direct_logit_attribution(model, ids, 1, attention_mask=mask)
    chunked = direct_logit_attribution(model, ids, 1, attention_mask=mask, chunk_size=4)
    torch.testing.assert_close(whole.attribution, chunked.attribution, rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", *_slow("gpt2")])
def test_biased_head_adds_its_bias_once(family):
    model = _build(AutoModelForSequenceClassification, family)
    model.score = nn.Linear(model.score.in_features, 3).double().eval()
    with torch.no_grad():
        model.score.bias.copy_(torch.tensor([3.0, -2.0, 0.5]))
        expected = model(IDS).logits
    _assert_units_right(model, IDS, 1, expected[:, 1])
    _assert_units_right(model, IDS, 1, expected[:, 1] - expected[:, 0], incorrect_tokens=0)


# Everything that is asked of tokens, asked of labels


@pytest.fixture
def named():
    model = _build(AutoModelForSequenceClassification, "llama")
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    return model


def test_own_labels_are_named(named):
    with torch.no_grad():
        order = named(IDS).logits.argsort(-1, descending=True)
    names = [named.config.id2label[int(i)] for i in order[:, 0]]
    seconds = [named.config.id2label[int(i)] for i in order[:, 1]]
    result = direct_logit_attribution(named, IDS, dla_hooks.TOP, dla_hooks.RUNNER_UP)
    assert (result.answer, result.incorrect) == (names, seconds)
    with pytest.raises(InputError, match="a classifier's labels have none"):
        direct_logit_attribution(named, IDS, dla_hooks.NEXT)


def test_sets_and_lists_of_labels_are_the_sums_of_single_ones(named):
    one = {name: direct_logit_attribution(named, IDS, name) for name in ("bad", "fair", "good")}
    several = direct_logit_attribution(named, IDS, dla_hooks.Tokens({"good": 1.0, "bad": -0.5}))
    expected = one["good"].attribution - 0.5 * one["bad"].attribution
    torch.testing.assert_close(several.attribution, expected)
    mean = direct_logit_attribution(named, IDS, "good", dla_hooks.Mean(["bad", "fair"]))
    halves = (one["bad"].attribution + one["fair"].attribution) / 2
    torch.testing.assert_close(mean.attribution, one["good"].attribution - halves)
    each = direct_logit_attribution(named, IDS[:1], dla_hooks.Each(["good", "bad"]))
    assert [name for name in each.answer] == ["good", "bad"]


def test_label_is_drawn_compared_and_reported(named, tmp_path):
    result = direct_logit_attribution(named, IDS[:1], "good", "bad", unit="head")
    assert "'good'" in str(result)
    assert "good" in result.plot()._repr_html_()
    result.save(tmp_path / "r.safetensors")
    assert dla_hooks.load(tmp_path / "r.safetensors").answer == ["good"]
    found = dla_hooks.effects(named, IDS[:1], "good", "bad", unit="head")
    assert "'good'" in str(found)
    report = dla_hooks.report(named, IDS[:1], "good", "bad")
    report.save(tmp_path / "page.html")
    assert "good" in (tmp_path / "page.html").read_text()


def test_reward_model_has_a_report_without_promoted_tokens():
    model = _build(AutoModelForSequenceClassification, "llama", 1)
    page = dla_hooks.report(model, IDS, 0)
    assert "ranks need two" in page.html()
    with pytest.raises(UnsupportedModelError, match="scores one label"):
        dla_hooks.promoted_tokens(model, IDS)


def test_labels_may_be_named_by_strings_of_their_numbers():
    model = _build(AutoModelForSequenceClassification, "llama")
    model.config.id2label = {"0": "bad", "1": "fair", "2": "good"}
    assert direct_logit_attribution(model, IDS, "good", 0).answer == ["good"]


def test_classifier_that_gives_no_numbers_with_padding_is_refused_for_it():
    model = _build(AutoModelForSequenceClassification, "bloom")  # NaN on the left, in float64
    mask = torch.ones_like(IDS)
    mask[:, :2] = 0
    with pytest.raises(UnsupportedModelError, match="when it is padded on the left"):
        direct_logit_attribution(model, IDS, 1, attention_mask=mask)
