"""The service over a real socket: its own API, and the official OpenAI client unchanged."""

from __future__ import annotations

import base64
import json
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

import httpx  # noqa: E402

from mmedrag.images.alike import pixel_hash  # noqa: E402
from mmedrag.pipeline.evidence import NOTICE  # noqa: E402
from mmedrag.serve.app import create_app  # noqa: E402
from mmedrag.serve.audit import verify  # noqa: E402
from mmedrag.serve.security import load_keys  # noqa: E402
from mmedrag.serve.settings import ServeSettings  # noqa: E402
from serve_tools import dicom_bytes, encoded, live, make_pipeline, picture, write_keys  # noqa: E402

IMAGE = picture(5)
PNG = encoded(IMAGE)
QUESTION = "Is the heart enlarged?"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    audit = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    settings = ServeSettings(port=0, audit=audit, rate=0)
    with live(create_app(make_pipeline(), settings), settings) as found:
        yield found


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def ask(http, path="/v1/ask", data=PNG, name="a.png", **fields):
    return http.post(path, files={"image": (name, data)}, data=fields)


# --- answers with evidence ---------------------------------------------------------------------


def test_an_answer_shows_what_it_rests_on(http):
    body = ask(http, question=QUESTION).json()
    assert body["image"]["sha256"] == pixel_hash(IMAGE) and pixel_hash(IMAGE) in str(body["answer"])
    assert (body["answer"]["label"], body["answer_type"]) == ("yes", "closed")
    assert body["answer"]["p_yes"] == 1.0 and not body["abstained"]
    assert body["domain"]["label"] == "radiology" and body["domain"]["confidence"] == 0.9
    shown = [(r["id"], r["score"], r["used"]) for r in body["references"]]
    assert shown == [("ref-0", 0.9, True), ("ref-1", 0.88, True), ("ref-2", 0.3, False)]
    assert "gap 2" in body["references"][2]["why"] and body["excluded"] == 1
    assert "The heart is enlarged." in body["prompt"]["text"]
    assert "A rib is broken." not in body["prompt"]["text"]
    assert body["notices"] == [NOTICE, "This model knows drawn pictures only."]
    assert body["versions"]["model"] == "scripted"


def test_json_and_multipart_give_the_same_answer(http):
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    sent = http.post("/v1/ask", json={"image": url, "question": QUESTION}).json()
    form = ask(http, question=QUESTION).json()
    for name in ("answer", "references", "domain", "image", "prompt"):
        assert sent[name] == form[name]


def test_comparison_runs_four_conditions_and_shows_both_pictures(http):
    body = ask(http, question=QUESTION, compare="true", preview="true").json()
    names = list(body["conditions"])
    assert names == [
        "clean, with references",
        "clean, without references",
        "noise, with references",
        "noise, without references",
    ]
    used = [sum(r["used"] for r in body["conditions"][n]["references"]) for n in names]
    assert used == [2, 0, 2, 0]
    seeds = {body["conditions"][n]["condition"]["noise"]["seed"] for n in names[2:]}
    again = ask(http, question=QUESTION, compare="true").json()["conditions"]
    assert seeds == {again[n]["condition"]["noise"]["seed"] for n in names[2:]} and len(seeds) == 1
    assert body["previews"]["clean"] != body["previews"]["noise"]
    assert body["answer"] == body["conditions"][names[0]]["answer"]


def test_reports_open_questions_and_switches(http):
    report = ask(http, "/v1/report").json()
    assert report["task"] == "report" and report["question"] is None
    assert report["answer"].get("p_yes") is None
    opened = ask(http, question="Where is the opacity?").json()
    assert opened["answer_type"] == "open" and "p_yes" not in opened["answer"]
    bare = ask(http, question=QUESTION, references="none").json()
    assert bare["selection"]["reason"] == "references switched off"
    assert not any(r["used"] for r in bare["references"])
    blank = ask(http, question=QUESTION, noise="blank").json()
    assert blank["condition"]["noise"]["kind"] == "blank"


