"""The page in a real browser, opened from disk: what is clicked, typed, hovered and saved."""

from __future__ import annotations

import csv
import json
import struct

import pytest
import torch

import dla_hooks

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def small(browser, tmp_path_factory):
    model, tokenizer = dla_hooks.demo.load()
    path = tmp_path_factory.mktemp("small") / "page.html"
    prompts = ["The keys near the cabinet", "The dogs near the car"]
    report = dla_hooks.report(model, prompts, " are", " is", tokenizer=tokenizer, path=path)
    return path, report.data()


@pytest.fixture
def page(browser, small):
    browser.open(small[0])
    yield browser
    assert browser.complaints() == []
    assert browser.requests() == []


def heads(small):
    return next(one for one in small[1]["pages"][0]["units"] if one["key"] == "head")


def strongest(small, entry):
    values = heads(small)["values"]
    labels = heads(small)["rows"]["label"]
    real = [i for i, label in enumerate(labels) if label != "remainder"]
    return labels[max(real, key=lambda i: abs(values[i][entry]))]


def hash_of(browser):
    from urllib.parse import parse_qsl

    return dict(parse_qsl(browser.run("return location.hash.slice(1)")))


def test_page_opens_with_the_strongest_head_at_the_last_token(page, small):
    label = strongest(small, 4)
    assert page.text("#card .name") == label
    value = heads(small)["values"][heads(small)["rows"]["label"].index(label)][4]
    assert f"{value:+.3f}" in page.text("#card .facts")
    assert page.text("#tokens .chosen").strip() == "cabinet"
    assert page.run("return document.querySelectorAll('#waterfall .bar').length") == 12
    page.click("#token-4")
    assert hash_of(page) == {"pos": "4", "unit": "head", "row": label, "tab": "head", "page": "0"}


def test_click_on_a_token_moves_every_panel(page, small):
    before = page.text(".head .facts")
    page.click("#token-1")
    assert hash_of(page)["pos"] == "1"
    assert page.text(".head .facts") != before
    assert "at position 1" in page.text("#heads .what")
    logit = small[1]["pages"][0]["logit"][1]
    assert f"{logit:+.3f}" in page.text(".head .facts")


def test_click_on_a_head_shows_its_card_and_its_row(page):
    page.cell(0, 2, click=True)
    assert page.text("#card .name") == "L0H2"
    assert (
        page.run(
            "return document.querySelector('#table [aria-selected=true][data-row]').dataset.row"
        )
        == "L0H2"
    )
    assert hash_of(page)["row"] == "L0H2"


def test_card_lists_tokens_read_and_promoted(page, small):
    assert "Tokens it reads" in page.text("#card")
    assert "keys" in page.text("#card .list")
    assert "Promotes" in page.text("#card .two")
    page.click("#token-2")
    assert "Listed at position 4" in page.text("#card")
    page.click("#card .link")
    assert hash_of(page)["pos"] == "4"


def test_click_on_a_component_chooses_it(page):
    page.click("#waterfall .bar[data-mark='3']")
    assert page.text("#card .name") == "0_mlp_out"
    assert page.run("return document.querySelectorAll('#waterfall .ring').length") == 1


def test_arrow_keys_move_positions_rows_and_grid_cells(page, small):
    from selenium.webdriver.common.keys import Keys

    page.press(Keys.ARROW_LEFT)
    assert hash_of(page)["pos"] == "3"
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert hash_of(page)["pos"] == "4"
    first = page.text("#card .name")
    page.press(Keys.ARROW_DOWN)
    assert page.text("#card .name") != first
    page.press(Keys.ESCAPE)
    assert page.text("#card .name") == first
    page.cell(0, 0, click=True)
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, selector="#heads .canvas")
    assert page.text("#card .name") == "L1H1"
    page.press(Keys.ARROW_DOWN, selector="#table tr[aria-selected=true]")
    assert page.text("#card .name") != "L1H1"
    assert page.text("[role=status].sr").startswith(page.text("#card .name"))


def test_keys_turn_pages_and_find_the_search(page):
    page.press("n")
    assert hash_of(page)["page"] == "1"
    assert "dogs" in page.text("#tokens .strip")
    page.press("p")
    assert "keys" in page.text("#tokens .strip")
    page.press("/")
    assert page.run("return document.activeElement.id") == "search"
    page.press("L2")
    rows = page.run(
        "return [...document.querySelectorAll('#table [data-row]')].map(one => one.dataset.row)"
    )
    assert rows
    assert all("L2" in row for row in rows)
    assert hash_of(page)["page"] == "0"


