"""Common beginnings: divided rightly, computed once, and never seen in an answer."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

torch = pytest.importorskip("torch")

from mmedrag.answering.generators.load import load_generator  # noqa: E402
from mmedrag.answering.generators.prefix import (  # noqa: E402
    GAIN,
    PrefixSplit,
    common_length,
    split_prefixes,
    worth_caching,
)
from mmedrag.answering.generators.random_model import random_llava  # noqa: E402
from mmedrag.records.protocols import Request  # noqa: E402
from mmedrag.records.records import Noise, Prompt  # noqa: E402

pytestmark = pytest.mark.model
PICTURE = (1, 2, 3)  # two template tokens and the image token


def ids(*rest):
    return (*PICTURE, *rest)


def lengths(*prompts):
    return [one.common for one in split_prefixes([(view, row, 3) for view, row in prompts])]


def test_the_picture_is_always_shared_and_long_text_too():
    refs = tuple(range(10, 10 + GAIN))
    assert lengths(("a", ids(7, 8)), ("a", ids(7, 9))) == [3, 3]  # too short to matter
    assert lengths(("a", ids(*refs, 7)), ("a", ids(*refs, 8))) == [3 + GAIN] * 2
    assert lengths(("a", ids(*refs, 7)), ("b", ids(*refs, 8))) == [3, 3]  # other pictures
    assert lengths(("a", ids(*refs, 7)), ("a", ids(9, 9)), ("a", ids(*refs, 8))) == (
        [3 + GAIN, 3, 3 + GAIN]
    )


def test_equal_prompts_keep_a_token_for_the_first_logits():
    refs = tuple(range(10, 10 + GAIN))
    assert lengths(("a", ids(*refs)), ("a", ids(*refs))) == [2 + GAIN] * 2


def test_two_sets_of_references_stay_apart():
    """They share their first report by chance; each set's own beginning is worth more."""
    first = tuple(range(10, 10 + GAIN))
    one, two = first + tuple(range(100, 160)), first + tuple(range(200, 260))
    found = lengths(*(("a", ids(*refs, q)) for refs in (one, two) for q in (7, 8, 9)))
    assert found == [3 + GAIN + 60] * 6


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 2), min_size=1, max_size=60)),
        min_size=1,
        max_size=8,
    )
)
def test_every_division_is_sound(rows):
    prompts = [(view, ids(*rest), 3) for view, rest in rows]
    found = split_prefixes(prompts)
    for (view, row, _), one in zip(prompts, found, strict=True):
        assert (one.view, one.ids) == (view, row)
        assert 3 <= one.common < len(row)
    for a in found:
        for b in found:
            if a.whole == b.whole:
                assert common_length(a.ids, b.ids) >= a.common


def test_it_has_to_pay():
    alone = [PrefixSplit(str(i), ids(*range(50)), 3, 3) for i in range(4)]
    assert not worth_caching(alone, 100)
    same = [PrefixSplit("a", ids(*range(50)), 3, 3) for _ in range(4)]
    assert worth_caching(same, 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """3 pictures × clean and noise × with and without references × 4 questions."""
    where = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    found = []
    for i in range(3):
        path = where / f"{i}.png"
        pixels = rng.integers(0, 255, (40 + 8 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        refs = f"Reference: the {'very ' * (i + 1)}large heart and some other words of case {i}.\n"
        for noise in (None, Noise(kind="gaussian_clip", seed=i)):
            for before in ("", refs):
                for q in ("Is it so?", "Is it not so?", "Where?", "Yes or no: is the heart large?"):
                    prompt = Prompt(template="t", text=f"{before}Question: {q}")
                    closed = q != "Where?"
                    found.append(
                        Request(prompt, (path,), noise, closed, max_new_tokens=4 if closed else 9)
                    )
    return found


def test_shared_beginnings_change_no_answer(folder, requests):
    shared, alone = load_generator("hf", folder), load_generator("hf", folder)
    alone.inputs.prefixes = None
    got, want = shared.generate(requests), alone.generate(requests)
    assert [a.text for a in got] == [a.text for a in want]
    for a, b in zip(got, want, strict=True):
        assert a.p_yes is b.p_yes is None or a.p_yes == pytest.approx(b.p_yes, abs=2e-6)
    facts = shared.facts()
    assert facts["prefixes_computed"] == 6 + 6  # pictures with and without noise; references
    assert facts["prefixes_reused"] >= len(requests)
    assert alone.facts()["prefixes_computed"] is None
    again = shared.generate(requests)
    assert [a.text for a in again] == [a.text for a in want]
    assert shared.facts()["prefixes_computed"] == 12  # kept between calls


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("room", [1, 20_000, 1 << 30])
def test_little_memory_costs_time_not_answers(folder, requests, size, room):
    generator = load_generator("hf", folder, batch_size=size, cache_bytes=room)
    plain = load_generator("hf", folder)
    plain.inputs.prefixes = None
    assert [a.text for a in generator.generate(requests)] == (
        [a.text for a in plain.generate(requests)]
    )
    prefixes = generator.inputs.prefixes
    assert prefixes._tokens <= prefixes.room or len(prefixes._kept) == 1  # one may stand alone
    assert prefixes._tokens == sum(k[0][0].shape[1] for k in prefixes._kept.values())


def test_beams_and_single_questions_go_the_plain_way(folder, requests):
    beams = load_generator("hf", folder, num_beams=2)
    beams.generate(requests[:8])
    assert beams.facts()["prefixes_computed"] == 0
    single = load_generator("hf", folder)
    single.generate([requests[0], requests[16], requests[32]])
    assert single.facts()["prefixes_computed"] == 0


def test_a_sliding_window_is_left_alone(folder, requests):
    from mmedrag.answering.generators.inputs import Inputs

    generator = load_generator("hf", folder)
    generator.model.config.text_config.sliding_window = 16
    plain = Inputs(generator.model, generator.inputs.processor, 1, 1 << 20)
    assert plain.prefixes is None
