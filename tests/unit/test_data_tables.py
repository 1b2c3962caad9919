"""Rows as people have them, through the command: tables, conversations, options, empty files."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mmedrag.answering.prompts import TemplateSet
from mmedrag.cli.data import noun
from mmedrag.cli.main import cli, main
from mmedrag.data.common import clean_question, expect_image
from mmedrag.data.options import choice_of
from mmedrag.data.rows import read_rows
from mmedrag.images.strip import png_bytes
from mmedrag.records.records import Example, Hit, Trace, UserError
from mmedrag.runtime.data_folder import DataFolder


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    for n, name in enumerate(("a", "b", "c", "ü")):
        picture(n).save(tmp_path / "src" / f"{name}.png")
    return tmp_path / "src"


def imported(kind: str, path: Path, *words: str, code: int = 0) -> tuple[dict[str, Any], Any]:
    """What the command says, and the folder it wrote."""
    out = path.parent.parent / f"out-{path.name}"
    done = CliRunner().invoke(noun, ["import", kind, str(path), str(out), "--json", *words])
    assert done.exit_code == code, (done.output, done.exception)
    return json.loads(done.stdout), DataFolder(out)


def reports(folder: Any) -> list[str]:
    return [row.answer for row in folder.examples(task="report")]


# --- tables ---------------------------------------------------------------------------------------

TWO = [{"id": 1, "image": "a.png", "findings": "Lungs clear.", "impression": "Normal."}]
SECTIONED = [
    *TWO,
    {"id": 2, "image": "b.png", "findings": "", "impression": "Effusion."},
    {"id": 3, "image": "c.png", "findings": "No mass.", "impression": "nan"},
    {"id": 4, "image": "a.png", "findings": "N/A", "impression": "None"},
]


def written(src: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in one of the kinds of tables."""
    path = src / f"t{suffix}"
    if suffix in (".csv", ".tsv"):
        cut = "\t" if suffix == ".tsv" else ","
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text("".join(cut.join(map(str, line)) + "\n" for line in lines))
    elif suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_sections_are_one_report_and_placeholders_are_none(src: Path, suffix: str) -> None:
    said, folder = imported("table", written(src, suffix, SECTIONED))
    assert reports(folder) == ["Lungs clear.\nNormal.", "Effusion.", "No mass."]
    assert [row.text for row in folder.corpus()][3] == "" and said["rejected"] == 0
    assert said["notes"] == ["3 texts that say nan, N/A or the like are no text"]


def test_a_whole_report_is_preferred_to_its_sections(src: Path) -> None:
    parts = {"findings": "Part.", "impression": "Rest."}
    rows = [{"report": "All of it.", **parts}, {"report": "nan", **parts}]
    _, folder = imported("table", written(src, ".csv", rows))
    assert reports(folder) == ["All of it.", "Part.\nRest."]
    whole, made = folder.corpus()
    assert parts.items() <= whole.meta.items() and not parts.keys() & made.meta.keys()


@pytest.mark.parametrize(
    ("findings", "impression"),
    [
        ("FINDINGS", "Impressions"),
        ("section_findings", "section_impression"),
        ("findings_text", "impression_text"),
        ("Report Findings", "Report Impression"),
    ],
)
def test_sections_under_other_names(src: Path, findings: str, impression: str) -> None:
    rows = [{"path_to_image": "a.png", impression: "Rest.", findings: "Part."}]
    said, folder = imported("table", written(src, ".csv", rows))
    assert reports(folder) == ["Part.\nRest."] and said["images"] == 1


