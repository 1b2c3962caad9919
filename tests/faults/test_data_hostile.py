"""Mutated images, rows, tables and DICOM files, in a child process so that a crash shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "hostile.py"


def run(count: int, seed: int, limit: int, *kinds: str) -> str:
    named = [word for kind in kinds for word in ("--kind", kind)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--count", str(count), "--seed", str(seed), *named],
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_hundred_mutated_inputs() -> None:
    kinds = ["images", "rows", "tables"]
    try:
        import dicomanonymizer  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        kinds.append("dicom")
    said = run(50 * len(kinds), 1, 300, *kinds)
    for kind in kinds:
        assert f"{kind}: 50 mutated inputs" in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_two_thousand_mutated_inputs(seed: int) -> None:
    pytest.importorskip("dicomanonymizer", reason="needs the extra 'dicom'")
    assert run(2000, seed, 3000).count("500 mutated inputs") == 4
