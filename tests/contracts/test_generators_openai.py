"""The OpenAI-compatible generator against a fake server on the loopback interface."""

import base64
import io

import numpy as np
import pytest
from fake_openai import serve, text_of
from PIL import Image, PngImagePlugin

pytest.importorskip("openai")

from mmedrag.answering.generators.load import load_generator  # noqa: E402
from mmedrag.records.protocols import Request  # noqa: E402
from mmedrag.records.records import Noise, Prompt, UserError  # noqa: E402

KEY = "MMEDRAG_TEST_KEY"


@pytest.fixture
def server():
    with serve() as running:
        yield running


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    rng = np.random.default_rng(0)
    told = PngImagePlugin.PngInfo()
    told.add_text("Comment", "A. Name, 1970-01-01")
    image = Image.fromarray(rng.integers(0, 255, (40, 64, 3), dtype=np.uint8))
    image.save(path, pnginfo=told)
    return path


def open_(server, **options):
    return load_generator("openai", "m", base_url=server[0], **options)


def ask(text="Is it so?", images=(), closed=True, style="chat", noise=None):
    prompt = Prompt(template="t", text=text, style=style)
    return Request(prompt=prompt, images=tuple(images), closed=closed, noise=noise)


def sent_picture(body):
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    head, data = url.split(",", 1)
    assert head == "data:image/png;base64"
    return base64.b64decode(data)


def test_answers_in_order_with_probabilities(server, picture):
    generator = open_(server)
    requests = [ask(f"Is there an effusion {i}?" if i % 2 else f"so {i}?") for i in range(20)]
    answers = generator.generate(requests)
    assert [a.text for a in answers] == ["Yes, it is.", "No."] * 10
    assert all(a.p_yes == pytest.approx(0.6 / 0.8, abs=1e-6) for a in answers)
    assert all(a.other_mass == pytest.approx(0.2, abs=1e-6) for a in answers)
    open_question = generator.generate([ask(closed=False)])[0]
    assert open_question.p_yes is None and "logprobs" not in server[1].bodies[-1]


def test_the_picture_travels_as_bare_pixels(server, picture):
    open_(server).generate([ask(images=[picture])])
    data = sent_picture(server[1].bodies[0])
    assert b"Name" not in data and b"tEXt" not in data
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == (
        Image.open(picture).convert("RGB").tobytes()
    )


def test_noise_is_drawn_here_at_the_stated_size(server, picture):
    noise = Noise(kind="gaussian_clip", seed=1)
    open_(server, image_size=48).generate([ask(images=[picture], noise=noise)])
    assert Image.open(io.BytesIO(sent_picture(server[1].bodies[0]))).size == (48, 48)


def test_large_pictures_are_scaled_down(server, picture):
    open_(server, max_side=32).generate([ask(images=[picture])])
    assert Image.open(io.BytesIO(sent_picture(server[1].bodies[0]))).size == (32, 20)


def test_failed_calls_are_tried_again(server):
    server[1].fail = [500, 429, 503]
    assert open_(server).generate([ask()])[0].text == "Yes, it is."
    assert len(server[1].bodies) == 4


def test_a_call_that_fails_for_good_is_named_and_the_others_kept(server):
    generator = open_(server, concurrency=1, retries=0)
    server[1].fail = [0, 0, 404]
    requests = [ask(f"{i}?") for i in range(4)]
    with pytest.raises(UserError, match="m: the server says 404: .*made to fail"):
        generator.generate(requests)
    seen = len(server[1].bodies)
    assert len(generator.generate(requests)) == 4
    again = [text_of(body) for body in server[1].bodies[seen:]]
    assert "0?" not in again and "1?" not in again  # answered before, not asked again


def test_no_server(picture):
    generator = load_generator("openai", "m", base_url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(UserError, match="cannot be reached"):
        generator.generate([ask()])


def test_a_server_without_logprobs(server):
    server[1].logprobs = False
    generator = open_(server)
    answer = generator.generate([ask()])[0]
    assert (answer.text, answer.p_yes) == ("Yes, it is.", None)
    assert generator.facts()["logprobs"] is False
    generator.generate([ask("else?")])
    assert "logprobs" not in server[1].bodies[-1]


def test_several_calls_at_once_but_not_more(server):
    state = server[1]
    state.wait.clear()
    generator = open_(server, concurrency=3)
    import threading

    done = []
    thread = threading.Thread(
        target=lambda: done.append(generator.generate([ask(f"{i}?") for i in range(9)]))
    )
    thread.start()
    for _ in range(200):
        if state.at_once == 3:
            break
        threading.Event().wait(0.02)
    assert state.at_once == 3
    state.wait.set()
    thread.join(20)
    assert len(done[0]) == 9 and state.most_at_once == 3


def test_the_key_comes_from_the_environment_alone(server, monkeypatch):
    monkeypatch.setenv(KEY, "secret-1")
    open_(server, key_variable=KEY).generate([ask()])
    assert server[1].headers[-1]["authorization"] == "Bearer secret-1"
    monkeypatch.delenv(KEY)
    open_(server, key_variable=KEY).generate([ask()])
    assert server[1].headers[-1]["authorization"] == "Bearer none"


def test_settings_reach_the_server(server):
    open_(server, temperature=0.3, top_p=0.9, seed=5, extra={"top_k": 3}).generate([ask()])
    body = server[1].bodies[0]
    assert (body["temperature"], body["top_p"], body["seed"], body["top_k"]) == (0.3, 0.9, 5, 3)
    assert body["max_tokens"] == 16 and body["top_logprobs"] == 20


def test_nothing_leaves_unless_configured(server, caplog):
    with pytest.raises(UserError, match="base_url are required"):
        load_generator("openai", "m")
    with pytest.raises(UserError, match="base_url 'ftp://x'"):
        load_generator("openai", "m", base_url="ftp://x")
    with pytest.raises(UserError, match="loaded by the server"):
        load_generator("openai", "m", base_url="http://127.0.0.1/v1", adapter="a")
    load_generator("openai", "m", base_url="https://example.org/v1")
    assert "are sent to example.org" in caplog.text
    caplog.clear()
    open_(server)
    assert not caplog.text


def test_raw_prompts_are_refused(server):
    with pytest.raises(UserError, match="use the prompt set default"):
        open_(server).generate([ask(style="raw")])


def test_given_texts_cannot_be_scored(server):
    with pytest.raises(UserError, match="do not score given texts"):
        open_(server).logprobs([ask()], ["yes"])


def test_a_missing_picture_is_named(server, tmp_path):
    with pytest.raises(UserError, match="gone.png"):
        open_(server).generate([ask(images=[tmp_path / "gone.png"])])