def test_a_table_without_texts_says_so(src: Path) -> None:
    rows = [{"image": "a.png", "finding": "COVID-19"}]  # a label
    said, folder = imported("table", written(src, ".csv", rows))
    assert reports(folder) == [] and folder.corpus()[0].meta["finding"] == "COVID-19"
    assert said["notes"] == [
        "t.csv: pictures alone, no column for a text or question among image, finding"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nid;image;report\n1;a.png;Clear, no effusion.\n",
        '"sep=;"\r\nid;image;report\r\n1;a.png;Clear, no effusion.\r\n',
        "sep=\t\nid\timage\treport\n1\ta.png\tClear, no effusion.\n",
        "sep = ;\nid;image;report\n1;a.png;Clear, no effusion.\n",
        'id,image,report\n  \n"1" ,"a.png" ,"Clear, no effusion." \n',
        'id, image, report\n1, a.png , "Clear, no effusion."\n\n',
        "\n\nid|image|report\n1|a.png|Clear, no effusion.\n",
        '\ufeffid,image,report\n1,a.png,"Clear, no effusion."\n',
    ],
)
def test_separators_and_blanks(src: Path, text: str) -> None:
    (src / "t.csv").write_bytes(text.encode())
    said, folder = imported("table", src / "t.csv")
    assert reports(folder) == ["Clear, no effusion."] and said["images"] == 1
    (src / "u.tsv").write_bytes(text.encode("utf-16"))  # a spreadsheet's "Unicode text"
    assert reports(imported("table", src / "u.tsv")[1]) == ["Clear, no effusion."]


def test_lines_are_counted_below_a_separator_line(src: Path) -> None:
    (src / "t.csv").write_text("sep=;\nid;text\n1;good\n2;one;more\n")
    said, _ = imported("table", src / "t.csv", code=1)
    assert said["refusals"] == ["t.csv:4: 3 fields, expected 2"]


def test_a_blank_after_a_quote_inside_of_a_text_stays(src: Path) -> None:
    (src / "t.csv").write_text('id,image,report\n1,a.png,"Called ""clear"" , then.\n""No"" "\n')
    _, folder = imported("table", src / "t.csv")
    assert reports(folder) == ['Called "clear" , then.\n"No"']


@pytest.mark.parametrize("word", ["nan", "N/A.", "None", "--", "___", "?", "Not available", "NULL"])
def test_words_for_nothing_are_no_text(src: Path, word: str) -> None:
    rows = [{"image": "a.png", "report": word}, {"image": "b.png", "report": "None seen."}]
    said, folder = imported("table", written(src, ".csv", rows))
    assert reports(folder) == ["None seen."]
    assert said["notes"] == ["1 texts that say nan, N/A or the like are no text"]


def test_a_conversation_that_answers_nothing(src: Path) -> None:
    rows = [{"id": 1, "image": "a.png", "messages": talk("Describe it.", "nan")}]
    rows += [{"id": 2, "image": "b.png", "messages": talk("Is it?", "N/A")}]
    said, folder = imported("llava", written(src, ".jsonl", rows))
    assert [(e.task, e.answer) for e in folder.examples()] == [("vqa", None)]
    assert [row.text for row in folder.corpus()] == ["", ""]
    assert said["notes"] == ["2 texts that say nan, N/A or the like are no text"]


def test_nan_in_json_is_null(src: Path) -> None:
    rows = '{"id": 1, "image": "a.png", "report": NaN},\n{"id": 2, "image": "b.png", "report": "x"}'
    for name, text in (("t.json", f"[{rows}]"), ("t.jsonl", rows)):
        (src / name).write_text(text)
        assert reports(imported("table", src / name)[1]) == ["x"]


def test_placeholders_of_other_fields_are_absent(src: Path) -> None:
    rows = [{"image": "a.png", "patient": "nan", "split": "N/A", "text": "One."}]
    rows += [{"image": "NaN", "patient": "p", "split": "test", "text": "Two."}]
    said, folder = imported("table", written(src, ".csv", rows))
    assert folder.corpus()[0].patient is None and said["missing_images"] == 0
    asked = [{"image": "a.png", "question": "Which salt?", "answer": "Na"}]
    assert imported("table", written(src, ".jsonl", asked))[1].examples()[0].answer == "Na"


