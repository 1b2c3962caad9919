"""Imports: manifest and released rows, splits, refusals, resume. All texts are ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedrag.data import export_released, import_data, splits
from mmedrag.data.rows import read_rows
from mmedrag.images.alike import Look, pixel_hash
from mmedrag.images.files import load_image
from mmedrag.records.records import UserError
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import BadRow, read_jsonl


def picture(seed: int, size: int = 96) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def manifest_row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"m/{number}",
        "domain": "radiology",
        "modality": "X-ray",
        "image": f"pics/{number}.png",
        "text": f"Report number {number}.",
        "text_kind": "report",
        "labels": {"grade": number},
        "qa": [],
        "patient": None,
        "source": "m",
        "licence": "CC0-1.0",
        "attribution": "us",
    } | changes


def write_manifest(folder: Path, rows: list[Any], name: str = "m.jsonl") -> Path:
    (folder / "pics").mkdir(parents=True, exist_ok=True)
    for number in range(len(rows)):
        picture(number).save(folder / "pics" / f"{number}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def rejected(out: Path) -> list[BadRow]:
    return list(read_jsonl(out / "rejected.jsonl", BadRow))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "import-cache.jsonl"
    }


# --- manifest


def test_manifest_rows_become_corpus_rows_reports_and_questions(tmp_path: Path) -> None:
    qa = [
        {"question": "Is it round?", "answer": "Yes", "answer_type": "CLOSED", "qid": 7},
        {"question": "Which side?", "answer": "left", "answer_type": "CLOSED"},
        {"question": "How many?", "answer": 3, "answer_type": "OPEN"},
    ]
    rows = [
        manifest_row(0, qa=qa, patient="p0", sheet="extra"),
        manifest_row(1, text_kind="labels", text="grade: 1"),
        manifest_row(2, text_kind="none", text=""),
        manifest_row(3, image=None, text_kind="note"),
    ]
    src = write_manifest(tmp_path / "src", rows)
    result = import_data("manifest", src, tmp_path / "out")
    assert (result.corpus, result.examples, result.rejected, result.exit_code) == (4, 5, 0, 0)
    data = DataFolder(tmp_path / "out")
    corpus, examples = data.corpus(), data.examples()
    assert [r.text for r in corpus] == ["Report number 0.", "grade: 1", "", "Report number 3."]
    assert corpus[0].meta["labels"] == {"grade": 0} and corpus[0].meta["sheet"] == "extra"
    assert corpus[0].meta["text_kind"] == "report" and corpus[3].image is None
    assert [e.task for e in examples] == ["report", "vqa", "vqa", "vqa", "report"]
    closed, side, count = examples[1:4]
    assert (closed.answer, closed.answer_type, closed.meta["qid"]) == ("Yes", "closed", 7)
    assert (side.answer_type, side.meta["answer_type"]) == ("open", "CLOSED")
    assert (count.answer, count.answer_type) == ("3", "open")
    assert {e.meta["study"] for e in examples[:4]} == {"m/0"} and examples[0].patient == "p0"
    assert len({r.split for r in [corpus[0], *examples[:4]]}) == 1
    assert pixel_hash(load_image(corpus[0].images[0])) == pixel_hash(picture(0))


def test_a_bad_row_never_stops_a_good_one(tmp_path: Path) -> None:
    rows: list[Any] = [
        manifest_row(0),
        "{not json",
        '{"id": "\\ud800"}',
        '{"id": "nan", "labels": NaN}',
        ["a list"],
        manifest_row(5, text_kind="poem"),
        manifest_row(6, text=7),
        manifest_row(7, image="../outside.png"),
        manifest_row(8, image="/etc/hostname"),
        manifest_row(0),
        manifest_row(10, split="holdout"),
        manifest_row(11, domain="unknown"),
        manifest_row(12, qa=["no object", {"question": "Is it?", "answer": "no"}, {"answer": "x"}]),
        "[" * 100_000,
        manifest_row(14, sha256="0" * 64),
        manifest_row(15, image="pics/broken.png"),
        manifest_row(16),
    ]
    src = write_manifest(tmp_path / "src", rows)
    (src / "pics" / "broken.png").write_bytes((src / "pics" / "0.png").read_bytes()[:60])
    with open(src / "m.jsonl", "ab") as handle:
        handle.write(b'{"id": "\xff\xfe"}\n')
    result = import_data("manifest", src, tmp_path / "out")
    assert result.exit_code == 1
    assert [r.id for r in DataFolder(tmp_path / "out").corpus()] == ["m/0", "m/12", "m/16"]
    assert [e.question for e in DataFolder(tmp_path / "out").examples(task="vqa")] == ["Is it?"]
    said = {bad.line: bad.reason for bad in rejected(tmp_path / "out")}
    for line, words in {
        2: "not JSON",
        3: "surrogate",
        4: "id: missing",  # NaN
        5: "object",
        6: "text_kind",
        7: "text",
        8: "leaves",
        9: "leaves",
        10: "stands twice",
        11: "split",
        12: "reserved",
        14: "nested",
        15: "sha256",
        16: "broken.png",
        18: "UTF-8",
    }.items():
        assert words in said[line], said[line]
    assert [b.reason[:5] for b in rejected(tmp_path / "out") if b.line == 13] == ["qa.0:", "qa.2:"]
    assert all(bad.file == "m.jsonl" for bad in rejected(tmp_path / "out"))


def test_absent_images_make_text_rows_that_say_so(tmp_path: Path) -> None:
    src = write_manifest(tmp_path / "src", [manifest_row(0), manifest_row(1)])
    (src / "pics" / "1.png").unlink()
    result = import_data("manifest", src, tmp_path / "out")
    row = DataFolder(tmp_path / "out").corpus()[1]
    assert row.image is None and row.meta["missing_images"] == ["pics/1.png"]
    assert result.missing_images == 1 and "text-only" in result.notes[0]


def test_unusable_sources_and_targets_are_usage_errors(tmp_path: Path) -> None:
    src = write_manifest(tmp_path / "src", [manifest_row(0)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for args, words in (
        (("manifest", tmp_path / "gone", tmp_path / "o1"), "does not exist"),
        (("manifest", tmp_path / "empty", tmp_path / "o2"), "no \\*.jsonl"),
        (("manifest", src, tmp_path / "full"), "is not empty"),
        (("manifest", src, src / "m.jsonl"), "is a file"),
        (("novel", src, tmp_path / "o3"), "not known"),
    ):
        with pytest.raises(UserError, match=words):
            import_data(*args)
    with pytest.raises(UserError, match="option 'colour' is not known"):
        import_data("manifest", src, tmp_path / "o4", colour="red")
    import_data("manifest", src, tmp_path / "o5")
    with pytest.raises(UserError, match="holds another import"):
        import_data("manifest", src, tmp_path / "o5", seed=1)


def test_images_lose_their_metadata_and_files_of_one_name_stay_two(tmp_path: Path) -> None:
    src = tmp_path / "src"
    (src / "a").mkdir(parents=True)
    picture(1).save(src / "a" / "x.jpg", comment=b"Doe^Jane", quality=95)
    picture(2).save(src / "a" / "x.png")
    picture(3).convert("RGB").save(src / "a" / "x.tif", description="Doe^Jane")
    rows = [manifest_row(i, image=f"a/x.{s}") for i, s in enumerate(("jpg", "png", "tif"))]
    (src / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    import_data("manifest", src, tmp_path / "out")
    stored = DataFolder(tmp_path / "out").corpus()
    assert [r.image for r in stored] == ["images/a/x.jpg", "images/a/x.png", "images/a/x.tif.png"]
    for row, suffix in zip(stored, ("jpg", "png", "tif"), strict=True):
        assert b"Doe" not in row.images[0].read_bytes()
        assert pixel_hash(load_image(row.images[0])) == pixel_hash(
            load_image(src / "a" / f"x.{suffix}")
        )


# --- resume


def test_an_interrupted_import_ends_with_the_same_bytes(tmp_path: Path) -> None:
    rows = [manifest_row(i, patient=f"p{i % 5}") for i in range(12)]
    src = write_manifest(tmp_path / "src", rows)
    import_data("manifest", src, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_at_seven(done: int, total: int | None) -> None:
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        import_data("manifest", src, tmp_path / "cut", progress=stop_at_seven)
    assert not (tmp_path / "cut" / "corpus.jsonl").exists()
    with open(tmp_path / "cut" / "import-cache.jsonl", "a") as handle:
        handle.write('{"source": "torn')
    stored = tmp_path / "cut" / "images" / "pics" / "0.png"
    before = stored.stat().st_mtime_ns
    import_data("manifest", src, tmp_path / "cut")
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")
    assert stored.stat().st_mtime_ns == before  # reused, not made again
    import_data("manifest", src, tmp_path / "cut")
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")


def test_a_cache_of_before_the_journal_is_still_read(tmp_path: Path) -> None:
    src = write_manifest(tmp_path / "src", [manifest_row(i) for i in range(3)])
    import_data("manifest", src, tmp_path / "out")
    cache = tmp_path / "out" / "import-cache.jsonl"
    rows = [line.partition("\t")[2] for line in cache.read_text().splitlines()]
    assert all(json.loads(row)["stamp"] for row in rows)
    cache.write_text("".join(row + "\n" for row in rows))  # an entry a line, without checksum
    stored = tmp_path / "out" / "images" / "pics" / "0.png"
    before = stored.stat().st_mtime_ns
    import_data("manifest", src, tmp_path / "out")
    assert stored.stat().st_mtime_ns == before  # reused, not made again


def test_a_changed_source_image_is_stored_again(tmp_path: Path) -> None:
    src = write_manifest(tmp_path / "src", [manifest_row(0)])
    import_data("manifest", src, tmp_path / "out")
    picture(77).save(src / "pics" / "0.png")
    os.utime(src / "pics" / "0.png", ns=(1, 1))
    import_data("manifest", src, tmp_path / "out")
    row = DataFolder(tmp_path / "out").corpus()[0]
    assert pixel_hash(load_image(row.images[0])) == pixel_hash(picture(77))


# --- splits


def test_no_group_crosses_splits_and_shares_are_met(tmp_path: Path) -> None:
    looks = [Look.of(picture(i)) for i in range(400)]
    rows = [(f"r{i}", f"p{i // 3}" if i < 300 else None, [looks[i]], None) for i in range(400)]
    # three patientless re-encodings of picture 350, and one of a known patient's picture 10
    for n, size in enumerate((80, 110, 130)):
        again = picture(350).resize((size, size), Image.Resampling.BICUBIC)
        rows.append((f"again{n}", None, [Look.of(again)], None))
    rows.append(("copy10", None, [looks[10]], None))
    drawn = splits.assign(rows, seed=3)
    assert drawn == splits.assign(reversed(rows), seed=3)
    assert drawn != splits.assign(rows, seed=4)
    for patient in range(100):
        assert len({drawn[f"r{patient * 3 + n}"] for n in range(3)}) == 1
    assert len({drawn["r350"], drawn["again0"], drawn["again1"], drawn["again2"]}) == 1
    assert drawn["copy10"] == drawn["r10"]
    counted = {s: list(drawn.values()).count(s) / len(drawn) for s in splits.SHARES}
    assert all(abs(counted[s] - share) < 0.09 for s, share in splits.SHARES.items()), counted


def test_one_patient_is_drawn_alike_whatever_else_is_there() -> None:
    alone = splits.assign([("a", "p7", [], None)], seed=0)
    among = splits.assign([("z", None, [], None), ("a", "p7", [], None), ("b", "p8", [], None)], 0)
    assert alone["a"] == among["a"]


def test_given_splits_stay_and_pull_their_group() -> None:
    rows = [("a", "p", [], "test"), ("b", "p", [], None), ("c", None, [], "train")]
    assert splits.assign(rows, 0) == {"a": "test", "b": "test", "c": "train"}


def test_near_duplicates_equal_comparing_all_pairs() -> None:
    pictures = [picture(i % 60, 96 + 20 * (i // 60)) for i in range(180)]
    looks = [Look.of(p) for p in pictures]
    found = splits.Groups()
    for i, j in splits.near_duplicates(looks):
        found.join(i, j)
    for i in range(60):
        assert found.find(i) == found.find(i + 60) == found.find(i + 120)
    assert len({found.find(i) for i in range(180)}) == 60
    assert list(splits.near_duplicates([])) == []


# --- rows of JSON files


def test_json_arrays_give_lines_and_lose_only_what_follows_a_break(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"a": 1},\n  {\n    "a": 2\n  },\n  {"a": 3} {"a": 4}\n]\n')
    rows = list(read_rows(path))
    assert [(r.line, r.number, r.value) for r in rows[:3]] == [
        (2, 0, {"a": 1}),
        (3, 1, {"a": 2}),
        (6, 2, {"a": 3}),
    ]
    assert "expected ','" in (rows[3].error or "") and len(rows) == 4
    for text, words in (
        ("5", "single JSON value"),
        ('{"a": 1} {"a": ', "rows end here"),
        ("", "not JSON"),
        ("[1, 2", "rows end here"),
        ("[1] x", "after the end"),
        ('[{"a": "\\ud800"}, 5]', "surrogate"),
        ("\ufeff[1]", None),
    ):
        path.write_text(text, encoding="utf-8")
        errors = [r.error for r in read_rows(path) if r.error]
        assert (not errors) if words is None else words in errors[0]


# --- released formats (rows written by us in the released shapes)

VQA = [
    {
        "question_id": 1,
        "question": "Is there a lesion?\n<image>",
        "answer": "Yes.",
        "image": "slo_fundus_08003.jpg",
        "report": "A lesion is noted.",
    },
    {
        "question_id": 2,
        "question": "Is the rim thin? \n<image>",
        "answer": "No, not mentioned.",
        "image": "slo_fundus_08003.jpg",
        "report": "A lesion is noted.",
    },
    {
        "question_id": 3,
        "question": "<image>\nIs it so?",
        "answer": "Perhaps",
        "text": "t",
        "image": "slo_fundus_08004.jpg",
        "report": "Nothing “special”.",
    },
]
HARVARD = [
    {
        "id": "data_08003",
        "image_path": "slo_fundus_08003.jpg",
        "filename": "data_08003.npz",
        "report": "A lesion is noted.",
        "age": 86.74,
        "gpt4_summary": "A lesion is noted.",
        "use": "test",
    }
]
RADIOLOGY = [
    {
        "id": "CXR12_IM-0034",
        "report": "Clear lungs.",
        "split": "train",
        "image_root": "/x/iu_xray",
        "image_path": ["CXR12_IM-0034/0.png", "CXR12_IM-0034/1.png"],
    },
    {
        "id": "aa-bb",
        "study_id": 5,
        "subject_id": 10000001,
        "report": "impression: none.",
        "image_path": ["p10/p10000001/s5/aa-bb.jpg"],
        "split": "train",
        "image_root": "/x/mimic",
    },
]
PATHOLOGY = [
    {
        "id": 0,
        "image": "14633.jpg",
        "report": "Stained tissue",
        "metadata": {},
        "image_root": "/x/pmc_oa",
    },
    {
        "caption": "Glands.",
        "image_path": "video_image_1.jpg",
        "id": "train_0",
        "split": "train",
        "image_root": "/x/quilt",
    },
    {
        "": "17",
        "caption": "Glands again.",
        "image_path": "video_image_1.jpg",
        "id": "",
        "height": "1.0",
    },
]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": f"<image>\n1 reference report(s): 1. r \n{question}"},
        {"from": "gpt", "value": answer},
    ]


ALIGNMENT = [
    {
        "id": 4052,
        "image": "slo_fundus_07639.jpg",
        "conversations": turns("Q?", "Yes."),
        "rejected_conversations": turns("Q?", "No."),
        "rejected_noised": 1,
    },
    {
        "id": "",
        "image": "slo_fundus_07640.jpg",
        "conversations": turns("Q?", "Yes."),
        "rejected_conversations": turns("Q?", "No."),
        "rejected_noised": 0,
    },
    {
        "id": "",
        "image": "slo_fundus_07641.jpg",
        "conversations": turns("Q?", "Yes."),
        "rejected_conversations": turns("Q?", "No."),
        "rejected_noised": 0,
    },
    {
        "id": "",
        "image": "slo_fundus_07640.jpg",
        "conversations": turns("Q?", "No."),
        "rejected_conversations": turns("Q?", "Yes."),
        "rejected_noised": 0,
    },
]


@pytest.fixture
def released(tmp_path: Path) -> Path:
    root = tmp_path / "released"
    files = {
        "test/vqa/harvard_test.jsonl": "".join(json.dumps(r) + "\n" for r in VQA),
        "test/report/harvard_test.json": json.dumps(HARVARD, indent=4),
        "training/retriever/radiology/radiology_train.json": json.dumps(RADIOLOGY, indent=4),
        "training/retriever/pathology/pathology_val.json": json.dumps(
            PATHOLOGY, indent=4, ensure_ascii=False
        ),
        "training/alignment/ophthalmology/harvard_vqa.json": json.dumps(ALIGNMENT),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_released_rows_of_every_kind(released: Path, tmp_path: Path) -> None:
    result = import_data("released", released, tmp_path / "out")
    assert (result.examples, result.corpus, result.pairs, result.rejected) == (9, 7, 4, 0)
    data = DataFolder(tmp_path / "out")
    examples = {e.id: e for e in data.examples()}
    first = examples["test/vqa/harvard_test/1"]
    assert (first.question, first.answer, first.answer_type) == (
        "Is there a lesion?",
        "Yes.",
        "closed",
    )
    assert (first.domain, first.patient, first.split) == ("ophthalmology", "harvard-08003", "test")
    assert first.image is None and first.meta["missing_images"] == ["slo_fundus_08003.jpg"]
    third = examples["test/vqa/harvard_test/3"]
    assert (third.answer_type, third.meta["answer_type"]) == ("open", "closed")
    corpus = {r.id: r for r in data.corpus()}
    # the study with a report row of its own has one corpus row, the other comes from its question
    assert corpus["test/report/harvard_test/data_08003"].meta["study"] == first.meta["study"]
    assert corpus["test/vqa/harvard_test/report/08004"].text == "Nothing “special”."
    iu, mimic = (
        corpus[f"training/retriever/radiology/radiology_train/{r['id']}"] for r in RADIOLOGY
    )
    assert (iu.patient, iu.source, iu.split) == ("iu-CXR12", "iu", "train")
    assert iu.meta["missing_images"] == RADIOLOGY[0]["image_path"]
    assert (mimic.patient, mimic.domain) == ("mimic-10000001", "radiology")
    pathology = [r for r in data.corpus() if r.domain == "pathology"]
    assert [(r.source, r.text, r.split) for r in pathology] == [
        ("pmc", "Stained tissue", "val"),
        ("quilt", "Glands.", "val"),
        ("quilt", "Glands again.", "val"),
    ]
    assert len({r.id for r in pathology}) == 3


def test_released_alignment_rows_become_pairs(released: Path, tmp_path: Path) -> None:
    from mmedrag.records.records import Pair

    import_data("released", released, tmp_path / "out")
    pairs = list(read_jsonl(tmp_path / "out" / "pairs.jsonl", Pair))
    assert [p.kind for p in pairs] == ["cross_modal", "resist", "resist", "copy"]
    assert pairs[0].rejected.noise is not None and pairs[0].chosen.noise is None
    assert pairs[0].rejected.noise.kind == "gaussian_clip"
    assert (pairs[3].chosen.text, pairs[3].rejected.text) == ("No.", "Yes.")
    assert pairs[0].patient == "harvard-07639"


def test_released_images_are_found_by_dataset_and_npz_stands_in(
    released: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    (root / "harvard").mkdir(parents=True)
    (root / "CXR12_IM-0034").mkdir()
    picture(2).save(root / "CXR12_IM-0034" / "0.png")
    picture(3).save(root / "CXR12_IM-0034" / "1.png")
    np.savez(root / "harvard" / "data_08003.npz", slo_fundus=np.asarray(picture(1)))
    result = import_data("released", released, tmp_path / "out", image_root=root)
    corpus = {r.meta["study"]: r for r in DataFolder(tmp_path / "out").corpus()}
    fundus = corpus["harvard/08003"]
    assert pixel_hash(load_image(fundus.images[0])) == pixel_hash(picture(1))
    assert isinstance(corpus["iu/CXR12_IM-0034"].image, list)
    assert len(corpus["iu/CXR12_IM-0034"].images) == 2
    assert result.images == 3 and result.missing_images > 0
    per_set = import_data("released", released, tmp_path / "out2", image_root={"iu": root})
    assert per_set.images == 2


def test_released_rows_go_back_byte_equal(released: Path, tmp_path: Path) -> None:
    import_data("released", released, tmp_path / "out")
    written = export_released(tmp_path / "out", tmp_path / "back")
    assert sum(written.values()) == 3 + 1 + 2 + 3 + 4
    for path in released.rglob("*.json*"):
        again = tmp_path / "back" / path.relative_to(released)
        assert again.read_bytes() == path.read_bytes(), path.name


def test_a_change_in_the_data_folder_reaches_the_export(released: Path, tmp_path: Path) -> None:
    import_data("released", released, tmp_path / "out")
    path = tmp_path / "out" / "examples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    target = next(r for r in rows if r["id"] == "test/vqa/harvard_test/2")
    target["answer"] = "Yes."
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    export_released(tmp_path / "out", tmp_path / "back")
    back = [
        json.loads(x)
        for x in (tmp_path / "back/test/vqa/harvard_test.jsonl").read_text().splitlines()
    ]
    assert back == [VQA[0], VQA[1] | {"answer": "Yes."}, VQA[2]]


def test_own_rows_export_in_the_released_shape(tmp_path: Path) -> None:
    rows = [manifest_row(0, qa=[{"question": "Is it?", "answer": "no"}], split="test")]
    import_data("manifest", write_manifest(tmp_path / "src", rows), tmp_path / "out")
    assert export_released(tmp_path / "out", tmp_path / "back") == {
        "test/report.json": 1,
        "test/vqa.jsonl": 1,
    }
    row = json.loads((tmp_path / "back/test/vqa.jsonl").read_text())
    assert row == {
        "question_id": 1,
        "question": "Is it?\n<image>",
        "answer": "no",
        "image": "images/pics/0.png",
        "report": "Report number 0.",
    }


def test_strange_released_rows_are_refused_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    lines = [
        VQA[0],
        {"colour": "red"},
        VQA[0] | {"question": " \n<image>"},
        VQA[0] | {"answer": ["x"]},
        VQA[0] | {"image": "../../x.jpg"},
        ALIGNMENT[0] | {"conversations": []},
        ALIGNMENT[0],
        VQA[0],
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    result = import_data("released", path, tmp_path / "out")
    said = {bad.line: bad.reason for bad in rejected(tmp_path / "out")}
    assert sorted(said) == [2, 3, 4, 5, 6]
    assert "none of the released" in said[2] and "question" in said[3] and "answer" in said[4]
    assert (result.examples, result.pairs) == (2, 1)
    ids = [e.id for e in DataFolder(tmp_path / "out").examples()]
    assert ids == ["odd/1", "odd/1#7"]
