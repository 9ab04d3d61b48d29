"""What plot() draws of results, promoted tokens and summaries: which numbers, and what it says."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch
from zoo import build, tiny_tokenizer

import dla_hooks
from dla_hooks import (
    ArgumentTypeError,
    DirectLogitAttribution,
    InputError,
    LabelError,
    Picture,
    PositionError,
    direct_logit_attribution,
    promoted_tokens,
    summarize,
)

PROMPT = "The cat sat on the mat"
BATCH = [PROMPT, "When Mary", "The cat sat"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def attribute(request):
    model, tokenizer = build(request.param, dtype=torch.float32), tiny_tokenizer()

    def call(input=PROMPT, answer=" Paris", incorrect=None, **kwargs):
        return direct_logit_attribution(
            model, input, answer, incorrect, tokenizer=tokenizer, **kwargs
        )

    call.model, call.tokenizer = model, tokenizer
    return call


def words(drawn: Picture) -> list[str]:
    root = ElementTree.fromstring(drawn.to_svg())
    return [one.text or "" for one in root.iter(SVG + "text")]


def heading(drawn: Picture) -> str:
    """Title and subtitle as one text; they alone are not monospaced."""
    root = ElementTree.fromstring(drawn.to_svg())
    return " ".join(
        one.text or "" for one in root.iter(SVG + "text") if "font-family" in one.attrib
    )


def errors(drawn: Picture) -> list[float]:
    """The errors that stand behind the numbers."""
    return [float(text.split("± ")[1]) for text in words(drawn) if re.search(r"± [\d.]+$", text)]


def near(numbers) -> dict[str, float]:
    return {name: pytest.approx(float(value), rel=1e-5) for name, value in numbers.items()}


class TestOneEntry:
    def test_components_are_bars_in_stream_order_with_bias_and_logit(self, attribute):
        result = attribute(incorrect=" Berlin")
        drawn = result.plot()
        assert [name for name, _ in drawn.values] == [*result.labels, "bias", "logit difference"]
        expected = dict(zip(result.labels, result.attribution[:, 0].tolist(), strict=True))
        expected |= {"bias": float(result.bias), "logit difference": float(result.logit)}
        assert dict(drawn.values) == near(expected)
        assert drawn.title == "Components: ' Paris' - ' Berlin'"
        assert f"at the last token of {PROMPT!r}" in heading(drawn)

    def test_heads_are_a_grid_of_layer_by_head_and_the_remainder_is_said(self, attribute):
        result = attribute(unit="head")
        drawn = dict(result.plot().values)
        grid = result.heads[:, :, 0]
        expected = {f"L{i}H{j}": grid[i, j] for i in range(len(grid)) for j in range(len(grid[0]))}
        assert drawn == near(expected)
        said = heading(result.plot()).replace("−", "-")
        assert f"what no head wrote (remainder): {float(result['remainder'][0]):+.3f}"[:-1] in said

    def test_layers_are_a_line(self, attribute):
        result = attribute(unit="layer")
        drawn = result.plot()
        assert dict(drawn.values) == near(dict(zip(result.labels, result.attribution, strict=True)))
        assert "sum up to here" in words(drawn)

    def test_layers_at_several_positions_are_a_lens(self, attribute):
        result = attribute(unit="layer", pos=None)
        drawn = result.plot()
        assert drawn.values == result.plot("lens").values
        n = result.attribution.shape[-1]
        names = [label for label, _ in drawn.values]
        assert names[0] == "logit · 0 'The'"
        assert names[-n].startswith(f"{result.labels[0]} · 0 ")  # layers from below
        assert [label.split(" · ")[0] for label in names[::n]] == ["logit", *result.labels[::-1]]
        numbers = torch.tensor([value for _, value in drawn.values]).reshape(-1, n)
        due = torch.cat((result.logit, result.attribution[:, 0].flip(0)))
        torch.testing.assert_close(numbers, due.to(numbers), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            ids = attribute.tokenizer(PROMPT, return_tensors="pt").input_ids
            logits = attribute.model(ids).logits[0].double()
        cap = result.softcap
        if cap:
            logits = cap * torch.atanh(logits / cap)
        answer = attribute.tokenizer.encode(" Paris")[-1]
        torch.testing.assert_close(numbers[0].double(), logits[:, answer], atol=1e-4, rtol=1e-4)

    def test_lens_of_what_has_no_layers_or_no_single_prompt_is_refused(self, attribute):
        with pytest.raises(InputError, match="kind='lens' draws running sums, and .* 'head'"):
            attribute(unit="head", pos=None).plot("lens")
        batch = attribute(BATCH, unit="layer", pos=None)
        with pytest.raises(InputError, match="kind='lens' draws positions of one prompt"):
            attribute(BATCH, unit="layer").plot("lens")
        chosen = batch.plot("lens", prompt=1)
        assert len(chosen.values) == 2 * (1 + len(batch.labels))
        one = attribute(unit="layer").plot("lens", pos=-1)
        due = attribute(unit="layer").attribution[:, 0].flip(0).tolist()
        assert [value for _, value in one.values][1:] == pytest.approx(due, rel=1e-5)

    @pytest.mark.parametrize(
        ("unit", "n_rows", "most"), [("component", 2, 200), ("layer", 120, 50)]
    )
    def test_last_positions_of_a_long_prompt_are_drawn_and_that_is_said(self, unit, n_rows, most):
        n = 210
        result = DirectLogitAttribution(
            torch.randn(n_rows, 1, n).cumsum(0), [f"{i}_pre" for i in range(n_rows)], unit,
            bias=torch.zeros(1, n), logit=torch.zeros(1, n), gap=0.0,
            positions=torch.arange(n)[None], tokens=[[" a"] * n], answer=[" b"],
        )  # fmt: skip
        drawn = result.plot()
        assert f"the last {most} of 210 positions; pos=… draws others" in heading(drawn)
        spots = {int(re.search(r"(\d+) '", label)[1]) for label, _ in drawn.values}
        assert spots == set(range(n - most, n))
        chosen = result.plot(pos=slice(0, 3))
        assert "pos=…" not in heading(chosen)
        assert {int(re.search(r"(\d+) '", label)[1]) for label, _ in chosen.values} == {0, 1, 2}

    def test_rows_are_the_strongest_and_the_others_one(self, attribute):
        result = attribute()
        values = result.attribution[:, 0]
        drawn = result.plot(rows=3)
        kept = values.abs().topk(3).indices.sort().values.tolist()
        n = len(result.labels) - 3
        names = [*(result.labels[i] for i in kept), f"{n} more", "bias", "logit"]
        assert [name for name, _ in drawn.values] == names
        others = values.sum() - values[kept].sum()
        assert dict(drawn.values)[f"{n} more"] == pytest.approx(float(others), rel=1e-4)

    def test_rows_by_label_stand_as_given(self, attribute):
        drawn = attribute().plot(rows=["1_mlp_out", "embed"])
        assert [name for name, _ in drawn.values][:2] == ["1_mlp_out", "embed"]

    def test_sort_by_size_puts_the_largest_first(self, attribute):
        values = [value for _, value in attribute().plot(sort="size").values[:-2]]
        assert values == sorted(values, reverse=True)

    def test_waterfall_ends_at_the_logit(self, attribute):
        result = attribute(unit="head")
        drawn = result.plot("waterfall")
        assert drawn.values[-1] == ("logit", pytest.approx(float(result.logit), rel=1e-4))
        assert {"remainder", "bias"} <= {name for name, _ in drawn.values}

    def test_title_and_size_are_those_given(self, attribute):
        drawn = attribute().plot(title="Mine", width=444, height=333)
        assert (drawn.title, drawn.width) == ("Mine", 444)


class TestPositions:
    def test_every_token_has_its_line(self, attribute):
        result = attribute(pos=None)
        drawn = result.plot()
        tokens = result.tokens[0]
        expected = {
            f"{t} {tokens[t]!r} · {label}": result.attribution[i, 0, t]
            for i, label in enumerate(result.labels)
            for t in range(len(tokens))
        }
        assert dict(drawn.values) == near(expected)
        assert f"at {len(tokens)} positions of" in heading(drawn)
        assert "mean" not in heading(drawn)
        for t in range(len(tokens)):  # and the logit beside it
            assert f"{float(result.logit[0, t]):+.2f}".replace("-", "−") in words(drawn)

    @pytest.mark.parametrize(
        ("pos", "places"), [(2, [2]), (-2, [-2]), ([0, -1], [0, -1]), (slice(1, 3), [1, 2])]
    )
    def test_positions_are_those_of_the_prompt(self, attribute, pos, places):
        result = attribute(pos=None)
        drawn = dict(result.plot("heatmap" if len(places) > 1 else None, pos=pos).values)
        row = result["0_mlp_out"][0]
        for place in places:
            token = place % len(result.tokens[0])
            name = f"{token} {result.tokens[0][token]!r} · 0_mlp_out"
            name = "0_mlp_out" if len(places) == 1 else name
            assert drawn[name] == pytest.approx(float(row[place]), rel=1e-5)

    def test_positions_of_padded_rows_are_their_own(self, attribute):
        result = attribute(BATCH, pos=None)
        drawn = dict(result.plot(pos=0, prompt=1, kind="bars").values)
        alone = attribute(BATCH[1], pos=0)
        assert drawn["embed"] == pytest.approx(float(alone["embed"]), abs=1e-4)

    @pytest.mark.parametrize("kind", ["bars", "waterfall"])
    def test_bars_are_of_the_last_position_and_say_so(self, attribute, kind):
        result = attribute(pos=(1, 3))
        drawn = result.plot(kind)
        value = float(result["embed"][0, -1])
        assert dict(drawn.values)["embed"] == pytest.approx(value, rel=1e-5)
        assert "at token 2 (' sat')" in heading(drawn)

    def test_mean_is_drawn_where_asked_for_with_its_deviation(self, attribute):
        result = attribute(pos=None)
        drawn = result.plot(pos="mean")
        row = result["0_mlp_out"][0].double()
        assert dict(drawn.values)["0_mlp_out"] == pytest.approx(float(row.mean()), rel=1e-5)
        assert any(each == pytest.approx(float(row.std()), rel=0.02) for each in errors(drawn))
        assert drawn.title.endswith("(mean over 6 positions)")
        assert "± standard deviation" in heading(drawn)

    @pytest.mark.parametrize("row", [None, "0_attn_out", "logit"])
    def test_strip_has_the_colours_of_one_row(self, attribute, row):
        result = attribute(pos=None)
        drawn = result.plot("strip", row=row)
        strongest = result.labels[int(result.attribution[:, 0].abs().amax(1).argmax())]
        name = row or strongest
        values = result.logit[0] if row == "logit" else result[name][0]
        assert [token for token, _ in drawn.values] == result.tokens[0]
        assert [value for _, value in drawn.values] == pytest.approx(values.tolist(), rel=1e-5)
        assert drawn.title == f"{name}: ' Paris'"

    def test_strip_of_some_positions_leaves_the_others_without_colour(self, attribute):
        result = attribute(pos=(1, 3))
        assert [token for token, _ in result.plot("strip").values] == result.tokens[0][1:3]

    def test_strip_of_sources_is_what_a_head_took_from_each_token(self):
        model, tokenizer = build("llama", dtype=torch.float32), tiny_tokenizer()
        result = direct_logit_attribution(
            model, PROMPT, " Paris", unit="source", tokenizer=tokenizer
        )
        drawn = result.plot("strip", row="L1H0")
        kept = {
            row.source: float(numbers)
            for row, numbers in result
            if row.label.startswith("L1H0<") and row.source is not None
        }
        assert [value for _, value in drawn.values] == pytest.approx(
            [kept[source] for source in sorted(kept)], rel=1e-5
        )
        with pytest.raises(LabelError, match="'L9H9'"):
            result.plot("strip", row="L9H9")


class TestBatches:
    def test_every_prompt_has_its_line(self, attribute):
        result = attribute(BATCH)
        drawn = dict(result.plot().values)
        for i, prompt in enumerate(BATCH):
            value = float(result["1_mlp_out"][i])
            assert drawn[f"{i} {prompt} · 1_mlp_out"] == pytest.approx(value, rel=1e-5)

    def test_lines_with_several_answers_say_them(self, attribute):
        result = attribute(BATCH, [" Paris", " mat", " cat"])
        drawn = result.plot()
        assert drawn.title == "Components: each its own answer"
        assert any(name.startswith(f"1 {BATCH[1]} → ' mat' · ") for name, _ in drawn.values)
        one = attribute(PROMPT, [" Paris", " mat"]).plot()
        assert {name.split(" · ")[0] for name, _ in one.values} == {"' Paris'", "' mat'"}

    def test_chosen_prompt_is_drawn_alone(self, attribute):
        result = attribute(BATCH, [" Paris", " mat", " cat"])
        drawn = result.plot(prompt=-1)
        assert dict(drawn.values)["embed"] == pytest.approx(float(result["embed"][2]), rel=1e-5)
        assert drawn.title == "Components: ' cat'"

    def test_chosen_answer_is_drawn_alone(self, attribute):
        result = attribute(PROMPT, [" Paris", " mat"])
        drawn = result.plot("bars", answer=" mat")
        assert dict(drawn.values)["embed"] == pytest.approx(float(result["embed"][1]), rel=1e-5)

    def test_mean_over_prompts_has_its_standard_error(self, attribute):
        result = attribute(BATCH)
        drawn = result.plot(prompt="mean")
        row = result["0_mlp_out"].double()
        assert dict(drawn.values)["0_mlp_out"] == pytest.approx(float(row.mean()), rel=1e-5)
        error = float(row.std() / 3**0.5)
        assert any(each == pytest.approx(error, rel=0.02) for each in errors(drawn))
        assert "(mean over 3 prompts)" in drawn.title
        assert "± standard error" in heading(drawn)

    def test_mean_over_positions_and_prompts_counts_each_prompt_once(self, attribute):
        result = attribute(BATCH, pos=None)
        drawn = dict(result.plot(pos="mean", prompt="mean").values)
        summary = summarize([result])
        expected = float(summary.mean[summary.labels.index("0_mlp_out")])
        assert drawn["0_mlp_out"] == pytest.approx(expected, rel=1e-5)
        assert drawn["logit"] == pytest.approx(summary.logit, rel=1e-5)
        said = heading(result.plot(pos="mean", prompt="mean")).replace("−", "-")
        found = re.search(r"= ([+-][\d.]+), the mean logit", said)
        assert found
        assert float(found[1]) == pytest.approx(summary.logit, rel=1e-3)

    def test_of_many_positions_of_many_prompts_the_first_prompt_is_drawn(self, attribute):
        drawn = attribute(BATCH, pos=None).plot()
        assert "prompt 0 of 3; prompt=… draws others" in heading(drawn)
        assert len({name.split(" · ")[0] for name, _ in drawn.values}) == 6


class TestRanked:
    @pytest.fixture
    def result(self):
        model, tokenizer = build("llama", dtype=torch.float32), tiny_tokenizer()
        unit = dla_hooks.Neurons(top=8)
        return direct_logit_attribution(
            model, PROMPT, " Paris", unit=unit, pos=None, tokenizer=tokenizer
        )

    def test_bars_are_the_kept_rows_the_others_and_the_whole(self, result):
        drawn = dict(result.plot(pos=2).values)
        kept = result.attribution[:, 0, 2].tolist()
        labels = [result.rows[i].label for i in result.index[:, 0, 2].tolist()]
        assert {label: drawn[label] for label in labels} == near(zip_dict(labels, kept))
        parts = sum(value for name, value in drawn.items() if name != "logit")
        assert parts == pytest.approx(drawn["logit"], abs=1e-4)

    def test_lines_leave_out_what_is_not_kept_there(self, result):
        drawn = result.plot(rows=1000)
        label = result.rows[int(result.index[0, 0, 0])].label
        for t, token in enumerate(result.tokens[0]):
            value = dict(drawn.values)[f"{t} {token!r} · {label}"]
            expected = float(result[label][0, t])
            assert value == pytest.approx(expected, rel=1e-5, nan_ok=True)

    def test_means_of_all_rows_are_drawn_where_they_are_known(self, result):
        label, value = result.top(1)[0]
        drawn = result.plot(pos="mean")
        assert dict(drawn.values)[label] == pytest.approx(value, rel=1e-4)
        assert "± " not in heading(drawn)
        result = result.prompt(0)
        result.prompt_means = None
        with pytest.raises(InputError, match="keeps the strongest rows of each entry"):
            result.plot(pos="mean")


def zip_dict(labels, values):
    return dict(zip(labels, values, strict=True))


class TestOthers:
    @pytest.fixture
    def summary(self):
        model, tokenizer = build("gpt2", dtype=torch.float32), tiny_tokenizer()
        return {
            unit: summarize(
                direct_logit_attribution(model, one, " Paris", unit=unit, tokenizer=tokenizer)
                for one in BATCH
            )
            for unit in ("component", "head", "layer")
        }

    @pytest.mark.parametrize("unit", ["component", "head", "layer"])
    def test_summary_draws_its_means_and_errors(self, summary, unit):
        one = summary[unit]
        drawn = one.plot()
        expected = zip_dict(one.labels, one.mean)
        expected.pop("remainder", None)
        found = {name: value for name, value in drawn.values if name in expected}
        assert found == near(expected)
        assert "mean over 3 prompts" in heading(drawn)
        if unit == "component":
            assert errors(drawn) == pytest.approx(one.standard_error.tolist(), abs=0.006)

    def test_summary_of_heads_has_bars_with_errors_too(self, summary):
        drawn = summary["head"].plot("bars", rows=4, sort="size")
        values = [value for _, value in drawn.values[:4]]
        assert values == sorted(values, reverse=True)
        assert sum("±" in text for text in words(drawn)) == 5  # the subtitle, and four bars
        assert [name for name, _ in drawn.values][-3:] == ["remainder", "bias", "mean logit"]

    def test_summary_of_nothing_is_refused(self, summary):
        with pytest.raises(InputError, match="nothing to draw"):
            dla_hooks.Summary.empty(2).plot()
        with pytest.raises(
            InputError, match="kind must be one of bars, line, heatmap; got 'strip'"
        ):
            summary["head"].plot("strip")

    def test_summary_has_html_with_errors(self, summary):
        page = summary["component"]._repr_html_()
        assert "mean of logits over 3 prompts" in page
        assert page.count(" ± ") == 2 * len(summary["component"].labels)
        assert "in stream order" in page

    def test_promoted_tokens_are_cells_in_the_colours_of_their_logits(self, attribute):
        result = promoted_tokens(attribute.model, PROMPT, tokenizer=attribute.tokenizer, k=3)
        drawn = result.plot(k=2)
        found = dict(drawn.values)
        for label in result.labels:
            for token, value in [*result.top(label, 2), *result.bottom(label, 2)]:
                assert found[f"{label} · {token!r}"] == pytest.approx(value, rel=1e-5)
        assert len(drawn.values) == 4 * len(result.labels)
        assert {"↑ 1", "↑ 2", "↓ 2", "↓ 1"} <= set(words(drawn))
        assert len(result.plot(rows=["embed"], k=1).values) == 2
        with pytest.raises(LabelError, match="'nonsense'"):
            result.plot(rows=["nonsense"])
        with pytest.raises(InputError, match="k must be"):
            result.plot(k=0)

    def test_promoted_tokens_of_a_prompt_and_a_position(self, attribute):
        result = promoted_tokens(
            attribute.model, BATCH[:2], tokenizer=attribute.tokenizer, k=2, pos=(0, 2)
        )
        drawn = dict(result.plot(prompt=1, position=0, k=1).values)
        token, value = result.prompt(1).position(0).top("embed", 1)[0]
        assert drawn[f"embed · {token!r}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("input", "answer", "given", "options", "error", "said"),
    [
        (PROMPT, " Paris", {}, {"kind": "pie"}, InputError, "kind must be one of bars, line"),
        (PROMPT, " Paris", {}, {"sort": "up"}, InputError, "'size' or 'stream', got 'up'"),
        (PROMPT, " Paris", {}, {"width": 3}, InputError, "width must be .* at least 50; got 3"),
        (PROMPT, " Paris", {}, {"height": "big"}, InputError, "height must be"),
        (PROMPT, " Paris", {}, {"rows": 0}, InputError, "at least 1, or labels; got 0"),
        (PROMPT, " Paris", {}, {"rows": True}, InputError, "rows must be"),
        (PROMPT, " Paris", {}, {"rows": "embed"}, InputError, "or a list of labels; got 'embed'"),
        (PROMPT, " Paris", {}, {"rows": ["emb"]}, LabelError, "near it are 'embed'"),
        (PROMPT, " Paris", {}, {"row": "embed"}, InputError, "kind='strip'"),
        (PROMPT, " Paris", {}, {"pos": 2}, PositionError, "pos=2 is none of .*: 5$"),
        (PROMPT, " Paris", {"pos": None}, {"pos": 9}, PositionError, "0 to 5"),
        (PROMPT, " Paris", {}, {"pos": "last"}, ArgumentTypeError, "or 'mean'; got 'last'"),
        (PROMPT, " Paris", {}, {"pos": 1.5}, ArgumentTypeError, "must be an int, got 1.5"),
        (PROMPT, " Paris", {}, {"prompt": 1}, PositionError, "the batch has 1 rows"),
        (PROMPT, " Paris", {}, {"prompt": "all"}, ArgumentTypeError, "or 'mean', got 'all'"),
        (PROMPT, " Paris", {}, {"answer": " x"}, InputError, r"the answers are \[' Paris'\]"),
        (PROMPT, [" Paris", " mat"], {}, {"kind": "bars"}, InputError, "draws one answer"),
        (PROMPT, [" Paris", " mat"], {}, {"kind": "strip"}, InputError, "draws one answer"),
        (BATCH, " Paris", {}, {"kind": "bars"}, InputError, "draws one prompt"),
        (BATCH, " Paris", {}, {"kind": "strip"}, InputError, "draws one prompt"),
        (BATCH, " Paris", {"pos": None}, {"prompt": "mean"}, InputError, "choose it with pos="),
        (PROMPT, " Paris", {}, {"kind": "strip", "row": "x"}, LabelError, "is called 'x'"),
        (
            PROMPT,
            " Paris",
            {},
            {"kind": "strip", "pos": "mean"},
            InputError,
            "leave pos='mean' out",
        ),
        (PROMPT, " Paris", {"unit": "layer"}, {"kind": "waterfall"}, InputError, "running sums"),
    ],
)
def test_what_cannot_be_drawn_is_refused(attribute, input, answer, given, options, error, said):
    with pytest.raises(error, match=said):
        attribute(input, answer, **given).plot(**options)


def test_a_result_without_tokens_is_drawn_without_them():
    ones = torch.ones(2, 3)
    result = DirectLogitAttribution(
        ones, ["a", "b"], "component", torch.zeros(3), torch.ones(3) * 2, 0.0
    )
    names = {name.split(" · ")[0] for name, _ in result.plot().values}
    assert names == {"entry 0", "entry 1", "entry 2"}
    with pytest.raises(InputError, match="does not say its positions"):
        result.plot(pos=0)
    with pytest.raises(InputError, match="does not say its tokens"):
        result.plot("strip")


def test_tokens_with_markup_are_shown_and_never_run():
    nasty = "<script>alert('&')</script>"
    result = DirectLogitAttribution(
        torch.ones(1, 1, 2), [nasty], "component", torch.zeros(1, 2), torch.ones(1, 2), 0.0,
        positions=torch.tensor([[0, 1]]), tokens=[[nasty, "\ud83d\x00"]], answer=[nasty],
        model=nasty,
    )  # fmt: skip
    for drawn in (result.plot(), result.plot("bars"), result.plot("strip")):
        assert "<script" not in drawn.to_html()
        assert any("<script>" in text for text in words(drawn))


def test_many_rows_are_the_strongest_few_unless_asked(attribute):
    result = attribute(pos=(0, 2), unit="head")
    assert len({name for name, _ in result.plot(rows=2).values}) == 4
    every = DirectLogitAttribution(
        torch.arange(400.0)[:, None], [f"row{i}" for i in range(400)], "component",
        torch.zeros(1), torch.tensor([79800.0]), 0.0,
    )  # fmt: skip
    drawn = dict(every.plot().values)
    assert len(drawn) == 33
    assert drawn["370 more"] == sum(range(370))


class TestTables:
    def test_html_opens_one_table_of_several(self, attribute):
        page = attribute(unit="head")._repr_html_()
        groups = re.findall(r'<details name="([^"]+)"( open)?>', page)
        assert [bool(opened) for _, opened in groups] == [True] + [False] * (len(groups) - 1)
        assert len({name for name, _ in groups}) == 1
        other = attribute(unit="head")._repr_html_()
        assert groups[0][0] not in other  # the same result shown twice has two switches

    def test_html_has_every_row_by_size_and_in_stream_order(self, attribute):
        result = attribute(unit="head")
        by_size, in_order = re.findall(r"<details.*?</details>", result._repr_html_())[:2]
        labels = [label for label in result.labels if label != "remainder"]
        assert re.findall(r">(L\dH\d)<", in_order) == labels
        assert sorted(re.findall(r">(L\dH\d)<", by_size)) == sorted(labels)
        assert "in stream order" in in_order

    def test_html_of_many_rows_has_all_of_them_behind_a_click(self):
        names = [f"L{i}H{j}" for i in range(12) for j in range(12)]
        values = torch.linspace(-1, 1, 144)[:, None]
        result = DirectLogitAttribution(values, names, "head", torch.zeros(1), values.sum(0), 0.0)
        tables = re.findall(r"<summary[^>]*>([^<]*)</summary>(.*?)</details>", result._repr_html_())
        counts = {name: len(set(re.findall(r">(L\d+H\d+)<", body))) for name, body in tables}
        assert counts == {"by size": 24, "by size, all 144": 144, "in stream order": 144}

    def test_batch_has_a_line_for_each_prompt_and_means_with_errors(self, attribute):
        result = attribute(BATCH)
        row = result["0_mlp_out"].double()
        said = f"{float(row.std() / 3**0.5):.8f}"
        for text in (repr(result), result._repr_html_()):
            found = re.search(r"0_mlp_out.*?[+-]\S+\s+± ([\d.]+)", text)
            assert found
            assert float(found[1]) == pytest.approx(float(said), abs=1e-3)
        for prompt in BATCH:
            assert f" {prompt}<" in result._repr_html_()

    @pytest.mark.parametrize("view", [repr, DirectLogitAttribution._repr_html_])
    def test_answers_of_their_own_are_shown_one_by_one(self, attribute, view):
        result = attribute(BATCH, [" Paris", " mat", " cat"])
        text = view(result).replace("&#x27;", "'").replace("&gt;", ">")
        assert "each its own answer, at the last token of each of 3 prompts" in text
        for i, answer in enumerate((" Paris", " mat", " cat")):
            best = result.labels[int(result.attribution[:, i].argmax())]
            logit = float(result.logit[i])
            line = re.search(rf"→ {answer!r}.*?([+-][\d.]+).*?↑ (\S+)", text)
            assert line
            assert float(line[1]) == pytest.approx(logit, abs=1e-2)
            assert line[2] == best