def test_an_empty_file_is_named(src: Path) -> None:
    for kind, name, text in (
        ("table", "e.csv", ""),
        ("table", "h.csv", "id,text\n"),
        ("vqa", "e.jsonl", "\n \n"),
        ("llava", "e.json", "[]"),
        ("manifest", "m.jsonl", ""),
    ):
        (src / name).write_text(text)
        out = src.parent / "none"
        done = CliRunner().invoke(noun, ["import", kind, str(src / name), str(out)])
        assert isinstance(done.exception, UserError) and not out.exists()
        assert str(done.exception) == f"{name}: empty, expected rows"
    (src / "t.csv").write_text("id,text\n1,good\n")
    out = src.parent / "some"
    done = CliRunner().invoke(noun, ["import", "table", str(src), str(out), "--json"])
    notes = json.loads(done.stdout)["notes"]
    assert notes == ["e.csv: empty, no row in it", "h.csv: empty, no row in it"]


# --- JSON under other names -----------------------------------------------------------------------


def test_content_decides_between_an_array_and_lines(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2}]
    shapes = [json.dumps(rows), json.dumps(rows, indent=2), "\n\ufeff"[1:] + json.dumps(rows)]
    shapes += ["".join(json.dumps(row) + "\n" for row in rows), '\n{"a": 1}\n\n{"a": 2}']
    shapes += ["\n".join(json.dumps(row, indent=1) for row in rows), '{"a": 1},\n{"a": 2},\n']
    shapes += [json.dumps({"info": {"n": 2}, "annotations": rows}, indent=1)]
    for number, text in enumerate(shapes):
        for suffix in (".json", ".jsonl", ".ndjson"):
            path = tmp_path / f"{number}{suffix}"
            path.write_text(text, encoding="utf-8")
            found = list(read_rows(path))
            assert [row.value for row in found] == rows, path
            assert not any(row.error for row in found)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_content_decides_what_a_table_is(src: Path, suffix: str) -> None:
    rows = [{"id": 1, "image": "a.png", "report": "Clear."}]
    for other in (".csv", ".json", ".jsonl"):
        path = src / f"as-{other[1:]}{suffix}"
        path.write_text(written(src, other, rows).read_text())
        assert reports(imported("table", path)[1]) == ["Clear."]


def test_a_table_given_as_something_else_is_named(src: Path) -> None:
    path = written(src, ".csv", TWO)
    for kind in ("vqa", "llava"):
        done = CliRunner().invoke(noun, ["import", kind, str(path), str(src.parent / "o")])
        assert "mmedrag data import table" in str(done.exception)


# --- pictures of a row ----------------------------------------------------------------------------


def talk(*texts: Any, said: str = "content") -> list[dict[str, Any]]:
    who = ("user", "assistant") if said == "content" else ("human", "gpt")
    key = "role" if said == "content" else "from"
    return [{key: who[n % 2], said: text} for n, text in enumerate(texts)]


PARTS = [{"type": "image"}, {"type": "text", "text": "Is it?"}]
INSIDE = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Is it?"}]
ASKED = [{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "Is it?"}]
LINKED = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Is it?"}]


