"""The released repository's data, where a user has it: known counts and known faults.

``MMEDRAG_RELEASED`` names a checkout's ``data`` folder (commit 45ceed3). Nothing of it is kept.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from mmedrag.data import check, export_released, import_data
from mmedrag.data.checks.report import CheckReport
from mmedrag.records.records import Pair
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import read_jsonl

RELEASED = os.environ.get("MMEDRAG_RELEASED")
ROWS = {  # counts of the released files (D1 of docs/differences.md)
    "test/report/harvard_test.json": 713,
    "test/report/iuxray_test.json": 590,
    "test/report/mimic_test.json": 700,
    "test/report/pmc-oa_test.json": 800,
    "test/report/quilt-1m_test.json": 1000,
    "test/vqa/harvard_test.jsonl": 4285,
    "test/vqa/iuxray_test.jsonl": 2573,
    "test/vqa/mimic_test.jsonl": 3470,
    "test/vqa/pmc-oa_test.jsonl": 1994,
    "test/vqa/quilt-1m_test.jsonl": 3124,
    "training/alignment/ophthalmology/harvard_report.json": 427,
    "training/alignment/ophthalmology/harvard_vqa.json": 1854,
    "training/alignment/radiology/radiology_report.json": 701,
    "training/retriever/ophthalmology/harvard_val_1000.json": 1000,
    "training/retriever/pathology/pathology_train.json": 5000,
    "training/retriever/pathology/pathology_val.json": 2000,
    "training/retriever/radiology/radiology_train.json": 4034,
    "training/retriever/radiology/radiology_val.json": 2035,
}
ABSENT = [name for name in ROWS if not (Path(RELEASED or "") / name).is_file()]
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not RELEASED, reason="MMEDRAG_RELEASED names no released data folder"),
    pytest.mark.skipif(
        bool(ABSENT), reason=f"the released data folder lacks {len(ABSENT)} files: {ABSENT[:1]}"
    ),
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("released") / "data"
    result = import_data("released", str(RELEASED), out)
    # two questions of the IU test file are empty; nothing else is refused
    assert [line.split(":")[:2] for line in result.refusals] == [
        ["test/vqa/iuxray_test.jsonl", "499"],
        ["test/vqa/iuxray_test.jsonl", "998"],
    ]
    return out


@pytest.fixture(scope="module")
def report() -> CheckReport:
    return check([str(RELEASED)], images=False)


def test_every_row_of_every_file_is_there(imported: Path, tmp_path: Path) -> None:
    written = export_released(imported, tmp_path)
    expected = dict(ROWS) | {"test/vqa/iuxray_test.jsonl": 2571}
    assert written == expected
    for name in expected:
        if "iuxray_test.jsonl" not in name:  # all but the file with refused rows: byte-equal
            assert (tmp_path / name).read_bytes() == (Path(str(RELEASED)) / name).read_bytes(), name


def test_pairs_have_the_paper_tables_counts(imported: Path) -> None:
    pairs = list(read_jsonl(imported / "pairs.jsonl", Pair))
    kinds = Counter((p.id.split("/")[-2], p.kind) for p in pairs)
    assert kinds["harvard_vqa", "cross_modal"] == 824 and kinds["harvard_vqa", "resist"] == 1030
    assert [kinds["harvard_report", k] for k in ("cross_modal", "resist", "copy")] == [142, 78, 207]
    assert [kinds["radiology_report", k] for k in ("cross_modal", "resist", "copy")] == [
        233,
        126,
        342,
    ]


def test_questions_and_studies(imported: Path) -> None:
    examples = DataFolder(imported).examples(task="vqa")
    images = {(e.source, e.meta["missing_images"][0]) for e in examples}
    per_set = Counter(source for source, _ in images)
    assert per_set == {"harvard": 711, "iu": 587, "mimic": 694, "pmc": 530, "quilt": 559}


def test_the_check_reports_the_known_faults(report: CheckReport) -> None:
    wrong = [f for f in report.findings if f.code == "wrong_image"]
    assert len(wrong) == 136 and {Path(f.file).name for f in wrong} == {"radiology_report.json"}
    leaks = [f for f in report.findings if f.code == "leak_image"]
    assert len(leaks) == 492 and all(f.message.startswith("quilt/") for f in leaks)
    assert report.totals["identical_texts"] == 589
    assert "leak_patient" not in report.totals and "bad_row" not in report.totals
    # questions of the IU test file that were cut apart badly, or answered with nothing
    iu = {
        code: [f for f in report.findings if f.code == code]
        for code in ("answer_in_question", "question_in_answer", "empty_text")
    }
    assert {code: len(found) for code, found in iu.items()} == {
        "answer_in_question": 20,
        "question_in_answer": 22,
        "empty_text": 3,
    }
    assert all(f.file.endswith("iuxray_test.jsonl") for found in iu.values() for f in found)
    cut = [f for f in report.findings if f.code == "cut_text"]
    assert len(cut) >= 150 and sum("pathology" in f.file for f in cut) >= len(cut) - 2


def test_an_import_keeps_the_known_faults(imported: Path, report: CheckReport) -> None:
    after = check([imported], images=False)
    for code in ("wrong_image", "leak_image", "repeated_image", "identical_texts", "cut_text"):
        assert after.totals[code] == report.totals[code], code


def test_baselines_equal_the_known_ones(report: CheckReport) -> None:
    yes = {b.source: round(100 * b.yes, 1) for b in report.baselines}
    assert yes == {"harvard": 86.1, "iu": 26.7, "mimic": 61.5, "pmc": 56.7, "quilt": 54.3}
    prior = {b.source: 100 * b.question_only for b in report.baselines}
    assert prior["harvard"] == pytest.approx(88.7, abs=0.1)
    assert prior["iu"] == pytest.approx(77.9, abs=0.1)
    # 74.3 on the raw strings; equal questions that differ in white space only are joined here
    assert prior["mimic"] == pytest.approx(74.3, abs=1.0)