def test_an_unknown_domain_is_not_answered(http):
    dark = encoded(picture(1).point(lambda v: v // 100))
    body = ask(http, data=dark, question=QUESTION).json()
    assert body["abstained"] and "domain is unknown" in body["abstain_reason"]
    assert body["references"] == [] and body["prompt"]["references"] == []


def test_retrieve_and_preview_need_no_question(http):
    found = ask(http, "/v1/retrieve").json()
    assert [r["id"] for r in found["references"]] == ["ref-0", "ref-1", "ref-2"]
    assert "answer" not in found
    view = ask(http, "/v1/preview").json()["views"][0]
    assert view["sha256"] == found["image"]["sha256"] and view["kind"] == "PNG"
    assert base64.b64decode(view["png"].partition(",")[2])[:4] == b"\x89PNG"


def test_dicom_and_several_views(http):
    pytest.importorskip("pydicom")
    body = ask(http, data=dicom_bytes(), name="film.dcm", question=QUESTION).json()
    assert body["image"]["views"][0]["kind"] == "DICOM"
    assert "Doe" not in json.dumps(body)
    views = [("image", ("a.png", PNG)), ("image", ("b.png", encoded(picture(6))))]
    both = http.post("/v1/ask", files=views, data={"question": QUESTION}).json()
    assert len(both["image"]["views"]) == 2
    assert both["image"]["sha256"] not in {v["sha256"] for v in both["image"]["views"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "question: missing"),
        ({"question": "x" * 2001}, "2,001 characters"),
        ({"question": QUESTION, "references": "mine"}, "selected or none or all"),
        ({"question": QUESTION, "colour": "red"}, "unknown field"),
        ({"question": QUESTION, "noise": "other_patient"}, "noise"),
        ({"question": QUESTION, "compare": "maybe"}, "true or false"),
        ({"question": QUESTION, "image": "/etc/passwd"}, "unknown field"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(http, fields, message):
    refused = ask(http, **fields)
    assert refused.status_code == 400 and message in refused.json()["error"]["message"]


def test_limits_and_unknown_routes(http):
    assert http.post("/v1/ask", json={"question": QUESTION}).status_code == 400
    for answer in (http.post("/v1/ask", content=b"x"), http.post("/v1/ask", data={"a": "b"})):
        assert answer.status_code == 415
    five = [("image", (f"{i}.png", PNG)) for i in range(5)]
    assert http.post("/v1/ask", files=five, data={"question": QUESTION}).status_code == 400
    assert http.get("/nothing").json()["error"]["message"] == "Not Found"
    assert http.get("/v1/ask").status_code == 405
    assert http.get("/docs").status_code == 404  # its page would load scripts from elsewhere


def test_every_response_carries_security_headers(http):
    for answer in (http.get("/"), http.get("/healthz"), http.get("/nothing"), ask(http)):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store" and "server" not in answer.headers
    for path in ("/", "/healthz", "/page/page.js"):  # as probes and proxies ask
        head = http.head(path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == http.get(path).headers["content-length"]
    foreign = http.get("/healthz", headers={"host": "evil.example"})
    assert foreign.status_code == 403 and "x-frame-options" in foreign.headers
    page = ask(http, question=QUESTION)
    assert page.status_code == 200
    cross = http.post(
        "/v1/ask", files={"image": ("a", PNG)}, headers={"origin": "http://evil.example"}
    )
    assert cross.status_code == 403


def test_health_metrics_and_schema(server, http):
    assert http.get("/healthz").json() == {"ok": True}
    assert http.get("/readyz").json() == {"ready": True, "problems": []}
    ask(http, question=QUESTION)
    text = http.get("/metrics").text
    assert 'mmedrag_requests_total{route="/v1/ask",status="200"}' in text
    assert "mmedrag_ready 1" in text
    schema = http.get("/openapi.json").json()
    body = schema["paths"]["/v1/ask"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}


def test_the_audit_log_holds_who_what_and_versions_but_no_text(server, http):
    ask(http, question="Is Jane Doe well?", patient="Doe-1961", name="jane_doe.png")
    path = server.app.state.engine.audit.path
    text = path.read_text()
    last = json.loads(text.splitlines()[-1])
    assert last["image"] == pixel_hash(IMAGE) and last["references"] == ["ref-0", "ref-1"]
    assert last["versions"]["model"] == "scripted" and last["action"] == "ask"
    for word in ("Jane", "Doe", "jane", "enlarged", "Yes"):
        assert word not in text
    assert verify(path) == len(text.splitlines())


def test_nothing_of_a_request_is_kept(server, http):
    ask(http, question=QUESTION)
    ask(http, question="x" * 5000)
    until = time.monotonic() + 5  # files go when the future is settled
    folder = server.app.state.engine._folder
    while list(folder.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not list(folder.iterdir()) and folder.stat().st_mode & 0o777 == 0o700


# --- the OpenAI client -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai", reason="needs the extra 'serve'")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def messages(data=PNG, question=QUESTION):
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    parts = [
        {"type": "text", "text": question},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
    ]
    return [{"role": "user", "content": parts}]


def test_the_official_client_gets_an_answer_and_its_evidence(client):
    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == client.models.retrieve("mmedrag").id == name
    made = client.chat.completions.create(model=name, messages=messages(), temperature=0)
    assert made.choices[0].message.content.startswith("Yes, " + pixel_hash(IMAGE))
    assert made.choices[0].finish_reason == "stop" and made.model == name
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens > 20
    assert [r["used"] for r in made.mmedrag["references"]] == [True, True, False]
    assert made.mmedrag["selection"]["rule"] == "log_ratio"
    assert made.mmedrag["ignored"] == ["temperature"]


def test_the_official_client_can_ask_for_a_report_without_references(client):
    extra = {"mmedrag": {"task": "report", "references": "none"}}
    made = client.chat.completions.create(
        model="mmedrag", messages=messages(question="-"), extra_body=extra
    )
    assert made.mmedrag["task"] == "report"
    assert made.mmedrag["selection"]["reason"] == "references switched off"


def test_the_official_client_can_stream(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="mmedrag", messages=messages(), stream=True, stream_options=options
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.startswith("Yes, " + pixel_hash(IMAGE))
    assert chunks[-1].usage.total_tokens > 0 and chunks[-2].choices[0].finish_reason == "stop"


def test_the_official_client_sees_refusals_as_its_own_errors(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="no image"):
        client.chat.completions.create(
            model="mmedrag", messages=[{"role": "user", "content": "Is it?"}]
        )
    with pytest.raises(openai.NotFoundError, match="answers with"):
        client.chat.completions.create(model="gpt-4o", messages=messages())
    with pytest.raises(openai.NotFoundError, match="answers with"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.UnprocessableEntityError, match="known format"):
        client.chat.completions.create(model="mmedrag", messages=messages(b"no picture"))
    remote = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}]
    with pytest.raises(openai.BadRequestError, match="never opened"):
        client.chat.completions.create(
            model="mmedrag", messages=[{"role": "user", "content": remote}]
        )


def test_an_abstention_is_the_first_thing_a_chat_says(client):
    dark = encoded(picture(1).point(lambda v: v // 100))
    made = client.chat.completions.create(model="mmedrag", messages=messages(dark))
    assert made.choices[0].message.content.startswith("No answer: the image's domain is unknown")


# --- keys --------------------------------------------------------------------------------------


def test_keys_scopes_and_rates_over_http(tmp_path):
    openai = pytest.importorskip("openai")
    keys = write_keys(tmp_path / "keys", reader=("read",), doctor=("read", "ask"))
    loaded = load_keys({"MMEDRAG_API_KEYS": str(tmp_path / "keys")})
    settings = ServeSettings(port=0, rate=60, burst=6, audit=tmp_path / "audit.jsonl")
    with live(create_app(make_pipeline(), settings, loaded), settings) as server:
        with httpx.Client(base_url=server.url, timeout=30) as http:

            def status(path, key=None):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                files = {"image": ("a.png", PNG)}
                fields = {"question": QUESTION} if path == "/v1/ask" else {}
                answer = http.post(path, files=files, data=fields, headers=headers)
                if answer.status_code == 401:
                    assert answer.headers["www-authenticate"] == "Bearer"
                return answer.status_code

            assert status("/v1/ask") == status("/v1/ask", "mmr_doctor_guess") == 401
            assert status("/v1/ask", keys["reader"]) == 403
            assert status("/v1/retrieve", keys["reader"]) == 200
            assert status("/v1/ask", keys["doctor"]) == 200
            assert http.get("/metrics").status_code == 401
            assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
            page = http.get("/page-settings").json()
            assert page["needs_key"] and http.get("/").status_code == 200
            statuses = [status("/v1/retrieve", keys["reader"]) for _ in range(8)]
            assert statuses.count(429) >= 2  # the burst is over; the other key is not affected
            assert status("/v1/ask", keys["doctor"]) == 200
            guesses = [status("/v1/ask", "mmr_doctor_guess") for _ in range(14)]
            assert guesses[-1] == 429
        client = openai.OpenAI(base_url=server.url + "/v1", api_key=keys["doctor"], max_retries=0)
        assert client.chat.completions.create(model="mmedrag", messages=messages()).choices
        wrong = openai.OpenAI(base_url=server.url + "/v1", api_key=keys["reader"], max_retries=3)
        with pytest.raises(openai.PermissionDeniedError):
            wrong.chat.completions.create(model="mmedrag", messages=messages())
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert {row["who"] for row in rows} == {"reader", "doctor"}


# --- a real, tiny model ------------------------------------------------------------------------


@pytest.mark.model
def test_a_model_answers_many_at_once_as_it_answers_one(tmp_path):
    """Batched with others, a question gets the answer that it gets alone."""
    pytest.importorskip("torch")
    from mmedrag.answering.generators.load import load_generator
    from mmedrag.answering.generators.random_model import random_llava
    from mmedrag.answering.prompts import neutralise
    from mmedrag.pipeline.pipeline import Pipeline

    generator = load_generator("hf", random_llava(tmp_path / "model"))
    pipeline = Pipeline(domain="radiology", generator=generator)
    settings = ServeSettings(port=0, linger=0.05, rate=0)
    with live(create_app(pipeline, settings), settings) as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            pictures = [encoded(picture(n)) for n in range(6)]
            alone = [ask(http, data=p, question=QUESTION).json() for p in pictures]
            together: list = [None] * 6
            threads = [
                threading.Thread(
                    target=lambda n=n: together.__setitem__(
                        n, ask(http, data=pictures[n], question=QUESTION).json()
                    )
                )
                for n in range(6)
            ]
            [t.start() for t in threads], [t.join(60) for t in threads]
            sent = {"messages": messages(pictures[0])}
            chat = http.post("/v1/chat/completions", json=sent).json()
    said = neutralise(chat["mmedrag"]["answer"]["text"])
    assert chat["usage"]["completion_tokens"] == len(generator.inputs.tokenizer.tokenize(said)) > 0
    assert max(body["batch"]["size"] for body in together) > 1
    for one, many in zip(alone, together, strict=True):
        assert one["image"] == many["image"] and one["answer"]["text"] == many["answer"]["text"]
        assert one["answer"]["p_yes"] == pytest.approx(many["answer"]["p_yes"], abs=1e-4)
    assert len({body["answer"]["p_yes"] for body in alone}) == 6
