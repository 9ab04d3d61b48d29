"""What stands in the file: the results' own numbers, escaped text, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import zlib
from types import SimpleNamespace

import pytest
import torch
from zoo import build

import dla_hooks
from dla_hooks.pages.grid import Grid, packed

PROMPT, ANSWER, INCORRECT = "The keys near the cabinet", " are", " is"


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = dla_hooks.demo.load()
    return SimpleNamespace(model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def made(demo):
    return dla_hooks.report(demo.model, PROMPT, ANSWER, INCORRECT, tokenizer=demo.tokenizer)


def element(html, name):
    return re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', html, re.DOTALL)[1]


def read(html):
    """The content of a file, its grids as lists [row][entry]. It shares no code with ours."""
    content = json.loads(element(html, "content"))
    data = zlib.decompress(base64.b64decode(element(html, "numbers")))
    letters = {"f4": "f", "i4": "i", "i2": "h", "i1": "b"}

    def grid(found):
        n, m = found["shape"]
        flat = struct.unpack_from(f"<{n * m}{letters[found['type']]}", data, found["start"])
        scale = found["scale"] or [1] * m
        return [[flat[row * m + e] * scale[e] for e in range(m)] for row in range(n)]

    def walk(value):
        if isinstance(value, dict):
            return grid(value) if "start" in value else {k: walk(v) for k, v in value.items()}
        return [walk(one) for one in value] if isinstance(value, list) else value

    return walk(content)


def unit(page, key):
    return next(one for one in page["units"] if one["key"] == key)


def test_numbers_in_the_file_equal_the_results(demo, made):
    page = read(made.html())["pages"][0]
    found = dla_hooks.direct_logit_attribution(
        demo.model,
        PROMPT,
        ANSWER,
        INCORRECT,
        unit=("component", "layer", "head"),
        pos=None,
        tokenizer=demo.tokenizer,
    )
    for key, result in found.items():
        shown = unit(page, key)
        assert shown["rows"]["label"] == result.labels
        torch.testing.assert_close(torch.tensor(shown["values"]), result.attribution[:, 0])
    logit = torch.tensor(page["logit"])
    torch.testing.assert_close(logit, found["head"].logit[0])
    assert page["tokens"] == found["head"].tokens[0]
    assert page["spots"] == list(range(len(page["tokens"])))
    total = torch.tensor(unit(page, "component")["values"]).sum(0) + torch.tensor(page["bias"])
    torch.testing.assert_close(total, logit, atol=1e-4, rtol=0)


def test_ranked_rows_with_rest_and_remainder_sum_to_the_logit(made):
    page = read(made.html())["pages"][0]
    for key in ("neuron", "source"):
        shown = unit(page, key)
        for place, entry in enumerate(shown["at"]):
            kept = sum(row[place] for row in shown["values"])
            whole = kept + shown["rest"][place] + shown["rest_of"][place] + page["bias"][entry]
            assert whole == pytest.approx(page["logit"][entry], abs=1e-3)


def test_tokens_that_a_head_reads_sum_to_the_head(made):
    page = read(made.html())["pages"][0]
    reads, heads = page["reads"], unit(page, "head")
    for number, label in enumerate(reads["heads"]):
        own = heads["values"][heads["rows"]["label"].index(label)]
        for place, entry in enumerate(reads["at"]):
            pairs = zip(reads["head"], reads["values"], strict=True)
            total = sum(value[place] for head, value in pairs if head[place] == number)
            assert total == pytest.approx(own[entry], abs=1e-4), label


def test_promoted_tokens_are_those_of_promoted_tokens(demo, made):
    page = read(made.html())["pages"][0]
    found = dla_hooks.promoted_tokens(
        demo.model, PROMPT, unit="head", k=6, tokenizer=demo.tokenizer
    )
    shown = page["promotes"][0]
    up, down = shown["rows"]["L3H3"]["4"]
    for listed, expected in ((up, found.top("L3H3")), (down, found.bottom("L3H3"))):
        assert [shown["names"][name] for name, _ in listed] == [name for name, _ in expected]
        numbers = [value for _, value in listed]
        assert numbers == pytest.approx([value for _, value in expected], rel=1e-4)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma2", "gpt_neox-parallel", "granite", "mixtral"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_page_of_each_family_shows_the_models_own_logits(family, seed):
    model = build(family, seed=seed)
    ids = torch.randint(3, 50, (1, 7), generator=torch.Generator().manual_seed(seed))
    page = read(dla_hooks.report(model, ids, 5, 6).html())["pages"][0]
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    cap = page["softcap"]
    if cap:
        logits = cap * torch.atanh(logits / cap)
    expected = logits[:, 5] - logits[:, 6]
    torch.testing.assert_close(torch.tensor(page["logit"]).double(), expected, atol=2e-3, rtol=1e-3)
    total = torch.tensor(unit(page, "component")["values"]).sum(0) + torch.tensor(page["bias"])
    torch.testing.assert_close(total.double(), expected, atol=2e-3, rtol=1e-3)


def test_script_in_prompt_and_title_is_escaped(demo):
    evil = "</script><script>alert(1)</script><!--"
    result = dla_hooks.DirectLogitAttribution(
        attribution=torch.ones(1, 1, 2),
        labels=[evil],
        unit="component",
        bias=torch.zeros(1, 2),
        logit=torch.ones(1, 2),
        gap=0.0,
        positions=torch.tensor([[0, 1]]),
        tokens=[[evil, "\ud800\x00"]],
        answer=[evil],
        model=evil,
    )
    html = dla_hooks.Report.of(result, title=evil).html()
    assert "<script>alert" not in html
    assert html.count("<script") == html.count("</script>") == 3
    page = read(html)["pages"][0]
    assert page["tokens"] == [evil, "\ud800\x00"]
    html.encode("utf-8")


def test_policy_allows_the_pages_own_script_and_style_only(made):
    html = made.html()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; ")
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    for text in (script, style):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r'\b(src|href)="(?!data:,")', html)


@pytest.mark.parametrize(("n_heads", "n_tokens"), [(1024, 2000), (4096, 3000)])
def test_large_page_stays_under_three_megabytes_and_says_what_is_cut(n_heads, n_tokens):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n_heads, 1, n_tokens, generator=generator)
    components = torch.randn(66, 1, n_tokens, generator=generator)
    shared = {
        "bias": torch.zeros(1, n_tokens),
        "logit": values.sum(0),
        "gap": 0.0,
        "positions": torch.arange(n_tokens)[None],
        "tokens": [[" token"] * n_tokens],
        "answer": [" a"],
    }
    labels = [f"L{i // 32}H{i % 32}" for i in range(n_heads)]
    names = [f"{i // 2}_{'mlp' if i % 2 else 'attn'}_out" for i in range(66)]
    heads = dla_hooks.DirectLogitAttribution(values, labels, "head", **shared)
    parts = dla_hooks.DirectLogitAttribution(components, names, "component", **shared)
    report = dla_hooks.Report.of(heads, parts)
    html = report.html()
    assert len(html) < 3_000_000
    page = read(html)["pages"][0]
    shown, kept = unit(page, "head"), len(page["spots"])
    assert bool(page["notes"]) == (kept < n_tokens)
    assert (kept == n_tokens) == (n_heads == 1024)
    own = values[:, 0, n_tokens - kept :]
    error = (torch.tensor(shown["values"]) - own).abs().amax(0) / own.abs().amax(0)
    assert float(error.max()) < 0.5 / 63 + 1e-3
    assert [row[0] for row in shown["exact"]] == own[:, -1].tolist()
    assert report.data()["pages"][0]["units"][0]["values"][0] == own[0].tolist()


def test_rounded_grid_keeps_missing_numbers_missing():
    grid = Grid.of(torch.tensor([[1.0, torch.nan]] * 900_000), rounded=True)
    content, blob = packed({"grid": grid})
    assert content["grid"]["type"] == "i1"
    data = zlib.decompress(base64.b64decode(blob))
    assert struct.unpack_from("<2b", data, 0) == (63, -128)


def test_pages_of_several_prompts_have_their_own_answers(demo):
    prompts = ["The keys near the cabinet", "The dog near the cars"]
    report = dla_hooks.report(
        demo.model,
        prompts,
        [" are", " is"],
        [" is", " are"],
        units=("component", "head"),
        tokenizer=demo.tokenizer,
    )
    assert len(report) == 2
    for page, prompt, answer in zip(report.data()["pages"], prompts, [" are", " is"], strict=True):
        assert "".join(page["tokens"]) == prompt
        assert page["answers"] == [answer]
        alone = dla_hooks.report(
            demo.model,
            prompt,
            answer,
            {" are": " is", " is": " are"}[answer],
            units=("component", "head"),
            tokenizer=demo.tokenizer,
        )
        assert alone.data()["pages"][0]["logit"] == page["logit"]
        assert f"--answer='{answer}'" in page["reproduce"]["command"]
    with pytest.raises(dla_hooks.ShapeMismatchError, match="2 prompts and 3 answers"):
        dla_hooks.report(demo.model, prompts, [" a"] * 3, tokenizer=demo.tokenizer)


def test_batch_with_padding_has_one_page_for_each_prompt(demo):
    result = dla_hooks.direct_logit_attribution(
        demo.model,
        ["The keys near the cabinet", "The keys"],
        " are",
        unit="head",
        pos=None,
        tokenizer=demo.tokenizer,
    )
    pages = dla_hooks.Report.of(result).data()["pages"]
    assert [len(page["spots"]) for page in pages] == [5, 2]
    whole = result.attribution[:, 1][:, result.positions[1] >= 0]
    torch.testing.assert_close(torch.tensor(unit(pages[1], "head")["values"]), whole)


def test_long_prompt_measures_ranked_units_at_the_last_position():
    model = build("gpt2", seed=0)
    n = min(80, model.config.n_positions)
    ids = torch.randint(3, 50, (1, n), generator=torch.Generator().manual_seed(0))
    page = dla_hooks.report(model, ids, 5).data()["pages"][0]
    assert unit(page, "head")["at"] == list(range(n))
    expected = [n - 1] if n > 64 else list(range(n))
    assert unit(page, "neuron")["at"] == page["reads"]["at"] == expected
    many = dla_hooks.direct_logit_attribution(model, ids, 5, unit="neuron", pos=None)
    shown = unit(dla_hooks.Report.of(many).data()["pages"][0], "neuron")
    assert len(shown["at"]) == min(64, n)


def test_summary_and_comparison_are_pages_of_their_own(demo):
    results = [
        dla_hooks.direct_logit_attribution(
            demo.model, prompt, " are", " is", unit="head", tokenizer=demo.tokenizer
        )
        for prompt in ("The keys near the cabinet", "The dogs near the car")
    ]
    summary = dla_hooks.summarize(results)
    page = dla_hooks.Report.of(summary).data()["pages"][0]
    assert page["kind"] == "summary"
    assert page["n"] == 2
    heads = page["units"][0]
    assert [row[0] for row in heads["values"]] == pytest.approx(summary.mean.tolist())
    error = [row[0] for row in heads["beside"]["standard error"]["values"]]
    assert error == pytest.approx(summary.standard_error.tolist())

    first, second = results
    difference = dla_hooks.DirectLogitAttribution(
        attribution=first.attribution - second.attribution,
        labels=first.labels,
        unit="head",
        bias=first.bias - second.bias,
        logit=first.logit - second.logit,
        gap=0.0,
        positions=first.positions,
        tokens=first.tokens,
        answer=first.answer,
        incorrect=first.incorrect,
        rows=first.rows,
        words=first.words,
        beside={"first": first.attribution, "second": second.attribution},
    )
    pair = SimpleNamespace(difference=difference, first=first, second=second)
    page = dla_hooks.Report.of(pair).data()["pages"][0]
    assert page["kind"] == "comparison"
    assert [side["logit"][0] for side in page["sides"]] == [float(first.logit), float(second.logit)]
    assert page["other_tokens"] == second.tokens[0]
    assert sorted(page["units"][0]["beside"]) == ["first", "second"]


def results_of(demo, prompts, units):
    return [
        dla_hooks.direct_logit_attribution(
            demo.model, prompt, " are", " is", unit=units, tokenizer=demo.tokenizer
        )
        for prompt in prompts
    ]


def test_summaries_of_several_units_over_the_same_prompts_share_a_page(demo):
    prompts, units = ["The keys near the cabinet", "The dogs near the car"], ("component", "head")
    units = (*units, "layer", "neuron")
    results = results_of(demo, prompts, units)
    summaries = {name: dla_hooks.summarize([one[name] for one in results]) for name in units}
    pages = dla_hooks.Report.of(summaries).data()["pages"]
    assert [one["key"] for one in pages[0]["units"]] == list(units)
    assert len(pages) == 1
    for name, summary in summaries.items():
        shown = unit(pages[0], name)
        assert [row[0] for row in shown["values"]] == pytest.approx(summary.mean.tolist(), rel=1e-6)
        error = [row[0] for row in shown["beside"]["standard error"]["values"]]
        assert error == pytest.approx(summary.standard_error.tolist(), rel=1e-6)

    other = dla_hooks.summarize([one["head"] for one in results_of(demo, prompts[:1], units)])
    again = dla_hooks.summarize([one["head"] for one in results])
    pages = dla_hooks.Report.of(summaries, other, again, results[0]["head"]).data()["pages"]
    assert [len(page["units"]) for page in pages] == [1, 4, 1, 1]
    assert [page["kind"] for page in pages] == ["attribution", *["summary"] * 3]
    assert [page["n"] for page in pages[1:]] == [2, 1, 2]


def test_summary_of_very_many_rows_lists_the_strongest_and_sums_the_rest(monkeypatch, demo):
    from dla_hooks.pages import averages

    results = results_of(demo, ["The keys near the cabinet", "The dogs near the car"], "neuron")
    summary = dla_hooks.summarize(results)
    whole = unit(dla_hooks.Report.of(summary).data()["pages"][0], "neuron")
    assert whole["dense"]
    monkeypatch.setattr(averages, "_MOST_ROWS", 100)
    monkeypatch.setattr(averages, "_LISTED", 20)
    page = dla_hooks.Report.of(summary).data()["pages"][0]
    shown = unit(page, "neuron")
    means = dict(zip(summary.labels, summary.mean.tolist(), strict=True))
    remainder = means.pop("remainder")
    strongest = sorted(means, key=lambda label: -abs(means[label]))[:20]
    assert shown["rows"]["label"] == strongest
    assert [row[0] for row in shown["values"]] == pytest.approx([means[x] for x in strongest])
    assert shown["n_rows"] == len(means)
    total = sum(means[x] for x in strongest) + shown["rest"][0] + shown["rest_of"][0]
    assert shown["rest_of"] == [pytest.approx(remainder)]
    assert total + page["bias"][0] == pytest.approx(page["logit"][0], abs=1e-4)


def test_summary_of_comparisons_shows_what_was_written_and_read(demo):
    found = [
        dla_hooks.compare(
            demo.model, input=f"The {a} near the cabinet", other_input=f"The {b} near the cabinet",
            answer_tokens=" are", unit="head", tokenizer=demo.tokenizer,
        )
        for a, b in (("keys", "key"), ("dogs", "dog"))
    ]  # fmt: skip
    summary = dla_hooks.summarize(found)
    page = dla_hooks.Report.of(summary).data()["pages"][0]
    assert page["question"] == "mean of logits over 2 prompts, first run minus second"
    beside = unit(page, "head")["beside"]
    halves = [torch.tensor(beside[name]["values"]) for name in ("written", "read")]
    torch.testing.assert_close(sum(halves), torch.tensor(unit(page, "head")["values"]))


def test_comparison_has_each_runs_own_rank_and_no_rank_of_the_difference(demo):
    found = dla_hooks.compare(
        demo.model, input="The keys near the cabinet", other_input="The key near the cabinet",
        answer_tokens=" are", unit="head", tokenizer=demo.tokenizer,
    )  # fmt: skip
    page = dla_hooks.Report.of(found).data()["pages"][0]
    assert not {"rank", "probability", "top"} & set(page)
    for side, run in zip(page["sides"], (found.first, found.second), strict=True):
        assert side["rank"] == run.rank.flatten().tolist()
        assert side["probability"] == pytest.approx(run.log_probability.exp().flatten().tolist())


def test_what_cannot_be_shown_is_refused(demo, tmp_path):
    with pytest.raises(dla_hooks.ArgumentTypeError, match="a report is made of"):
        dla_hooks.Report.of(torch.ones(3))
    with pytest.raises(dla_hooks.InputError, match="nothing to show"):
        dla_hooks.Report.of()
    several = dla_hooks.DirectLogitAttribution(
        torch.ones(1, 1, 2, 3),
        ["embed"],
        "component",
        torch.ones(1, 2, 3),
        torch.ones(1, 2, 3),
        0.0,
    )
    with pytest.raises(dla_hooks.InputError, match="one answer at a time"):
        dla_hooks.Report.of(several)
    with pytest.raises(dla_hooks.InputError, match="there is no folder"):
        dla_hooks.report(demo.model, PROMPT, ANSWER, path=tmp_path / "no" / "x.html")
    with pytest.raises(dla_hooks.InputError, match="promoted must be an int"):
        dla_hooks.report(demo.model, PROMPT, ANSWER, promoted=-1)


def test_call_on_the_page_makes_the_same_page(made):
    again = made.pages[0]["reproduce"]
    assert again["command"] == (
        "dla-hooks report demo 'The keys near the cabinet' --answer=' are' --incorrect=' is' "
        "-o page.html"
    )
    names = {}
    exec(
        again["call"]
        .replace("dla_hooks.report(", "found = dla_hooks.report(")
        .replace('    path="page.html",\n', ""),
        names,
    )
    assert names["found"].data()["pages"][0]["logit"] == made.data()["pages"][0]["logit"]


def test_effects_stand_beside_their_rows(demo):
    lines = [{"label": "L3H3", "row": 0, "position": 4, "direct": 5.5, "total": 4.0}]
    made = dla_hooks.report(
        demo.model,
        PROMPT,
        ANSWER,
        INCORRECT,
        units=["head"],
        effects=lines,
        tokenizer=demo.tokenizer,
    )
    assert made.data()["pages"][0]["effects"] == {"L3H3": {"direct": 5.5, "total": 4.0}}


def test_notebook_shows_the_page_in_a_frame(made):
    html = made._repr_html_()
    assert html.startswith("<iframe srcdoc=")
    assert 'sandbox="allow-scripts allow-downloads"' in html


def test_rank_probability_and_top_tokens_are_shown_where_a_result_has_them(demo):
    result = dla_hooks.direct_logit_attribution(
        demo.model, PROMPT, ANSWER, unit="head", pos=[-2, -1], tokenizer=demo.tokenizer
    )
    page = dla_hooks.Report.of(result).data()["pages"][0]
    ids = demo.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        p = demo.model(ids).logits[0, -2:].softmax(-1)
    token = demo.tokenizer.encode(ANSWER)[0]
    assert page["rank"] == [1 + int((row > row[token]).sum()) for row in p]
    assert page["probability"] == [pytest.approx(float(row[token]), rel=1e-3) for row in p]
    first = [[demo.tokenizer.decode([int(row.argmax())]), float(row.max())] for row in p]
    for own, (text, most) in zip(page["top"], first, strict=True):
        assert own[0] == [text, pytest.approx(most, rel=1e-3)]


def test_without_an_answer_the_models_own_top_token_is_asked_for(demo):
    made = dla_hooks.report(demo.model, PROMPT, units=["component"], tokenizer=demo.tokenizer)
    page = made.data()["pages"][0]
    result = dla_hooks.direct_logit_attribution(
        demo.model, PROMPT, dla_hooks.TOP, pos=None, tokenizer=demo.tokenizer
    )
    assert result.answer[-1] == " are"
    assert str(page).count("' are'") >= 1
    assert "--answer" not in page["reproduce"]["command"]
    assert "answer_tokens=dla_hooks.TOP" in page["reproduce"]["call"]


def test_titles_of_prompts_without_a_tokenizer_keep_their_ids_apart():
    model = build("gpt2")
    found = dla_hooks.report(model, torch.tensor([[5, 12, 7]]), 5, 7, units=["component"])
    assert found.title == "5 12 7 · token 5 - token 7"


def test_page_is_written_as_html_and_as_nothing_else(demo, tmp_path):
    with pytest.raises(dla_hooks.DLAError, match=r"written as \.html; got .*page\.pdf"):
        dla_hooks.report(None, PROMPT, path=tmp_path / "page.pdf")  # before the model is looked at
    found = dla_hooks.report(
        demo.model, PROMPT, ANSWER, units=["component"], tokenizer=demo.tokenizer
    )
    with pytest.raises(dla_hooks.DLAError, match=r"written as \.html"):
        found.save(tmp_path / "page.json")
    assert found.save(tmp_path / "page").exists()
    assert found.save(tmp_path / "page.HTM").exists()
