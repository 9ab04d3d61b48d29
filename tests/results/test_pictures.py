"""Pictures of plain numbers, read back from their shapes and from the files."""

from __future__ import annotations

import math
import re
import struct
import sys
from xml.etree import ElementTree

import pytest

from dla_hooks import InputError, MissingExtraError, Picture
from dla_hooks.results import picture
from dla_hooks.results.picture.svg import DOWN, UP

LABELS = ["embed", "0_attn_out", "0_mlp_out", "1_attn_out"]
VALUES = [1.5, -0.25, 3.125, -2.0]
NASTY = ["<script>alert('&\"')</script>", "\x00\x1b\ud83d", "a\nb\tc", "]]>日本語", "\ufffe{}"]
SVG = "{http://www.w3.org/2000/svg}"


def shapes(drawn: Picture, tag: str) -> list[dict[str, str]]:
    root = ElementTree.fromstring(drawn.to_svg())
    return [dict(one.attrib, hover="".join(one.itertext())) for one in root.iter(SVG + tag)]


def marks(drawn: Picture, tag: str = "rect") -> list[tuple[str, float]]:
    """What the shapes say they stand for."""
    found = [one for one in shapes(drawn, tag) if "data-value" in one]
    return [(one["data-label"], float(one["data-value"])) for one in found]


def texts(drawn: Picture) -> list[str]:
    root = ElementTree.fromstring(drawn.to_svg())
    return [one.text or "" for one in root.iter(SVG + "text")]


def every(labels=LABELS, values=VALUES, **more) -> dict[str, Picture]:
    """One picture of each kind."""
    return {
        "bars": picture.bars(labels, values, **more),
        "waterfall": picture.waterfall(labels, values, **more),
        "line": picture.line(labels, values, **more),
        "strip": picture.strip(labels, values, **more),
        "heatmap": picture.heatmap(labels, labels, [values] * len(labels), **more),
    }


KINDS = list(every())


class TestNumbers:
    @pytest.mark.parametrize("kind", KINDS)
    def test_marks_hold_the_numbers(self, kind):
        drawn = every()[kind]
        pairs = list(zip(LABELS, VALUES, strict=True))
        if kind == "heatmap":
            pairs = [(f"{row} · {label}", value) for row in LABELS for label, value in pairs]
        if kind == "waterfall":
            pairs.append(("sum", sum(VALUES)))
        assert marks(drawn, "circle" if kind == "line" else "rect") == pairs
        assert drawn.values == pairs

    @pytest.mark.parametrize("kind", KINDS)
    def test_pointing_at_a_mark_shows_its_number_and_sign(self, kind):
        found = shapes(every()[kind], "circle" if kind == "line" else "rect")
        said = [one["hover"] for one in found if one.get("data-label", "").endswith("0_mlp_out")]
        assert all("+3.1" in one for one in said)
        negative = [one["hover"] for one in found if one.get("data-value") == "-2"]
        assert negative
        assert all("−2.0" in one for one in negative)

    def test_bars_are_as_long_as_their_values_on_their_side_of_zero(self):
        bars = [one for one in shapes(picture.bars(LABELS, VALUES), "rect") if "data-value" in one]
        unit = float(bars[0]["width"]) / VALUES[0]
        for bar, value in zip(bars, VALUES, strict=True):
            assert float(bar["width"]) == pytest.approx(abs(value) * unit, abs=0.02)
            assert bar["fill"] == (DOWN if value < 0 else UP)
        zero = float(bars[0]["x"])
        right = [float(bar["x"]) + float(bar["width"]) for bar in bars]
        assert right[1] == pytest.approx(zero, abs=0.02)
        assert float(bars[2]["x"]) == zero

    def test_waterfall_bars_begin_where_the_last_one_ends(self):
        found = shapes(picture.waterfall(LABELS, VALUES), "rect")
        *bars, total = [one for one in found if "data-value" in one]
        end = float(bars[0]["x"])
        for bar, value in zip(bars, VALUES, strict=True):
            ends = [float(bar["x"]), float(bar["x"]) + float(bar["width"])]
            start, end_ = ends if value > 0 else ends[::-1]
            assert start == pytest.approx(end, abs=0.05)
            end = end_
        assert float(total["x"]) + float(total["width"]) == pytest.approx(end, abs=0.05)

    def test_error_bars_reach_as_far_as_the_errors(self):
        drawn = picture.bars(["a", "b"], [2.0, -1.0], errors=[0.5, math.nan])
        bar = next(one for one in shapes(drawn, "rect") if one.get("data-label") == "a")
        unit = float(bar["width"]) / 2
        whiskers = [one for one in shapes(drawn, "line") if one.get("stroke-width") == "1.2"]
        level = [one for one in whiskers if one["y1"] == one["y2"]]
        assert len(level) == 1  # NaN has none
        assert float(level[0]["x2"]) - float(level[0]["x1"]) == pytest.approx(unit, abs=0.05)
        assert "+2.00 ± 0.50" in texts(drawn)

    def test_cells_are_the_deeper_the_larger_and_of_the_colour_of_their_sign(self):
        drawn = picture.heatmap(["a"], list("wxyz"), [[1.0, -2.0, 4.0, math.nan]])
        cells = [one for one in shapes(drawn, "rect") if "data-value" in one]
        assert [one["fill"] for one in cells] == [UP, DOWN, UP]  # and none for NaN
        depth = [float(one["fill-opacity"]) - 0.04 for one in cells]
        assert depth == pytest.approx([0.225, 0.45, 0.9], abs=0.01)

    def test_small_cells_below_zero_are_told_apart_without_colour(self):
        grid = [[(-1.0) ** (i + j) for j in range(40)] for i in range(40)]
        names = [str(i) for i in range(40)]
        drawn = picture.heatmap(names, names, grid, square=True)
        dashes = [one for one in shapes(drawn, "line") if "pointer-events" in one]
        assert len(dashes) == 800
        roomy = picture.heatmap(names[:3], names[:3], [row[:3] for row in grid[:3]], square=True)
        assert {"+1.00", "−1.00"} <= set(texts(roomy))

    def test_what_is_not_finite_has_no_bar_and_is_said(self):
        drawn = picture.bars(list("abcd"), [math.nan, math.inf, -math.inf, 1.0])
        widths = [float(one["width"]) for one in shapes(drawn, "rect") if "data-value" in one]
        assert widths[:3] == [0, 0, 0]
        assert {"n/a", "+∞", "−∞"} <= set(texts(drawn))

    @pytest.mark.parametrize("values", [[0.0] * 4, [1e-9] * 4, [-1e9] * 4, [math.nan] * 4])
    @pytest.mark.parametrize("kind", ["bars", "waterfall", "line", "strip", "heatmap"])
    def test_odd_values_are_drawn(self, kind, values):
        ElementTree.fromstring(every(values=values)[kind].to_svg())

    def test_holes_part_a_line(self):
        drawn = picture.line(list("abcde"), [1.0, 2.0, math.nan, 3.0, 4.0])
        assert len(shapes(drawn, "polyline")) == 2


