"""The H&E tiles: sentences parse, pixels are exact on any CPU, findings show and stay apart."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmedrag
from mmedrag.phantom.canvas import Canvas, Rng, to_uint8
from mmedrag.phantom.grammar import fill, label_report, sentences, states, write_report
from mmedrag.phantom.histology import SPEC
from mmedrag.records.records import Finding

NAMES = [spec.name for spec in SPEC.findings]
SIZE = 96


def attributes(key: object) -> dict[str, str]:
    rng = Rng("attributes", key)
    return {spec.name: rng.choice(list(spec.values)) for spec in SPEC.attributes}


def tile(key: object, present: dict[str, Finding] | None = None, contrast: float = 1.0) -> Any:
    """The picture without grain; findings not given are absent."""
    findings = {name: (present or {}).get(name, Finding(present=False)) for name in NAMES}
    image = SPEC.render(
        Canvas(SIZE), findings, attributes(key), lambda name: Rng(key, name), contrast
    )
    return to_uint8(image, np.zeros((SIZE, SIZE, 3), np.int32), 0.0)


def plain(name: str, side: str | None = "upper") -> Finding:
    spec = SPEC.by_name[name]
    return Finding(
        present=True,
        side=side if spec.sided else None,
        severity="moderate" if spec.grades else None,
        count=2 if spec.most else None,
    )


def everything(key: int) -> dict[str, Finding]:
    return {s.name: Rng("all", key, s.name).choice(states(SPEC, s)) for s in SPEC.findings}


def digest() -> str:
    """Of pictures that run every branch of the renderer."""
    out = hashlib.sha256()
    for key in range(8):
        out.update(tile(key, everything(key), 0.55 + 0.1 * (key % 3)).tobytes())
        out.update(tile(key).tobytes())
    return out.hexdigest()


def test_vocabulary() -> None:
    assert len(SPEC.findings) == 10
    for spec in SPEC.findings:
        assert min(len(spec.positive), len(spec.negative), len(spec.hedged)) >= 4
        assert len(spec.questions) >= 3
    combinations = 1
    for attribute in SPEC.attributes:
        combinations *= len(attribute.values)
    assert len(SPEC.attributes) == 5 and combinations == 48
    words = {word for sentence in sentences("pathology") for word in sentence.split()}
    assert len(words) < 200  # a small word-level language model has to learn them


def test_every_state_is_told_apart() -> None:
    """The first template of a finding states all there is to know of it."""
    for spec in SPEC.findings:
        for state in states(SPEC, spec):
            read = label_report("pathology", fill(SPEC, spec, spec.positive[0], state))
            found = read["findings"][spec.name]
            assert not read["unreadable"] and found["present"] and not found["uncertain"]
            assert found["side"] == state.side and found["count"] == state.count
            assert found["severity"] == state.severity


def test_reports_read_back() -> None:
    for key in range(200):
        draw = Rng("report", key)
        truth = {
            spec.name: draw.choice(states(SPEC, spec))
            if draw.chance(0.3)
            else Finding(present=False)
            for spec in SPEC.findings
        }
        text = write_report(SPEC, truth, attributes(key), draw, hedging=0.0)
        read = label_report("pathology", text)
        assert not read["unreadable"]
        told = {name for name, found in read["findings"].items() if found["present"]}
        assert told == {name for name in NAMES if truth[name].present}


@pytest.mark.parametrize("size", [64, 128, 200])
def test_shape_and_range(size: int) -> None:
    findings = {name: Finding(present=False) for name in NAMES} | everything(1)
    image = SPEC.render(Canvas(size), findings, attributes(1), lambda name: Rng(1, name), 1.0)
    assert image.shape == (size, size, 3) and image.dtype == np.float32
    assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1.05


def test_same_pixels_without_vector_instructions() -> None:
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    optional = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    if not optional:
        pytest.skip("this CPU has no instruction set beyond NumPy's baseline")
    here = Path(__file__)
    paths = [str(here.parent), str(Path(mmedrag.__file__).parents[1])]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "NPY_DISABLE_CPU_FEATURES": " ".join(optional),
    }
    code = (
        f"import {here.stem} as t; from numpy._core import _multiarray_umath as m; "
        f"print(sum(m.__cpu_features__[n] for n in {optional!r}), t.digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", digest()]


@pytest.mark.parametrize("name", NAMES)
def test_visible(name: str) -> None:
    """At contrast 1 a finding changes at least 0.4 % of the pixels by more than twice the
    grain's standard deviation, in every tile."""
    for key in range(6):
        change = np.abs(tile(key).astype(int) - tile(key, {name: plain(name, "lower")}).astype(int))
        assert (change.max(-1) > 2 * SPEC.grain).mean() > 0.004, key