def test_hover_shows_numbers(page, small):
    page.hover("#token-1")
    assert not page.run("return document.querySelector('.tip').hidden")
    assert "keys" in page.text(".tip b")
    page.cell(0, 0)
    assert page.text(".tip b") == "L0H0"
    value = heads(small)["values"][0][4]
    assert f"{abs(value):.3f}"[:4] in page.text(".tip dl")
    page.hover("#waterfall .bar:nth-of-type(3)")
    assert "sum up to here" in page.text(".tip dl")


def test_table_sorts_filters_and_keeps_the_rest(page, small):
    page.run(
        "[...document.querySelectorAll('#table [role=tab]')]"
        ".find(one => one.textContent === 'Neurons').click()"
    )
    page.frame()
    foot = page.text("#table tfoot")
    assert "rest" in foot
    assert "remainder" in foot
    page.run("document.querySelector('#table [data-sort=value]').click()")
    values = (
        "[...document.querySelectorAll('#table tbody td.up, #table tbody td.down')]"
        ".map(one => Number(one.textContent.replace('−', '-')))"
    )
    shown = page.run(f"return {values}")
    assert shown == sorted(shown, reverse=True)
    page.run("[...document.querySelectorAll('#table .choice button')][2].click()")
    shown = page.run(f"return {values}")
    assert shown
    assert all(value < 0 for value in shown)
    assert (
        page.run("return document.querySelector('#table th[aria-sort]').getAttribute('aria-sort')")
        == "descending"
    )


def test_strip_shows_what_a_head_reads(page):
    before = page.run("return document.querySelector('#token-4').style.background")
    page.run("[...document.querySelectorAll('#tokens .choice button')][1].click()")
    page.frame()
    assert page.run("return document.querySelector('#token-4').style.background") != before
    assert hash_of(page)["strip"] == "reads"
    page.hover("#token-1")
    assert "attention" in page.text(".tip")


def test_address_chooses_and_links_are_followed(browser, small):
    browser.open(small[0], "#page=1&pos=2&unit=component&row=embed&tab=neuron")
    assert browser.text("#card .name") == "embed"
    assert hash_of(browser) == {
        "page": "1",
        "pos": "2",
        "unit": "component",
        "row": "embed",
        "tab": "neuron",
    }
    browser.run("location.hash = '#pos=0&unit=head&row=L1H2'")
    browser.wait("document.querySelector('#card .name').textContent === 'L1H2'")
    browser.frame()
    assert hash_of(browser)["page"] == "0"
    browser.open(small[0], "#page=99&pos=x&unit=<b>&row=%00")
    assert browser.text("#card .name") == strongest(small, 4)
    assert browser.complaints() == []


@pytest.mark.parametrize("panel", ["tokens", "waterfall", "heads", "card", "table"])
def test_every_panel_is_saved_as_four_kinds_of_files(page, small, panel):
    label = page.text("#card .name")
    for ending in ("csv", "json", "svg", "png"):
        page.run(f"document.querySelector('#{panel} [data-save={ending}]').click()")
    found = {e: page.downloaded(f"{panel}-{label}.{e}") for e in ("csv", "json", "svg", "png")}
    with found["csv"].open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    records = json.loads(found["json"].read_text())["records"]
    assert len(lines) == len(records) + 1
    assert list(records[0]) == lines[0]
    if panel == "heads":
        for line in lines[1:]:
            row = heads(small)["rows"]["label"].index(line[0])
            assert float(line[-1]) == pytest.approx(heads(small)["values"][row][4], rel=1e-6)
    import xml.etree.ElementTree as tree

    picture = tree.parse(found["svg"]).getroot()
    assert picture.tag.endswith("svg")
    assert "class=" not in found["svg"].read_text()
    data = found["png"].read_bytes()
    assert data.startswith(b"\x89PNG")
    width = struct.unpack(">I", data[16:20])[0]
    assert width == 2 * round(float(picture.get("width")))
    for path in found.values():
        path.unlink()


def test_every_panel_goes_full_screen_and_comes_back(page):
    full = "document.fullscreenElement?.id ?? ''"
    for panel in ("tokens", "waterfall", "heads", "card", "table"):
        wide = "document.querySelector('#heads .canvas svg').getBoundingClientRect().width"
        before = page.run(f"return {wide}")
        page.click(f"#{panel} [data-full]")
        page.wait(f"{full} === '{panel}'")
        page.frame()
        named = page.run(f"return document.querySelector('#{panel} [data-full]').title")
        assert named == "Leave full screen"
        if panel == "heads":
            assert page.run(f"return {wide}") > before
            page.cell(1, 1, click=True)  # its squares are where they are shown
            assert page.text("#card .name") == "L1H1"
            page.cell(2, 3)
            assert page.text("#heads .tip b") == "L2H3"
        page.click(f"#{panel} [data-full]")
        page.wait(f"{full} === ''")
        page.frame()
        assert page.run(f"return {wide}") == before


