"""Domain identification and retrieval on the public sample data (skipped where it is absent).

Picture statistics alone are trained here, so that it takes minutes on two cores;
docs/retrieval.md has the full tables.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mmedrag.data import import_data
from mmedrag.domain.identify import open_domain
from mmedrag.domain.train import train_domain
from mmedrag.evaluation.of_domain import evaluate_domain
from mmedrag.evaluation.of_retriever import evaluate_retriever
from mmedrag.records.records import UNKNOWN
from mmedrag.runtime.data_folder import DataFolder

pytestmark = [pytest.mark.data, pytest.mark.model]


@pytest.fixture(scope="module")
def sample(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    out = tmp_path_factory.mktemp("sample") / "data"
    assert import_data("manifest", str(sample_data), out).exit_code == 0
    return DataFolder(out)


def test_held_out_groups_and_unknown_pictures(sample: DataFolder, tmp_path: Path) -> None:
    train_domain([sample], tmp_path / "d", None)
    found = evaluate_domain(open_domain(tmp_path / "d"), [sample], "test")
    assert found["accuracy_forced"]["value"] >= 0.98
    assert found["lost"]["value"] <= 0.02
    assert found["unknown"]["all"]["flagged"]["value"] >= 0.95
    seen = found["leave_one_source_out"]
    assert seen["idrid"] is None  # the only source of its domain
    assert set(seen) >= {"vqa-rad", "covid-chestxray", "bccd", "dsb2018", "dtr-histology"}


def test_the_embedded_model_says_that_it_knows_drawn_pictures_only(sample: DataFolder) -> None:
    model = open_domain("embedded:domain")
    rows = sample.corpus("test")[:40]
    found = model.identify([row.images for row in rows])
    odd = [domain for domain in found if domain.label == UNKNOWN]
    assert len(odd) >= 0.9 * len(rows)
    assert all("benchmark model" in domain.model_dump()["reason"] for domain in odd)


def test_the_table_of_real_pictures_has_its_controls(sample: DataFolder) -> None:
    found = evaluate_retriever([sample], "embedded:retriever-radiology", "radiology", resamples=200)
    recall = found["paired"]["recall@5"]
    assert {"value", "low", "high", "chance", "shuffled", "untrained"} <= set(recall)
    assert recall["chance"]["value"] > 0 and found["hubness"]["distinct_share"]["value"] > 0
    assert "label_jaccard" in found["agreement"]
