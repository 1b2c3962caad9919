"""The whole page: from run folders to one file that a browser shows without a complaint."""

import csv
import importlib.util
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmedrag.records.records import UserError
from mmedrag.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="headless Chromium and playwright are not installed",
)


def load_maker():
    path = Path(__file__).with_name("report_runs.py")
    spec = importlib.util.spec_from_file_location("report_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    data, runs = load_maker().make(folder, studies=24)
    page = write_report(
        runs, folder / "out", data, resamples=400, cases=18, subgroups=["meta.form"]
    )
    return folder, runs, page


class Links(HTMLParser):
    """Everything in the page that could load something, and ids."""

    def __init__(self):
        super().__init__()
        self.urls, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.urls.append(value)
            if name == "id":
                self.ids.append(value)


def test_the_page_is_one_file_that_loads_nothing(made):
    text = made[2].read_text()
    links = Links()
    links.feed(text)
    assert links.urls and all(u.startswith(("data:", "#")) for u in links.urls)
    assert "default-src 'none'" in text and "@import" not in text
    assert not re.search(r"url\(\s*['\"]?(?!data:)", text)
    assert len(links.ids) == len(set(links.ids))
    assert {u[1:] for u in links.urls if u.startswith("#")} <= set(links.ids)


def test_the_page_has_every_part(made):
    text = made[2].read_text()
    for part in (
        "scores-vqa_closed",
        "scores-vqa_open",
        "scores-report",
        "reliance",
        "comparisons",
        "calibration",
        "retrieval",
        "training",
        "subgroups",
        "not-computed",
        "gallery",
        "methods",
    ):
        assert f'<section id="{part}"' in text, part
    assert "not a medical device" in text
    assert text.count('class="case"') == 18 and text.count("data:image/jpeg;base64") >= 18
    assert "Reliability diagram" in text and "Hubness of retrieval" in text


def test_marks_agree_with_metrics_json(made):
    folder, _, page = made
    result = json.loads((folder / "out" / "metrics.json").read_text())
    run = result["runs"]["pt-all/references"]["tasks"]["vqa_closed"]["overall"]
    rows = list(csv.reader(open(folder / "out" / "tables" / "headline-vqa_closed.csv")))
    row = dict(zip(rows[0], rows[-1], strict=True))
    assert row["row"] == "+ RAG-PT (full method), references"
    assert float(row["accuracy"]) == pytest.approx(run["metrics"]["accuracy"]["value"])
    shown = page.read_text()
    for metric in run["marked"]:
        if metric in ("accuracy", "balanced_accuracy"):
            assert f"{run['metrics'][metric]['value']:.3f}†" in shown


def test_every_table_is_csv_and_latex(made):
    folder = made[0] / "out" / "tables"
    names = {p.stem for p in folder.glob("*.csv")}
    assert names == {p.stem for p in folder.glob("*.tex")}
    assert {
        "headline-vqa_closed",
        "controls-report",
        "reliance",
        "comparisons",
        "confusion",
        "hubness",
        "selection",
        "subgroups",
    } <= names
    for path in folder.glob("*.tex"):
        text = path.read_text()
        assert text.count("{") == text.count("}") and r"\bottomrule" in text


def test_same_runs_same_page(made, tmp_path):
    _, runs, page = made
    again = write_report(runs, tmp_path, metrics=page.with_name("metrics.json"), cases=18)
    assert again.read_bytes() == page.read_bytes()  # data found through config.json


def test_text_from_models_and_data_cannot_become_markup(made, tmp_path):
    folder, runs, _ = made
    run = tmp_path / "evil"
    shutil.copytree(runs[0], run)
    lines = [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]
    for row in lines:
        if row.get("answer"):
            row["answer"]["text"] = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
        row["question"] = "<b onclick='x'>bold?</b>" if row["question"] else None
    (run / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    text = write_report([run], tmp_path / "out", resamples=50, cases=5).read_text()
    assert "<script>alert" not in text and "<img src=x" not in text and "<b onclick" not in text
    assert "&lt;/script&gt;" in text


def test_missing_images_cost_the_picture_not_the_report(made, tmp_path):
    from mmedrag.runtime.data_folder import DataFolder

    folder, runs, _ = made
    bare = tmp_path / "data"
    bare.mkdir()
    for name in ("examples.jsonl", "corpus.jsonl", "truth.jsonl"):
        shutil.copy(folder / "data" / name, bare / name)
    page = write_report(runs[:1], tmp_path / "out", DataFolder(bare), resamples=50, cases=3)
    assert "data:image/jpeg" not in page.read_text()


def test_metrics_of_other_runs_are_refused(made, tmp_path):
    folder, runs, page = made
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    with pytest.raises(UserError, match="no run 'other'"):
        write_report([other], tmp_path, metrics=page.with_name("metrics.json"))
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="expected a metrics.json"):
        write_report(runs, tmp_path, metrics=tmp_path / "metrics.json")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


def open_page(chromium, path, **context):
    said = []
    page = chromium.new_context(**context).new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: (
            said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
        ),
    )
    page.goto(path.as_uri())
    return page, said