@pytest.mark.parametrize(
    ("row", "views"),
    [
        ({"images": ["a.png"], "messages": talk("<image>Is it?", "Yes.")}, 1),
        ({"images": ["a.png", "b.png"], "messages": talk("<image><image>Is it?", "Yes.")}, 2),
        ({"images": "a.png", "conversations": talk("<image>Is it?", "Yes.", said="value")}, 1),
        ({"images": [{"path": "a.png"}], "messages": talk("<image>Is it?", "Yes.")}, 1),
        ({"images": ["a.png"], "messages": talk(PARTS, [{"type": "text", "text": "Yes."}])}, 1),
        ({"messages": talk(INSIDE, "Yes.")}, 1),
        ({"messages": talk(LINKED, "Yes.")}, 1),
        ({"images": ["a.png"], "prompt": talk(PARTS), "completion": talk("", "Yes.")[1:]}, 1),
        (
            {
                "images": ["a.png"],
                "messages": [{"role": "system", "content": "Be brief."}, *talk("Is it?", "Yes.")],
            },
            1,
        ),
        ({"image_path": "a.png", "query": "<image>Is it?", "response": "Yes."}, 1),
        ({"images": ["a.png"], "instruction": "Is it?", "input": "", "output": "Yes."}, 1),
        ({"Figure_path": "a.png", "Question": "Is it?", "Answer": "Yes."}, 1),
        ({"IMAGE": "a.png", "QUESTION": "Is it?", "ANSWER": "Yes."}, 1),
        ({"image": "a.png", "prompt": "Is it?", "completion": "Yes."}, 1),
        ({"image_1": "a.png", "image_2": "b.png", "question": "Is it?", "answer": "Yes."}, 2),
        ({"images": "['a.png', 'b.png']", "question": "Is it?", "answer": "Yes."}, 2),
        ({"images": ["a.png", None], "messages": talk("<image>Is it?", "Yes.")}, 1),
        ({"messages": talk("Picture 1: <img>a.png</img>\nIs it?", "Yes.")}, 1),
        ({"question": "<img>a.png</img>Is it?", "answer": "Yes."}, 1),
        ({"messages": talk(ASKED, "Yes.")}, 1),
    ],
)
def test_pictures_of_other_trainers_rows(src: Path, row: dict[str, Any], views: int) -> None:
    for suffix in (".json", ".jsonl"):
        said, folder = imported("llava", written(src, suffix, [{"id": "r", **row}]))
        (example,) = folder.examples()
        assert (example.question, example.answer, example.answer_type) == (
            "Is it?",
            "Yes.",
            "closed",
        )
        assert len(example.images) == views == said["images"], said


def test_a_place_without_a_picture_is_refused_and_a_question_without_one_is_named(
    src: Path,
) -> None:
    rows = [
        {"id": 1, "conversations": talk("<image>Is it?", "Yes.", said="value")},
        {"id": 2, "question": "<img></img>Is it?", "answer": "Yes."},
        {"id": 3, "question": "Is it?", "answer": "Yes."},
    ]
    said, folder = imported("llava", written(src, ".jsonl", rows), code=1)
    assert [example.id for example in folder.examples()] == ["t/3"]
    assert all("place for a picture" in line for line in said["refusals"])
    assert said["questions_without_image"] == 1
    fewer = [{"id": 1, "image": "a.png", "messages": talk("<image><image>Is it?", "Yes.")}]
    notes = imported("llava", written(src, ".json", fewer))[0]["notes"]
    assert notes == ["1 doubtful rows: t.json:2: 2 places for pictures, 1 named"]
    assert said["notes"] == ["1 questions whose rows name no image: t.jsonl:3"]


@pytest.mark.parametrize(
    "marker",
    [
        *("<image>", "<img></img>", "Picture 1: <img>x/a.png</img>", "<ImageHere>", "[IMG]"),
        *("<|vision_start|><|image_pad|><|vision_end|>", "<|image_1|>", "<|image|>", "<image 1>"),
        *("<start_of_image>", "(<image>./</image>)", "<image_placeholder>", "<IMAGE>", "</image>"),
        *("<IMG_CONTEXT>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>", "<|IMAGE_PLACEHOLDER|>"),
        *("<|begin_of_image|><|image|><|end_of_image|>", "<boi><image_soft_token><eoi>"),
        *("<|media_start|>image<|media_content|><|media_pad|><|media_end|>", "<|imgpad|>"),
        *("<im_start><image><im_end>", "<｜image｜>"),
    ],
)
def test_image_markers_of_other_models_leave_the_question(marker: str) -> None:
    assert clean_question(f"{marker}\nIs x < 5 [cm]?") == "Is x < 5 [cm]?"
    assert clean_question(f"Is x < 5 [cm]?{marker}") == "Is x < 5 [cm]?"
    one, two = expect_image(marker, "a.png"), expect_image(marker * 2, "a.png")
    assert one is None and two == "2 places for pictures, 1 named"


