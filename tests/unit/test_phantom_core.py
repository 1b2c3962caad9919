"""The benchmark: determinism across instruction sets, exact labeller, balanced questions."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from mmedrag.phantom.build import build_benchmark
from mmedrag.phantom.canvas import Canvas, Rng, grain, turn
from mmedrag.phantom.grammar import (
    DOMAINS,
    has,
    label_report,
    load_domain,
    sentences,
    structured_report,
)
from mmedrag.phantom.questions import ask_closed, balance
from mmedrag.phantom.sample import Knobs, flip, picture, report, studies
from mmedrag.records.records import UserError
from mmedrag.runtime.data_folder import DataFolder

KNOBS = Knobs()


@pytest.fixture(scope="module", params=list(DOMAINS))
def domain(request):
    return load_domain(request.param)


def test_turn_matches_trigonometry():
    for angle in np.linspace(-2, 2, 401):
        cos, sin = turn(float(angle))
        assert cos == pytest.approx(np.cos(2 * np.pi * angle), abs=1e-6)
        assert sin == pytest.approx(np.sin(2 * np.pi * angle), abs=1e-6)


def test_grain_is_centred_and_has_its_stated_spread():
    noise = grain(256, 1, "seed")
    assert abs(noise.mean()) < 2 and noise.std() == pytest.approx(147.8, rel=0.02)


def test_structured_report_reads_back_as_exactly_what_is_there(domain):
    for study in studies(domain, 100, 7, KNOBS):
        text = structured_report(domain, study.findings, study.attributes)
        read = label_report(domain.name, text)
        assert read["unreadable"] == []
        said = {n: (f["side"], f["count"], f["severity"]) for n, f in read["findings"].items()}
        there = {n: f for n, f in study.findings.items() if f.present}
        assert said.keys() == there.keys()
        for name, (side, count, severity) in said.items():
            assert side in (None, there[name].side)
            assert count in (None, there[name].count)
            assert severity in (None, there[name].severity)


def test_specification_is_rich_enough(domain):
    assert len(domain.findings) >= (10 if domain.name == "radiology" else 8)
    for spec in domain.findings:
        for phrasings in (spec.positive, spec.negative, spec.hedged):
            assert len(set(phrasings)) >= 4, spec.name
        assert len(set(spec.questions)) >= 3, spec.name
    assert sentences(domain.name)  # raises when one sentence has two meanings
    assert any(spec.grades for spec in domain.findings)
    assert any(spec.most for spec in domain.findings)
    assert any(spec.sided for spec in domain.findings)


def test_labeller_reads_every_report_back(domain):
    """Every stated finding is recovered with every attribute that the sentence states."""
    for study in studies(domain, 1200, 7, KNOBS):
        read = label_report(domain.name, report(domain, study, KNOBS))
        assert read["unreadable"] == []
        for name, said in read["findings"].items():
            truth = study.findings[name]
            if said["uncertain"]:
                continue
            assert said["present"] == truth.present, (study.id, name)
            for field in ("side", "count", "severity"):
                assert said[field] in (None, getattr(truth, field)), (study.id, name, field)
        for name, truth in study.findings.items():
            assert not truth.present or name in read["findings"]


def test_perturbed_reports_are_counted_as_unreadable(domain):
    study = next(iter(studies(domain, 1, 3, KNOBS)))
    text = report(domain, study, KNOBS)
    read = label_report(domain.name, text + " Clinical correlation advised by the zebra.")
    assert read["unreadable"] == ["Clinical correlation advised by the zebra."]


def test_report_errors_knob_makes_wrong_reports(domain):
    knobs = Knobs(report_errors=0.3)
    wrong = told = 0
    for study in studies(domain, 200, 7, knobs):
        for name, said in label_report(domain.name, report(domain, study, knobs))[
            "findings"
        ].items():
            if not said["uncertain"]:
                told += 1
                wrong += said["present"] != study.findings[name].present
    assert 0.1 < wrong / told < 0.6


def test_balanced_questions_are_balanced_within_each_finding(domain):
    yes, asked = Counter(), Counter()
    everyone = list(studies(domain, 2500, 11, KNOBS))
    fair = balance(domain, [study.findings for study in everyone])
    for study in everyone:
        rng = Rng(study.key, "balance")
        for _ in range(3):
            q = ask_closed(domain, study.findings, rng, fair, "presence")
            yes[q.finding] += q.answer == "yes"
            asked[q.finding] += 1
    assert sum(yes.values()) / sum(asked.values()) == pytest.approx(0.5, abs=0.03)
    for finding, n in asked.items():
        assert yes[finding] / n == pytest.approx(0.5, abs=0.08), finding


def test_answers_are_those_of_the_truth(domain):
    for study in studies(domain, 200, 5, KNOBS):
        rng = Rng(study.key, "forms")
        for form in ("presence", "negated"):
            q = ask_closed(domain, study.findings, rng, form=form)
            truth = has(domain, study.findings[q.finding], q.side)
            assert q.answer == ("yes" if truth == (form == "presence") else "no")


def test_flip_changes_one_cell_only(domain):
    for study in studies(domain, 100, 5, KNOBS):
        rng = Rng(study.key, "flip-test")
        q = ask_closed(domain, study.findings, rng, form="presence")
        new = flip(domain, study.findings, q.finding, q.side, rng)
        before = has(domain, study.findings[q.finding], q.side)
        assert has(domain, new[q.finding], q.side) != before
        for side in domain.single_sides if q.side else ():
            if side != q.side:
                assert has(domain, new[q.finding], side) == has(
                    domain, study.findings[q.finding], side
                )
        assert all(new[n] == study.findings[n] for n in new if n != q.finding)


def test_similarity_makes_phenotype_mates_alike(domain):
    def agreement(similarity):
        knobs = Knobs(similarity=similarity)
        groups = {}
        for study in studies(domain, 1500, 2, knobs):
            groups.setdefault(tuple(study.attributes.values()), []).append(study)
        same = total = 0
        for members in groups.values():
            for a, b in zip(members[:-1], members[1:], strict=True):
                if a.patient != b.patient:
                    for name, state in a.findings.items():
                        if state.present:
                            total += 1
                            same += b.findings[name].present
        return same / total

    assert agreement(0.0) < 0.35 < 0.55 < agreement(0.9)


SCRIPT = """
import hashlib, sys
from mmedrag.phantom.canvas import Canvas
from mmedrag.phantom.grammar import DOMAINS, load_domain
from mmedrag.phantom.sample import Knobs, picture, report, studies
digest = hashlib.sha256()
for name in DOMAINS:
    domain, knobs = load_domain(name), Knobs(size=96)
    canvas = Canvas(96)
    for study in studies(domain, 25, 3, knobs):
        digest.update(picture(domain, study, canvas, knobs).tobytes())
        digest.update(report(domain, study, knobs).encode())