def test_script_in_a_token_is_shown_and_not_run(browser, tmp_path):
    result = dla_hooks.DirectLogitAttribution(
        attribution=torch.tensor([[[1.0, -2.0, 0.5]], [[0.0, 1.0, 2.0]]]),
        labels=["L0H0", EVIL],
        unit="head",
        bias=torch.zeros(1, 3),
        logit=torch.tensor([[1.0, -1.0, 2.5]]),
        gap=0.0,
        positions=torch.tensor([[0, 1, 2]]),
        tokens=[[EVIL, "\ud800", "\n\x00"]],
        answer=[EVIL],
        model=EVIL,
    )
    path = dla_hooks.Report.of(result, title=EVIL).save(tmp_path / "evil.html")
    browser.open(path)
    assert browser.text("#token-0") == EVIL
    assert browser.text("#token-1") == r"\ud800"
    assert browser.text("#token-2") == "↵␀"
    assert EVIL in browser.text("h1")
    browser.run("document.querySelector('#tokens [data-save=svg]').click()")
    saved = browser.downloaded("tokens-_script_alert_1_script_.svg")
    import xml.etree.ElementTree as tree

    assert EVIL in "".join(tree.parse(saved).getroot().itertext())
    assert browser.run("return document.scripts.length") == 3
    assert browser.complaints() == []
    assert browser.requests() == []