class TestLayout:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("width", [None, 300, 1200])
    def test_nothing_is_drawn_outside(self, kind, width):
        labels = [f"{'long ' * 30}{i}" for i in range(30)]
        values = [math.sin(i) for i in range(30)]
        drawn = every(labels, values, title="title " * 40, subtitle=["sub " * 40], width=width)
        one = drawn[kind]
        assert one.width == (width or one.width)
        for rect in [*shapes(one, "rect"), *shapes(one, "text")]:
            if "%" not in rect.get("width", ""):
                x = float(rect["x"])
                assert -1 <= x <= one.width + 1
                assert x + float(rect.get("width", 0)) <= one.width + 1
                assert float(rect["y"]) <= one.height

    def test_two_hundred_tokens_stay_in_their_lines(self):
        tokens = [f" word{i}" for i in range(200)]
        drawn = picture.strip(tokens, [math.sin(i) for i in range(200)], chosen=3)
        assert len(marks(drawn)) == 200
        boxes = [one for one in shapes(drawn, "rect") if "data-value" in one]
        assert max(float(one["x"]) + float(one["width"]) for one in boxes) <= drawn.width
        assert len({one["y"] for one in boxes}) > 10
        assert [one["data-label"] for one in boxes if "stroke" in one] == [" word3"]

    def test_height_is_that_of_the_field(self):
        low, high = (picture.bars(LABELS, VALUES, height=height).height for height in (150, 400))
        assert high - low == pytest.approx(250, abs=1)

    def test_one_row_and_no_heading(self):
        drawn = picture.bars(["embed"], [-3.0])
        assert marks(drawn) == [("embed", -3.0)]


