"""``data import`` killed at any moment ends, run again, with the bytes of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IMPORT = (
    "import sys; from mmedrag.data import import_data; "
    "sys.exit(import_data('manifest', sys.argv[1], sys.argv[2]).exit_code)"
)


def make(src: Path, count: int = 60) -> None:
    src.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((160, 160), Image.Resampling.BICUBIC).save(src / f"{n}.png")
        rows.append(
            {
                "id": f"r{n}",
                "image": f"{n}.png",
                "text": f"Report {n}.",
                "text_kind": "report",
                "domain": "radiology",
                "patient": None,
            }
        )
    rows.insert(30, {"id": "bad", "text_kind": "poem"})
    (src / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def start(src: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", IMPORT, str(src), str(out)])


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "import-cache.jsonl"
    }


def killed_and_resumed(tmp_path: Path, rounds: int) -> tuple[int, int]:
    """(kills that landed, resumed imports whose bytes differ from an uninterrupted one)."""
    make(tmp_path / "src")
    begun = time.monotonic()
    assert start(tmp_path / "src", tmp_path / "whole").wait() == 1  # one row is refused
    span = time.monotonic() - begun
    expected = content(tmp_path / "whole")
    assert len(expected) == 60 + 5
    rng = np.random.default_rng(1)
    kills = differ = 0
    for number in range(rounds):
        out = tmp_path / f"cut{number}"
        for _ in range(1 + number % 2):
            child = start(tmp_path / "src", out)
            time.sleep(float(rng.uniform(0.3, 1.0)) * span)
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
            child.wait()
        assert start(tmp_path / "src", out).wait() == 1
        differ += content(out) != expected
    return kills, differ


def test_a_few_kills(tmp_path: Path) -> None:
    kills, differ = killed_and_resumed(tmp_path, 3)
    assert kills >= 1, "the machine was too fast for the kills to land"
    assert differ == 0


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    kills, differ = killed_and_resumed(tmp_path, 25)
    assert kills >= 12, "the machine was too fast for the kills to land"
    assert differ == 0
