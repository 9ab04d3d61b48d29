"""What a result looks like as text, html, records and JSON."""

from __future__ import annotations

import html.parser
import json
import math
import re

import pytest
import torch
from zoo import build, tiny_tokenizer

from dla_hooks import DirectLogitAttribution, direct_logit_attribution
from dla_hooks.results.table import as_dict

PROMPT = "The cat sat on the mat"


@pytest.fixture(scope="module")
def gpt2():
    return build("gpt2", dtype=torch.float32)


@pytest.fixture(scope="module")
def attribute(gpt2):
    tokenizer = tiny_tokenizer()

    def call(input=PROMPT, answer=" Paris", incorrect=None, **kwargs):
        kwargs.setdefault("tokenizer", tokenizer)
        return direct_logit_attribution(gpt2, input, answer, incorrect, **kwargs)

    return call


def by_hand(labels, values, unit="component", **kwargs):
    values = torch.tensor(values)[:, None]
    bias = torch.tensor([0.5])
    defaults = {
        "positions": torch.tensor([1]),
        "tokens": [["The", " cat"]],
        "answer": [" Paris"],
        "model": "M (m)",
    }
    total = values[-1] if unit == "layer" else values.sum(0)
    return DirectLogitAttribution(
        values, labels, unit, bias, total + bias, 1e-7, **{**defaults, **kwargs}
    )


def shown_labels(text, labels):
    return [line.split()[0] for line in text.splitlines() if line.split()[0] in labels]


class TestText:
    def test_head_line_says_what_where_and_of_which_model(self, attribute):
        first = repr(attribute(incorrect=" Berlin")).splitlines()[0]
        assert first == (
            "' Paris' - ' Berlin' at the last token of 'The cat sat on the mat' · "
            "GPT2LMHeadModel (gpt2)"
        )

    @pytest.mark.parametrize(
        ("input", "answer", "pos", "words"),
        [
            (PROMPT, " Paris", 1, "at token 1 (' cat') of 'The cat sat on the mat'"),
            (PROMPT, " Paris", None, "mean over all 6 positions of 'The cat"),
            (PROMPT, " Paris", (1, 3), "mean over 2 positions of 'The cat"),
            (PROMPT, [" Paris", " mat"], -1, "each its own answer, at the last token of 'The cat"),
            ([PROMPT, "When Mary"], " Paris", -1, "mean over 2 prompts, at the last token of each"),
            ([PROMPT, "When Mary"], " Paris", 0, "mean over 2 prompts, at token 0 of each"),
            ([PROMPT, "When Mary"], " Paris", None, "mean over 8 entries of 2 prompts (first: "),
            (["The cat", "When"], " Paris", None, "mean over 3 entries of 2 prompts"),
        ],
    )
    def test_place(self, attribute, input, answer, pos, words):
        assert words in repr(attribute(input, answer, pos=pos)).splitlines()[0]

    def test_without_a_tokenizer_tokens_are_named_by_id(self, gpt2):
        text = repr(direct_logit_attribution(gpt2, torch.tensor([3, 4, 50]), 7, 8))
        assert text.startswith("token 7 - token 8 at the last token of '3 4 50'")

    def test_values_are_signed_and_bars_grow_to_their_side(self):
        text = repr(by_hand(["embed", "0_attn_out", "0_mlp_out"], [1.0, -2.0, 0.5]))
        rows = {line.split()[0]: line for line in text.splitlines()[2:5]}
        assert list(rows) == ["embed", "0_mlp_out", "0_attn_out"]
        zero = rows["embed"].index("│")
        assert all(line.index("│") == zero for line in rows.values())
        assert rows["embed"][zero + 1 :] == "█" * 6
        assert rows["0_attn_out"][:zero].endswith(" -2.000  " + "█" * 12)
        assert rows["0_mlp_out"][zero + 1 :] == "█" * 3

    def test_strongest_rows_of_both_signs_are_kept_and_the_rest_is_summed(self):
        labels = [f"{i}_mlp_out" for i in range(40)]
        values = [0.01 * (i - 20) for i in range(40)]
        text = repr(by_hand(labels, values))
        shown = shown_labels(text, labels)
        by_size = sorted(range(40), key=lambda i: abs(values[i]), reverse=True)
        strongest = {labels[i] for i in by_size[:14]}
        assert set(shown) == strongest
        assert shown[0] == "39_mlp_out"
        assert shown[-1] == "0_mlp_out"
        rest = sum(v for label, v in zip(labels, values, strict=True) if label not in strongest)
        noted = re.search(r"… 26 more rows, together (\S+)", text)
        assert noted
        assert float(noted[1]) == pytest.approx(rest, abs=1e-3)
        assert len(text.splitlines()) <= 25

    def test_remainder_is_not_ranked_and_does_not_set_the_scale(self):
        text = repr(by_hand(["L0H0", "L0H1", "remainder"], [0.1, -0.2, 90.0], unit="head"))
        *_, last_row, _, _ = text.splitlines()
        assert "remainder" in last_row
        assert "+90.00" in last_row
        assert "█" * 12 in text.splitlines()[3]

    def test_layers_stay_in_order_and_end_with_the_last(self):
        labels = [f"{i}_pre" for i in range(40)] + ["final_post"]
        text = repr(by_hand(labels, [math.sin(i) for i in range(41)], unit="layer"))
        shown = shown_labels(text, labels)
        assert shown == sorted(shown, key=labels.index)
        assert shown[-1] == "final_post"
        assert "one entry in 3 shown, of 41" in text
        assert "last entry +0.745  + bias +0.500  = +1.245, the logit" in text

    def test_closing_line_is_the_measured_sum(self):
        result = by_hand(["embed", "0_mlp_out"], [1.0, 0.25])
        result.logit = torch.tensor([7.0])  # a result that does not add up must not look as if
        assert "sum +1.250  + bias +0.500  = +7.000, the logit" in repr(result)

    def test_softcap_mean_and_unchecked_are_said(self):
        result = by_hand(["embed"], [1.0], softcap=30.0, incorrect=[" London"])
        closing = repr(result).splitlines()[-2:]
        assert closing[0].endswith("the logit difference before the cap of 30")
        assert closing[1] == "gap 1.0e-07, not checked against the model's logits"

    def test_padding_takes_no_part_in_the_means(self, attribute):
        result = attribute(["The cat sat", "When"], pos=None, unit="layer")
        real = result.positions >= 0
        assert not bool(real.all())
        mean = float(result.logit[real].mean())
        assert f"= {mean:+.3f}"[:7] in repr(result)
        assert repr(result).splitlines()[-2].endswith(", the mean logit")
        assert "nan" not in repr(result)

    def test_long_prompt_is_elided_between_words(self, attribute):
        text = repr(attribute(" ".join(["The", *["cat sat on the"] * 6, "mat"])))
        quoted = re.search(r"of ('.*') ·", text.splitlines()[0])
        assert quoted
        assert len(quoted[1]) <= 64
        assert re.fullmatch(r"'The cat( \w+)* … (\w+ )*mat'", quoted[1])

    def test_a_result_without_tokens_can_be_shown(self):
        result = DirectLogitAttribution(
            torch.ones(2, 3), ["a", "b"], "component", torch.zeros(3), torch.ones(3) * 2, 0.0
        )
        assert "a logit, mean over 3 entries" in repr(result)
        assert result._repr_html_()
        assert [line["position"] for line in result.records()] == [None] * 6

    def test_tiny_and_zero_values_keep_their_digits(self):
        assert "+0.000012" in repr(by_hand(["embed", "0_mlp_out"], [1.2e-5, 0.0]))
        assert "+0.000" in repr(by_hand(["embed"], [0.0]))


