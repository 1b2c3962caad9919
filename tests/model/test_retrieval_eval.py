"""``retriever eval`` and ``calibrate``: better than chance where there is something to find, at
chance where there is not; the rule fitted on validation pictures keeps its word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmedrag.evaluation.calibrate import fit_selection, write_recipe
from mmedrag.evaluation.of_retriever import (
    agreements,
    evaluate_retriever,
    labels_of,
    reinitialised,
    same_labels,
)
from mmedrag.records.records import Reference, Truth, UserError
from mmedrag.retrieval.embeddings import EmbeddingCache
from mmedrag.retrieval.encoders.load import load_encoder
from mmedrag.retrieval.index_build import build_index
from mmedrag.retrieval.search import open_retriever
from mmedrag.retrieval.select import RuleSpec
from mmedrag.runtime import config
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import write_jsonl
from retrieval_tools import FINDINGS, ColourEncoder, make_data, tiny_clip

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[DataFolder]:
    """120 references, 60 validation and 40 test pictures, with exact findings."""
    base = tmp_path_factory.mktemp("eval")
    folders = [
        make_data(base / "train", 120),
        make_data(base / "val", 60, seed=1, split="val", first=200),
        make_data(base / "test", 40, seed=2, split="test", first=300),
    ]
    for folder in folders:
        truth = []
        for row in folder.corpus():
            found = {name: {"present": name in row.text} for name in FINDINGS}
            truth.append(
                Truth.model_validate(
                    {
                        "study": row.id,
                        "patient": row.patient,
                        "domain": row.domain,
                        "findings": found,
                    }
                )
            )
        write_jsonl(folder.path / "truth.jsonl", truth)
    return folders


def test_a_good_encoder_stands_out_from_its_controls(data: list[DataFolder]) -> None:
    found = evaluate_retriever(data, ColourEncoder(), "radiology", resamples=200)
    assert (found["n"], found["gallery"], found["skipped"]) == (40, 120, 0)
    recall = found["paired"]["recall@5"]
    assert recall["chance"]["value"] == pytest.approx(5 / 40)
    assert recall["low"] <= recall["value"] <= recall["high"]
    assert recall["low"] > 3 * recall["chance"]["value"]
    assert recall["shuffled"]["high"] < 0.4 < recall["value"]
    gain = found["agreement"]["finding_accuracy"]
    assert gain["difference"]["low"] > 0.1
    gap = gain["value"] - gain["random"]["value"]
    assert gap == pytest.approx(gain["difference"]["value"], abs=1e-3)
    assert 1 / 40 < found["hubness"]["distinct_share"]["value"] <= 1
    cells = [c for c in nested(found) if "value" in c]
    ranged = [c for c in cells if c["low"] is not None]  # counts of references have no interval
    assert len(ranged) > 20 and all(c["n"] and c["low"] <= c["high"] for c in ranged)


def nested(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A dict and all dicts in it."""
    yield found
    for value in found.values():
        if isinstance(value, dict):
            yield from nested(value)


def test_a_blind_encoder_is_at_chance(data: list[DataFolder], tmp_path: Path) -> None:
    encoder = load_encoder(str(tiny_clip(tmp_path / "m")))
    found = evaluate_retriever(data, encoder, "radiology", resamples=200)
    recall = found["paired"]["recall@5"]
    assert recall["low"] <= 0.3 and recall["untrained"]["low"] <= 0.3
    assert abs(found["agreement"]["finding_accuracy"]["difference"]["value"]) < 0.15


def test_untrained_means_random_weights_and_comes_back(tmp_path: Path) -> None:
    encoder = load_encoder(str(tiny_clip(tmp_path / "m")))
    text = ["There is effusion."]
    before = encoder.texts(text)
    with reinitialised(encoder, 0):
        inside = encoder.texts(text)
        with reinitialised(encoder, 1):
            other = encoder.texts(text)
    assert np.abs(inside - before).max() > 1e-3 < np.abs(inside - other).max()
    assert (encoder.texts(text) == before).all()


def test_agreement_by_hand(tmp_path: Path) -> None:
    rows = [
        Reference(id=str(n), text="x", meta={"labels": {"a": value, "n": 3}})
        for n, value in enumerate(["yes", "no", ["yes", "big"]])
    ]
    assert labels_of(rows[2]) == {"a=yes", "a=big"}  # numbers are no labels
    folder = DataFolder(tmp_path)
    found = agreements([folder], rows[:1], rows)["label_jaccard"]
    assert found.tolist() == [[1.0, 0.0, 0.5]]


def test_truth_agreement_by_hand(tmp_path: Path) -> None:
    def truth(study: str, **present: bool) -> Truth:
        findings = {name: {"present": value} for name, value in present.items()}
        return Truth.model_validate(
            {"study": study, "patient": study, "domain": "d", "findings": findings}
        )

    write_jsonl(
        tmp_path / "truth.jsonl",
        [truth("0", a=True, b=False, c=False), truth("1", a=True, b=True, c=False)],
    )
    rows = [Reference(id=n, text="x") for n in ("0", "1")]
    found = agreements([DataFolder(tmp_path)], rows, rows)
    assert found["finding_accuracy"][0] == pytest.approx([1, 2 / 3])
    assert found["finding_jaccard"][0] == pytest.approx([1, 1 / 2])


