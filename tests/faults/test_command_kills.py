"""Kills, damage and full disks of long commands, as users meet them: real processes, real signals.

Each tries a few places by default; marked ``slow``, thirty. A killed command is finished by the
same command, with the bytes (data, runs, pairs) or the losses (trainings) of one never killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mmedrag.preference.pairs.files import write_pairs
from mmedrag.records import PairSet

pytestmark = pytest.mark.model
MANY = pytest.param(30, marks=pytest.mark.slow)
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from mmedrag.cli.main import main
main(sys.argv[1:])
"""


def start(words: Sequence[object], limit: int | None = None) -> subprocess.Popen[str]:
    """A command in a process of its own; ``limit``: no file may grow beyond so many bytes (the
    kernel refuses the write as on a full disk)."""
    how = ["-m", "mmedrag"] if limit is None else ["-c", LIMITED, str(limit)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
           "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *how, *map(str, words)],
        env=env,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(words: Sequence[object], limit: int | None = None) -> tuple[int, str]:
    child = start(words, limit)
    said = child.communicate(timeout=300)[1]
    return child.returncode, said


def kill(words: Sequence[object], sign: Path, dice: random.Random, last: float) -> bool:
    """Kill the command at a random moment after ``sign`` (a file of its work) has appeared or
    grown; whether it was still alive."""
    before = sum(p.stat().st_mtime_ns for p in [sign] if p.exists())
    child = start(words)
    while child.poll() is None:
        if sign.exists() and sign.stat().st_mtime_ns != before:
            break
        time.sleep(0.005)
    time.sleep(dice.random() * last)
    alive = child.poll() is None
    if alive:
        child.send_signal(signal.SIGKILL)
    child.communicate()
    return alive


def one_line(said: str) -> bool:
    return "Traceback" not in said and "internal error" not in said


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kills")
    made = ("data", "phantom", path / "data", "--studies", 30, "--domain", "radiology")
    assert finish(made)[0] == 0
    return path


def losses(out: Path, file: str) -> list[float]:
    if file == "training.json":
        return [json.loads((out / file).read_text())["loss"]]
    rows = (out / file).read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


# --- train retriever --------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, MANY])
def test_a_killed_train_retriever_is_finished_by_the_same_command(home: Path, kills: int) -> None:
    def words(out: Path) -> list[object]:
        settings = ("epochs=6", "batch_size=8", "warmup=1")
        sets = [word for one in settings for word in ("--set", one)]
        where = ("--domain", "radiology", "--out", out)
        return ["train", "retriever", home / "data", *where, *sets]

    whole, killed = home / f"whole{kills}", home / f"killed{kills}"
    assert finish(words(whole))[0] == 0
    dice, hit = random.Random(kills), 0
    for _ in range(kills):
        hit += kill(words(killed), killed / "run.json", dice, 0.5)
        if (killed / "training.json").exists():
            break
    code, said = finish(words(killed))
    assert code == 0, said
    assert hit >= 1
    assert losses(killed, "training.json") == pytest.approx(
        losses(whole, "training.json"), abs=1e-6
    )
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}


# --- pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, MANY])
def test_killed_pairs_end_with_the_same_bytes(home: Path, kills: int) -> None:
    def words(out: Path) -> list[object]:
        return ["pairs", home / "data", "--split", "train", "--limit", 24, "--out", out]

    whole, killed = home / f"pairs-whole{kills}", home / f"pairs-killed{kills}"
    code, said = finish(words(whole))
    assert code == 0, said
    dice, hit = random.Random(kills), 0
    for _ in range(kills):
        hit += kill(words(killed), killed / "traces" / "journal.log", dice, 1.0)
        if (killed / "pairs.jsonl").exists():
            break
    code, said = finish(words(killed))
    assert code == 0, said
    assert hit >= 1
    for name in ("pairs.jsonl", "config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


# --- train dpo --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(home: Path) -> Path:
    """A PAIRS folder beside the drawn pictures, and a small model (``home/model``)."""
    from dpo_tools import make_model, make_pairs

    make_model(home / "model")
    made = make_pairs(home / "pictures", 12)
    kinds = PairSet(pairs=made)
    return write_pairs(kinds, home / "pairs", home / "pictures", {})


def dpo(home: Path, out: Path) -> list[object]:
    sets = [w for one in ("epochs=3", "save_steps=1", "dtype=float32") for w in ("--set", one)]
    return ["train", "dpo", home / "pairs", "--model", home / "model", "--out", out, *sets]


@pytest.mark.parametrize("kills", [2, MANY])
def test_a_killed_train_dpo_is_finished_by_the_same_command(
    home: Path, pairs: Path, kills: int
) -> None:
    whole, killed = home / f"dpo-whole{kills}", home / f"dpo-killed{kills}"
    code, said = finish(dpo(home, whole))
    assert code == 0, said
    dice, hit = random.Random(kills), 0
    for _ in range(kills):
        hit += kill(dpo(home, killed), killed / "run.json", dice, 1.5)
        if (killed / "result.json").exists():
            break
    code, said = finish(dpo(home, killed))
    assert code == 0, said
    assert hit >= 1
    found, wanted = (losses(out, "training_log.jsonl") for out in (killed, whole))
    assert found == pytest.approx(wanted, abs=1e-6)


# --- a full disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("tries", [2, MANY])
def test_a_run_on_a_full_disk_says_so_and_goes_on_later(home: Path, tries: int) -> None:
    def words(out: Path) -> list[object]:
        only = ("--no-rag", "--limit", 24, "--set", "run.chunk=4")
        return ["run", home / "data", *only, "--out", out]

    whole, full = home / f"run-whole{tries}", home / f"run-full{tries}"
    assert finish(words(whole))[0] == 0
    size, dice = (whole / "traces.jsonl").stat().st_size, random.Random(tries)
    for _ in range(tries):
        code, said = finish(words(full), dice.randrange(100, size))
        assert code == 2 and one_line(said), said
        assert "cannot be written" in said
    code, said = finish(words(full))
    assert code == 0, said
    assert (full / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()