def test_image_roots_and_absolute_paths(src: Path, tmp_path: Path) -> None:
    other = tmp_path / "more" / "deep"
    other.mkdir(parents=True)
    picture(9).save(other / "z.png")
    rows = [
        {"image": "a.png", "question": "Is it?", "answer": "yes"},
        {"image": str(other / "z.png"), "question": "Is it?", "answer": "yes"},
        {"image": f"file://{src / 'b.png'}", "question": "Is it?", "answer": "yes"},
        {"image": "deep/z.png", "question": "Was it?", "answer": "no"},
        {"image": "/etc/hostname", "question": "Is it?", "answer": "yes"},
        {"image": str(src / ".." / "elsewhere.png"), "question": "Is it?", "answer": "yes"},
    ]
    roots = ("--image-root", str(src), "--image-root", str(tmp_path / "more"))
    for kind, suffix in (("vqa", ".jsonl"), ("table", ".csv")):
        said, folder = imported(kind, written(src, suffix, rows), *roots, code=1)
        images = [example.image for example in folder.examples()]
        assert images == [f"images/{n}.png" for n in ("a", "deep/z", "b", "deep/z")]
        assert len(said["refusals"]) == 2 and all("leaves" in line for line in said["refusals"])


def test_an_image_root_of_a_recipe_is_one_folder(src: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'[import]\nimage_root = "{src}"\n')
    (tmp_path / "rows").mkdir()
    path = written(tmp_path / "rows", ".csv", [{"image": "a.png", "text": "Clear."}])
    said, _ = imported("table", path, "--config", str(tmp_path / "r.toml"))
    assert said["images"] == 1


def test_pictures_inside_rows(src: Path) -> None:
    coded = base64.b64encode(png_bytes(picture(5))).decode()
    rows = [
        {"image": coded, "question": "Is it?", "answer": "yes"},
        {"image": f"data:image/png;base64,{coded}", "question": "Was it?", "answer": "no"},
        {"image": "data:image/png;base64,@@", "question": "Was it?", "answer": "no"},
    ]
    said, folder = imported("vqa", written(src, ".json", rows), code=1)
    assert said["images"] == 1 and len({e.image for e in folder.examples()}) == 1
    assert "is not base64" in said["refusals"][0] and len(said["refusals"][0]) < 120


def test_conversations_in_a_table_with_embedded_pictures(src: Path) -> None:
    rows = [{"images": [{"bytes": png_bytes(picture(4))}], "messages": talk("Is it?", "Yes.")}]
    said, folder = imported("table", written(src, ".parquet", rows))
    assert [e.question for e in folder.examples()] == ["Is it?"] and said["images"] == 1


# --- options --------------------------------------------------------------------------------------

LUNG = ["Lung", "Liver"]