class TestSafety:
    @pytest.mark.parametrize("kind", KINDS)
    def test_text_is_shown_and_never_run(self, kind):
        labels = NASTY[:4]
        drawn = every(labels, VALUES, title=NASTY[0], subtitle=NASTY)[kind]
        for text in (drawn.to_svg(), drawn.to_html(), drawn._repr_html_()):
            text.encode("utf-8")
            assert "<script" not in text
        ElementTree.fromstring(drawn.to_svg())
        inside = re.search(r"<svg.*</svg>", drawn._repr_html_())
        assert inside
        ElementTree.fromstring(inside[0])
        assert any("<script>alert" in text for text in texts(drawn))

    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_is_loaded(self, kind):
        drawn = every(title="t", subtitle=["s"])[kind]
        for text in (drawn.to_svg(), drawn.to_html(), drawn._repr_html_()):
            bare = text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|src=|href=|url\(|@import|<script|<link|<iframe", bare)

    def test_page_forbids_everything_but_its_own_style(self):
        page = picture.bars(LABELS, VALUES, title="T").to_html()
        assert "default-src 'none'; style-src 'unsafe-inline'" in page
        assert '<meta name="color-scheme" content="light dark">' in page
        assert re.findall(r"<td>([^<]+)<td>([^<]+)", page)[1] == ("0_attn_out", "−0.250000")

    def test_pictures_stand_on_light_and_dark_pages(self):
        drawn = picture.bars(LABELS, VALUES)
        assert "prefers-color-scheme:dark" in drawn.to_svg()
        inline = drawn._repr_html_()
        assert 'fill="currentColor"' in inline
        assert "dla-paper" not in inline
        assert not re.search(r'fill="#(?!4393c3|d6604d)', inline)


class TestFiles:
    def test_html_and_svg_need_nothing(self, tmp_path, monkeypatch):
        for module in ("altair", "vl_convert", "cairosvg", "pandas"):
            monkeypatch.setitem(sys.modules, module, None)
        drawn = picture.bars(LABELS, VALUES)
        assert drawn.save(tmp_path / "p.html").read_text("utf-8") == drawn.to_html()
        assert drawn.save(str(tmp_path / "p.SVG")).read_text("utf-8") == drawn.to_svg()

    @pytest.fixture(params=["vl_convert", "cairosvg"])
    def drawer(self, request, monkeypatch):
        """One of the packages that draw, as if it were the only one."""
        pytest.importorskip(request.param)
        for module in {"vl_convert", "cairosvg"} - {request.param}:
            monkeypatch.setitem(sys.modules, module, None)

    @pytest.mark.usefixtures("drawer")
    @pytest.mark.parametrize("name", ["p.png", "p.PNG"])
    def test_png_has_twice_the_size(self, tmp_path, name):
        drawn = picture.bars(LABELS, VALUES)
        data = drawn.save(tmp_path / name).read_bytes()
        size = struct.unpack(">II", data[16:24])
        assert size == pytest.approx((2 * drawn.width, 2 * drawn.height), abs=2)

    @pytest.mark.usefixtures("drawer")
    def test_pdf_is_one_page_of_the_pictures_shape(self, tmp_path):
        drawn = picture.heatmap(["x"], LABELS, [VALUES], title="größer → ' <|unk|>'")
        data = drawn.save(tmp_path / "p.pdf").read_bytes()
        assert data.startswith(b"%PDF-")
        box = re.search(rb"/MediaBox ?\[ ?0 0 ([\d.]+) ([\d.]+) ?\]", data)
        width, height = map(float, box.groups())
        assert width / height == pytest.approx(drawn.width / drawn.height, rel=0.01)
        assert b"/Font" in data  # words are words, not outlines

    def test_program_draws_where_no_module_does(self, tmp_path, monkeypatch):
        for module in ("vl_convert", "cairosvg"):
            monkeypatch.setitem(sys.modules, module, None)
        program = tmp_path / "rsvg-convert"
        program.write_text('#!/bin/sh\necho "$@"; cat\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        drawn = picture.bars(LABELS, VALUES)
        said, content = drawn.save(tmp_path / "p.png").read_text("utf-8").split("\n", 1)
        assert said == "--format=png --zoom=2"
        assert content.startswith("<svg")
        program.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
        with pytest.raises(InputError, match="cannot draw the picture: broken"):
            drawn.save(tmp_path / "p.pdf")

    @pytest.mark.parametrize("name", ["p.png", "p.pdf"])
    def test_missing_packages_are_named_by_a_command_that_works(self, tmp_path, monkeypatch, name):
        for module in ("vl_convert", "cairosvg"):
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingExtraError, match="pip install .*'vl-convert-python>=1.7'"):
            picture.bars(LABELS, VALUES).save(tmp_path / name)

    @pytest.mark.parametrize("name", ["p.gif", "p", "p.svgz"])
    def test_any_other_suffix_is_refused(self, tmp_path, name):
        with pytest.raises(InputError, match=r"\.html, \.svg, \.png, \.pdf.*got "):
            picture.bars(LABELS, VALUES).save(tmp_path / name)

    @pytest.mark.parametrize("name", ["p.svg", "p.png"])
    def test_a_folder_that_is_not_there_is_an_input_error(self, tmp_path, name):
        with pytest.raises(InputError, match=r"cannot write .*No such file"):
            picture.bars(LABELS, VALUES).save(tmp_path / "nowhere" / name)

    def test_what_is_no_path_is_refused(self):
        with pytest.raises(InputError, match="path must be"):
            picture.bars(LABELS, VALUES).save(5)


def test_methods_of_altair_charts_are_said_to_be_elsewhere():
    drawn = picture.bars(LABELS, VALUES)
    with pytest.raises(AttributeError, match=r"'to_dict'; result\.to_altair\(\) gives"):
        drawn.to_dict()
    assert not hasattr(drawn, "_repr_javascript_")
    assert repr(drawn).endswith(".save(path) writes html, svg, png or pdf>")