def test_same_labels_by_hand() -> None:
    rows = [
        Reference(id=str(n), text="", meta={"labels": labels, "modality": modality})
        for n, (labels, modality) in enumerate(
            [
                ({"organ": "chest", "n": 3}, "CT"),
                ({"organ": "chest"}, "MRI"),
                ({"organ": ["head"]}, "CT"),
                ({}, "CT"),
            ]
        )
    ]
    found = {name: matrix[0].tolist() for name, matrix in same_labels(rows[:1], rows).items()}
    assert found["same_modality"] == [1, 0, 1, 1]
    assert found["same_organ"] == pytest.approx([1, 1, 0, np.nan], nan_ok=True)
    assert found["same_all"] == pytest.approx([1, 0, 0, np.nan], nan_ok=True)


@pytest.mark.parametrize("copied", [False, True])
def test_pictures_among_pictures_without_the_same_one(copied: bool, tmp_path: Path) -> None:
    """Key "image": no text is needed, and a copy of a picture does not answer for it."""
    make_data(tmp_path / "train", 30, patients=1)
    first = 0 if copied else 100
    make_data(tmp_path / "test", 12, 0 if copied else 3, "test", first=first, patients=1)
    data = [DataFolder(tmp_path / name) for name in ("train", "test")]
    for folder in data:
        rows = [r.model_dump(exclude_none=True) for r in folder.corpus()]
        for row in rows:
            said = [name for name in FINDINGS if name in row["text"]] or ["none"]
            label = [row["id"]] if copied else said
            row |= {"text": "", "patient": None, "meta": {"labels": {"finding": label}}}
            row["id"] += row["split"]
        write_jsonl(folder.path / "corpus.jsonl", rows)
    found = evaluate_retriever(data, ColourEncoder(), "radiology", resamples=100, key="image")
    assert (found["n"], found["gallery"]) == (12, 30) and "paired" not in found
    same = found["agreement"]["same_finding"]
    assert same["n"] == 12
    if copied:
        assert same["value"] == 0  # only the copies that may not be found have the same label
    else:
        assert same["value"] > same["random"]["value"]
    with pytest.raises(UserError, match="0 rows with picture in split val"):
        evaluate_retriever(data, ColourEncoder(), split="val", key="image")


def test_too_little_to_measure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 rows with picture and text"):
        evaluate_retriever([make_data(tmp_path / "d", 3)], ColourEncoder(), split="test")


# --- the calibrated rule -----------------------------------------------------------------------


def test_kept_references_reach_the_stated_precision(data: list[DataFolder], tmp_path: Path) -> None:
    build_index(data, tmp_path / "i", "radiology", ColourEncoder())
    retriever = open_retriever(tmp_path / "i", ColourEncoder())
    # 15 patients are too few to be sure of 0.9
    found = fit_selection(retriever, data, precision=0.8, k=20, level=0.8)
    assert found["measure"] == "finding_accuracy" and found["n"] == 60 * 20
    assert found["agreeing"] < 0.8 <= found["held_out"]["reached"]
    assert 0 < found["held_out"]["kept"] < 1
    write_recipe(tmp_path / "r.toml", found)
    table = config.load(str(tmp_path / "r.toml"))["selection"]
    rule = RuleSpec(**table)
    truth = {t.study: t for folder in data for t in folder.truth().values()}
    kept = agree = 0
    for row in data[2].corpus():  # pictures that nothing was fitted on
        example = next(e for e in data[2].examples() if e.image == row.image)
        (hits,), _ = retriever.search([example], 20)
        for reference in rule(hits).kept:
            same = [
                truth[row.id].findings[f].present == truth[reference].findings[f].present
                for f in FINDINGS
            ]
            kept, agree = kept + 1, agree + (np.mean(same) >= 0.8)
    assert kept > 20 and agree / kept >= 0.8


def test_an_unreachable_precision_keeps_nothing(data: list[DataFolder], tmp_path: Path) -> None:
    build_index(data, tmp_path / "i", "radiology", ColourEncoder())
    retriever = open_retriever(tmp_path / "i", ColourEncoder())
    found = fit_selection(retriever, data, precision=0.999, k=20, level=1.0)
    held = found["held_out"]
    assert (found["threshold"], held["kept"], held["reached"]) == (None, 0.0, None)
    write_recipe(tmp_path / "r.toml", found)
    rule = RuleSpec(**config.load(str(tmp_path / "r.toml"))["selection"])
    (hits,), _ = retriever.search([data[2].examples()[0]], 5)
    assert hits and rule(hits).kept == []
    with pytest.raises(UserError, match="precision: got 2"):
        fit_selection(retriever, data, precision=2)
    with pytest.raises(UserError, match="no rows with picture and text in split 'none'"):
        fit_selection(retriever, data, precision=0.5, split="none")


def test_evaluation_uses_a_cache_where_one_is_given(data: list[DataFolder], tmp_path: Path) -> None:
    first, second = ColourEncoder(), ColourEncoder()
    results = [
        evaluate_retriever(data, e, "radiology", cache=tmp_path, resamples=50)
        for e in (first, second)
    ]
    assert results[0] == results[1]
    assert (second.encoded_images, second.encoded_texts) == (0, 0)
    assert len(EmbeddingCache(tmp_path, first, "image")) == 40
