"""The public sample data: imported, checked and counted (skipped where it is absent)."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path

import pytest

from mmedrag.data import check, import_data, stats
from mmedrag.images.files import load_image
from mmedrag.runtime.data_folder import DataFolder

SAMPLE = os.environ.get("MMEDRAG_SAMPLE_DATA")
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not SAMPLE, reason="MMEDRAG_SAMPLE_DATA names no sample data folder"),
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "data"
    result = import_data("manifest", str(SAMPLE), out)
    assert result.exit_code == 0, result.refusals
    return out


def test_counts_of_the_sample_data(sample: Path) -> None:
    counted = stats(sample)
    corpus = counted["tables"]["corpus"]
    assert corpus["domain"] == {"ophthalmology": 294, "pathology": 322, "radiology": 383}
    assert counted["tables"]["examples"]["task"] == {"report": 97, "vqa": 2622}
    assert (counted["images"], counted["text_only"], counted["rejected"]) == (999, 0, 0)


def test_no_patient_or_look_alike_crosses_splits(sample: Path) -> None:
    seen = defaultdict(set)
    for row in DataFolder(sample).corpus():
        if row.patient:
            seen[row.patient].add(row.split)
        if row.source == "dsb2018":
            assert row.split == "train"
    assert len(seen) == 65 + 195 and all(len(splits) == 1 for splits in seen.values())
    leaks = [f for f in check([sample]).findings if f.code.startswith("leak")]
    assert leaks == []


def test_stored_pictures_have_the_source_pixels_and_no_metadata(sample: Path) -> None:
    for row in DataFolder(sample).corpus()[::37]:
        stored = row.images[0]
        source = Path(str(SAMPLE)) / str(row.image)
        assert load_image(stored).tobytes() == load_image(source).tobytes()
        assert hashlib.sha256(source.read_bytes()).hexdigest() == row.meta["sha256"]
        data = stored.read_bytes()
        assert b"Exif" not in data and b"tEXt" not in data and b"iTXt" not in data


def test_the_sample_dicom_files(tmp_path: Path) -> None:
    pytest.importorskip("dicomanonymizer", reason="needs the extra 'dicom'")
    folder = Path(str(SAMPLE)) / "dicom"
    result = import_data("dicom", folder, tmp_path / "out", ocr="off")
    assert (result.corpus, result.rejected) == (6, 0), result.refusals
    rows = DataFolder(tmp_path / "out").corpus()
    kinds = {row.meta.get("modality"): len(row.images) for row in rows}
    assert kinds["US"] == 16 and kinds["CT"] == 1 and kinds["DX"] == 1
    for row in rows:
        ranges = [load_image(path).convert("L").getextrema() for path in row.images]
        if row.domain == "radiology":  # the slide's tiles are plain glass
            assert max(high - low for low, high in ranges) > 100  # windowed, not near-black
    assert sorted(str(row.domain) for row in rows) == ["pathology", *["radiology"] * 5]