@browser
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_complaint_and_no_sideways_scrolling(made, chromium, width, scheme):
    page, said = open_page(
        chromium, made[2], viewport={"width": width, "height": 844}, color_scheme=scheme
    )
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    size = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.chart text')].map("
        "(t) => t.getBoundingClientRect().height).filter((h) => h > 0))"
    )
    assert size >= 9  # text of charts stays readable on a phone
    page.context.close()


@browser
@pytest.mark.browser
def test_filters_work_by_keyboard_and_say_how_many(made, chromium):
    page, said = open_page(chromium, made[2])
    total = page.locator(".case").count()
    page.locator("select[name=domain]").focus()
    page.keyboard.press("ArrowDown")
    chosen = page.locator("select[name=domain]").input_value()
    visible = page.locator(".case:visible")
    assert 0 < visible.count() < total
    assert set(visible.evaluate_all("e => e.map((c) => c.dataset.domain)")) == {chosen}
    assert page.locator("#shown").inner_text() == f"{visible.count()} of {total} cases"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("no such words")
    assert visible.count() == 0 and page.locator("#shown").inner_text().startswith("0 of")
    assert said == []
    page.context.close()


@browser
@pytest.mark.browser
def test_without_script_every_case_is_shown(made, chromium):
    page, _ = open_page(chromium, made[2], java_script_enabled=False)
    assert page.locator(".case:visible").count() == 18
    assert not page.locator("#filters").is_visible()
    page.context.close()


@browser
@pytest.mark.browser
def test_paper_shows_what_the_screen_folds(made, chromium):
    page, _ = open_page(chromium, made[2])
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert len(page.pdf(format="A4")) > 20_000
    page.context.close()


AXE = Path(os.environ.get("MMEDRAG_AXE", "node_modules/axe-core/axe.min.js"))

# what axe would find first; a few lines of our own for machines without it
OWN_CHECKS = """() => {
  const bad = [];
  const name = (e) => e.getAttribute("aria-label") || e.textContent.trim();
  document.querySelectorAll("img:not([alt]), svg:not([role]), svg[role=img]:not([aria-label])")
    .forEach((e) => bad.push("no text alternative: " + e.outerHTML.slice(0, 80)));
  document.querySelectorAll("a, button, summary").forEach((e) => {
    if (!name(e)) bad.push("no name: " + e.outerHTML.slice(0, 80)); });
  document.querySelectorAll("select, input").forEach((e) => {
    if (!e.labels.length) bad.push("no label: " + e.name); });
  document.querySelectorAll("table").forEach((t) => {
    if (!t.caption || !t.querySelector("thead th[scope=col]") ||
        [...t.tBodies[0].rows].some((r) => !r.querySelector("th")))
      bad.push("table without caption or headers: " + t.id); });
  document.querySelectorAll(".scroll").forEach((e) => {
    if (e.tabIndex !== 0) bad.push("scrolls, but not by keyboard"); });
  let last = 1;
  document.querySelectorAll("h1, h2, h3, h4").forEach((h) => {
    const level = +h.tagName[1];
    if (level > last + 1) bad.push("heading skips a level: " + h.textContent);
    last = level; });
  if (document.documentElement.lang !== "en") bad.push("no language");
  if (document.querySelectorAll("main").length !== 1) bad.push("not one main");
  return bad;
}"""


@browser
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(made, chromium, scheme):
    page, _ = open_page(chromium, made[2], color_scheme=scheme, bypass_csp=True)
    assert page.evaluate(OWN_CHECKS) == []
    if AXE.is_file():
        page.add_script_tag(path=str(AXE))
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found["violations"]] == []
    page.context.close()
