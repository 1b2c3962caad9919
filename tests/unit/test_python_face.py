"""``import mmedrag``: the nine names, at once and without anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mmedrag

NAMES = "load_system ask Pipeline Example Reference Trace Index evaluate build_pairs".split()


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_face_is_these_names() -> None:
    assert sorted(mmedrag.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(mmedrag)) and mmedrag.__version__
    for name in NAMES:
        assert getattr(mmedrag, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        mmedrag.no_such_name  # noqa: B018


def test_importing_it_is_light() -> None:
    """50 ms of processor time at most, best of five; the names themselves need no engine."""
    code = """
import time
start = time.process_time()
import mmedrag
taken = time.process_time() - start
import sys
print(taken, [m for m in ("torch", "numpy", "pydantic", "click") if m in sys.modules])
"""
    found = [python(code).split(maxsplit=1) for _ in range(5)]
    assert {loaded.strip() for _, loaded in found} == {"[]"}
    assert min(float(taken) for taken, _ in found) <= 0.05


def test_its_names_load_no_engine() -> None:
    code = f"from mmedrag import {', '.join(NAMES)}; import sys; print('torch' in sys.modules)"
    assert python(code).strip() == "False"