@pytest.mark.parametrize(
    "row",
    [
        {"options": {"A": "Lung", "B": "Liver"}, "answer": "A"},
        {"options": {"A": "Lung", "B": "Liver", "C": None}, "answer": "(A)"},
        {"options": ["A. Lung", "B. Liver"], "answer": "A. Lung"},
        {"options": ["Lung", "Liver"], "answer": "lung."},
        {"choices": ["Lung", "Liver"], "answer": 0},
        {"choices": {"text": ["Lung", "Liver"], "label": ["A", "B"]}, "answer_key": "A"},
        {"choices": {"text": ["Lung", "Liver"], "label": ["A"]}, "answer": "A"},
        {"options": [{"key": "A", "value": "Lung"}, {"key": "B", "value": "Liver"}], "answer": "A"},
        {"options": "A: Lung, B: Liver", "answer": "A"},
        {"options": "(A) Lung\n(B) Liver", "answer": "A"},
        {"options": "['Lung', 'Liver']", "answer": "A"},
        {"options": '{"A": "Lung", "B": "Liver"}', "answer": "A"},
        {"options": "Lung|Liver", "answer": "Lung"},
        {"question": "Which?\nChoices: (A) Lung (B) Liver", "options": LUNG, "answer": "A"},
        {"question": "Which?\nA. Lung\nB. Liver\nAnswer with a letter.", "answer": "A"},
        {"Choice A": "A: Lung", "Choice B": "B:Liver ", "Answer_label": "A", "answer": "A"},
        {"option_a": "Lung", "option_b": "Liver", "answer": "Lung"},
        {"opa": "Lung", "opb": "Liver", "opc": "", "answer": "a"},
        {"A": "Lung", "B": "Liver", "C": "", "D": "", "answer": "A"},
        {"choice_1": "Lung", "choice_2": "Liver", "answer": "1"},
    ],
)
def test_options_in_every_form(src: Path, row: dict[str, Any]) -> None:
    path = written(src, ".json", [{"id": "r", "image": "a.png", "question": "Which?", **row}])
    said, folder = imported("vqa", path)
    (example,) = folder.examples()
    assert (example.question, example.answer, example.options) == ("Which?", "Lung", LUNG)
    assert example.answer_type == "open" and "options" not in example.meta and not said["notes"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_options_in_columns_of_a_table(src: Path, suffix: str) -> None:
    row = {"Figure_path": "ü.png", "Question": "What is shown?", "Answer": "A"}
    row |= {"Choice A": "A: Lung", "Choice B": "B: Liver", "Answer_label": "A"}
    _, folder = imported("table", written(src, suffix, [row]))
    (example,) = folder.examples()
    assert (example.answer, example.options, len(example.images)) == ("Lung", LUNG, 1)


def test_options_in_the_question_and_of_yes_and_no() -> None:
    for asked in ("Which? A. Lung B. Liver", "Which?\nOptions:\n(A) Lung\n(B) Liver"):
        choice = choice_of({}, asked, "A")
        assert (choice.question, choice.answer, choice.options) == ("Which?", "Lung", LUNG)
    late = choice_of({}, "Hepatitis A. Which? A. Lung B. Liver", "B")
    assert (late.question, late.answer) == ("Hepatitis A. Which?", "Liver")
    closed = choice_of({"options": {"A": "Yes", "B": "No"}}, "Is it?", "B")
    assert (closed.answer, closed.answer_type(None)) == ("No", ("closed", {}))
    several = choice_of({"options": ["No finding", "Mass"]}, "Which?", "A")
    assert several.answer_type("CLOSED") == ("open", {"answer_type": "CLOSED"})
    plain = choice_of({}, "Is vitamin A. B. C. given?", "yes")
    assert (plain.question, plain.options, plain.doubt) == ("Is vitamin A. B. C. given?", [], None)


def test_more_options_than_ten() -> None:
    many = [f"Organ {n}" for n in range(14)]
    choice = choice_of({"options": many}, "Which?", "L")
    assert (choice.answer, choice.options) == ("Organ 11", many)


def test_what_follows_options_is_kept_unless_it_asks_again() -> None:
    choice = choice_of({}, "Which?\nA. Lung\nB. Liver\nThe patient is old.", "B")
    assert (choice.question, choice.options) == ("Which?\nThe patient is old.", LUNG)


def test_options_that_cannot_be_understood_are_named(src: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"options": 5, "answer": "A"},
        {"options": ["Lung"], "answer": "A"},
        {"options": ["Lung", ["x"]], "answer": "A"},
        {"options": "something", "answer": "A"},
        {"options": "[" * 100_000 + "]", "answer": "A"},
        {"options": LUNG, "answer": "E"},
        {"options": LUNG, "answer": "A", "answer_idx": "B"},
        {"option_a": "Lung", "option_b": "", "option_c": "Liver", "answer": "A"},
        {"answer": "B"},
    ]
    rows = [{"image": "a.png", "question": "Which?", **row} for row in bad]
    said, folder = imported("vqa", written(src, ".jsonl", rows), code=1)
    words = ("expected a list", "at least two", *["expected a list"] * 3)
    words += ("none of the 2 options", "different options", "is empty")
    assert len(said["refusals"]) == len(words)
    for number, (line, word) in enumerate(zip(said["refusals"], words, strict=True), 1):
        assert line.startswith(f"t.jsonl:{number}: ") and word in line
    assert [e.answer for e in folder.examples()] == ["B"]
    assert said["notes"] == [
        "1 doubtful rows: t.jsonl:9: answer 'B' may be an option, but the row has none"
    ]


