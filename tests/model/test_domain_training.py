"""Domain identification: trained, calibrated, *unknown*, zero-shot, and what evaluates it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmedrag.domain import outliers as domain_outliers
from mmedrag.domain.fit import (
    DomainTraining,
    fit_head,
    fit_temperature,
    threshold_between,
    tree_arrays,
)
from mmedrag.domain.identify import DomainModel, open_domain, predict_domain, tree_scores
from mmedrag.domain.train import split_rows, train_domain, zero_shot_domain, zero_shot_from
from mmedrag.evaluation.of_domain import evaluate_domain
from mmedrag.phantom.build import build_benchmark
from mmedrag.records.records import UNKNOWN, Example, UserError
from mmedrag.retrieval.encoders.load import load_encoder
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import write_jsonl
from retrieval_tools import paint, tiny_clip

pytestmark = pytest.mark.model
SMALL = DomainTraining(variants=1, swaps=4, outliers=200, trees=60)
NOTICE = "a model of this test"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    out = tmp_path_factory.mktemp("domains") / "data"
    build_benchmark(out, studies=40, seed=5, size=64, workers=1)
    return DataFolder(out)


@pytest.fixture(scope="module")
def trained(data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "domain"
    train_domain([data], out, None, SMALL, notice=NOTICE)
    return out


def test_the_folder_is_ordinary_and_says_what_it_was_trained_on(
    trained: Path, data: DataFolder
) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {"config.json", "head.safetensors", "README.md", "train_ids.jsonl"}
    config = json.loads((trained / "config.json").read_text())
    assert config["labels"] == ["ophthalmology", "pathology", "radiology"]
    assert config["metrics"]["val_accuracy"] == 1.0
    assert config["metrics"]["val_kept"] >= SMALL.keep
    assert config["metrics"]["val_outliers_flagged"] > 0.95
    ids = [
        json.loads(line)["id"]
        for line in (trained / "train_ids.jsonl").read_text().split("\n")
        if line
    ]
    train, val = split_rows([data], 0)
    assert set(ids) == {row.id for row in train}
    assert not set(ids) & {row.id for row in val}
    assert "not a medical device" in (trained / "README.md").read_text()


def test_a_fine_tuned_encoder_is_saved_beside_its_head(data: DataFolder, tmp_path: Path) -> None:
    """The picture side learns, the text side and the given encoder stay; pictures that it never
    saw lie nearer to those of their own domain than in the frozen tower."""
    from safetensors.torch import load_file

    start = tiny_clip(tmp_path / "clip")
    before = load_file(start / "model.safetensors")
    settings = replace(SMALL, outliers=60, trees=10, fine_tune=2, fine_tune_lr=1e-3)
    found = train_domain([data], tmp_path / "tuned", str(start), settings)
    assert found["val_accuracy"] == 1.0
    rows = data.corpus("test")
    same = np.array([[a.domain == b.domain for b in rows] for a in rows])
    apart = {}
    for folder in (start, tmp_path / "tuned/encoder"):
        seen = load_encoder(str(folder), "cpu").images([row.images[0] for row in rows])
        alike = seen @ seen.T
        apart[folder.name] = alike[same].mean() - alike[~same].mean()
    assert apart["encoder"] > apart["clip"] + 0.2
    after = load_file(tmp_path / "tuned/encoder/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("vision" in name or "visual" in name for name in moved)
    assert all(torch.equal(before[n], t) for n, t in load_file(start / "model.safetensors").items())
    config = json.loads((tmp_path / "tuned/config.json").read_text())
    assert config["encoder"]["spec"] == "encoder" and config["settings"]["fine_tune"] == 2
    moved_folder = (tmp_path / "tuned").rename(tmp_path / "elsewhere")
    model = open_domain(moved_folder)
    picture = next(r.images[0] for r in data.corpus("test"))
    assert model.identify([[picture]])[0].scores.keys() == set(config["labels"])
    with pytest.raises(UserError, match="needs an encoder's name"):
        train_domain([data], tmp_path / "none", None, replace(SMALL, fine_tune=1))


def test_labels_confidence_and_unknown(trained: Path, data: DataFolder, tmp_path: Path) -> None:
    model = open_domain(trained)
    found = evaluate_domain(model, [data], "test")
    assert found["accuracy_forced"]["value"] == 1.0 > found["accuracy_forced"]["low"] > 0.7
    assert found["lost"]["value"] <= 0.1
    outliers = found["unknown"]
    assert outliers["all"]["flagged"]["value"] >= 0.9
    for kind in ("noise", "blank"):
        assert outliers[kind]["flagged"]["value"] == 1.0 and outliers[kind]["flagged"]["low"] > 0.5
    assert outliers["all"]["flagged"]["n"] + found["n"] == outliers["all"]["auroc"]["n"]
    assert outliers["all"]["auroc"]["value"] > 0.98
    assert 0 <= found["ece"]["value"] < 0.05
    for domain, row in found["confusion"].items():
        assert sum(cell["value"] for cell in row.values()) == pytest.approx(1, abs=1e-5)
        assert row[domain] == found["recall"][domain]
    assert sum(cell["n"] for cell in found["recall"].values()) == found["n"]
    assert found["leave_one_source_out"] == {"phantom": None}  # no other source has its domains
    rng = np.random.default_rng(0)
    noise = np.clip(rng.standard_normal((64, 64, 3)), 0, 1) * 255
    Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    known = next(r.images[0] for r in data.corpus("train") if r.domain == "pathology")
    odd, broken, seen = model.identify(
        [[tmp_path / "noise.png"], [tmp_path / "broken.png"], [known]]
    )
    assert (odd.label, broken.label, seen.label) == (UNKNOWN, UNKNOWN, "pathology")
    reason = odd.model_dump()["reason"]
    assert "unlike the training pictures" in reason and NOTICE in reason
    assert "not an image" in broken.model_dump()["reason"]
    assert seen.confidence == seen.scores["pathology"] > 0.9
    assert sum(seen.scores.values()) == pytest.approx(1, abs=1e-5)


def test_the_views_of_a_study_are_averaged(trained: Path, data: DataFolder) -> None:
    model = open_domain(trained)
    by_domain = {r.domain: r.images[0] for r in data.corpus("train")}
    a, b = by_domain["radiology"], by_domain["ophthalmology"]
    alone = model.identify([[a], [b]])
    (both,) = model.identify([[a, b]])
    for label in model.labels:
        mean = (alone[0].scores[label] + alone[1].scores[label]) / 2
        assert both.scores[label] == pytest.approx(mean, abs=1e-5)


def test_predict_gives_a_row_per_picture(trained: Path, data: DataFolder) -> None:
    rows = predict_domain(data, open_domain(trained), "val")
    expected = {r.id for r in data.corpus("val")} | {e.id for e in data.examples("val")}
    assert {row["id"] for row in rows} == expected
    assert all(row["label"] in (row["domain"], UNKNOWN) for row in rows)


def test_training_again_gives_the_same_model(data: DataFolder, trained: Path, tmp_path: Path):
    train_domain([data], tmp_path / "again", None, SMALL, notice=NOTICE)
    for name in ("config.json", "head.safetensors", "train_ids.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_a_head_on_an_encoder_knows_its_encoder(data: DataFolder, tmp_path: Path) -> None:
    train_domain([data], tmp_path / "d", "embedded:encoder", replace(SMALL, outliers=50, trees=5))
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["encoder"]["spec"] == "embedded:encoder"
    assert open_domain(tmp_path / "d").encoder is not None
    config["encoder"]["fingerprint"] = "0" * 64
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not the one it was trained with"):
        open_domain(tmp_path / "d")


def test_domains_come_from_the_data(data: DataFolder, tmp_path: Path) -> None:
    rows = data.corpus()
    for row in rows:
        row.domain = {"radiology": "thorax", "pathology": "slides"}.get(str(row.domain))
    copy = tmp_path / "data"
    copy.mkdir()
    (copy / "images").symlink_to(data.path / "images")
    write_jsonl(copy / "corpus.jsonl", rows)
    train_domain([DataFolder(copy)], tmp_path / "d", None, replace(SMALL, outliers=50, trees=5))
    assert open_domain(tmp_path / "d").labels == ["slides", "thorax"]
    for row in rows:
        row.domain = "thorax" if row.domain else None
    write_jsonl(copy / "corpus.jsonl", rows)
    with pytest.raises(UserError, match="expected at least two"):
        train_domain([DataFolder(copy)], tmp_path / "e", None, SMALL)


@pytest.mark.parametrize("damage", ["config.json", "head.safetensors"])
def test_a_damaged_folder_is_refused(damage: str, trained: Path, tmp_path: Path) -> None:
    for name in ("config.json", "head.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / damage).write_bytes(b"{}")
    with pytest.raises(UserError, match="domain model"):
        open_domain(tmp_path)


# --- zero-shot --------------------------------------------------------------------------------


def test_zero_shot_by_prompts(tmp_path: Path) -> None:
    prompts = {"fluid": ["There is effusion."], "bone": ["There is fracture.", "fracture"]}
    zero_shot_domain(prompts, tmp_path / "d", "retrieval_tools:colour")
    model = open_domain(tmp_path / "d", encoder="retrieval_tools:colour")
    for n, shown in enumerate(("effusion", "fracture")):
        present = [name == shown for name in ("effusion", "nodule", "x", "fracture", "y", "z")]
        paint(tmp_path / f"{n}.png", present, n)
    fluid, bone = model.identify([[tmp_path / "0.png"], [tmp_path / "1.png"]])
    assert (fluid.label, bone.label) == ("fluid", "bone")
    assert fluid.confidence is not None and fluid.confidence > 0.5


def test_zero_shot_file(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('fluid = ["effusion"]\nbone = ["fracture"]\n')
    made = zero_shot_from(file, tmp_path / "d", "retrieval_tools:colour")
    assert made == {"labels": ["bone", "fluid"], "kind": "zero-shot"}
    file.write_text('fluid = "effusion"\n')
    with pytest.raises(UserError, match="fluid: expected a list of texts"):
        zero_shot_from(file, tmp_path / "e", "retrieval_tools:colour")
    file.write_text('fluid = ["effusion"]\n')
    with pytest.raises(UserError, match="at least two labels"):
        zero_shot_from(file, tmp_path / "e", "retrieval_tools:colour")


# --- the fits ---------------------------------------------------------------------------------


def test_threshold_in_a_gap_and_in_an_overlap() -> None:
    known, unknown = np.linspace(4, 9, 101), np.linspace(-5, 0, 101)
    threshold, flagged = threshold_between(known, unknown, 0.99)
    assert threshold == pytest.approx((4.05 - 0.05) / 2)
    assert flagged == 1.0
    threshold, flagged = threshold_between(known, unknown + 6, 0.99)  # up to 6: they overlap
    assert threshold == pytest.approx(4.05)  # no more than 1 % of the known is lost
    assert 0.5 < flagged < 0.7
    assert threshold_between(known, np.zeros(0), 0.99)[0] == pytest.approx(4.05)


def test_temperature_finds_what_was_hidden() -> None:
    """Labels drawn from softmax(logits): logits made five times as sure need T = 5."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (4000, 3))
    chances = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    y = np.array(["abc"[rng.choice(3, p=p)] for p in chances], dtype=object)
    arrays = {
        "mean": np.zeros(3, np.float32),
        "scale": np.ones(3, np.float32),
        "weight": 5 * np.eye(3, dtype=np.float32),
        "bias": np.zeros(3, np.float32),
    }
    head = DomainModel({"labels": list("abc"), "temperature": 1.0}, arrays)
    assert fit_temperature(head, z, y) == pytest.approx(5, rel=0.08)