class _Balance(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestHtml:
    def test_is_escaped_and_well_formed(self):
        nasty = "<script>alert('&')</script>"
        result = by_hand(
            [f"0_{nasty}", "embed"],
            [1.0, -1.0],
            tokens=[["The", nasty]],
            answer=[nasty],
            incorrect=[nasty],
            model=nasty,
        )
        page = _Balance()
        page.feed(result._repr_html_())
        assert page.open == []
        table = {"div", "table", "tr", "td", "span", "details", "summary"}
        assert {tag for tag, _ in page.tags} == table
        assert f"0_{nasty}" in page.text

    def test_bars_have_the_colour_of_their_sign(self):
        page = by_hand(["embed", "0_mlp_out"], [1.0, -0.5])._repr_html_()
        found = re.findall(
            r"margin-left:(.*?)px;width:(.*?)px;background:(#\w+);border-(\w+)", page
        )
        up, down = found[:2]
        assert found[2:] == [up, down]  # by size, and in stream order
        assert (up[:2], up[3]) == (("110.0", "110.0"), "left")
        assert (down[:2], down[3]) == (("55.0", "55.0"), "right")
        assert up[2] != down[2]

    def test_brings_its_own_style_and_fits_any_background(self):
        page = by_hand(["embed"], [1.0])._repr_html_()
        assert "<style" not in page
        assert "<script" not in page
        assert "http" not in page
        assert not re.search(r"[ ;\"]color:", page)  # the notebook's own text colour


class TestRecords:
    def test_one_line_per_row_and_entry_without_padding(self, attribute):
        result = attribute([PROMPT, "When Mary"], pos=None, unit="head")
        lines = result.records()
        assert len(lines) == len(result.labels) * 8
        assert {(line["row"], line["position"], line["token"]) for line in lines} == {
            *((0, i, token) for i, token in enumerate(result.tokens[0])),
            *((1, i, token) for i, token in enumerate(result.tokens[1])),
        }
        column = {(line["label"], line["row"], line["position"]): line for line in lines}
        last = column["L2H1", 1, 1]
        assert last["attribution"] == float(result.attribution[result.labels.index("L2H1"), 1, -1])

    @pytest.mark.parametrize(
        ("label", "layer", "head"),
        [
            ("L3H12", 3, 12),
            ("remainder", None, None),
            ("embed", None, None),
            ("pos_embed", None, None),
            ("3_attn_out", 3, None),
            ("31_mixer_out", 31, None),
            ("3_pre", 3, None),
            ("3_mid", 3, None),
            ("final_post", None, None),
        ],
    )
    def test_layer_and_head(self, label, layer, head):
        (line,) = by_hand([label], [1.0]).records()
        assert (line["layer"], line["head"]) == (layer, head)

    @pytest.mark.parametrize(
        ("input", "answer", "pos", "expected"),
        [
            (PROMPT, " Paris", (0, 2), [" Paris", " Paris"]),
            (PROMPT, [" Paris", " mat", " cat"], -1, [" Paris", " mat", " cat"]),
            (PROMPT, [" Paris", " mat", " cat"], [2], [" Paris", " mat", " cat"]),
            (PROMPT, [" Paris", " mat"], (0, 2), [" Paris", " mat"]),
            (["The cat", "When"], [" Paris", " mat"], -1, [" Paris", " mat"]),
            (["The cat", "When Mary"], [" Paris", " mat"], (0, 2), [" Paris"] * 2 + [" mat"] * 2),
            (["The cat", "When"], [" Paris", " mat"], None, [" Paris"] * 2 + [" mat"]),
            (["The cat", "When", "The"], [" Paris", " mat"], None, None),
        ],
    )
    def test_each_entry_has_its_own_answer(self, attribute, input, answer, pos, expected):
        result = attribute(input, answer, pos=pos)
        lines = [line for line in result.records() if line["label"] == "embed"]
        if expected is None:
            expected = [" Paris", " mat", " mat", " mat"]  # per position, padded on the left
        assert [line["answer"] for line in lines] == expected
        for line in lines:  # the text is that of the answer whose number it is
            alone = attribute(result_prompt(input, line["row"]), line["answer"], pos=None)
            value = alone.attribution[0, 0, line["position"]]
            assert line["attribution"] == pytest.approx(float(value), abs=1e-5)

    def test_a_grid_of_answers(self, attribute):
        ids = torch.tensor([[7, 8], [9, 10]])
        result = attribute(["The cat", "When Mary"], ids, pos=None)
        lines = [line for line in result.records() if line["label"] == "embed"]
        decode = tiny_tokenizer().decode
        assert [line["answer"] for line in lines] == [decode([i]) for i in (7, 8, 9, 10)]

    def test_dataframe_has_the_same_lines(self, attribute):
        result = attribute(incorrect=" Berlin", unit="head")
        frame = result.to_dataframe()
        assert list(frame["label"]) == result.labels
        assert frame["attribution"].sum() == pytest.approx(float(result.attribution.sum()))
        assert set(frame["incorrect"]) == {" Berlin"}


def result_prompt(input, row):
    return input if isinstance(input, str) else input[row]


class TestFiles:
    def test_json_has_null_for_nan_and_nothing_else_odd(self, attribute, tmp_path):
        result = attribute(["The cat", "When"], pos=None, check=False)
        result.to_json(tmp_path / "r.json")

        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        data = json.loads((tmp_path / "r.json").read_text("utf-8"), parse_constant=refuse)
        assert data == as_dict(result)
        assert data["version"] == 1
        assert data["attribution"][0][1][0] is None  # padding
        assert data["logit_gap"] is None  # not checked
        assert data["attribution"][0][1][1] == float(result.attribution[0, 1, 1])
        assert data["tokens"] == [["The", " cat"], ["When"]]

    def test_csv_keeps_commas_quotes_and_newlines(self, tmp_path):
        import csv

        result = by_hand(["embed"], [1.0], tokens=[["a", 'x,"\n']])
        result.to_csv(tmp_path / "r.csv")
        with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as file:
            (line,) = csv.DictReader(file)
        assert line["token"] == 'x,"\n'
        assert float(line["attribution"]) == 1.0
        assert line["head"] == ""
