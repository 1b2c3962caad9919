"""Fundus phantoms: language, determinism, and that every finding shows where it should."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmedrag.phantom.canvas import Canvas, Rng
from mmedrag.phantom.fundus import BLOT_PLACES, SPEC, WOOL_PLACES, render
from mmedrag.phantom.grammar import Findings, fill, label_report, sentences, states, write_report
from mmedrag.records.records import Finding

SIZE = 128
CANVAS = Canvas(SIZE)
PLAIN = {"eye": "left", "pigmentation": "medium", "media": "clear", "field": "macula"} | {
    "reflex": "no"
}


def draw(
    findings: Findings | None = None,
    attributes: dict[str, str] | None = None,
    key: str = "a",
    contrast: float = 1.0,
    canvas: Canvas = CANVAS,
) -> np.ndarray:
    state = {spec.name: Finding(present=False) for spec in SPEC.findings} | (findings or {})
    return render(canvas, state, PLAIN | (attributes or {}), lambda n: Rng(key, n), contrast)


def small(image: np.ndarray) -> np.ndarray:
    """Half the size, by averaging, as the models see it."""
    n = image.shape[0] // 2
    return image.reshape(n, 2, n, 2, 3).mean((1, 3))


def digest() -> str:
    """Pixels of one picture with every finding, for each of a few keys."""
    total = hashlib.sha256()
    for key in range(4):
        every = {s.name: Rng(key, s.name).choice(states(SPEC, s)) for s in SPEC.findings}
        looks = {a.name: Rng(key, a.name).choice(list(a.values)) for a in SPEC.attributes}
        for size in (64, 97):
            total.update(draw(every, looks, str(key), 0.7, Canvas(size)).tobytes())
    return total.hexdigest()


def test_every_sentence_has_one_meaning() -> None:
    table = sentences("ophthalmology")
    assert len(SPEC.findings) == 10
    for spec in SPEC.findings:
        assert min(len(spec.positive), len(spec.negative), len(spec.hedged)) >= 4
        assert len(spec.questions) >= 3
        assert {m[1] for m in table.values() if m and m[0] == spec.name} == {
            "present",
            "absent",
            "uncertain",
        }
        for template in (*spec.positive, *spec.hedged, *spec.questions):
            for state in states(SPEC, spec):
                text = fill(SPEC, spec, template, state)
                assert "{" not in text and len(text.split()) <= 12


def test_reports_read_back() -> None:
    for key in range(300):
        rng = Rng("report", key)
        truth = {
            s.name: rng.choice(states(SPEC, s)) if rng.chance(0.3) else Finding(present=False)
            for s in SPEC.findings
        }
        looks = {a.name: rng.choice(list(a.values)) for a in SPEC.attributes}
        read = label_report("ophthalmology", write_report(SPEC, truth, looks, rng, hedging=0.0))
        assert not read["unreadable"]
        for name, state in truth.items():
            if state.present:
                assert read["findings"][name]["present"]
            for slot in ("side", "count", "severity"):
                told = read["findings"].get(name, {}).get(slot)
                assert told is None or told == getattr(state, slot)


@pytest.mark.parametrize("size", [33, 64, 128, 256])
def test_picture_is_in_range_at_any_size(size: int) -> None:
    image = draw(canvas=Canvas(size))
    assert image.shape == (size, size, 3) and image.dtype == np.float32
    assert np.isfinite(image).all() and image.min() >= 0.0
    assert image[0, 0].max() < 0.1 < image[size // 2, size // 2].max()  # dark surround


def test_same_pixels_without_cpu_features() -> None:
    import numpy._core._multiarray_umath as umath

    found = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
    here = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t; "
    code += "import numpy._core._multiarray_umath as u; "  # and report how many are still on
    code += "print(t.digest(), sum(u.__cpu_features__[n] for n in u.__cpu_dispatch__))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    env["NPY_DISABLE_CPU_FEATURES"] = " ".join(found)
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert child.stdout.split() == [digest(), "0"]


@pytest.mark.parametrize("spec", SPEC.findings, ids=lambda s: s.name)
@pytest.mark.parametrize("pigmentation", ["light", "medium", "dark"])
@pytest.mark.parametrize("field", ["macula", "disc"])
@pytest.mark.parametrize("media", ["clear", "hazy"])
def test_every_finding_shows(spec, pigmentation: str, field: str, media: str) -> None:
    looks = {"pigmentation": pigmentation, "field": field, "media": media}
    empty = small(draw(attributes=looks))
    options = states(SPEC, spec)
    for state in (options[0], options[-1]):
        change = np.abs(small(draw({spec.name: state}, looks)) - empty).max(-1)
        assert change.max() > 0.1  # well above the grain, 6 / 255 before averaging
        assert (change > 0.04).sum() >= 6


@pytest.mark.parametrize("spec", [s for s in SPEC.findings if s.sided], ids=lambda s: s.name)
def test_located_findings_keep_to_their_half(spec) -> None:
    for key in "abcd":
        empty = draw(key=key)
        for state in states(SPEC, spec):
            change = np.abs(draw({spec.name: state}, key=key) - empty).max(-1) > 1e-6
            upper, lower = change[: SIZE // 2].any(), change[SIZE // 2 :].any()
            assert (upper, lower) == (state.side != "inferior", state.side != "superior")


@pytest.mark.parametrize("spec", SPEC.findings, ids=lambda s: s.name)
def test_flipping_a_finding_moves_nothing_else(spec) -> None:
    """Far from the finding's own pixels, a crowded picture stays bit for bit the same."""
    crowd = {s.name: states(SPEC, s)[0] for s in SPEC.findings if s.name != spec.name}
    before, after = draw(crowd), draw(crowd | {spec.name: states(SPEC, spec)[0]})
    alone = np.abs(draw({spec.name: states(SPEC, spec)[0]}) - draw()).max(-1) > 0
    change = np.abs(after - before).max(-1) > 0
    assert change.any() and not (change & ~alone).any()


def test_counts_can_be_counted() -> None:
    """Each blot and each tuft is one connected patch at 256 pixels."""
    from scipy import ndimage

    canvas = Canvas(256)
    for name, places in (("haemorrhage", BLOT_PLACES), ("cotton_wool_spots", WOOL_PLACES)):
        most = SPEC.by_name[name].most
        assert most <= len(places)
        for key in map(str, range(12)):
            empty = draw(key=key, canvas=canvas)
            for count in range(1, most + 1):
                state = Finding(present=True, side="superior", count=count)
                change = np.abs(draw({name: state}, key=key, canvas=canvas) - empty).max(-1)
                assert ndimage.label(change > 0.02)[1] == count


def test_grades_are_ordered() -> None:
    for spec in SPEC.findings:
        if not spec.grades:
            continue
        side = "superior" if spec.sided else None
        for key in "abc":
            empty = draw(key=key)
            area = [
                float(np.abs(draw({spec.name: state}, key=key) - empty).sum())
                for grade in spec.grades
                for state in [Finding(present=True, side=side, severity=grade)]
            ]
            assert area[0] < area[1] < area[2]


def test_attributes_are_visible() -> None:
    for spec in SPEC.attributes:
        views = [small(draw(attributes={spec.name: value})) for value in spec.values]
        for i, one in enumerate(views):
            for other in views[:i]:
                assert np.abs(one - other).mean() > 0.01
    bright = {eye: draw(attributes={"eye": eye})[:, :, 1] for eye in ("left", "right")}
    half = SIZE // 2
    assert bright["right"][:, half:].max() > bright["right"][:, :half].max()
    assert bright["left"][:, half:].max() < bright["left"][:, :half].max()
