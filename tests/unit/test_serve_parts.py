"""The service's parts, each by itself: queue, evidence, keys, limits, audit log, chat schema."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from mmedrag.images.alike import pixel_hash  # noqa: E402
from mmedrag.images.files import decode_image
from mmedrag.pipeline.evidence import abstention, guess_answer_type, references  # noqa: E402
from mmedrag.records.records import Answer, Domain, Hit, Prompt, Selection, Trace, UserError  # noqa: E402
from mmedrag.serve import (  # noqa: E402
    audit as audits,  # noqa: E402
    openai,
    uploads,
)
from mmedrag.serve.audit import Audit  # noqa: E402
from mmedrag.serve.decoder import BadImage, Decoders  # noqa: E402
from mmedrag.serve.errors import Refused  # noqa: E402
from mmedrag.serve.metrics import HELP, Metrics  # noqa: E402
from mmedrag.serve.queue import Batcher, Busy, Job, Stopped  # noqa: E402
from mmedrag.serve.security import Keys, Rate, load_keys, may_bind, new_key, same_site  # noqa: E402
from serve_tools import dicom_bytes, encoded, picture, write_keys  # noqa: E402

# --- queue -------------------------------------------------------------------------------------


def test_jobs_that_wait_become_one_batch_in_order():
    started, go, sizes = threading.Event(), threading.Event(), []

    def work(jobs: list[Job[int]]) -> None:
        started.set()
        go.wait(5)
        sizes.append([job.payload for job in jobs])
        for job in jobs:
            job.done(job.payload * 2)

    batcher = Batcher(work, max_waiting=20, batch=3, linger=0)
    first = batcher.submit(0)
    started.wait(5)
    rest = [batcher.submit(n) for n in range(1, 6)]
    assert batcher.depth == 6
    go.set()
    assert [f.result(5) for f in [first, *rest]] == [0, 2, 4, 6, 8, 10]
    assert sizes == [[0], [1, 2, 3], [4, 5]]
    assert batcher.stop(5)


def test_a_full_queue_says_when_to_come_back_and_has_room_again():
    go = threading.Event()

    def work(jobs: list[Job[int]]) -> None:
        go.wait(5)
        for job in jobs:
            job.done(None)

    batcher = Batcher(work, max_waiting=2, batch=1, linger=0)
    batcher.seconds = 3.0
    waiting = [batcher.submit(1), batcher.submit(2)]
    with pytest.raises(Busy) as busy:
        batcher.submit(3)
    assert busy.value.retry_after == 6  # two jobs of three seconds
    go.set()
    [f.result(5) for f in waiting]
    until = time.monotonic() + 5
    while batcher.depth and time.monotonic() < until:
        time.sleep(0.01)
    assert batcher.submit(4).result(5) is None
    batcher.stop(5)


def test_a_job_whose_caller_left_is_not_run():
    go, ran = threading.Event(), []

    def work(jobs: list[Job[int]]) -> None:
        go.wait(5)
        ran.extend(job.payload for job in jobs)
        for job in jobs:
            job.done(None)

    batcher = Batcher(work, batch=1, linger=0)
    first, second = batcher.submit(1), batcher.submit(2)
    time.sleep(0.05)
    assert second.cancel()
    go.set()
    first.result(5)
    assert batcher.stop(5)
    assert ran == [1]


def test_work_that_raises_or_forgets_a_job_fails_it_and_goes_on():
    def work(jobs: list[Job[str]]) -> None:
        if jobs[0].payload == "raise":
            raise ValueError("no")
        if jobs[0].payload == "good":
            jobs[0].done("yes")

    batcher = Batcher(work, batch=1, linger=0)
    with pytest.raises(ValueError, match="no"):
        batcher.submit("raise").result(5)
    with pytest.raises(RuntimeError, match="without an answer"):
        batcher.submit("forget").result(5)
    assert batcher.submit("good").result(5) == "yes"
    batcher.stop(5)


def test_stopping_finishes_what_waits_and_takes_no_more():
    def work(jobs: list[Job[int]]) -> None:
        time.sleep(0.05)
        for job in jobs:
            job.done(job.payload)

    batcher = Batcher(work, batch=1, linger=0)
    waiting = [batcher.submit(n) for n in range(4)]
    assert batcher.stop(5)
    assert [f.result(0) for f in waiting] == [0, 1, 2, 3]
    with pytest.raises(Stopped):
        batcher.submit(5)


def test_work_beyond_the_grace_is_failed_not_forgotten():
    go = threading.Event()

    def work(jobs: list[Job[int]]) -> None:
        go.wait(5)

    batcher = Batcher(work, batch=1, linger=0)
    waiting = [batcher.submit(n) for n in range(2)]
    assert not batcher.stop(0.1)
    for future in waiting:
        with pytest.raises(Stopped):
            future.result(1)
    go.set()


# --- evidence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Is there an effusion?", "closed"),
        ("isn't there a fracture?", "closed"),
        ("Does the image show a mass or not?", "closed"),
        ("Is the effusion left or right?", "open"),
        ("Where is the opacity?", "open"),
        ("Describe the heart.", "open"),
        ("Look at the heart. Is it enlarged?", "closed"),
        ("Island of tissue?", "open"),
    ],
)
def test_answer_type_is_guessed_from_the_question(question, kind):
    assert guess_answer_type(question) == kind


def trace(**parts):
    shared = dict(example_id="a", task="vqa", question="Is it?", answer_type="closed")
    return Trace(**{**shared, "domain": Domain(label="radiology", confidence=0.9), **parts})


def test_abstention_says_why():
    sure = Answer(text="yes", label="yes", p_yes=0.7)
    assert abstention(trace(answer=sure), 0.6) is None
    assert "0.70 is under the threshold 0.80" in abstention(trace(answer=sure), 0.8)
    low = Answer(text="no", label="no", p_yes=0.3)  # as sure of no as the other was of yes
    assert abstention(trace(answer=low), 0.6) is None
    unclear = Answer(text="perhaps", label="unclear", p_yes=0.9)
    assert "neither yes nor no" in abstention(trace(answer=unclear))
    unknown = trace(answer=sure, domain=Domain(label="unknown", confidence=0.8, reason="far away"))
    assert abstention(unknown) == "the image's domain is unknown: far away"


def test_every_reference_says_why_it_was_kept_or_dropped():
    hits = [
        Hit(id=name, text=text, score=0.9 - at / 10, rank=at)
        for at, (name, text) in enumerate(
            [("a", "One."), ("b", "Long."), ("c", " "), ("d", "Far.")]
        )
    ]
    rule = Selection(rule="log_ratio", kept=["a", "b", "c"], reason="gap 3")
    prompt = Prompt(template="t", text="", references=["a"], dropped=["b", "c"])
    rows = references(trace(hits=hits, selection=rule, prompt=prompt))
    assert [(row["id"], row["used"]) for row in rows] == [
        ("a", True),
        ("b", False),
        ("c", False),
        ("d", False),
    ]
    assert [row["why"] for row in rows] == [
        "kept by the rule log_ratio: gap 3",
        "kept by the rule log_ratio: gap 3, but it does not fit the model's context",
        "kept by the rule log_ratio: gap 3, but it has no text",
        "dropped by the rule log_ratio: gap 3",
    ]


# --- keys, rates, hosts ------------------------------------------------------------------------


def test_keys_are_hashed_at_rest_and_scoped(tmp_path):
    path = tmp_path / "keys"
    keys = write_keys(path, reader=("read",), doctor=("read", "ask"))
    text = path.read_text()
    assert len(text.splitlines()) == 2 and path.stat().st_mode & 0o777 == 0o600
    for key in keys.values():
        assert key not in text and key.split("_", 2)[2] not in text
    found = load_keys({"MMEDRAG_API_KEYS": str(path)})
    assert found.check(f"Bearer {keys['doctor']}", "ask") == "doctor"
    assert found.check(f"bearer {keys['reader']}", "read") == "reader"
    with pytest.raises(Refused) as refused:
        found.check(f"Bearer {keys['reader']}", "ask")
    assert refused.value.status == 403
    wrong = [
        None,
        "",
        "Bearer",
        "Bearer mmr_doctor_",
        f"Basic {keys['doctor']}",
        "Bearer mmr__",
        f"Bearer {keys['doctor']}x",
        keys["doctor"],
        f"Bearer {keys['doctor'][:-1]}",
        "Bearer mmr_nobody_" + keys["doctor"].split("_", 2)[2],
        "Bearer mmr_reader_" + keys["doctor"].split("_", 2)[2],
        "Bearer \udcff_\udcff_\udcff",
    ]
    for header in wrong:
        with pytest.raises(Refused) as refused:
            found.check(header, "read")
        assert refused.value.status == 401, header


def test_key_files_that_cannot_be_trusted_are_refused(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(UserError, match="cannot be read"):
        load_keys({"MMEDRAG_API_KEYS": str(path)})
    write_keys(path, one=("ask",))
    path.chmod(0o644)
    with pytest.raises(UserError, match="others can read"):
        load_keys({"MMEDRAG_API_KEYS": str(path)})
    path.chmod(0o640)  # as orchestrators mount secrets for an unprivileged user
    assert load_keys({"MMEDRAG_API_KEYS": str(path)})
    path.chmod(0o600)
    for line in ("name:ask:salt", "two:root:00:" + "0" * 64, "two:ask::" + "0" * 64):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=":1: expected NAME"):
            load_keys({"MMEDRAG_API_KEYS": str(path)})
    path.write_text("# none\n")
    with pytest.raises(UserError, match="holds no API key"):
        load_keys({"MMEDRAG_API_KEYS": str(path)})
    for name in ("a:b", "", "a_b", "x" * 41):
        with pytest.raises(UserError, match="key name"):
            new_key(path, name, ("ask",))
    new_key(path, "again", ("ask",))
    with pytest.raises(UserError, match="already"):
        new_key(path, "again", ("ask",))
    assert not load_keys({})


def test_other_hosts_need_keys(tmp_path):
    keys = Keys()
    may_bind("127.0.0.1", keys)
    for host in ("0.0.0.0", "192.168.1.7", "::", "example.org"):
        with pytest.raises(UserError, match="needs API keys"):
            may_bind(host, keys)
    write_keys(tmp_path / "keys", one=("ask",))
    may_bind("0.0.0.0", load_keys({"MMEDRAG_API_KEYS": str(tmp_path / "keys")}))


def test_rate_limit_refills_and_is_per_caller():
    now = [0.0]
    rate = Rate(60, 2, clock=lambda: now[0])
    rate.take("a"), rate.take("a"), rate.take("b")
    with pytest.raises(Refused) as refused:
        rate.take("a")
    assert refused.value.status == 429 and refused.value.retry_after == 2  # a second, rounded up
    now[0] = 1.01
    rate.take("a")
    with pytest.raises(Refused):
        rate.take("a")
    for n in range(20_000):  # addresses cannot fill the memory
        rate.take(str(n))
    assert len(rate._buckets) == 10_000


def test_foreign_hosts_and_origins_are_refused():
    known = ("localhost", "127.0.0.1", "::1")
    same_site({"host": "localhost:8000"}, known)
    same_site({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, known)
    same_site({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, known)
    for headers in (
        {"host": "evil.example"},
        {"host": "localhost.evil.example:80"},
        {},
        {"host": "localhost:8000", "origin": "http://evil.example"},
        {"host": "localhost:8000", "origin": "null"},
        {"host": "localhost:8000", "origin": "http://localhost:9000"},
    ):
        with pytest.raises(Refused) as refused:
            same_site(headers, known)
        assert refused.value.status == 403, headers
    same_site({"host": "any.example"}, ("*",))


# --- audit log ---------------------------------------------------------------------------------


def test_audit_log_is_appended_and_any_change_is_found(tmp_path):
    path = tmp_path / "log" / "audit.jsonl"
    log = Audit(path)
    log.write([{"request": "1"}, {"request": "2"}])
    with pytest.raises(UserError, match="another service"):
        Audit(path)
    log.close()
    again = Audit(path)
    again.write([{"request": "3"}])
    again.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["request"] for row in rows] == ["1", "2", "3"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["time"]) for row in rows)
    assert audits.verify(path) == 3 and path.stat().st_mode & 0o777 == 0o600
    lines = path.read_text().splitlines(keepends=True)
    for changed in (
        [lines[0].replace('"1"', '"9"'), *lines[1:]],
        [lines[0], lines[2]],
        [lines[1], lines[0], lines[2]],
        ["x\n", *lines],
    ):
        path.write_text("".join(changed))
        with pytest.raises(UserError, match="altered|not an audit record"):
            audits.verify(path)


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = Audit(path)
    log.write([{"request": "1"}])
    log.close()
    with open(path, "a") as handle:
        handle.write('{"request": "2", "prev')
    log = Audit(path)
    log.write([{"request": "3"}])
    log.close()
    assert audits.verify(path) == 2


# --- decoding ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoders():
    made = Decoders(1, timeout=20)
    yield made
    made.close()


def test_pictures_are_decoded_to_the_same_pixels(decoders, tmp_path):
    image = picture(3)
    for kind in ("PNG", "BMP", "TIFF"):
        found = decoders.decode(encoded(image, kind), False, 10**6, preview=True)
        assert (found.width, found.height, found.kind) == (*image.size, kind)
        assert found.sha256 == pixel_hash(image) == pixel_hash(decode_image(found.ppm))
        assert decode_image(found.preview).size == image.size


def test_twelve_bit_dicom_uses_the_whole_range(decoders):
    pytest.importorskip("pydicom")
    for named in (True, False):  # by its name, or by its content
        found = decoders.decode(dicom_bytes(), named, 10**6)
        assert found.kind == "DICOM" and found.width == 64
        assert decode_image(found.ppm).getextrema() == ((0, 255),) * 3


def test_too_many_pixels_are_refused_unread(decoders):
    for data in (encoded(picture(1, 100)), dicom_bytes(100)):
        with pytest.raises(BadImage, match="at most 5,000 are taken") as bad:
            decoders.decode(data, False, 5000)
        assert bad.value.large


def test_deflated_dicom_is_refused_before_it_is_inflated(decoders):
    data = dicom_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    with pytest.raises(BadImage, match="deflated"):
        decoders.decode(data, True, 10**6)


def test_a_decoder_that_dies_or_hangs_is_replaced(decoders):
    good, before = encoded(picture(1)), decoders.replaced
    child = decoders._idle.get()
    child.kill()  # between requests: not noticed by anybody
    decoders._idle.put(child)
    child.wait()
    assert decoders.decode(good, False, 10**6).kind == "PNG"
    assert decoders.replaced == before
    decoders.timeout = 0.0001
    with pytest.raises(BadImage, match="not decoded within"):
        decoders.decode(encoded(picture(2, 2000)), False, 10**8)
    decoders.timeout = 20
    assert decoders.replaced == before + 1
    assert decoders.decode(good, False, 10**6).kind == "PNG"


def test_a_decoder_gets_no_secrets(decoders, monkeypatch):
    monkeypatch.setenv("MMEDRAG_API_KEYS", "/secret")
    child = decoders._start()
    until = time.monotonic() + 10
    environment = b""
    while not environment and time.monotonic() < until:  # empty while the child is being started
        environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    child.kill()
    child.wait()
    assert b"secret" not in environment and b"PYTHONPATH" in environment


# --- bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "http://127.0.0.1/x.png",
        "ftp://x/y",
        "image.png",
        7,
        "data:text/html;base64,PGI+",
        "data:image/png,plain",
        "data:image/png;base64,#",
        None,
        [],
    ],
)
def test_only_data_urls_are_read(value):
    with pytest.raises(Refused) as refused:
        uploads.data_url(value, "image")
    assert refused.value.status == 400


def test_data_urls_and_fields():
    assert uploads.data_url("data:image/png;base64,QUJD", "image").data == b"ABC"
    assert uploads.data_url("data:application/dicom;base64,QUJD", "image").dicom
    for value, expected in (("true", True), (True, True), ("0", False), (None, None)):
        if expected is not None:
            assert uploads.flag({"x": value}, "x") is expected
    for value in ("yes", 1, [], None):
        with pytest.raises(Refused):
            uploads.flag({"x": value}, "x")
    assert uploads.text({"x": " a\x00b "}, "x", 9) == "a b"
    assert uploads.text({"x": "\x00"}, "x", 9) is None
    for value in ("\ud800", "x" * 10, 5, {}):
        with pytest.raises(Refused):
            uploads.text({"x": value}, "x", 9)
    with pytest.raises(Refused, match="unknown field, expected a, b"):
        uploads.only({"c": 1}, ("a", "b"))
    for body in (b"", b"[]", b"NaN", b'{"a": NaN}', b"[" * 100_000, b"\xff"):
        with pytest.raises(Refused):
            uploads.parse_json(body)


# --- chat --------------------------------------------------------------------------------------

URL = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
SHOWN = {"type": "image_url", "image_url": {"url": URL}}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_chat_takes_the_last_question_and_the_last_images_and_lists_what_it_ignores():
    body = {
        "model": "m",
        "temperature": 0.3,
        "messages": [
            {"role": "system", "content": "Be brief."},
            user({"type": "text", "text": "First?"}, SHOWN),
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "Second?"},
        ],
    }
    chat = openai.read(body, "m")
    assert chat.question == "Second?" and [i.data for i in chat.images] == [b"pixels"]
    assert chat.ignored == ("messages[0]", "messages[2]", "messages[1]: its text", "temperature")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"messages": []}, 400),
        ({"messages": "x"}, 400),
        ({"messages": [{"role": "user", "content": "No image?"}]}, 400),
        ({"messages": [{"role": "system", "content": [SHOWN]}]}, 400),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "http://a/b"}})]}, 400),
        ({"messages": [user({"type": "input_audio"})]}, 400),
        ({"messages": [7]}, 400),
        ({"n": 2}, 400),
        ({"tools": [{"type": "function"}]}, 400),
        ({"mmedrag": "x"}, 400),
        ({"model": "other"}, 404),
    ],
)
def test_chat_requests_without_a_meaning_are_refused(change, status):
    good = {"model": "m", "messages": [user({"type": "text", "text": "Is it?"}, SHOWN)]}
    assert openai.read(good, "m").ignored == ()
    with pytest.raises(Refused) as refused:
        openai.read({**good, **change}, "m")
    assert refused.value.status == status


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    for seconds in (0.01, 0.3, 500):
        metrics.saw("/v1/ask", 200, seconds)
    values = {name: 1.0 for name, (kind, _) in HELP.items() if kind != "histogram"}
    text = metrics.text(values)
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+')
    for line in text.splitlines():
        assert line.startswith("# ") or sample.fullmatch(line), line
    assert 'mmedrag_requests_total{route="/v1/ask",status="200"} 3' in text
    counts = [int(line.rsplit(" ")[-1]) for line in text.splitlines() if "_bucket{" in line]
    assert counts == sorted(counts) and counts[-1] == 3
