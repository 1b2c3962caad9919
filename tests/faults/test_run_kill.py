"""A batch run that is killed again and again ends with the bytes of one that never was."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mmedrag.runtime.data_folder import DataFolder

CHILD = """
import sys, time
from pathlib import Path
from mmedrag.pipeline import Plan
from mmedrag.answering.generators import ScriptedGenerator
from mmedrag.pipeline import Pipeline
from mmedrag.pipeline import RunSettings, run_plans
from mmedrag.runtime import DataFolder

def say(request):
    time.sleep(0.004)
    noise = request.noise.seed if request.noise else 0
    return f"yes {len(request.prompt.text)} {noise} {request.images[0].name}"

plans = {"clean": Plan("none"), "noise": Plan("own", "gaussian_clip")}
pipeline = Pipeline(rule=None, generator=ScriptedGenerator("child", script=say))
run_plans(pipeline, DataFolder(sys.argv[1]), plans, Path(sys.argv[2]), RunSettings(chunk=3), 5)
"""


def command(data: Path, out: Path) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(CHILD), str(data), str(out)]


def kill_rounds(data: Path, out: Path, rounds: int, seed: int) -> int:
    """Start the run and kill it at a random moment of its work; how many kills hit it alive."""
    rng, hit = random.Random(seed), 0
    journal = out / "journal.log"
    for _ in range(rounds):
        before = journal.stat().st_size if journal.exists() else 0
        child = subprocess.Popen(command(data, out))
        while child.poll() is None:  # work has begun when the journal grows
            if journal.exists() and journal.stat().st_size > before:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            hit += 1
        child.wait()
    return hit


def check(data: Path, tmp_path: Path, rounds: int, need: int) -> None:
    subprocess.run(command(data, tmp_path / "whole"), check=True)
    hit = kill_rounds(data, tmp_path / "killed", rounds, seed=rounds)
    assert hit >= need
    subprocess.run(command(data, tmp_path / "killed"), check=True)
    ids = [e.id for e in DataFolder(data).examples()]
    for name in ("clean", "noise"):
        whole, killed = (tmp_path / part / name for part in ("whole", "killed"))
        rows = (killed / "traces.jsonl").read_text().splitlines()
        assert [json.loads(row)["example_id"] for row in rows] == ids
        for file in ("traces.jsonl", "config.json"):
            assert (killed / file).read_bytes() == (whole / file).read_bytes()
    left = sorted(p.name for p in (tmp_path / "killed").iterdir())
    assert left == ["clean", "noise", "timings.jsonl"]


def test_five_kills(small_data: Path, tmp_path: Path) -> None:
    check(small_data, tmp_path, rounds=5, need=4)


@pytest.mark.slow
def test_sixty_kills(small_data: Path, tmp_path: Path) -> None:
    copies = DataFolder(small_data).examples()
    with open(small_data / "examples.jsonl", "a", encoding="utf-8") as more:
        for turn in range(40):
            for row in copies:
                again = row.model_copy(update={"id": f"{row.id}-{turn}"})
                more.write(again.to_json() + "\n")
    check(small_data, tmp_path, rounds=60, need=50)
