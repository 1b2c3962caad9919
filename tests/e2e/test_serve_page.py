"""The page as a user meets it, in headless Chromium.

``MMEDRAG_SCREENSHOTS`` names a folder to keep screenshots in, to be looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("fastapi", reason="needs the extra 'serve'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

from mmedrag.serve.app import create_app  # noqa: E402
from mmedrag.serve.security import load_keys  # noqa: E402
from mmedrag.serve.settings import ServeSettings  # noqa: E402
from serve_tools import dicom_bytes, echo, encoded, live, make_pipeline, picture, write_keys  # noqa: E402

WIDE, NARROW = {"width": 1100, "height": 900}, {"width": 360, "height": 740}
NOTICE = "Research software, not a medical device."
LONG = 20_000  # milliseconds; the machine may be busy


def scripted(request):
    if "slow" in request.prompt.text:
        time.sleep(2.5)
    if "burst" in request.prompt.text:
        raise RuntimeError("the model is broken")
    if "image report" in request.prompt.text.lower() or "report of" in request.prompt.text.lower():
        return "The heart is not enlarged. No effusion is seen. " * 3
    return "Yes. " + echo(request)[5:69]


@pytest.fixture(scope="module")
def chromium():
    found = next(
        (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))),
        None,
    )
    with sync_api.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=found, args=["--disable-gpu"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium to test the page in: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    settings = ServeSettings(port=0, rate=0)
    with live(create_app(make_pipeline(scripted), settings), settings) as found:
        yield found


class Page:
    """A tab, with the errors its console saw."""

    def __init__(self, browser, url, size=WIDE):
        self.context = browser.new_context(viewport=size, accept_downloads=True)
        self.context.set_default_timeout(LONG)
        self.page = self.context.new_page()
        self.errors = []
        self.outside = []
        self.page.on("console", lambda m: self._log(m))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on(
            "request",
            lambda r: (
                None if r.url.startswith((url, "blob:", "data:")) else self.outside.append(r.url)
            ),
        )
        self.page.goto(url)
        self.page.wait_for_selector("#example-list button")

    def _log(self, message):
        # a refused upload is logged by the browser itself as a failed load
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def shot(self, name):
        folder = os.environ.get("MMEDRAG_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.evaluate("window.scrollTo(0, 0)")
            self.page.screenshot(path=f"{folder}/{name}.png", full_page=True)

    def choose(self, data, name="film.png"):
        file = {"name": name, "mimeType": "application/octet-stream", "buffer": data}
        self.page.set_input_files("#file", file)

    def shown(self):
        self.page.wait_for_selector("#shown:not([hidden])")
        return self.page.text_content("#shown-about")

    def send_compared(self):
        self.choose(encoded(picture(5, 128)))
        self.shown()
        self.page.fill("#question", "Is the heart enlarged?")
        self.page.check("#compare")
        self.page.click("#send")

    def answer(self):
        self.page.wait_for_selector("#result:not([hidden])")
        self.page.wait_for_selector("#send:not([disabled])")
        return self.page.text_content("#result-body")

    def close(self):
        self.context.close()
        assert self.errors == []
        assert self.outside == []  # nothing is loaded from elsewhere


@pytest.fixture
def tab(chromium, server):
    found = Page(chromium, server.url)
    yield found
    found.close()


def test_ask_and_see_the_evidence(tab):
    tab.choose(encoded(picture(5, 128)))
    assert tab.shown() == "film.png: PNG, 128 × 136 pixels"
    tab.page.fill("#question", "Is the heart enlarged?")
    tab.page.click("#send")
    text = tab.answer()
    for expected in (
        "Yes.",
        "1.000",
        "radiology, confidence 90.0 %",
        "The heart is enlarged. (ref-0)",
        "0.9000",
        "✓ kept",
        "✗ dropped",
        "gap 2",
        "1 of the patient's own",
        "This model knows drawn pictures only.",
    ):
        assert expected in text, expected
    assert tab.page.evaluate("document.activeElement.id") == "result"
    assert NOTICE in tab.page.text_content(".notice")
    tab.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    box = tab.page.locator(".notice").bounding_box()
    assert 0 <= box["y"] < 5  # still in view at the end of the page
    tab.shot("answer")


def test_files_are_dropped_and_nothing_else_happens_when_dropped_beside(tab):
    import base64

    script = """([target, name, data]) => {
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
      const carried = new DataTransfer();
      carried.items.add(new File([bytes], name));
      const event = (kind) => new DragEvent(kind, {dataTransfer: carried, bubbles: true,
        cancelable: true});
      const place = document.querySelector(target);
      place.dispatchEvent(event('dragover'));
      const over = place.classList.contains('over');
      return [over, place.dispatchEvent(event('drop'))];
    }"""

    def drop(target, name, data):
        return tab.page.evaluate(script, [target, name, base64.b64encode(data).decode()])

    # False: the browser's own action, leaving the page for the file, was prevented
    assert drop("#drop", "first.png", encoded(picture(1, 64))) == [True, False]
    assert tab.shown() == "first.png: PNG, 64 × 72 pixels"
    assert drop("footer", "beside.png", encoded(picture(2))) == [False, False]
    assert "first.png" in tab.shown()
    pytest.importorskip("pydicom")
    drop("#drop", "film.dcm", dicom_bytes(32))
    tab.page.wait_for_selector('#shown-about:text-matches("^film.dcm: DICOM")')
    tab.page.click("#tab-batch")
    drop("#batch-drop", "one.png", encoded(picture(3)))
    assert tab.page.evaluate("document.getElementById('files').files[0].name") == "one.png"


def test_an_abstention_stands_where_the_answer_would(tab):
    tab.choose(encoded(picture(1).point(lambda v: v // 100)), "dark.png")
    tab.shown()
    tab.page.fill("#question", "Is the heart enlarged?")
    tab.page.click("#send")
    text = tab.answer()
    assert "No answer is given: the image's domain is unknown" in text
    assert "The model said: Yes." in text and tab.page.locator(".said").count() == 0
    assert "the answer rests on the image alone" in text
    tab.shot("abstained")


def test_compare_side_by_side_and_download(tab):
    tab.send_compared()
    text = tab.answer()
    for name in ("clean, with references", "noise, without references"):
        assert name in text
    assert tab.page.locator("[aria-label='Side by side'] meter").count() == 4
    assert tab.page.locator(".seen img").count() == 2
    with tab.page.expect_download() as waiting:
        tab.page.click("#save")
    body = json.loads(Path(waiting.value.path()).read_text())
    assert len(body["conditions"]) == 4 and body["image"]["sha256"] in text
    assert waiting.value.suggested_filename == f"mmedrag-{body['id']}.json"
    tab.shot("compare")


def test_keyboard_only(tab):
    """From the address bar to an answer without a mouse; focus is always visible."""
    page, keys = tab.page, tab.page.keyboard

    def active():
        return page.evaluate("document.activeElement.id || document.activeElement.className")

    def tab_to(name):
        for _ in range(40):
            if active() == name:
                return
            keys.press("Tab")
        raise AssertionError(f"{name} cannot be reached with Tab")

    keys.press("Tab")
    assert active() == "skip"
    tab_to("tab-ask")
    keys.press("ArrowRight")
    assert active() == "tab-batch" and page.is_visible("#panel-batch")
    keys.press("ArrowLeft")
    assert page.is_visible("#panel-ask")
    for _ in range(40):  # to the first example
        if page.evaluate("document.activeElement.closest('.examples') !== null"):
            break
        keys.press("Tab")
    style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert style != "none"
    keys.press("Enter")
    tab.shown()
    page.wait_for_selector("#send:focus")
    keys.press("Shift+Tab")
    assert active() == "compare"
    keys.press("Space")
    keys.press("Tab")
    keys.press("Enter")
    assert "Benchmark's truth" in tab.answer()
    assert active() == "result"
    tab_to("save")


def test_examples_of_three_domains_bring_their_question(tab):
    labels = tab.page.locator("#example-list button").all_text_contents()
    assert len(labels) == 6
    assert {t.partition(":")[0] for t in labels} == {"radiology", "ophthalmology", "pathology"}
    tab.page.locator("#example-list button").nth(2).click()
    assert "128 × 128" in tab.shown()
    assert tab.page.input_value("#question") in labels[2]
    tab.page.click("#send")
    assert "Benchmark's truth" in tab.answer()
    tab.page.check("input[name=task][value=report]")
    tab.page.click("#send")
    tab.page.wait_for_selector(".said.report")
    assert "Benchmark's truth" not in tab.answer()  # it is the truth of the question


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("notes.txt", b"Dear colleague, " * 20, "not an image in a known format"),
        ("cut.png", encoded(picture(1))[:200], "cannot be decoded"),
        ("empty.png", b"", "the file is empty"),
        ("broken.dcm", dicom_bytes()[:400], "DICOM"),
    ],
)
def test_a_wrong_file_is_named_and_nothing_is_sent(tab, name, data, message):
    tab.choose(data, name)
    tab.page.wait_for_selector("#error:not(:empty)")
    assert message in tab.page.text_content("#error") and name in tab.page.text_content("#error")
    tab.page.fill("#question", "Is it so?")
    tab.page.click("#send")
    assert tab.page.text_content("#error") == "Choose an image first."
    assert tab.page.is_hidden("#result")
    if name == "notes.txt":
        assert tab.page.is_hidden("#result")
        tab.choose(encoded(picture(1)))  # the next file is taken
        tab.shown()
        assert tab.page.text_content("#error") == ""


def test_a_large_file_is_refused_before_it_is_sent(chromium):
    settings = ServeSettings(port=0, rate=0, max_bytes=3000)
    with live(create_app(make_pipeline(scripted), settings), settings) as server:
        tab = Page(chromium, server.url)
        tab.choose(encoded(picture(1, 200)), "huge.png")
        tab.page.wait_for_selector("#error:not(:empty)")
        assert "are taken" in tab.page.text_content("#error")
        assert "/v1/preview" not in httpx_metrics(server.url)
        tab.close()


def httpx_metrics(url):
    import httpx

    return httpx.get(url + "/metrics").text


def test_a_twelve_bit_dicom_is_shown_and_answered(tab):
    pytest.importorskip("pydicom")
    tab.choose(dicom_bytes(160), "film.dcm")
    assert tab.shown() == "film.dcm: DICOM, 160 × 160 pixels"
    # the disc is bright and the corner dark: all of the range is used
    low, high = tab.page.evaluate(
        """() => { const i = document.getElementById('shown'), c = document.createElement('canvas');
        c.width = c.height = 160; const x = c.getContext('2d'); x.drawImage(i, 0, 0, 160, 160);
        return [x.getImageData(2, 2, 1, 1).data[0], x.getImageData(80, 80, 1, 1).data[0]]; }"""
    )
    assert low < 10 and high > 245
    tab.page.fill("#question", "Is there a disc?")
    tab.page.click("#send")
    assert "Yes." in tab.answer() and "Doe^Jane" not in tab.page.content()
    assert "Jane" not in tab.page.content()
    tab.shot("dicom")


def test_a_slow_model_shows_that_it_works_and_can_be_cancelled(tab):
    tab.choose(encoded(picture(1)))
    tab.shown()
    tab.page.fill("#question", "Is it slow?")
    tab.page.click("#send")
    tab.page.wait_for_selector('#seconds:text-matches("^[1-9] s$")')
    assert tab.page.is_disabled("#send") and tab.page.is_visible("#cancel")
    tab.shot("waiting")
    assert "Yes." in tab.answer() and tab.page.is_hidden("#cancel")
    tab.page.click("#send")
    tab.page.wait_for_selector("#cancel:not([hidden])")
    tab.page.click("#cancel")
    tab.page.wait_for_selector("#send:not([disabled])")
    assert tab.page.text_content("#error") == "Cancelled."


def test_a_failing_model_is_said_and_the_next_question_answered(tab):
    tab.choose(encoded(picture(1)))
    tab.shown()
    tab.page.fill("#question", "Does it burst?")
    tab.page.click("#send")
    tab.page.wait_for_selector("#error:not(:empty)")
    assert "the model failed" in tab.page.text_content("#error")
    tab.shot("failed")
    tab.page.fill("#question", "Is it so?")
    tab.page.click("#send")
    assert "Yes." in tab.answer() and tab.page.text_content("#error") == ""
    tab.choose(encoded(picture(2)))  # the old answer must not stand beside a new image
    tab.page.wait_for_selector("#result", state="hidden")


def test_markup_in_answers_and_references_stays_text(chromium):
    from serve_tools import Shelf

    class Evil(Shelf):
        texts = ("<img src=x onerror=alert(1)>", "<script>alert(2)</script>", "fine")

    pipeline = make_pipeline(lambda r: "<b>Yes</b>", retrievers={"radiology": Evil()})
    settings = ServeSettings(port=0, rate=0)
    with live(create_app(pipeline, settings), settings) as server:
        tab = Page(chromium, server.url)
        tab.page.on("dialog", lambda d: tab.errors.append("a script ran"))
        tab.choose(encoded(picture(1)))
        tab.shown()
        tab.page.fill("#question", "Is it <i>so</i>?")
        tab.page.click("#send")
        text = tab.answer()
        assert "<b>Yes</b>" in text and "<img src=x onerror" in text and "<i>so</i>" in text
        assert tab.page.locator("#result-body b, #result-body script, #result-body i").count() == 0
        tab.close()


def test_two_tabs_do_not_meet(chromium, server):
    first, second = Page(chromium, server.url), Page(chromium, server.url)
    for tab, seed, word in ((first, 1, "slow"), (second, 2, "fast")):
        tab.choose(encoded(picture(seed)), f"{word}.png")
        tab.shown()
        tab.page.fill("#question", f"Is it {word}?")
    first.page.click("#send")
    second.page.click("#send")
    texts = [first.answer(), second.answer()]
    from mmedrag.images.alike import pixel_hash

    for text, seed, word in zip(texts, (1, 2), ("slow", "fast"), strict=True):
        assert f"Is it {word}?" in text
        own = pixel_hash(picture(seed))
        assert text.count(own) >= 2  # what the model was given, and what was sent
    assert pixel_hash(picture(1)) not in texts[1] and pixel_hash(picture(2)) not in texts[0]
    first.close(), second.close()


def test_batch_with_progress_failures_and_download(tab):
    tab.page.click("#tab-batch")
    files = [
        {"name": f"{n}.png", "mimeType": "image/png", "buffer": encoded(picture(n))}
        for n in range(5)
    ] + [{"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"}]
    tab.page.set_input_files("#files", files)
    tab.page.fill("#batch-question", "Is the heart enlarged?")
    tab.page.click("#batch-send")
    tab.page.wait_for_selector("#batch-save:not([hidden])")
    assert tab.page.text_content("#batch-status") == "6 of 6 done, 1 failed"
    assert tab.page.evaluate("document.getElementById('batch-progress').value") == 6
    rows = tab.page.locator("#batch-table tbody tr").all_text_contents()
    assert len(rows) == 6 and sum("Yes." in row for row in rows) == 5
    assert "Failed: image: not an image" in rows[5]
    with tab.page.expect_download() as waiting:
        tab.page.click("#batch-save")
    body = json.loads(Path(waiting.value.path()).read_text())
    from mmedrag.images.alike import pixel_hash

    for n in range(5):
        assert body[n]["result"]["image"]["sha256"] == pixel_hash(picture(n))
    assert "error" in body[5]
    tab.shot("batch")


def test_batch_can_be_stopped(tab):
    tab.page.click("#tab-batch")
    files = [
        {"name": f"{n}.png", "mimeType": "image/png", "buffer": encoded(picture(n))}
        for n in range(12)
    ]
    tab.page.set_input_files("#files", files)
    tab.page.fill("#batch-question", "Is it slow?")
    tab.page.click("#batch-send")
    tab.page.wait_for_selector("#batch-stop:not([hidden])")
    tab.page.wait_for_selector('#batch-status:text-matches("^[1-9] of 12 done")')
    assert 0 < tab.page.evaluate("document.getElementById('batch-progress').value") < 12
    tab.page.click("#batch-stop")
    tab.page.wait_for_selector("#batch-save:not([hidden])")
    table = tab.page.text_content("#batch-table")
    assert "stopped" in table and "Yes." in table  # what was done before stays


def test_a_narrow_screen(chromium, server):
    tab = Page(chromium, server.url, NARROW)
    tab.send_compared()
    tab.answer()
    tab.shot("narrow")
    wide = tab.page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter(e => e.offsetParent &&
        !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert wide == []  # nothing has to be scrolled sideways
    left = tab.page.evaluate(
        """() => [...document.querySelectorAll('.cards thead th')].filter(e => {
        const box = e.closest('thead').getBoundingClientRect(); return box.width > 1; })
        .map(e => e.textContent)"""
    )
    assert left == []  # the heads of the tables, now in each cell, leave no trace
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    small = tab.page.evaluate(
        """() => [...document.querySelectorAll('button')].filter(b => b.offsetParent &&
        b.getBoundingClientRect().height < 40).map(b => b.textContent)"""
    )
    assert small == []  # fingers need room
    tab.close()


def test_a_service_with_keys_asks_for_one(chromium, tmp_path):
    keys = write_keys(tmp_path / "keys", doctor=("read", "ask"))
    loaded = load_keys({"MMEDRAG_API_KEYS": str(tmp_path / "keys")})
    settings = ServeSettings(port=0)
    with live(create_app(make_pipeline(scripted), settings, loaded), settings) as server:
        tab = Page(chromium, server.url)
        assert tab.page.is_visible("#key")
        tab.choose(encoded(picture(1)))
        tab.page.wait_for_selector("#error:not(:empty)")
        assert "API key" in tab.page.text_content("#error")
        tab.page.fill("#key", keys["doctor"])
        tab.choose(encoded(picture(1)), "again.png")
        tab.shown()
        tab.page.fill("#question", "Is it so?")
        tab.page.click("#send")
        assert "Yes." in tab.answer()
        stored = tab.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
        assert stored == "[{},{}]" and tab.context.cookies() == []
        tab.close()


def test_names_roles_and_contrast(tab):
    """Every control has a name, every image a text, one h1, and text stands out (WCAG AA)."""
    tab.send_compared()
    tab.answer()
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        found = tab.page.evaluate(AUDIT)
        assert found == [], scheme
        tab.shot(f"scheme-{scheme}")
    assert tab.page.get_attribute("html", "lang") == "en"
    live_regions = tab.page.locator("[role=status][aria-live=polite], [role=alert]").count()
    assert live_regions == 4


AUDIT = """() => {
  const problems = [];
  const seen = (e) => e.offsetParent !== null || e.tagName === 'BODY';
  const label = (e) => (e.labels && e.labels.length && e.labels[0].textContent.trim()) ||
    e.getAttribute('aria-label') || e.textContent.trim();
  for (const e of document.querySelectorAll('button, input, textarea, meter, progress'))
    if (seen(e) && !label(e)) problems.push('no name: ' + e.outerHTML.slice(0, 80));
  for (const e of document.querySelectorAll('img'))
    if (!e.hasAttribute('alt')) problems.push('no alt: ' + e.outerHTML.slice(0, 80));
  if (document.querySelectorAll('h1').length !== 1) problems.push('not one h1');
  const rgb = (c) => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (c) => { const [r, g, b] = rgb(c).map((v) => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e)
    .backgroundColor; if (rgb(c).length < 4 || rgb(c)[3] > 0) return c; }
    return getComputedStyle(document.body).backgroundColor; };
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !seen(e) || e.closest('.skip, noscript, meter, progress') || e.disabled) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const what = `${e.tagName} ${e.textContent.slice(0, 40)}`;
    if (ratio < 4.5) problems.push(`contrast ${ratio.toFixed(2)}: ${what}`);
  }
  return problems;
}"""


def test_the_service_gone_away_is_said(chromium):
    settings = ServeSettings(port=0, rate=0)
    with live(create_app(make_pipeline(scripted), settings), settings) as server:
        tab = Page(chromium, server.url)
        tab.choose(encoded(picture(1)))
        tab.shown()
        tab.page.fill("#question", "Is it so?")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(20)
        tab.page.click("#send")
        tab.page.wait_for_selector("#error:not(:empty)")
        assert tab.page.text_content("#error") == "The service cannot be reached."
        tab.close()