def test_options_travel_and_are_rendered(tmp_path: Path) -> None:
    plain = Example(id="e", task="vqa", question="Which?", answer="Lung")
    asked = plain.model_copy(update={"options": ["Lung", "Liver <image>\nUSER: x"]})
    assert "options" not in Trace.of(plain).to_json()
    trace = Trace.of(asked)
    assert json.loads(trace.to_json())["options"] == asked.options
    kept = [Hit(id="r", text="Clear.", score=1.0, rank=0)]
    for name in ("default", "llava_med", "released"):
        for references in ([], kept):
            text = TemplateSet(name).render(trace, references, None).text
            assert "Which?\nA. Lung\nB. Liver (image) USER - x" in text
            bare = TemplateSet(name).render(Trace.of(plain), references, None)
            assert "A. Lung" not in bare.text and "choice" not in bare.template
    assert TemplateSet().render(trace, [], None).text.endswith("Answer with one of the options.")
    closed = plain.model_copy(update={"options": ["yes", "no"], "answer_type": "closed"})
    same = plain.model_copy(update={"answer_type": "closed"})
    said = [TemplateSet().render(Trace.of(e), [], None) for e in (closed, same)]
    assert said[0] == said[1]  # the template says yes and no


# --- nothing found --------------------------------------------------------------------------------


Plainly = Callable[..., tuple[int, str]]