@pytest.fixture(scope="module")
def large(browser, tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    n, shared = 2000, {}
    shared = {
        "bias": torch.zeros(1, n),
        "gap": 0.0,
        "positions": torch.arange(n)[None],
        "tokens": [[" token"] * n],
        "answer": [" a"],
    }
    values = torch.randn(1024, 1, n, generator=generator)
    labels = [f"L{i // 32}H{i % 32}" for i in range(1024)]
    parts = torch.randn(65, 1, n, generator=generator)
    names = ["embed", *(f"{i // 2}_{'mlp' if i % 2 else 'attn'}_out" for i in range(64))]
    heads = dla_hooks.DirectLogitAttribution(values, labels, "head", logit=values.sum(0), **shared)
    parts = dla_hooks.DirectLogitAttribution(
        parts, names, "component", logit=parts.sum(0), **shared
    )
    path = tmp_path_factory.mktemp("large") / "large.html"
    return dla_hooks.Report.of(heads, parts).save(path)


# Milliseconds of the page's own thread for each frame, whatever else runs on the machine, and the
# time that passes between frames: a key is pressed at each.
FRAMES = """
  const [key, n, done] = arguments, found = [];
  let i = 0, last = performance.now();
  const step = () => {
    const now = performance.now();
    found.push(now - last);
    last = now;
    if (++i > n) return done(found.slice(1));
    const press = {key, bubbles: true, cancelable: true};
    document.body.dispatchEvent(new KeyboardEvent("keydown", press));
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
"""


def test_two_thousand_tokens_and_a_thousand_heads_keep_sixty_frames_a_second(browser, large):
    browser.open(large)
    cdp, n = browser.driver.execute_cdp_cmd, 30
    cdp("Performance.enable", {"timeDomain": "threadTicks"})

    def busy():
        found = cdp("Performance.getMetrics", {})["metrics"]
        return next(one["value"] for one in found if one["name"] == "TaskDuration")

    for place in ("#tokens", "#table"):
        browser.run("document.querySelector(arguments[0]).scrollIntoView()", place)
        for key in ("ArrowLeft", "ArrowDown"):
            browser.frame()
            before = busy()
            between = browser.driver.execute_async_script(FRAMES, key, n)
            own = 1000 * (busy() - before) / n
            # 5 to 14; 47 to 57 where every token and square was an element that is coloured anew.
            assert own < 30, f"{key} at {place} takes {own:.1f} ms of a frame"
            assert sorted(between)[n // 2] < 150  # others may use the machine
    cdp("Performance.disable", {})
    assert browser.complaints() == []


def test_all_rows_of_a_table_are_shown_when_asked_for_and_stay(browser, large):
    from selenium.webdriver.common.keys import Keys

    browser.open(large)
    rows = "return document.querySelectorAll('#table [data-row]').length"
    assert browser.run(rows) == 60
    browser.click("#table .scroll > .link")
    assert browser.run(rows) == 1024
    browser.press(Keys.ARROW_LEFT)
    assert browser.run(rows) == 1024
    assert (
        browser.run("return document.querySelectorAll('#table tr[aria-selected=true]').length") == 1
    )


def test_large_page_opens_within_seconds(browser, large):
    browser.open(large)
    assert browser.run("return performance.now()") < 10_000
    browser.run("document.querySelector('#tokens .strip').scrollTop = 0")
    browser.frame()
    first = "document.querySelector('#token-0').style.background"
    assert browser.run(f"return {first}").startswith("rgb")
    assert browser.complaints() == []


def test_narrow_window_needs_no_sideways_scrolling(browser, small):
    browser.open(small[0], width=700)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.open(small[0])
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_policy_stops_a_foreign_request(browser, small):
    """The page's policy is in force: what it forbids does not leave, and is complained about."""
    browser.open(small[0])
    browser.run(
        "const one = new Image(); one.src = 'https://example.invalid/x.png';"
        "document.body.append(one)"
    )
    browser.wait("true")
    browser.frame()
    assert any("Content Security Policy" in line for line in browser.complaints())


def test_notebook_frame_runs_the_page(browser, small, tmp_path):
    model, tokenizer = dla_hooks.demo.load()
    report = dla_hooks.report(
        model, "The keys near the cabinet", " are", units=["head"], tokenizer=tokenizer
    )
    path = tmp_path / "notebook.html"
    path.write_text(
        f"<!doctype html><html data-ready=true><body>{report._repr_html_()}</body>",
        encoding="utf-8",
    )
    browser.open(path)
    browser.driver.switch_to.frame(0)
    try:
        browser.wait("document.documentElement.dataset.ready === 'true'")
        browser.cell(0, 3, click=True)
        assert browser.text("#card .name") == "L0H3"
    finally:
        browser.driver.switch_to.default_content()


def test_comparison_shows_both_prompts_and_both_runs(browser, tmp_path):
    model, tokenizer = dla_hooks.demo.load()
    found = dla_hooks.compare(
        model, input="The keys near the cabinet", other_input="The key near the cabinet",
        answer_tokens=" are", unit=("component", "head"), pos=None, tokenizer=tokenizer,
    )  # fmt: skip
    browser.open(dla_hooks.Report.of(found).save(tmp_path / "comparison.html"))
    assert browser.text("#tokens .other") == "Second run: The key near the cabinet"
    assert browser.text("#tokens .changed") == " key"
    assert "second run" in browser.text(".head .facts")
    row = found["head"].labels.index(browser.text("#card .name"))
    both = (found["head"].second.attribution, found["head"].written)
    beside = [float(one[row, 0, -1]) for one in both]
    for value in beside:
        assert f"{abs(value):.2f}"[:-1] in browser.text("#card .facts")
    assert browser.complaints() == []


def test_summary_and_single_position_are_shown_without_a_strip_or_with_one_token(browser, tmp_path):
    model, tokenizer = dla_hooks.demo.load()
    results = [
        dla_hooks.direct_logit_attribution(
            model, text, " are", unit=("head", "component"), tokenizer=tokenizer
        )
        for text in ("The keys near the cabinet", "The dogs near the car")
    ]
    summaries = [
        dla_hooks.summarize([one[unit] for one in results]) for unit in ("head", "component")
    ]
    browser.open(dla_hooks.Report.of(summaries).save(tmp_path / "summary.html"))
    tabs = "[...document.querySelectorAll('#table [role=tab]')].map(one => one.textContent)"
    assert browser.run(f"return {tabs}") == ["Heads", "Components"]
    assert not browser.run("return document.getElementById('waterfall').hidden")
    assert browser.run("return document.getElementById('tokens').hidden")
    assert "over 2 prompts" in browser.text("h1")
    assert "standard error" in browser.text("#card")
    assert "position" not in browser.text("#heads .what")
    layers = dla_hooks.direct_logit_attribution(
        model, "The keys near the cabinet", " are", unit="layer", tokenizer=tokenizer
    )
    browser.open(dla_hooks.Report.of(layers).save(tmp_path / "layers.html"))
    assert browser.run("return document.getElementById('heads').hidden")
    assert browser.run("return document.querySelectorAll('#tokens .at:not(.off)').length") == 1
    assert "sum up to here" in browser.text("#card")
    assert browser.complaints() == []