print(digest.hexdigest())
"""


def test_same_pixels_whatever_the_instruction_set():
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    usable = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    if not usable:
        pytest.skip("this CPU offers numpy no optional instruction set to switch off")
    digests = set()
    for disabled in ("", " ".join(usable)):
        env = os.environ | {"NPY_DISABLE_CPU_FEATURES": disabled}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def _digest(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def test_build_is_reproducible_resumable_and_complete(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    counts = build_benchmark(one, studies=60, seed=4, twins="image", workers=1, size=64)
    build_benchmark(two, studies=60, seed=4, twins="image", workers=2, size=64)
    assert _digest(one) == _digest(two)
    for path in list((two / "images").iterdir())[::3]:
        path.unlink()
    (two / "examples.jsonl").unlink()
    build_benchmark(two, studies=60, seed=4, twins="image", size=64)
    assert _digest(one) == _digest(two)

    data = DataFolder(one)
    examples, truth = data.examples(), data.truth()
    assert len(examples) == counts["examples"] and len(truth) == counts["truth"]
    patients = {}
    for row in [*examples, *data.corpus()]:
        patients.setdefault(row.patient, set()).add(row.split)
        assert row.images[0].exists() and row.meta["study"] in truth
    assert all(len(splits) == 1 for splits in patients.values())
    assert {e.split for e in examples} == {"train", "val", "test"}
    assert {e.task for e in examples} == {"vqa", "report"}


def test_image_twins_flip_the_asked_answer_and_keep_the_rest(tmp_path):
    build_benchmark(
        tmp_path / "d", studies=60, domains=["radiology"], seed=4, twins="image", size=64
    )
    rows = {e.id: e for e in DataFolder(tmp_path / "d").examples()}
    twins = [e for e in rows.values() if e.meta.get("twin") == "image"]
    asked = [e for e in twins if e.meta["finding"] == e.meta["flipped"]]
    assert asked and len(asked) < len(twins)
    for twin in twins:
        base = rows[twin.meta["twin_of"]]
        assert base.question == twin.question
        assert (base.answer != twin.answer) == (twin.meta["finding"] == twin.meta["flipped"])


def test_another_build_in_the_same_folder_is_refused(tmp_path):
    build_benchmark(tmp_path / "d", studies=2, domains=["radiology"], seed=1, size=32)
    with pytest.raises(UserError, match="another phantom build"):
        build_benchmark(tmp_path / "d", studies=2, domains=["radiology"], seed=2, size=32)
    with pytest.raises(UserError, match="unknown knob"):
        build_benchmark(tmp_path / "e", studies=2, brightness=3)
    with pytest.raises(UserError, match="not in the benchmark"):
        build_benchmark(tmp_path / "e", studies=2, domains=["dermatology"])


def test_any_size_shows_the_same_study(domain):
    study = next(iter(studies(domain, 1, 3, KNOBS)))
    small = picture(domain, study, Canvas(64), Knobs(size=64, noise=0.0)).astype(float)
    large = picture(domain, study, Canvas(256), Knobs(size=256, noise=0.0)).astype(float)
    shape = (64, 4, 64, 4, *large.shape[2:])
    pooled = large.reshape(shape).mean((1, 3))
    assert np.abs(pooled - small).mean() < 12


def test_truth_file_has_the_contract_fields(tmp_path):
    build_benchmark(tmp_path / "d", studies=3, domains=["radiology"], seed=1, size=32)
    line = json.loads((tmp_path / "d" / "truth.jsonl").read_text().splitlines()[0])
    assert set(line) == {"study", "patient", "domain", "findings"}
    assert all("present" in state for state in line["findings"].values())
