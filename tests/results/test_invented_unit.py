"""A unit that no view has heard of: its rows and words are all that a view needs."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import torch

import dla_hooks
from dla_hooks import DirectLogitAttribution, InputError, Summary, summarize
from dla_hooks.results.chart import save_plot
from dla_hooks.results.rows import Row, Words

WORDS = Words(
    name="toy",
    title="Toys",
    sentence="toys: what each thing wrote",
    index="thing",
    chart="heatmap",
    remainder="leftover",
    remainder_is="what no thing wrote",
)
ROWS = [
    Row("2~0", "thing", 2, 0, 0),
    Row("2~1", "thing", 2, 0, 1),
    Row("2.1~0", "thing", 2, 1, 0),
    Row("3~0", "thing", 3, 0, 0),
    Row("paint", "paint", 3),
    Row("leftover", "leftover"),
]
VALUES = [1.0, -2.0, 0.5, 3.0, 0.25, 40.0]


def toys(words=WORDS, rows=ROWS, values=VALUES):
    attribution = torch.tensor(values)[:, None]
    bias = torch.tensor([0.5])
    total = attribution[-1] if words.cumulative else attribution.sum(0)
    return DirectLogitAttribution(
        attribution=attribution,
        labels=[row.label for row in rows],
        unit=words.name,
        bias=bias,
        logit=total + bias,
        gap=1e-7,
        positions=torch.tensor([1]),
        tokens=[["The", " cat"]],
        answer=[" Paris"],
        model="M (m)",
        rows=rows,
        words=words,
    )


def test_text_ranks_the_rows_and_sets_the_remainder_apart():
    head, sentence, *table, end, _ = repr(toys()).splitlines()
    assert head.startswith("' Paris' at the last token")
    assert sentence == "toys: what each thing wrote"
    assert [line.split()[0] for line in table] == [
        *("3~0", "2~0", "2.1~0", "paint", "2~1"),
        "leftover",
    ]
    assert table[-1].endswith("(what no thing wrote)")
    assert end == "sum +42.75  + bias +0.50  = +43.25, the logit"


def test_html_has_the_unit_s_sentence_and_remainder():
    page = toys()._repr_html_()
    assert "toys: what each thing wrote" in page
    assert "what no thing wrote" in page


def test_heatmap_has_a_square_per_numbered_row_and_says_what_has_none(tmp_path):
    chart = toys().to_altair()
    spec = chart.to_dict()
    cells = next(iter(spec["datasets"].values()))
    squares = {(cell["layer"], cell["index"]): cell["value"] for cell in cells}
    assert squares == {("2", 0): 1.0, ("2", 1): -2.0, ("2.1", 0): 0.5, ("3", 0): 3.0}
    assert spec["title"]["text"] == "Toys: ' Paris'"
    assert spec["title"]["subtitle"][-2:] == [
        "1 more row without a square, together +0.25",
        "what no thing wrote (leftover): +40.00",
    ]
    page = save_plot(chart, tmp_path / "p.svg").read_text(encoding="utf-8")
    found = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert {"thing", "layer", "2.1"} <= set(found)
    assert found.index("2") < found.index("2.1") < found.index("3")


def test_heatmap_keeps_kinds_of_one_layer_and_number_apart():
    rows = [Row("L0H0", "head", 0, 0, 0), Row("L0X0", "cross", 0, 0, 0)]
    spec = toys(rows=rows, values=[1.0, 2.0]).to_altair().to_dict()
    cells = next(iter(spec["datasets"].values()))
    assert [cell["layer"] for cell in cells] == ["0 head", "0 cross"]


@pytest.mark.parametrize("chart", ["bars", "line"])
def test_other_charts_show_every_row(chart, tmp_path):
    words = Words("toy", "Toys", "toys", chart=chart, cumulative=chart == "line")
    drawn = toys(words=words).to_altair()
    assert {row.label for row in ROWS} <= set(re.findall(r"[\w.~]+", drawn.to_json()))
    assert save_plot(drawn, tmp_path / "p.png").stat().st_size > 1000


def test_heatmap_without_any_number_is_drawn_as_bars():
    rows = [Row("a", "a"), Row("b", "b")]
    cells = next(
        iter(toys(rows=rows, values=[1.0, 2.0]).to_altair().to_dict()["datasets"].values())
    )
    assert [cell["label"] for cell in cells] == ["a", "b", "bias", "logit"]


def test_a_kind_of_chart_that_is_none_is_refused():
    with pytest.raises(InputError, match="'pie', which is none of bars, line, heatmap"):
        toys(words=Words("toy", "Toys", "toys", chart="pie")).plot()


def test_running_sums_stay_in_order_and_end_with_the_whole():
    words = Words("toy", "Toys", "toys", cumulative=True)
    result = toys(words=words)
    assert torch.equal(result.total(), result.attribution[-1])
    text = repr(result)
    shown = [line.split()[0] for line in text.splitlines()[2:-2]]
    assert shown == result.labels
    assert "last entry +40.00  + bias" in text


def test_records_name_the_column_by_the_unit_s_word():
    line = toys().records()[2]
    assert list(line) == [
        *("label", "kind", "layer", "sub", "thing"),
        *("row", "position", "token", "answer", "incorrect", "attribution"),
    ]
    assert list(line.values()) == ["2.1~0", "thing", 2, 1, 0, 0, 1, " cat", " Paris", None, 0.5]


def test_csv_json_and_data_frame_hold_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    result = toys()
    lines = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [line["thing"] for line in lines] == ["0", "1", "0", "0", "", ""]
    frame = result.to_dataframe()
    assert list(frame.columns) == list(lines[0])
    assert frame["attribution"].tolist() == VALUES
    assert isinstance(frame, pandas.DataFrame)
    data = json.loads(result.to_json())
    assert data["words"]["index"] == "thing"
    assert data["rows"]["sub"] == [0, 0, 1, 0, None, None]
    assert data["labels"] == result.labels


def test_a_saved_result_comes_back_with_rows_and_words(tmp_path):
    result = toys()
    loaded = dla_hooks.load(result.save(tmp_path / "toy.safetensors"))
    assert (loaded.rows, loaded.words) == (ROWS, WORDS)
    assert repr(loaded) == repr(result)
    assert loaded.records() == result.records()
    assert loaded.to_json() == result.to_json()


def test_a_summary_keeps_rows_and_words(tmp_path):
    summary = summarize([toys(), toys()])
    text = repr(summary)
    assert "toys: what each thing wrote (± standard error)" in text
    assert "(what no thing wrote)" in text
    assert summary.records()[2]["thing"] == 0
    loaded = dla_hooks.load(summary.save(tmp_path / "toy.safetensors"))
    assert isinstance(loaded, Summary)
    assert (loaded.rows, loaded.words) == (ROWS, WORDS)
    assert repr(loaded.merge(summary)).splitlines()[0].startswith("mean of logits over 4 prompts")


def test_command_line_view_shows_the_unit_s_words():
    from rich.console import Console

    from dla_hooks.cli.views import attribution

    console = Console(width=100, file=io.StringIO())
    console.print(attribution(toys(), 2))
    text = console.file.getvalue()
    assert "M (m) · toys: what each thing wrote" in text
    assert re.findall(r"^(\S+) +[+-]\d", text, re.MULTILINE)[:5] == [
        *("3~0", "2~0", "paint", "2~1"),
        "leftover",
    ]


@pytest.mark.parametrize("rows", [ROWS[:-1], [*ROWS[1:], ROWS[0]]])
def test_rows_that_are_not_those_of_the_labels_are_refused(rows):
    result = toys()
    with pytest.raises(InputError, match=r"rows and|stands at the label"):
        DirectLogitAttribution(
            result.attribution, result.labels, "toy", result.bias, result.logit, 0.0, rows=rows
        )
