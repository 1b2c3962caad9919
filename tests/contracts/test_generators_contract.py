"""What every generator promises, over every backend that can run here."""

import dataclasses

import pytest
from fake_openai import serve

from mmedrag.answering.generators.load import load_generator
from mmedrag.records.protocols import Request
from mmedrag.records.records import Answer, Noise, Prompt, UserError

pytestmark = pytest.mark.model
SAMPLED = dict(temperature=0.7, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    from mmedrag.answering.generators.random_model import random_llava

    return random_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    import numpy as np
    from PIL import Image

    where = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 255, (40 + 20 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{i}.png")
    return sorted(where.glob("*.png"))


@pytest.fixture(scope="module", params=["scripted", "hf", "hf-beam", "hf-sampled", "openai"])
def generator(request, folder):
    kind, _, mode = request.param.partition("-")
    options = {"": {}, "beam": dict(num_beams=2), "sampled": SAMPLED}[mode]
    if kind == "scripted":
        yield load_generator(kind, script={"": "no", "effusion": "Yes, there is."})
    elif kind == "openai":
        pytest.importorskip("openai")
        with serve() as (url, _state):
            yield load_generator(kind, "fake", base_url=url)
    else:
        yield load_generator(kind, folder, **options)


def ask(text="Question: Is it so?", images=(), closed=True, **more):
    prompt = Prompt(template="t", text=text, style=more.pop("style", "chat"))
    return Request(prompt=prompt, images=tuple(images), closed=closed, max_new_tokens=6, **more)


@pytest.fixture(scope="module")
def requests(pictures):
    texts = ["Is there an effusion?", "Is it so?", "Question: " + "so " * 20 + "?", "a"]
    return [
        ask(text, [pictures[i % 3]], closed=i % 2 == 0, noise=noise)
        for noise in (None, Noise(kind="gaussian_clip", seed=1))
        for i, text in enumerate(texts)
    ]


def test_facts_of_the_protocol(generator):
    assert isinstance(generator.name, str) and generator.name
    assert isinstance(generator.image_size, int) and generator.image_size > 0
    assert isinstance(generator.context, int) and generator.context > 0


def test_one_answer_each_in_order(generator, requests):
    answers = generator.generate(requests)
    assert len(answers) == len(requests)
    assert all(isinstance(a, Answer) and a.model == generator.name for a in answers)
    alone = [generator.generate([request])[0] for request in requests]
    assert [a.text for a in answers] == [a.text for a in alone]
    turned = generator.generate(requests[::-1])[::-1]
    assert [a.text for a in answers] == [a.text for a in turned]


def test_closed_questions_carry_p_yes(generator, requests):
    for request, answer in zip(requests, generator.generate(requests), strict=True):
        if request.closed:
            assert 0 <= answer.p_yes <= 1 and 0 <= answer.other_mass <= 1
        else:
            assert answer.p_yes is None and answer.other_mass is None


def test_nothing_asked_nothing_answered(generator):
    assert generator.generate([]) == []
    assert generator.logprobs([], []) == []


def test_text_only(generator):
    assert len(generator.generate([ask(images=())])) == 1


def test_logprobs_are_sums_of_logs(generator, requests):
    if type(generator).__name__ == "OpenAIGenerator":
        with pytest.raises(UserError, match="do not score given texts"):
            generator.logprobs(requests, ["yes"] * len(requests))
        return
    texts = ["yes", "no, it is not so", "yes", "no"] * 2
    found = generator.logprobs(requests, texts)
    assert len(found) == len(requests) and all(value <= 0 for value in found)
    alone = [generator.logprobs([r], [t])[0] for r, t in zip(requests, texts, strict=True)]
    assert found == pytest.approx(alone, abs=1e-4)


def test_count_tokens_counts_text_and_images(generator):
    short, long = ask("one").prompt, ask("one two three four").prompt
    assert generator.count_tokens(long) > generator.count_tokens(short)
    assert generator.count_tokens(short, 1) > generator.count_tokens(short, 0)


def test_lengths_must_match(generator, requests):
    with pytest.raises((ValueError, UserError)):
        generator.logprobs(requests, ["yes"])


def test_unknown_kind_and_missing_model():
    with pytest.raises(UserError, match="'gpt' is not known, expected one of hf, openai, scripted"):
        load_generator("gpt", "x")
    with pytest.raises(UserError, match="no model given"):
        load_generator("hf", None)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_generator("hf", "no/such-model-anywhere")


def test_a_class_of_ones_own_needs_no_registration():
    name = "mmedrag.answering.generators.scripted:ScriptedGenerator"
    assert load_generator(name, "mine", script="no").generate([ask()])[0].text == "no"


def test_scripts(pictures):
    by_function = load_generator("scripted", script=lambda r: f"{len(r.images)} images")
    assert by_function.generate([ask(images=pictures)])[0].text == "3 images"
    by_text = load_generator("scripted", script={"so": "a", "Is it so": "b", "": "c"})
    answers = by_text.generate([ask("Is it so?"), ask("so"), ask("else")])
    assert [a.text for a in answers] == ["b", "a", "c"]
    closed = load_generator("scripted", script="No.").generate([ask()])[0]
    assert (closed.p_yes, closed.other_mass) == (0.0, 0.0)
    assert dataclasses.is_dataclass(ask())
