"""What can be done with a result; its looks are tested in test_report.py and test_plots.py."""

from __future__ import annotations

import dataclasses
import json
from math import inf, nan

import pytest
import torch
from safetensors.torch import load_file, save_file
from units import UNIT_NAMES
from zoo import build, example_ids

from dla_hooks import (
    CheckpointError,
    DirectLogitAttribution,
    InputError,
    Summary,
    direct_logit_attribution,
    load,
    prepare,
    summarize,
)
from dla_hooks.results.chart import save_plot
from dla_hooks.results.rows import Row

IDS = example_ids("gpt2")


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


def made(attribution: torch.Tensor) -> DirectLogitAttribution:
    rest = torch.zeros(attribution.shape[1:])
    labels = [f"row{i}" for i in range(len(attribution))]
    return DirectLogitAttribution(attribution, labels, "component", rest, rest, 0.0)


def test_top_and_bottom_rank_by_signed_mean():
    result = made(torch.tensor([[1.0, 3.0], [-5.0, -7.0], [0.0, 1.0], [float("nan"), 2.5]]))
    assert result.top(2) == [("row3", 2.5), ("row0", 2.0)]
    assert result.bottom(2) == [("row1", -6.0), ("row2", 0.5)]
    assert [label for label, _ in result.top(99)] == ["row3", "row0", "row2", "row1"]
    assert len(result.top()) == 4
    assert result.top(0) == []
    with pytest.raises(InputError, match="negative, got -1"):
        result.top(-1)


def test_top_of_one_entry_per_row():
    assert made(torch.tensor([1.0, 2.0])).top(1) == [("row1", 2.0)]


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_a_saved_result_comes_back_whole(model, tmp_path, unit):
    mask = torch.ones_like(IDS)
    mask[0, 0] = 0
    result = direct_logit_attribution(
        model.float(), IDS, 5, 7, unit=unit, pos=None, attention_mask=mask
    )
    model.double()
    path = result.save(tmp_path / "result.safetensors")
    loaded = DirectLogitAttribution.load(path)
    for name, value in vars(result).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(loaded, name), value, equal_nan=True, msg=name)
        else:
            assert getattr(loaded, name) == value, name
    assert repr(loaded) == repr(result)