@pytest.mark.parametrize("name", [spec.name for spec in SPEC.findings if spec.sided])
def test_side_is_where_it_shows(name: str) -> None:
    others = {k: v for k, v in everything(3).items() if k != name}
    for key in range(4):
        without = tile(key, others)
        for side, empty in (("upper", slice(SIZE // 2 + 4, None)), ("lower", slice(SIZE // 2 - 4))):
            image = tile(key, others | {name: plain(name, side)})
            assert np.array_equal(without[empty], image[empty])
        both = tile(key, others | {name: plain(name, "diffuse")})
        for side, half in (("upper", slice(SIZE // 2 - 4)), ("lower", slice(SIZE // 2 + 4, None))):
            image = tile(key, others | {name: plain(name, side)})
            assert np.array_equal(both[half], image[half])


@pytest.mark.parametrize(
    ("name", "share"),
    [("gland_loss", 0.1), ("mitoses", 0.85), ("fibrosis", 0.2), ("nuclear_atypia", 0.35)],
)
def test_a_flip_moves_nothing_else(name: str, share: float) -> None:
    """Where a finding of the whole field is not drawn, the picture is the same to the bit."""
    for key in range(6):
        without = tile(key, {"mucin": plain("mucin")})
        image = tile(key, {"mucin": plain("mucin"), name: plain(name)})
        same = (without == image).all(-1).mean()
        assert share < same < 1, (key, same)


def test_mitoses_are_counted() -> None:
    """Each further figure leaves the ones before in place."""
    for key in range(4):
        series = [tile(key)]
        for n in range(1, 5):
            series.append(tile(key, {"mitoses": Finding(present=True, count=n)}))
        added = [(a != b).any(-1) for a, b in zip(series[:-1], series[1:], strict=True)]
        assert all(mask.any() for mask in added)
        assert not any((a & b).any() for i, a in enumerate(added) for b in added[:i])


def test_severity_is_ordered() -> None:
    for name in (spec.name for spec in SPEC.findings if spec.grades):
        means = []
        for grade in ("mild", "moderate", "severe"):
            total = 0
            for key in range(6):
                state = plain(name, "diffuse").model_copy(update={"severity": grade})
                total += int(
                    np.abs(tile(key).astype(int) - tile(key, {name: state}).astype(int)).sum()
                )
            means.append(total)
        assert means[0] < means[1] < means[2], (name, means)


def test_contrast_is_ordered() -> None:
    for name in NAMES:
        change = []
        for contrast in (0.4, 0.7, 1.0):
            total = 0
            for key in range(5):
                image = tile(key, {name: plain(name)}, contrast)
                total += int(np.abs(tile(key).astype(int) - image.astype(int)).sum())
            change.append(total)
        assert change[0] < change[1] < change[2], (name, change)


def test_nothing_is_hidden_by_the_rest() -> None:
    """With all ten findings present, each of them still changes the picture."""
    for key in range(6):
        present = {name: plain(name) for name in NAMES}
        full = tile(key, present)
        for name in NAMES:
            less = tile(key, {k: v for k, v in present.items() if k != name})
            change = np.abs(full.astype(int) - less.astype(int)).max(-1)
            assert (change > 2 * SPEC.grain).mean() > 0.002, (key, name)
