"""What a model thinks aloud before it answers decides nothing."""

import pytest

from mmedrag.records import Answer, Trace, parse_released, read_answer, read_text, without_reasoning

REPLIES = [
    ("yes", "yes", "yes"),
    ("Yes.  ", "Yes.  ", "yes"),
    ("<think>no</think>Yes", "Yes", "yes"),
    ("no. no</think> Yes it is", "Yes it is", "yes"),
    ("<think>no", "", "unclear"),
    ("Let me see, no.<think>no", "", "unclear"),
    ("<think>a</think>Yes<think>no", "Yes", "yes"),
    ("<think>yes <think>b</think> yes</think>\nNo", "No", "no"),
    ("<CONCLUSION>No</CONCLUSION>", "No", "no"),
    ("<|begin_of_box|>yes<|end_of_box|>", "yes", "yes"),
    ("◁think▷no◁/think▷yes", "yes", "yes"),
    ("<THINK>yes</THINK>\n\n**No**", "**No**", "no"),
]


@pytest.mark.parametrize(("reply", "said", "label"), REPLIES)
def test_the_answer_comes_after_the_reasoning(reply, said, label):
    assert without_reasoning(reply) == said
    assert read_text(reply) == label
    if label != "unclear" and "*" not in said:
        assert parse_released(reply).lower() == parse_released(said).lower()


def traced(text, answer_type):
    answer = Answer(text=text, model="m")
    return Trace(example_id="x", task="vqa", answer_type=answer_type, answer=answer)


@pytest.mark.parametrize("answer_type", ["closed", "open"])
def test_the_trace_keeps_the_whole_reply(answer_type):
    trace = traced("<think>no</think>Yes", answer_type)
    read_answer(trace)
    assert (trace.answer.text, trace.answer.raw) == ("Yes", "<think>no</think>Yes")
    assert trace.answer.label == ("yes" if answer_type == "closed" else None)


def test_an_answer_without_reasoning_gains_no_field():
    trace = traced("Yes", "closed")
    read_answer(trace)
    assert trace.answer.to_json() == '{"text": "Yes", "label": "yes", "model": "m"}'