def test_trees_score_as_the_library_that_grew_them() -> None:
    from sklearn.ensemble import GradientBoostingClassifier

    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 8)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    trees = GradientBoostingClassifier(n_estimators=30, max_depth=3, random_state=0).fit(x, y)
    scores = tree_scores(x, {**tree_arrays(trees), "start": np.zeros(1)})
    offset = trees.decision_function(x) - scores
    assert offset == pytest.approx(np.full(300, offset[0]), abs=1e-4)
    assert np.ptp(scores) > 1


def test_a_head_of_two_labels_is_symmetric() -> None:
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(-1, 1, (50, 2)), rng.normal(1, 1, (50, 2))])
    head = fit_head(z, np.repeat(["a", "b"], 50), ["a", "b"], SMALL)
    assert head["weight"][0] == pytest.approx(-head["weight"][1])
    assert ((z @ head["weight"].T + head["bias"]).argmax(axis=1)[50:] == 1).mean() > 0.8


def test_outliers_come_from_their_seed_and_leave_the_pictures_alone() -> None:
    a, b = (np.asarray(domain_outliers.outlier(np.random.default_rng(3))) for _ in range(2))
    assert (a == b).all() and a.shape == (128, 128, 3)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    before = np.asarray(picture).copy()
    swapped = np.asarray(domain_outliers.swap_channels(picture, (2, 0, 1)))
    assert (swapped[..., 0] == before[..., 2]).all() and (np.asarray(picture) == before).all()


def test_an_example_without_an_image_is_unknown(trained: Path) -> None:
    example = Example(id="q", task="vqa", question="?")
    (found,) = open_domain(trained).identify([example.images])
    assert (found.label, found.model_dump()["reason"]) == (UNKNOWN, "no image")
