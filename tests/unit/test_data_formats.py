"""LLaVA, VQA and table formats: rows as such sets have them, written by us."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mmedrag.cli.data import noun
from mmedrag.data import import_data
from mmedrag.images.alike import pixel_hash
from mmedrag.images.files import load_image
from mmedrag.images.strip import png_bytes
from mmedrag.records.records import Example, UserError
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import BadRow, read_jsonl


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)


def run(kind: str, src: Path, out: Path, **options: Any) -> tuple[Any, list[Example], list[Any]]:
    result = import_data(kind, src, out, **options)
    data = DataFolder(out)
    return result, data.examples(), data.corpus()


def refused(out: Path) -> dict[int, str]:
    return {bad.line: bad.reason for bad in read_jsonl(out / "rejected.jsonl", BadRow)}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows))
    return path


# --- LLaVA


def talk(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": "human" if n % 2 == 0 else "gpt", "value": text} for n, text in enumerate(texts)
    ]


def test_conversations_become_questions_and_reports(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.jpg")
    rows = [
        {
            "id": "c1",
            "image": "a.jpg",
            "pair_id": "x",
            "conversations": talk(
                "<image>\nWhat is shown?", "A chest film.", "Is the heart large?", "No, it is not."
            ),
        },
        {
            "id": "c2",
            "image": "a.jpg",
            "conversations": talk("Describe the following image.\n<image>", "Clear lungs."),
        },
        {"id": "c3", "image": "gone.jpg", "conversations": talk("Is it so?\n<image>", "Yes.")},
        {"id": "c4", "image": "a.jpg", "conversations": talk("Only a question?")},
        {"id": "c5", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "Hello."}]},
        {"id": "c6", "image": "a.jpg", "conversations": talk("<image>\nWhy?", "")},
    ]
    write(tmp_path / "chat.json", rows)
    result, examples, corpus = run("llava", tmp_path / "chat.json", tmp_path / "out", source="s")
    assert [(e.task, e.question, e.answer, e.answer_type) for e in examples[:4]] == [
        ("vqa", "What is shown?", "A chest film.", "open"),
        ("vqa", "Is the heart large?", "No, it is not.", "closed"),
        ("report", None, "Clear lungs.", None),
        ("vqa", "Is it so?", "Yes.", "closed"),
    ]
    assert examples[0].meta["pair_id"] == "x" and examples[0].source == "s"
    assert [r.text for r in corpus] == ["", "Clear lungs.", "", ""]
    assert corpus[2].image is None and corpus[2].meta["missing_images"] == ["gone.jpg"]
    assert len({e.split for e in examples[:3]}) == 1  # one picture, one split
    assert sorted(refused(tmp_path / "out")) == [1] and result.rejected == 2  # one-line array
    forced, examples, _ = run("llava", tmp_path / "chat.json", tmp_path / "o2", turns="report")
    assert {e.task for e in examples} == {"report"} and forced.exit_code == 1


ASK = "Please choose from the following two options: [yes, no]"


def test_question_files_of_cares_and_llava_med(tmp_path: Path) -> None:
    rows = [
        {
            "question_id": 0,
            "image": "x/0.png",
            "answer": "Yes.",
            "question": f"Is it normal? {ASK}\n<image>",
        },
        {"question_id": 0, "image": "x/0.png", "answer": "No (as reported).", "text": "Any mass?"},
        {
            "question_id": "I1",
            "image": "y.jpg",
            "options": "A:ear, B:scalp",
            "age": 45,
            "fig_caption": "B:scalp",
            "text": "Where is it? [A:ear, B:scalp]\n",
        },
    ]
    src = write(tmp_path / "cares_test.jsonl", rows)
    _, examples, corpus = run("llava", src, tmp_path / "out", domain="radiology", source="cares")
    assert [(e.question, e.answer, e.answer_type, e.split) for e in examples] == [
        ("Is it normal?", "Yes.", "closed", "test"),
        ("Any mass?", "No (as reported).", "closed", "test"),
        ("Where is it?", "scalp", "open", "test"),  # what it offers stands in `options`
    ]
    assert examples[2].options == ["ear", "scalp"]
    assert len({e.id for e in examples}) == 3 and examples[2].meta["age"] == 45
    assert [r.meta["study"] for r in corpus] == ["cares/x/0", "cares/y"]


# --- VQA


def test_slake_vqa_rad_and_pathvqa_rows(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in ("xmlab1/source.jpg", "synpic7.jpg", "train_0422.jpg"):
        (src / "imgs" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(src / "imgs" / name)
    write(
        src / "validate.json",
        [
            {
                "img_id": 1,
                "img_name": "xmlab1/source.jpg",
                "question": "Is this an MRI?",
                "answer": "Yes",
                "q_lang": "en",
                "modality": "MRI",
                "answer_type": "CLOSED",
                "qid": 0,
            },
            {
                "img_id": 1,
                "img_name": "xmlab1/source.jpg",
                "question": "这是什么？",
                "answer": "MRI",
                "q_lang": "zh",
                "qid": 1,
            },
        ],
    )
    write(
        src / "public.json",
        [
            {
                "qid": "12",
                "image_name": "synpic7.jpg",
                "image_organ": "CHEST",
                "question": "Which side?",
                "answer": "left",
                "answer_type": "CLOSED ",
                "phrase_type": "test_freeform",
            },
            {"qid": "13", "image_name": "synpic7.jpg", "question": "How many?", "answer": 2},
            {"qid": "14", "image_name": "../up.jpg", "question": "How many?", "answer": 2},
            {"qid": "15", "image_name": "synpic7.jpg", "answer": 2},
            "no object",
        ],
    )
    write(src / "path.jsonl", [{"image": "train_0422", "question": "Are they?", "answer": "yes"}])
    result, examples, corpus = run(
        "vqa", src, tmp_path / "out", image_root=src / "imgs", domain="radiology", source="v"
    )
    got = {e.question: e for e in examples}
    assert (got["Is this an MRI?"].split, got["Is this an MRI?"].answer_type) == ("val", "closed")
    assert got["Which side?"].answer_type == "open"
    assert got["Which side?"].meta["answer_type"] == "CLOSED "
    assert got["How many?"].answer == "2" and got["Which side?"].split == got["How many?"].split
    assert got["Are they?"].image == "images/train_0422.jpg"
    assert len(corpus) == 3 and all(r.text == "" for r in corpus)
    assert result.rejected == 3 and "1 rows in other languages" in result.notes[0]
    everything, *_ = run("vqa", src, tmp_path / "o2", image_root=src / "imgs", language="")
    assert everything.examples == 5


# --- tables


def table(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_with_common_and_with_mapped_columns(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "1.png")
    rows = [
        {
            "uid": "u1",
            "Path": "1.png",
            "Report": "Line one,\nline two.",
            "PatientId": "007",
            "view": "PA",
            "split": "validation",
        },
        {
            "uid": "u2",
            "Path": "2.png",
            "Report": "Other.",
            "PatientId": "",
            "view": "",
            "split": "",
        },
    ]
    src = table(tmp_path / "t.csv", rows)
    result, examples, corpus = run("table", src, tmp_path / "out", domain="radiology")
    assert [(e.task, e.answer) for e in examples] == [
        ("report", "Line one,\nline two."),
        ("report", "Other."),
    ]
    first = corpus[0]
    assert (first.patient, first.split, first.meta["view"]) == ("007", "val", "PA")
    assert pixel_hash(load_image(first.images[0])) == pixel_hash(picture(1))
    assert corpus[1].image is None and result.missing_images == 1
    columns = {"text": "view", "image": "", "id": "Report"}
    _, examples, _ = run("table", src, tmp_path / "o2", columns=columns)
    assert [e.answer for e in examples] == ["PA"]
    for bad, words in (
        ({"text": "nope"}, "no column 'nope' for text, it has uid, Path"),
        ({"colour": "x"}, "'colour' is not known"),
        ({"text": "", "image": "", "question": ""}, "name one: --column text=COLUMN"),
    ):
        with pytest.raises(UserError, match=words):
            import_data("table", src, tmp_path / f"bad{len(bad)}{words[:3]}", columns=bad)


def test_several_columns_are_views_or_paragraphs(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(ord(name[0])).save(tmp_path / name)
    rows = [
        {"exam": 1, "front": "a.png", "side": "b.png", "seen": "Clear.", "so": "Normal."},
        {"exam": 2, "front": "a.png", "side": "", "seen": "Opacity.", "so": ""},
    ]
    src = table(tmp_path / "t.csv", rows)
    columns = {"id": "exam", "image": ["front", "side"], "text": ["seen", "so"]}
    _, examples, corpus = run("table", src, tmp_path / "out", columns=columns)
    assert [row.image for row in corpus] == [["images/a.png", "images/b.png"], "images/a.png"]
    assert [e.answer for e in examples] == ["Clear.\nNormal.", "Opacity."]
    with pytest.raises(UserError, match="id takes one column, got exam, so"):
        import_data("table", src, tmp_path / "o2", columns={"id": ["exam", "so"]})


def test_a_column_map_on_the_command_line(tmp_path: Path) -> None:
    rows = [{"a+b": "One.", "who": "p1", "text": "x"}, {"a+b": "Two.", "who": "p2", "text": "y"}]
    src, out = table(tmp_path / "t.csv", rows), tmp_path / "out"
    recipe = tmp_path / "r.toml"
    recipe.write_text('[import]\ndomain = "radiology"\n[import.columns]\npatient = "who"\n')
    mapped = ("--config", str(recipe), "--column", "text=a+b", "--column", "id=")
    calls: dict[tuple[str, ...], tuple[int, str]] = {
        ("--column", "words=text"): (2, "columns: 'words' is not known, expected id, image, text"),
        ("--column", "text=words"): (2, "t.csv: no column 'words' for text, it has a+b, who, text"),
        ("--column", "text"): (2, "--column: got 'text', expected NAME=SOURCE"),
        mapped: (0, ""),  # after the failures: OUT was left free
    }
    for words, (code, said) in calls.items():
        done = CliRunner().invoke(noun, ["import", "table", str(src), str(out), *words])
        shown = str(done.exception) if isinstance(done.exception, UserError) else done.output
        assert (done.exit_code == 0) == (code == 0) and said in shown, shown
        assert out.exists() == (code == 0)
    rows_ = DataFolder(out).corpus()
    assert [(r.text, r.patient, r.domain) for r in rows_] == [
        ("One.", "p1", "radiology"),
        ("Two.", "p2", "radiology"),
    ]


def test_refused_rows_are_printed_each_on_its_line(tmp_path: Path) -> None:
    src = tmp_path / "t.csv"
    src.write_text("id,text\n" + "".join(f"{n},good,bad\n" for n in range(30)) + "x,fine\n")
    done = CliRunner().invoke(noun, ["import", "table", str(src), str(tmp_path / "out")])
    lines = [line for line in done.output.splitlines() if line.startswith("refused: ")]
    assert done.exit_code == 1 and len(lines) == 20
    assert lines[0] == "refused: t.csv:2: 3 fields, expected 2"
    assert f"10 more are in {tmp_path / 'out' / 'rejected.jsonl'}" in done.output
    again = ["import", "table", str(src), str(tmp_path / "o2"), "--json"]
    assert len(json.loads(CliRunner().invoke(noun, again).stdout)["refusals"]) == 30


def test_questions_about_one_picture_share_a_corpus_row(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "1.png")
    rows = [
        {"question": q, "answer": a, "image": "1.png"}
        for q, a in (("Is it?", "yes"), ("Where?", "left"))
    ]
    src = table(tmp_path / "t.tsv", rows, delimiter="\t")
    _, examples, corpus = run("table", src, tmp_path / "out")
    assert [e.answer_type for e in examples] == ["closed", "open"] and len(corpus) == 1
    assert {e.meta["study"] for e in examples} == {corpus[0].meta["study"]}


def test_damaged_csv_rows_are_refused_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,text\na,one\nb,two,three\nc\nd,"it ""is"" fine"\ne,"bad"quote\nf,six\n,\n')
    _, examples, _ = run("table", path, tmp_path / "out")
    assert [e.answer for e in examples] == ["one", 'it "is" fine', "six"]
    assert sorted(refused(tmp_path / "out")) == [3, 4, 6, 8]
    path.write_text('id,text\na,one\nb,"never closed\nc,three\n')
    result, examples, _ = run("table", path, tmp_path / "o2")
    assert [e.answer for e in examples] == ["one"] and result.rejected == 1
    path.write_bytes(b"id,text\na,\xff\xfe\n")
    assert "UTF-8" in run("table", path, tmp_path / "o3")[0].refusals[0]
    path.write_text("id,id\na,b\n")
    assert "same name" in run("table", path, tmp_path / "o4")[0].refusals[0]


def test_parquet_with_embedded_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {
            "image": {"bytes": png_bytes(picture(n)), "path": None},
            "question": f"Is it {n}?",
            "answer": "yes",
            "grade": float(n),
        }
        for n in range(3)
    ] + [
        {
            "image": {"bytes": b"broken", "path": "b.png"},
            "question": "Is it?",
            "answer": "no",
            "grade": None,
        }
    ]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    result, examples, corpus = run("table", tmp_path, tmp_path / "out", source="p")
    assert (result.rejected, len(examples), len(corpus)) == (1, 3, 3)
    assert {e.split for e in examples} == {"test"} and examples[2].meta["grade"] == 2
    assert [pixel_hash(load_image(e.images[0])) for e in examples] == [
        pixel_hash(picture(n)) for n in range(3)
    ]
    path.write_bytes(path.read_bytes()[:-40])
    assert "cannot be read" in run("table", tmp_path / "data", tmp_path / "o2")[0].refusals[0]


def test_a_saved_hugging_face_dataset_folder(tmp_path: Path) -> None:
    """The layout of ``DatasetDict.save_to_disk``: Arrow streams beside JSON descriptions."""
    pa = pytest.importorskip("pyarrow")
    rows = {"train": [("one.", 1), ("two.", 2)], "test": [("three.", 3)]}
    for split, content in rows.items():
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        table = pa.table(
            {
                "caption": [c for c, _ in content],
                "id": [n for _, n in content],
                "grade": [n % 2 for _, n in content],
            }
        )
        grade = {"names": ["low", "high"], "_type": "ClassLabel"}
        described = json.dumps({"info": {"features": {"grade": grade}}})
        table = table.replace_schema_metadata({"huggingface": described})
        with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink:
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        (folder / "state.json").write_text("{}")
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    _, examples, corpus = run("table", tmp_path / "saved", tmp_path / "out")
    assert sorted((e.answer, e.split) for e in examples) == [
        ("one.", "train"),
        ("three.", "test"),
        ("two.", "train"),
    ]
    assert len({r.id for r in corpus}) == 3
    assert {r.text: r.meta["grade"] for r in corpus} == {
        "one.": "high",
        "two.": "low",
        "three.": "high",
    }