def test_the_file_is_plain_safetensors_with_json(model, tmp_path):
    from safetensors import safe_open

    path = direct_logit_attribution(model, IDS, 5).save(tmp_path / "r.safetensors")
    seen = {f"seen.{name}" for name in ("log_probability", "rank", "top_ids", "top_probability")}
    assert set(load_file(path)) == {"attribution", "bias", "logit", "positions"} | seen
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["version"] == "3"
    assert json.loads(header["result"])["unit"] == "component"


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        DirectLogitAttribution.load(tmp_path / "missing.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        DirectLogitAttribution.load(tmp_path / "torn.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no saved attribution"):
        DirectLogitAttribution.load(tmp_path / "other.safetensors")
    header = {"format": "dla_hooks.result", "version": "4", "result": "{}"}
    save_file({"x": torch.zeros(1)}, tmp_path / "newer.safetensors", metadata=header)
    with pytest.raises(InputError, match="newer dla_hooks"):
        DirectLogitAttribution.load(tmp_path / "newer.safetensors")


OLD = {
    "unit": "head",
    "labels": ["L0H0", "L0.1H2", "remainder"],
    "gap": 0.0,
    "logit_gap": float("nan"),
    "tokens": [["The", " cat"]],
    "answer": [" Paris"],
    "incorrect": None,
    "model": "M (m)",
    "softcap": None,
}


def old_file(path, version="1", rest=OLD):
    """A file as format 1 wrote it, before results carried rows and words."""
    numbers = {
        "attribution": torch.tensor([[1.0], [2.0], [4.0]]),
        "bias": torch.zeros(1),
        "logit": torch.tensor([7.0]),
        "positions": torch.tensor([1]),
    }
    header = {"format": "dla_hooks.result", "version": version, "result": json.dumps(rest)}
    save_file(numbers, path, metadata=header)
    return path


def test_a_file_of_format_1_is_read_with_rows_and_words(tmp_path):
    result = load(old_file(tmp_path / "r.safetensors"))
    assert result.rows == [
        Row("L0H0", "head", 0, 0, 0),
        Row("L0.1H2", "head", 0, 1, 2),
        Row("remainder", "remainder"),
    ]
    assert result.words.index == "head"
    assert "(what no head wrote)" in repr(result)
    assert [line["sub"] for line in result.records()] == [0, 1, None]
    again = load(result.save(tmp_path / "again.safetensors"))
    assert repr(again) == repr(result)
    assert again.rows == result.rows


def test_a_unit_that_no_table_knows_stands_for_itself(tmp_path):
    result = load(old_file(tmp_path / "r.safetensors", rest={**OLD, "unit": "mine"}))
    assert repr(result).splitlines()[1] == "mine"
    assert list(result.records()[0])[:5] == ["label", "kind", "layer", "sub", "head"]
    assert result.to_altair().to_dict()["title"]["text"] == "mine: ' Paris'"


@pytest.mark.parametrize("version", ["²", "", "one", "-1", "1.0", "9" * 5000])
def test_a_version_that_is_no_number_is_an_error_of_the_file(tmp_path, version):
    path = old_file(tmp_path / "r.safetensors", version=version)
    with pytest.raises(CheckpointError, match=r"damaged: its version is no number"):
        load(path)


@pytest.mark.parametrize(
    "rest",
    [
        {**OLD, "labels": ["L0H0"]},
        {**OLD, "labels": 5},
        {**OLD, "unit": ["head"]},
        {**OLD, "rows": {"kind": ["head"]}},
        {**OLD, "rows": [1, 2, 3]},
        {**OLD, "rows": {"colour": [1, 2, 3]}},
        {**OLD, "words": {"name": "head"}},
        {**OLD, "words": 5},
        [OLD],
        5,
    ],
)
def test_a_damaged_file_is_an_error_of_the_file(tmp_path, rest):
    with pytest.raises(CheckpointError, match=r"r\.safetensors is damaged: \w+Error"):
        load(old_file(tmp_path / "r.safetensors", version="2", rest=rest))


@pytest.mark.parametrize("path", [None, "", 5, b"r", ["r"], True])
def test_what_is_no_path_is_refused_and_writes_nothing(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    result = made(torch.ones(1, 1))
    actions = [result.save, DirectLogitAttribution.load, load, summarize([result]).save]
    if path is not None:  # which asks for the text
        actions += [result.to_json, result.to_csv]
    for action in actions:
        with pytest.raises(InputError, match="a string or a Path; got"):
            action(path)
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_file_is_read_by_load_and_no_other(model, tmp_path):
    result = direct_logit_attribution(model, IDS, 5)
    one = result.save(tmp_path / "one.safetensors")
    many = summarize([result]).save(tmp_path / "many.safetensors")
    assert type(load(one)) is DirectLogitAttribution
    assert type(load(str(many))) is Summary
    with pytest.raises(InputError, match=r"no saved attribution \(it is a saved summary, which"):
        DirectLogitAttribution.load(many)
    with pytest.raises(InputError, match=r"no saved summary \(it is a saved attribution, which"):
        Summary.load(one)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no saved attribution or .*saved summary"):
        load(tmp_path / "other.safetensors")


def test_tensors_that_share_memory_or_have_a_gradient_are_saved(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3).requires_grad_()
    rest = torch.zeros(2)
    result = DirectLogitAttribution(whole.T, ["a", "b", "c"], "component", rest, rest, 0.0)
    loaded = load(result.save(tmp_path / "r.safetensors"))
    assert torch.equal(loaded.attribution, whole.T)


def test_json_and_csv_are_given_as_text_or_written(model, tmp_path):
    result = direct_logit_attribution(model, IDS, 5)
    for text, name in ((result.to_json, "r.json"), (result.to_csv, "r.csv")):
        path = text(tmp_path / name)
        assert path == tmp_path / name
        assert path.read_bytes().decode("utf-8") == text()
        with pytest.raises(InputError, match=r"cannot write .*nowhere"):
            text(tmp_path / "nowhere" / name)
    assert json.loads(result.to_json())["unit"] == "component"
    header = result.to_csv().splitlines()[0]
    assert header == "label,kind,layer,sub,head,row,position,token,answer,incorrect,attribution"


def test_half_a_surrogate_pair_breaks_no_view(tmp_path):
    half = "\ud83d"
    result = DirectLogitAttribution(
        torch.ones(2, 1),
        ["embed", half],
        "component",
        torch.zeros(1),
        torch.full((1,), 2.0),
        0.0,
        positions=torch.zeros(1, dtype=torch.long),
        tokens=[[half]],
        answer=[half],
        incorrect=[half],
        model=half,
    )
    for text in (repr(result), result._repr_html_(), repr(summarize([result]))):
        text.encode("utf-8")
        assert "\\ud83d" in text
    data = json.loads(result.to_json(tmp_path / "r.json").read_text("utf-8"))
    assert (data["tokens"], data["labels"]) == ([[half]], ["embed", half])
    assert "\\ud83d" in result.to_csv(tmp_path / "r.csv").read_text("utf-8")
    loaded = load(result.save(tmp_path / "r.safetensors"))
    assert (loaded.tokens, loaded.answer, loaded.labels) == ([[half]], [half], result.labels)
    save_plot(result.to_altair(), tmp_path / "r.svg")
    frame = result.to_dataframe()
    assert frame["attribution"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("values", [[inf, 1.0], [-inf, inf], [nan, 2.0], [nan, nan], [-inf, -inf]])
def test_what_is_not_finite_breaks_no_view(tmp_path, unit, values):
    labels = ["L0H0", "L0H1"]
    numbers = torch.tensor(values)[:, None]
    result = DirectLogitAttribution(
        numbers, labels, unit, torch.zeros(1), numbers.sum(0), 0.0, tokens=[["a"]],
        positions=torch.zeros(1, dtype=torch.long),
    )  # fmt: skip
    for text in (repr(result), result._repr_html_(), repr(summarize([result, result]))):
        assert all(label in text for label in labels)
    assert len(result.records()) == 2
    json.loads(result.to_json(), parse_constant=pytest.fail)
    loaded = load(result.save(tmp_path / "r.safetensors"))
    torch.testing.assert_close(loaded.attribution, numbers, equal_nan=True)
    if numbers.isfinite().any():
        json.loads(json.dumps(result.to_altair().to_dict()), parse_constant=pytest.fail)
        save_plot(result.to_altair(), tmp_path / "r.svg")
    else:
        with pytest.raises(InputError, match="nothing is finite"):
            result.plot()


@pytest.mark.parametrize("unit", UNIT_NAMES)
@pytest.mark.parametrize("located", [True, False])
def test_a_result_without_rows_breaks_no_view(tmp_path, unit, located):
    result = DirectLogitAttribution(torch.zeros(0, 2), [], unit, torch.ones(2), torch.ones(2), 0.0)
    if located:
        result.tokens, result.positions = [["a", "b"]], torch.tensor([0, 1])
    assert repr(result).endswith("\nthere is no row")
    assert "there is no row" in result._repr_html_()
    assert (result.top(), result.records(), list(result)) == ([], [], [])
    assert result.total().tolist() == [0.0, 0.0]
    assert result.mean().shape == (0,)
    assert result.to_csv().count("\n") == 1
    assert len(result.to_dataframe()) == 0
    assert json.loads(result.to_json())["attribution"] == []
    assert repr(load(result.save(tmp_path / "r.safetensors"))) == repr(result)
    summary = summarize([result])
    assert (summary.n, summary.logit) == (1, 1.0)
    assert "sum +0.000" in repr(summary) or "last entry +0.000" in repr(summary)
    with pytest.raises(InputError, match="nothing to draw"):
        result.plot()


def test_total_and_bias_are_the_logit(model):
    for unit in UNIT_NAMES:
        result = direct_logit_attribution(model, IDS, 5, unit=unit, pos=None)
        torch.testing.assert_close(result.total() + result.bias, result.logit, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("unit", ["component", "head", "neuron"])
def test_tensors_of_one_result_are_not_those_of_the_next(model, unit, prepared):
    ids = torch.tensor([[5, 6, 7, 8]])
    plan = prepare(model, 3, 4, unit=unit)
    ask = plan if prepared else lambda ids: direct_logit_attribution(model, ids, 3, 4, unit=unit)
    first, again = ask(ids), ask(ids)
    for one in dataclasses.fields(first):
        value = getattr(first, one.name)
        if isinstance(value, torch.Tensor):
            value.fill_(1) if value.dtype == torch.bool else value.sub_(99)
        if isinstance(value, list):
            value.clear()
    for later in (again, ask(ids)):
        assert later.positions.tolist() == [3]
        assert len(later.rows) > 0
        total = later.attribution.sum(0) + later.bias
        if unit == "neuron":
            total = total + later.rest + later.remainder
        torch.testing.assert_close(total, later.logit, rtol=0, atol=1e-6)


def test_a_dataframe_has_a_line_per_real_entry(model):
    pandas = pytest.importorskip("pandas")
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    result = direct_logit_attribution(
        model.float(), IDS, 5, unit="head", pos=None, attention_mask=mask
    )
    model.double()
    frame = result.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(result.labels) * int(mask.sum())
    line = frame[(frame.label == "L1H2") & (frame.row == 1) & (frame.position == 3)]
    row = result.labels.index("L1H2")
    assert line.attribution.item() == pytest.approx(float(result.attribution[row, 1, 3]))
    assert (line["layer"].item(), line["head"].item()) == (1, 2)
    assert frame.attribution.notna().all()
