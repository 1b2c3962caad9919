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


# --- servers that are not quite as the documentation says -----------------------------------------

REFUSALS = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0.0 with this model.",
    "seed": "[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs'}]",
}


@pytest.mark.parametrize("names", [*([name] for name in REFUSALS), [*REFUSALS]], ids=str)
def test_a_refused_setting_is_replaced_or_left_out(server, names, caplog):
    server[1].refuses = {name: REFUSALS[name] for name in names}
    generator = open_(server, concurrency=1)
    assert [a.text for a in generator.generate([ask("a?"), ask("b?")])] == ["Yes, it is."] * 2
    last = server[1].bodies[-1]
    assert not set(names) & set(last) and len(server[1].bodies) == 2 + len(names)  # learnt once
    assert last.get("max_completion_tokens") == (16 if "max_tokens" in names else None)
    assert all(f"refuses {name}" in caplog.text for name in names)


def test_a_prompt_that_is_too_long_is_no_refusal_of_max_tokens(server):
    server[1].refuses = {"max_tokens": "max_tokens is too large: context length is 8 tokens"}
    with pytest.raises(UserError, match="the server says 400: .*context length"):
        open_(server).generate([ask()])
    assert len(server[1].bodies) == 1


def test_fewer_log_probabilities_are_asked_for(server):
    server[1].most_logprobs = 5
    answer = open_(server, concurrency=1).generate([ask()])[0]
    assert answer.p_yes == pytest.approx(0.75, abs=1e-6)
    assert [body["top_logprobs"] for body in server[1].bodies] == [20, 5]


THOUGHT = "<think>There is no opacity, no effusion. No.</think>"


@pytest.mark.parametrize(
    ("said", "label"),
    [
        (f"{THOUGHT}\n\nYes", "yes"),
        ("There is no opacity. No.</think>Yes", "yes"),
        ("<think>There is no opacity, let me", "unclear"),
        (f"{THOUGHT}<answer>Yes</answer>", "yes"),
        ("[THINK]no[/THINK]Yes.", "yes"),
    ],
)
def test_reasoning_decides_neither_label_nor_p_yes(server, said, label):
    from mmedrag.records import read_text

    server[1].say = lambda body: said
    server[1].tokens = [[("<think>", 0.99), ("No", 0.006), ("Yes", 0.004)]]
    answer = open_(server).generate([ask()])[0]
    assert read_text(answer.text) == read_text(said) == label
    assert (answer.raw, answer.p_yes) == (said, None)


@pytest.mark.parametrize("apart", [False, True])
def test_p_yes_is_read_where_the_answer_begins(server, apart):
    before = ["no", " effusion", "\n"] if apart else ["<think>", "no", "</think>", "\n"]
    server[1].tokens = [[(t, 0.9), ("No", 0.1)] for t in before]
    server[1].tokens += [[("Yes", 0.6), ("No", 0.2)], [(".", 0.9)]]
    server[1].say = lambda body: "Yes." if apart else "<think>no</think>\nYes."
    if apart:
        server[1].message = lambda body: {"reasoning_content": "no effusion"}
    answer = open_(server).generate([ask()])[0]
    assert (answer.text, answer.p_yes) == ("Yes.", 0.75)
    assert answer.reasoning == ("no effusion" if apart else None)


def test_reasoning_apart_that_was_cut_off_is_no_answer(server, caplog):
    server[1].say = lambda body: None
    server[1].message = lambda body: {"reasoning_content": "There is no opacity"}
    server[1].finish = "length"
    answer = open_(server).generate([ask()])[0]
    assert (answer.text, answer.p_yes, answer.finish_reason) == ("", None, "length")
    assert answer.reasoning == "There is no opacity"
    assert "--set generator.reasoning_tokens=8192" in caplog.text


def test_reasoning_that_was_cut_off_is_asked_again_with_room(server):
    """As a server does that counts thoughts as tokens of the answer."""

    def room(body):
        return body["max_tokens"] > 100

    server[1].say = lambda body: "Yes" if room(body) else None
    server[1].message = lambda body: {} if room(body) else {"reasoning_content": "There is no"}
    server[1].finish = "length"
    (answer,) = open_(server, reasoning_tokens=500).generate([ask()])
    assert answer.text == "Yes"
    assert [body["max_tokens"] for body in server[1].bodies[-2:]] == [16, 516]
    (answer,) = open_(server, reasoning_tokens=0).generate([ask()])
    assert answer.text == "" and server[1].bodies[-1]["max_tokens"] == 16


def test_a_refusal_is_kept(server):
    server[1].say = lambda body: None
    server[1].message = lambda body: {"refusal": "I cannot help with medical images."}
    server[1].finish = "content_filter"
    answer = open_(server).generate([ask(closed=False)])[0]
    assert answer.refusal == "I cannot help with medical images."
    assert (answer.text, answer.finish_reason) == ("", "content_filter")


def test_content_in_parts_is_read(server):
    server[1].say = lambda body: [{"type": "text", "text": "Yes"}, {"type": "text", "text": "."}]
    assert open_(server).generate([ask(closed=False)])[0].text == "Yes."


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_a_page_in_place_of_a_reply_is_one_line(server, kind):
    server[1].html = "<html>\n<title>Sign in</title></html>", kind
    with pytest.raises(UserError, match="is base_url right") as error:
        open_(server, retries=0).generate([ask()])
    assert "\n" not in str(error.value)