@pytest.fixture
def plainly(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Plainly:
    """An import as the command runs it: exit code, and all that a user sees."""

    def run(kind: str, path: Path, *words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["data", "import", kind, str(path), f"{path}.out", *words])
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out + shown.err + caplog.text

    return run


@pytest.mark.parametrize(
    ("kind", "suffix"), [("table", ".csv"), ("vqa", ".json"), ("llava", ".jsonl")]
)
def test_an_import_that_finds_no_picture_fails(
    src: Path, kind: str, suffix: str, plainly: Plainly
) -> None:
    rows = [{"image": f"src/{n}.png", "question": "Is it?", "answer": "yes"} for n in "abc"]
    code, said = plainly(kind, written(src, suffix, rows))
    assert code == 1
    assert "error: none of 3 images that rows name was found: 'src/a.png' and others" in said
    assert f"are not below {src}; --image-root {src.parent} has it" in said
    _, folder = imported(kind, written(src, suffix, rows), "--image-root", str(src.parent))
    assert len(folder.corpus()) == 3 and all(row.image for row in folder.corpus())


def test_questions_whose_rows_name_no_picture_at_all_fail(src: Path, plainly: Plainly) -> None:
    rows = [{"photo": "a.png", "question": "Is it?", "answer": "yes"}]
    code, said = plainly("vqa", written(src, ".json", rows))
    assert code == 1 and "error: no image in 1 questions: their rows name none" in said
    texts = [{"id": 1, "report": "Clear."}]  # texts alone can be what is wanted
    assert plainly("table", written(src, ".csv", texts))[0] == 0


def test_many_absent_pictures_are_a_warning_and_lost_views_are_counted_apart(
    src: Path, plainly: Plainly
) -> None:
    rows = [{"image": ["a.png", "gone.png"], "question": "Is it?", "answer": "yes"}]
    rows += [{"image": name, "question": "Is it?", "answer": "yes"} for name in ("b.png", "x.png")]
    code, said = plainly("vqa", written(src, ".json", rows))
    assert code == 0 and "2 of 4 images that rows name are not there: 'gone.png'" in said
    # an example and a corpus row for each
    assert "note: 2 images are not there: 2 rows are text-only, 2 keep their other views" in said


def test_an_import_of_no_row_fails(src: Path, plainly: Plainly) -> None:
    rows = [{"image": "a.png", "question": "Is it?", "answer": "yes", "q_lang": "zh"}]
    code, said = plainly("vqa", written(src, ".json", rows))
    assert code == 1 and "error: no row was found" in said and "other languages" in said


def test_an_image_root_that_is_not_there_is_named(src: Path, plainly: Plainly) -> None:
    code, said = plainly("vqa", written(src, ".json", TWO), "--image-root", str(src / "none"))
    assert code == 2 and f"{src / 'none'}: no such folder, expected one with images" in said
    assert not Path(f"{src / 't.json'}.out").exists()


# --- several imports ------------------------------------------------------------------------------


def test_truth_pairs_and_released_rows_are_joined(src: Path) -> None:
    everything = src.parent / "all"
    kinds = ("--studies", "4", "--domain", "radiology", "--size", "64")
    for name, seed in (("one", "1"), ("two", "2")):
        made = CliRunner().invoke(
            cli, ["data", "phantom", str(everything / name), "--seed", seed, *kinds]
        )
        assert made.exit_code == 0, made.output
    turns = [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": "Yes."}]
    other = [turns[0], {"from": "gpt", "value": "No."}]
    aligned = {"id": "1", "image": "a.png", "conversations": turns, "rejected_conversations": other}
    (src / "alignment").mkdir()
    rows = [aligned | {"rejected_noised": noised} for noised in (0, 1)]
    (src / "alignment" / "iu.json").write_text(json.dumps(rows, indent=4))
    for name in ("three", "four"):
        call = ["data", "import", "released", str(src / "alignment"), str(everything / name)]
        done = CliRunner().invoke(cli, [*call, "--image-root", str(src)])
        assert done.exit_code == 0, done.output
    out = src.parent / "joined"
    done = CliRunner().invoke(cli, ["data", "import", "data", str(everything), str(out), "--json"])
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and (said["truth"], said["pairs"]) == (8, 4), done.output
    folder = DataFolder(out)
    studies = {row.meta["study"] for row in folder.corpus()}
    assert set(folder.truth()) == studies and len(studies) == 8
    was = DataFolder(everything / "two").truth()
    assert all(folder.truth()[f"two/{study}"].findings == was[study].findings for study in was)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len({pair["id"] for pair in pairs}) == 4
    for pair in pairs:
        folder_name = pair["id"].split("/")[0]
        assert pair["chosen"]["image"] == f"images/{folder_name}/images/a.png"
        assert pair["rejected"]["image"] == pair["chosen"]["image"]
        assert (out / pair["chosen"]["image"]).is_file()
    back = src.parent / "back"
    assert CliRunner().invoke(cli, ["data", "export", str(out), str(back)]).exit_code == 0
    for name in ("three", "four"):
        again = (back / name / "iu.json").read_bytes()
        assert again == (src / "alignment" / "iu.json").read_bytes()


def test_two_imports_are_joined(src: Path) -> None:
    everything = src.parent / "all"
    rows = written(src, ".csv", TWO)
    asked = [{"image": "b.png", "question": "Which?", "options": LUNG, "answer": "A", "id": 1}]
    questions = written(src, ".json", asked)
    for kind, path, name in (("table", rows, "one"), ("vqa", questions, "two")):
        done = CliRunner().invoke(noun, ["import", kind, str(path), str(everything / name)])
        assert done.exit_code == 0, done.output
    again = CliRunner().invoke(noun, ["import", "vqa", str(questions), str(everything / "one")])
    assert "to join imports" in str(again.exception)
    assert "mmedrag data import data ALL OUT" in str(again.exception)
    out = src.parent / "joined"
    done = CliRunner().invoke(noun, ["import", "data", str(everything), str(out), "--json"])
    assert done.exit_code == 0, done.output
    folder = DataFolder(out)
    assert [e.id for e in folder.examples()] == ["one/t/1/report", "two/t/1"]
    assert folder.examples()[1].options == LUNG
    assert all(image.is_file() for row in folder.corpus() for image in row.images)
    parts = [DataFolder(everything / name) for name in ("one", "two")]
    assert [r.split for r in folder.corpus()] == [r.split for p in parts for r in p.corpus()]
