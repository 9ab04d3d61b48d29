"""What an Altair chart shows, read off the chart and off the files."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys

import pytest
import torch
from units import UNIT_NAMES
from zoo import build, tiny_tokenizer

from dla_hooks import (
    DirectLogitAttribution,
    InputError,
    MissingExtraError,
    direct_logit_attribution,
)
from dla_hooks.results.chart import plot, save_plot

PROMPT = "The cat sat on the mat"


@pytest.fixture(scope="module")
def attribute():
    model, tokenizer = build("gpt2", dtype=torch.float32), tiny_tokenizer()

    def call(input=PROMPT, **kwargs):
        return direct_logit_attribution(
            model, input, " Paris", " Berlin", tokenizer=tokenizer, **kwargs
        )

    return call


def made_up(unit, labels, values=None, prompt=("The", " cat")):
    if values is None:
        values = [math.sin(i) for i in range(len(labels))]
    values = torch.tensor(values)[:, None]
    bias = torch.tensor([0.25])
    total = (values[-1] if unit == "layer" else values.sum(0)) + bias
    return DirectLogitAttribution(
        values,
        labels,
        unit,
        bias,
        total,
        1e-7,
        positions=torch.tensor([len(prompt) - 1]),
        tokens=[list(prompt)],
        answer=[" Paris"],
        model="M (m)",
    )


def heads(layers, per_layer):
    names = [f"L{layer}H{head}" for layer in range(layers) for head in range(per_layer)]
    return [*names, "remainder"]


def drawn(chart):
    """The values that a chart draws: label to value."""
    tables = [list(table) for table in chart.to_dict()["datasets"].values()]
    rows = next(table for table in tables if "label" in table[0])
    return {row["label"]: row["value"] for row in rows}


def svg(chart, tmp_path):
    return save_plot(chart, tmp_path / "chart.svg").read_text(encoding="utf-8")


def texts(page):
    return re.findall(r"<text[^>]*>([^<]*)</text>", page)


class TestHeads:
    def test_every_head_is_a_square_with_its_own_value(self, attribute):
        result = attribute(unit="head")
        values = drawn(plot(result))
        expected = dict(zip(result.labels, result.attribution[:, 0].tolist(), strict=True))
        remainder = expected.pop("remainder")
        assert values == pytest.approx(expected)
        subtitle = plot(result).to_dict()["title"]["subtitle"]
        assert f"remainder): {remainder:+.3f}".replace("-", "−") in subtitle[-1]

    def test_colours_are_symmetric_about_zero(self, tmp_path):
        labels = heads(2, 2)
        page = svg(plot(made_up("head", labels, [0.0, 3.0, -3.0, 1.0, 50.0])), tmp_path)
        found = re.findall(r'aria-label="([^"]*attribution[^"]*)"[^>]*fill="(rgb[^"]*)"', page)
        colours = {re.search(r"L\dH\d", text)[0]: fill for text, fill in found}
        zero, up, down = (
            [int(part) for part in re.findall(r"\d+", colours[label])]
            for label in ("L0H0", "L0H1", "L1H0")
        )
        assert max(zero) - min(zero) < 12  # grey
        assert up[2] > up[0] + 50  # blue
        assert down[0] > down[2] + 50  # red
        assert sum(up) < 400 > sum(down)  # both at the ends of the scale

    def test_axes_are_layer_and_head(self, tmp_path):
        page = texts(svg(plot(made_up("head", heads(3, 5))), tmp_path))
        assert {"layer", "head"} <= set(page)
        assert {"0", "1", "2", "3", "4"} <= set(page)

    def test_numbers_stand_in_squares_that_have_room(self, tmp_path):
        assert "+0.841" in texts(svg(plot(made_up("head", heads(4, 4))), tmp_path))
        assert "+0.841" not in texts(svg(plot(made_up("head", heads(32, 32))), tmp_path))

    def test_large_models_are_drawn_whole(self):
        labels = heads(80, 128)  # more rows than Altair takes without being asked
        assert len(drawn(plot(made_up("head", labels)))) == 80 * 128

    def test_layers_without_heads_are_left_out(self, tmp_path):
        labels = ["L1H0", "L1H1", "L5H0", "L5H1", "remainder"]
        page = texts(svg(plot(made_up("head", labels)), tmp_path))
        assert "5" in page
        assert "3" not in page


class TestComponents:
    def test_stream_order_then_bias_then_the_total(self, attribute, tmp_path):
        result = attribute()
        chart = plot(result)
        assert list(drawn(chart)) == [*result.labels, "bias", "logit difference"]
        assert drawn(chart)["bias"] == pytest.approx(float(result.bias))
        assert drawn(chart)["logit difference"] == pytest.approx(float(result.logit))
        page = texts(svg(chart, tmp_path))
        names = [text for text in page if text in drawn(chart)]
        assert names == list(drawn(chart))

    def test_bars_are_red_below_zero_and_blue_above(self, tmp_path):
        page = svg(plot(made_up("component", ["embed", "0_mlp_out"], [1.0, -1.0])), tmp_path)
        fill = dict(re.findall(r'"value[^"]*label: (\w+);[^>]*"bar"[^>]*fill="([^"]+)"', page))
        assert fill["embed"] == fill["bias"] != fill["0_mlp_out"]
        assert fill["logit"] not in (fill["embed"], fill["0_mlp_out"])

    def test_every_one_of_many_bars_is_named(self, tmp_path):
        labels = [f"{i}_{kind}_out" for i in range(40) for kind in ("attn", "mlp")]
        assert set(labels) <= set(texts(svg(plot(made_up("component", labels)), tmp_path)))


class TestLayers:
    def test_every_entry_is_named_in_order(self, tmp_path):
        labels = [f"{i}_{kind}" for i in range(32) for kind in ("pre", "mid")] + ["final_post"]
        page = texts(svg(plot(made_up("layer", labels)), tmp_path))
        assert [text for text in page if text in labels] == labels


class TestTitle:
    def title(self, result):
        return plot(result).to_dict()["title"]

    def test_says_unit_difference_place_and_model(self, attribute):
        title = self.title(attribute(unit="head"))
        assert title["text"] == "Heads: ' Paris' - ' Berlin'"
        assert title["subtitle"][0] == "at the last token of 'The cat sat on the mat'"
        assert title["subtitle"][1] == "GPT2LMHeadModel (gpt2)"

    def test_names_the_token_of_another_position(self, attribute):
        assert self.title(attribute(pos=2))["subtitle"][0].startswith("at token 2 (' sat') of")

    @pytest.mark.parametrize("unit", UNIT_NAMES)
    def test_means_are_drawn_and_said(self, attribute, unit):
        result = attribute([PROMPT, "When Mary"], pos=None, unit=unit)
        title = self.title(result)
        assert title["text"].endswith("(mean)")
        assert title["subtitle"][0].startswith("mean over 8 entries of 2 prompts")
        values = drawn(plot(result))
        label = result.labels[1]
        real = result.attribution[1][result.positions >= 0]
        assert values[label] == pytest.approx(float(real.mean()))

    def test_long_prompt_is_elided(self):
        prompt = ["The", *[" cat sat"] * 60, " mat"]
        first = self.title(made_up("component", ["embed"], prompt=prompt))["subtitle"][0]
        assert len(first) < 100
        assert "…" in first
        assert first.endswith("mat'")


class TestFiles:
    def test_png_has_twice_the_size_of_the_svg(self, attribute, tmp_path):
        chart = plot(attribute())
        png = save_plot(chart, tmp_path / "p.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        size = re.search(r'<svg[^>]* width="([\d.]+)" height="([\d.]+)"', svg(chart, tmp_path))
        assert (width, height) == pytest.approx((2 * float(size[1]), 2 * float(size[2])), abs=2)

    def test_html_loads_nothing_from_elsewhere(self, attribute, tmp_path):
        page = save_plot(plot(attribute()), tmp_path / "p.html").read_text(encoding="utf-8")
        assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
        # What is left are names of formats, and the link to an editor in the chart's menu.
        hosts = set(re.findall(r"https?://([\w.-]+)", page))
        assert hosts == {"www.w3.org", "vega.github.io", "github.com"}
        assert "0_attn_out" in page
        assert len(page) > 500_000  # Vega itself is in it

    def test_suffix_may_be_of_any_case(self, attribute, tmp_path):
        assert save_plot(plot(attribute()), tmp_path / "p.PNG").read_bytes()[:4] == b"\x89PNG"

    @pytest.mark.parametrize("name", ["plot.pdf", "plot", "plot.jpeg"])
    def test_any_other_suffix_is_refused(self, attribute, tmp_path, name):
        with pytest.raises(InputError, match=r"\.html, \.png, \.svg.*got '.*plot"):
            save_plot(plot(attribute()), tmp_path / name)

    def test_a_folder_that_is_not_there_is_an_input_error(self, attribute, tmp_path):
        with pytest.raises(InputError, match=r"cannot write .*No such file"):
            save_plot(plot(attribute()), tmp_path / "nowhere" / "p.svg")


@pytest.mark.parametrize(
    ("module", "action", "feature"),
    [
        ("altair", lambda result, path: result.to_altair(), "to_altair()"),
        ("vl_convert", lambda result, path: save_plot(result.to_altair(), path), "saving a plot"),
    ],
)
def test_what_is_missing_is_named(attribute, tmp_path, monkeypatch, module, action, feature):
    result = attribute()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        action(result, tmp_path / "p.png")
    assert str(caught.value).startswith(f"{feature} needs packages")
    assert "pip install 'altair>=5.5' 'vl-convert-python>=1.7'" in str(caught.value)


def test_a_plot_needs_no_pandas(tmp_path):
    code = (
        "import sys; sys.modules['pandas'] = None\n"
        "import torch\n"
        "from dla_hooks import DirectLogitAttribution\n"
        "from dla_hooks.results.chart import save_plot\n"
        "r = DirectLogitAttribution(torch.ones(1, 1), ['embed'], 'component', torch.zeros(1),"
        " torch.ones(1), 0.0)\n"
        f"save_plot(r.to_altair(), {str(tmp_path / 'p.svg')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "embed" in (tmp_path / "p.svg").read_text(encoding="utf-8")
