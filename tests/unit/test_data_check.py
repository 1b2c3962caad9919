"""``data check``: every finding on a data set that has each fault once; nothing on a clean one."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedrag.data import check, import_data, stats
from mmedrag.data.checks import text as rules
from mmedrag.data.checks.report import FINDINGS
from mmedrag.records.records import UserError


def picture(seed: int, size: int = 96) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


DATA = struct.pack(">I", 8) + b"IDAT" + bytes(12)


def bomb() -> bytes:
    """A PNG header that promises 50,000 x 50,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    size = struct.pack(">I", 13)
    return b"\x89PNG\r\n\x1a\n" + size + head + struct.pack(">I", zlib.crc32(head)) + DATA


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def clean(folder: Path, count: int = 6) -> tuple[list[Any], list[Any]]:
    """(examples, corpus) of a sound data set, its pictures stored."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    examples, corpus = [], []
    for n in range(count):
        picture(n).save(folder / "images" / f"{n}.png")
        shared = {
            "image": f"images/{n}.png",
            "patient": f"p{n}",
            "source": "s",
            "split": ("train", "val", "test")[n % 3],
            "meta": {"study": f"s{n}"},
        }
        corpus.append({"id": f"c{n}", "text": f"The lesion has grade {n} of nine.", **shared})
        examples.append(
            {
                "id": f"e{n}",
                "task": "vqa",
                "question": "Is there a lesion?",
                "answer": "yes" if n % 2 else "no",
                "answer_type": "closed",
                **shared,
            }
        )
    return examples, corpus


def found(folder: Path | list[Path], **options: Any) -> dict[str, list[Any]]:
    report = check(folder if isinstance(folder, list) else [folder], **options)
    by: dict[str, list[Any]] = {}
    for finding in report.findings:
        assert finding.severity == FINDINGS[finding.code][0]
        by.setdefault(finding.code, []).append(finding)
    assert {code: len(fs) for code, fs in by.items()} == report.totals
    return by


def test_a_clean_data_set_has_no_findings(tmp_path: Path) -> None:
    examples, corpus = clean(tmp_path)
    write(tmp_path / "examples.jsonl", examples)
    write(tmp_path / "corpus.jsonl", corpus)
    report = check([tmp_path])
    assert report.findings == [] and report.totals == {} and report.exit_code == 0
    assert report.rows == {"example": 6, "corpus": 6} and report.images == 6


def test_every_fault_is_found_at_its_line(tmp_path: Path) -> None:
    examples, corpus = clean(tmp_path, 12)
    base = dict(examples[0])

    def ask(**changes: Any) -> int:
        """Append an example; the line it stands on."""
        examples.append(base | {"id": f"x{len(examples)}"} | changes)
        return len(examples)

    def note(**changes: Any) -> int:
        corpus.append(dict(corpus[0]) | {"id": f"y{len(corpus)}"} | changes)
        return len(corpus)

    images = tmp_path / "images"
    (images / "cut.png").write_bytes((images / "0.png").read_bytes()[:200])
    picture(3).resize((80, 80)).save(images / "near.png")  # a smaller copy of patient p3's picture
    picture(20).save(images / "a.png")
    picture(20).save(images / "b.bmp")
    (images / "bomb.png").write_bytes(bomb())
    expected: dict[tuple[Any, ...], int] = {
        ("bad_row", "examples"): ask(task="riddle"),
        ("duplicate_id", "examples"): ask(id="e1", question="Is it another?"),
        ("closed_answer", "examples"): ask(question="Is it there?", answer="Perhaps."),
        ("image_token", "examples"): ask(question="<image> <image> Is it so?"),
        ("question_in_answer", "examples"): ask(
            question="Is the lung fully clear?",
            answer="Is the lung fully clear? Yes it is.",
            answer_type="open",
        ),
        ("contradiction", "examples"): ask(answer="Yes."),
        ("duplicate_question", "examples"): ask(
            image="images/1.png",
            question="is there a  lesion",
            answer="yes",
            patient="p1",
            split="val",
        ),
        # an open answer to the same question is no contradiction, only asked again
        ("duplicate_question", "examples", 2): ask(
            image="images/2.png", patient="p2", split="test", answer="A cyst.", answer_type="open"
        ),
        ("leak_patient", "examples"): ask(
            patient="p3", split="test", image=None, question="Is it large?"
        ),
        ("leak_image", "corpus"): note(
            image="images/5.png", split="val", patient="p99", text="Another text of its own."
        ),
        ("image_missing", "corpus"): note(image="images/gone.png", text="One of a kind one."),
        ("image_undecodable", "corpus"): note(image="images/cut.png", text="One of a kind two."),
        ("image_bomb", "corpus"): note(image="images/bomb.png", text="One of a kind three."),
        ("identity", "corpus"): note(text="Seen by Dr. Miller on that day.", image=None),
        ("cut_text", "corpus"): note(text="There is a lesion in the", image=None),
        ("leak_near_duplicate", "corpus"): note(
            image="images/near.png", split="val", patient="p77", text="One of a kind four."
        ),
    }
    note(image="images/a.png", patient="q1", text="One of a kind five.")
    expected["duplicate_image", "corpus"] = note(
        image="images/b.bmp", patient="q2", text="One of a kind six."
    )
    expected["repeated_image", "corpus"] = 3
    note(image="images/2.png", split="test", patient="p2", text="Quite another report.")
    expected["duplicate_text", "corpus"] = 8
    note(text="the lesion has grade 7  of nine", image=None, meta={"study": "z"})
    write(tmp_path / "examples.jsonl", examples)
    write(tmp_path / "corpus.jsonl", [*corpus, "{broken"])
    side = {"prompt": {"template": "t", "text": "Q?"}, "image": "images/1.png", "text": "No."}
    noisy = side | {"noise": {"kind": "blank", "seed": 0}}
    write(
        tmp_path / "pairs.jsonl",
        [
            {"id": "a", "kind": "resist", "chosen": side, "rejected": side},
            {"id": "b", "kind": "cross_modal", "chosen": side, "rejected": noisy},
            {"id": "c", "kind": "resist", "chosen": side, "rejected": side | {"text": "Yes."}},
        ],
    )
    expected |= {("no_signal", "pairs"): 1, ("identical_texts", "pairs"): 2}
    by = found(tmp_path)
    for (code, table, *_), line in expected.items():
        places = [(Path(f.file).stem, f.line) for f in by.get(code, [])]
        assert (table, line) in places, (code, line, places)
    assert [f.line for f in by["bad_row"] if "corpus" in f.file] == [len(corpus) + 1]
    for code in (
        "contradiction",
        "closed_answer",
        "question_in_answer",
        "image_bomb",
        "no_signal",
        "identity",
        "duplicate_id",
        "cut_text",
        "image_undecodable",
        "leak_near_duplicate",
    ):
        assert len(by[code]) == 1, [str(f) for f in by[code]]
    assert "val" in by["leak_near_duplicate"][0].message
    assert check([tmp_path], images=False).exit_code == 1
    assert not {"image_missing", "near_duplicate"} & set(found(tmp_path, images=False))


def test_leaks_between_two_folders(tmp_path: Path) -> None:
    for name, split in (("one", "train"), ("two", "test")):
        (tmp_path / name).mkdir()
        picture(5).save(tmp_path / name / "p.png")
        write(
            tmp_path / name / "corpus.jsonl",
            [
                {
                    "id": "1",
                    "text": f"Text of {name}.",
                    "image": "p.png",
                    "split": split,
                    "patient": name,
                }
            ],
        )
    assert found(tmp_path / "one") == {}
    assert list(found([tmp_path / "one", tmp_path / "two"])) == ["leak_near_duplicate"]


def test_released_rows_are_checked_as_they_stand(tmp_path: Path) -> None:
    ask = {
        "question_id": 1,
        "question": "Is it?\n<image>",
        "answer": "Yes.",
        "image": "slo_fundus_08003.jpg",
        "report": "R.",
    }
    write(
        tmp_path / "test/vqa/harvard_test.jsonl",
        [
            ask,
            ask | {"question_id": 2, "question": "Is that?"},
            ask | {"question_id": 3, "question": "And?\n<image>", "answer": "Maybe."},
            ask | {"question_id": 3, "question": "Or?\n<image>", "answer": "No, none."},
            {"colour": "red"},
        ],
    )
    hexes = ["0a1b2c3d-00000001", "0a1b2c3d-00000002", "0a1b2c3d-00000003"]

    def pair(row_id: str, image: str, noised: int = 1) -> dict[str, Any]:
        turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "Same."}]
        return {
            "id": row_id,
            "image": f"p10/p10000001/s5/{image}.jpg",
            "conversations": turns,
            "rejected_conversations": turns,
            "rejected_noised": noised,
        }

    rows = [pair(hexes[0], hexes[0]), pair(hexes[1], hexes[0]), pair(hexes[2], hexes[0], 0)]
    path = tmp_path / "training/alignment/radiology/radiology_report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rows))
    by = found(tmp_path)
    assert [f.line for f in by["image_token"]] == [2]
    assert [f.line for f in by["closed_answer"]] == [3]
    assert [f.line for f in by["duplicate_id"]] == [4]
    assert [f.line for f in by["bad_row"]] == [5]
    assert [f.id for f in by["wrong_image"]] == hexes[1:]
    assert by["wrong_image"][0].file.endswith("radiology_report.json[1]")  # rows share line 1
    assert len(by["identical_texts"]) == 2 and len(by["no_signal"]) == 1


def test_questions_and_answers_that_hold_each_other(tmp_path: Path) -> None:
    """Generated questions that were cut apart badly, as in the released test questions."""
    ask = {"image": "slo_fundus_08003.jpg", "report": "R."}
    said = [
        ("Is the disc pale? - Yes", "2. Is the cup large? - No"),
        ("Is it large (above 0.6)? No", "No."),
        ("", "Yes."),
        ("Is it small?", ""),
        ("Is it round? Please choose from the following two options: [yes, no]", "No."),
        ("Is it grey (yes or no)?", "Yes, it is."),
    ]
    write(
        tmp_path / "test/vqa/harvard_test.jsonl",
        [
            ask | {"question_id": n, "question": f"{q}\n<image>", "answer": a}
            for n, (q, a) in enumerate(said)
        ]
        + [ask | {"question_id": 9, "question": "Is it?", "answer": 3}],
    )
    by = found(tmp_path)
    assert [f.line for f in by["answer_in_question"]] == [1, 2]
    assert [f.line for f in by["question_in_answer"]] == [1]
    assert [f.line for f in by["closed_answer"]] == [1]
    assert [(f.line, f.message) for f in by["empty_text"]] == [(3, "question"), (4, "answer")]
    assert [(f.line, f.message) for f in by["bad_row"]] == [(7, "answer: got 3, expected text")]


def test_an_import_keeps_the_faults_of_released_rows(tmp_path: Path) -> None:
    """Their images are not part of that data: rows without one are still about it."""
    hexes = ["0a1b2c3d-00000001", "0a1b2c3d-00000002"]
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "By Dr. Miller."}]
    pairs = [
        {
            "id": own,
            "image": f"p10/p10000001/s5/{hexes[0]}.jpg",
            "conversations": turns,
            "rejected_conversations": turns,
            "rejected_noised": 1,
        }
        for own in hexes
    ]
    for name, rows in (
        ("alignment/radiology_report", pairs),
        (
            "retriever/pathology_train",
            [{"id": 1, "image_path": "q.jpg", "caption": "A gland is seen in"}],
        ),
        ("retriever/pathology_val", [{"id": 1, "image_path": "q.jpg", "caption": "Another one."}]),
    ):
        path = tmp_path / "src" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    import_data("released", tmp_path / "src", tmp_path / "out")
    for folder in (tmp_path / "src", tmp_path / "out"):
        by = found(folder)
        assert [len(by[code]) for code in ("wrong_image", "leak_image", "repeated_image")] == [
            1,
            1,
            1,
        ]
        assert "q.jpg is in train and val" in by["leak_image"][0].message
        # a text is judged once, in however many rows it stands
        assert [(f.message, f.count) for f in by["identity"]] == [("name-like: 'Dr. Miller'", 2)]
        assert len(by["cut_text"]) == 1
    assert by["cut_text"][0].count == 2  # the corpus row and the report to write


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def rows(name: str, count: int) -> Path:
        write(
            tmp_path / name / "corpus.jsonl",
            [
                {
                    "id": f"{n}",
                    "text": f"Report {n % 50} is here.",
                    "patient": f"{n}",
                    "split": "train",
                    "image": f"{n}.png",
                }
                for n in range(count)
            ],
        )
        return tmp_path / name

    small, large = rows("small", 500), rows("large", 6000)
    check([small], images=False)  # what is imported and cached once
    peaks = []
    for folder in (small, large):
        tracemalloc.start()
        check([folder], images=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**17, peaks  # 22 bytes a row


def test_images_of_released_rows_are_looked_for_under_a_root(tmp_path: Path) -> None:
    write(
        tmp_path / "test/report/harvard_test.jsonl",
        [
            {
                "id": f"data_{n:05d}",
                "image_path": f"slo_fundus_{n:05d}.jpg",
                "report": f"Report {n}.",
            }
            for n in range(3)
        ],
    )
    (tmp_path / "pics/harvard").mkdir(parents=True)
    picture(0).save(tmp_path / "pics/harvard/slo_fundus_00000.jpg")
    picture(1).save(tmp_path / "pics/slo_fundus_00001.jpg")
    by = found(tmp_path / "test", image_root=tmp_path / "pics")
    assert [f.line for f in by["image_missing"]] == [3]


def test_baselines_by_hand(tmp_path: Path) -> None:
    def row(n: int, question: str, answer: str, split: str) -> dict[str, Any]:
        return {
            "id": f"{n}",
            "task": "vqa",
            "question": question,
            "answer": answer,
            "answer_type": "closed",
            "source": "s",
            "split": split,
            "meta": {"study": f"{n}"},
        }

    asked = [("A?", "yes"), ("A?", "yes"), ("A?", "no"), ("B?", "no"), ("B?", "no"), ("C?", "no")]
    rows = [row(n, q, a, "test") for n, (q, a) in enumerate(asked)]
    rows += [
        row(10 + n, q, a, "train")
        for n, (q, a) in enumerate([("A?", "yes"), ("B?", "yes"), ("D?", "no"), ("D?", "no")])
    ]
    write(tmp_path / "examples.jsonl", rows)
    found_ = {b.split: b for b in check([tmp_path]).baselines}
    test = found_["test"]
    assert (test.n, test.yes, test.no) == (6, pytest.approx(2 / 6), pytest.approx(4 / 6))
    assert test.f1_yes == pytest.approx(2 * 2 / (6 + 2))
    # leave-one-out: the yes rows of A see one yes, one no (a tie: majority no, wrong twice);
    # its no row sees two yes (wrong); B right twice; C has no other: majority no, right
    assert test.question_only == pytest.approx(3 / 6)
    # from train: A yes (2 of 3 right), B yes (0 of 2), C unseen: train majority tie at 0.5 → no
    assert test.train_prior == pytest.approx(3 / 6)
    assert found_["train"].train_prior is None


def test_the_page_shows_thumbnails_and_escapes_text(tmp_path: Path) -> None:
    examples, corpus = clean(tmp_path / "d", 4)
    corpus[3] |= {"image": "images/0.png", "text": "<script>alert(1)</script> seen by Dr. Miller."}
    write(tmp_path / "d/corpus.jsonl", corpus)
    report = check([tmp_path / "d"], html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "data:image/jpeg;base64," in page and "<script>" not in page
    assert "http" not in page and "identity" in page and str(report.errors) in page
    json.dumps(report.to_dict())


def test_unreadable_sources_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "none/corpus.jsonl", [])
    for paths, words in (
        ([tmp_path / "gone"], "does not exist"),
        ([tmp_path / "empty"], "no .json"),
        ([tmp_path / "none"], "no rows"),
        ([], "nothing given"),
    ):
        with pytest.raises(UserError, match=words):
            check(paths)


def test_progress_only_goes_on(tmp_path: Path) -> None:
    _, corpus = clean(tmp_path)
    write(tmp_path / "corpus.jsonl", corpus * 100)  # more rows than pictures
    seen: list[tuple[int, int | None]] = []
    check([tmp_path], progress=lambda done, total: seen.append((done, total)))
    steps = [done for done, _ in seen]
    assert steps == sorted(steps) and seen[-1] == (606, 606)


def test_listing_is_bounded_and_totals_are_not(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "text": f"Text {n} written by Dr. Miller."} for n in range(30)]
    write(tmp_path / "corpus.jsonl", rows)
    report = check([tmp_path], most=5)
    assert report.totals["identity"] == 30 and len(report.findings) == 5


def test_stats_counts_what_is_there(tmp_path: Path) -> None:
    examples, corpus = clean(tmp_path)
    write(tmp_path / "examples.jsonl", examples)
    write(tmp_path / "corpus.jsonl", corpus)
    counted = stats(tmp_path)
    assert counted["tables"]["examples"]["split"] == {"test": 2, "train": 2, "val": 2}
    assert counted["tables"]["examples"]["answer_type"] == {"closed": 6}
    assert (counted["patients"], counted["images"], counted["text_only"]) == (6, 6, 0)
    assert counted["tables"]["corpus"]["words"] == {"median": 7, "p95": 7, "max": 7}
    assert [b["split"] for b in counted["baselines"]] == ["test", "train", "val"]
    with pytest.raises(UserError, match="no such data folder"):
        stats(tmp_path / "gone")


# --- text rules


@pytest.mark.parametrize(
    "text",
    [
        "Seen on 03/12/2018.",
        "Dated 2019-04-01.",
        "Exam of March 3, 2017.",
        "On 12 Jan 2020 it was.",
        "Dr. Miller agrees.",
        "Mrs. O'Neil was seen.",
        "Patient name: Smith",
        "MRN: 1234567",
        "Accession number 44556677.",
        "SSN 123-45-6789",
        "mail a.b@c.org",
        "Phone: +1 (555) 123-4567",
    ],
)
def test_identity_is_seen(text: str) -> None:
    assert rules.identity(text)


@pytest.mark.parametrize(
    "text",
    [
        "Dr. ___ agrees.",
        "XXXX seen at C3-4.",
        "Magnification 2000 x.",
        "Ratio 1/5 of 12/20.",
        "May show 2 lesions.",
        "The March of time.",
        "Grade 3-4/2000 cells",
        "No name was given.",
        "The radiologist: see above.",
        "10-12-14 mm",
        "p53 and CD20 2019",
        "Type 1234 stain",
        "Dr. Identified agrees with Dr. Person and Dr. [redacted].",
        "Mitofusin (accession no. O43399)",  # of a protein
    ],
)
def test_what_is_no_identity_stays_unseen(text: str) -> None:
    assert rules.identity(text) == []


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("There is a mass in the", True),
        ("Staining for", True),
        ("Cells (stained red", True),
        ("Left lung,", True),
        ("Clear lungs", False),
        ("Clear lungs.", False),
        ("Grade (low)", False),
        ("intensity 1+", False),
        ("Scale bar 50 μm", False),
        ("", False),
        ("Arrow: nucleus A", False),  # a label, not the article
    ],
)
def test_texts_that_break_off(text: str, cut: bool) -> None:
    assert bool(rules.breaks_off(text)) == cut


def test_half_words_need_the_whole_one_elsewhere() -> None:
    words = rules.Words()
    for _ in range(3):
        words.add("fluorescence of crypts")
    words.add("immune fluorescenc")
    words.add("the crypt")
    assert words.half("fluorescenc") == "fluorescence"
    assert words.half("crypt") is None  # crypts is its plural
    assert words.half("unheard") is None
    words.add("immune fluorescenc")  # the same text in another row
    assert words.half("fluorescenc") is None
    assert words.half("fluorescenc", here=2) == "fluorescence"


def test_an_import_and_its_check_agree(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"r{n}",
            "image": f"{n}.png",
            "text": f"Report {n}.",
            "text_kind": "report",
            "qa": [{"question": "Which?", "answer": "left", "answer_type": "CLOSED"}],
        }
        for n in range(3)
    ]
    (tmp_path / "src").mkdir()
    for n in range(2):
        picture(n).save(tmp_path / "src" / f"{n}.png")
    write(tmp_path / "src/m.jsonl", rows)
    import_data("manifest", tmp_path / "src", tmp_path / "out")
    by = found(tmp_path / "out")
    assert set(by) == {"made_open", "text_only"}
    assert by["made_open"][0].count == 3 and by["text_only"][0].count in (1, 2)
