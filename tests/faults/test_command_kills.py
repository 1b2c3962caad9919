"""Kills, damage and full disks of long commands, as users meet them: real processes, real signals.

Each tries a few places by default; marked ``slow``, thirty. A killed command is finished by the
same command, with the bytes (data, runs, pairs) or the losses (trainings) of one never killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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


def killed(
    words: Callable[[Path], list[object]], base: Path, sign: str, result: str, kills: int, last: float
) -> Iterator[Path]:
    """Kill a command ``kills`` times; the same command finishes each folder. A new folder is begun
    whenever ``result`` is in the last one."""
    dice, out, hits, tries = random.Random(kills), base / "0", 0, 0
    while hits < kills:
        tries += 1
        assert tries <= 3 * kills, "the machine was too fast for the kills to land"
        hits += kill(words(out), out / sign, dice, last)
        if (out / result).exists() or hits == kills:
            code, said = finish(words(out))
            assert code == 0, said
            yield out
            out = base / str(tries)


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


def retriever(home: Path, out: Path) -> list[object]:
    settings = ("epochs=6", "batch_size=8", "warmup=1", "save_every=1")
    sets = [word for one in settings for word in ("--set", one)]
    return ["train", "retriever", home / "data", "--domain", "radiology", "--out", out, *sets]


def same_training(out: Path, whole: Path, file: str) -> None:
    """What it learnt, and that nothing else lies in its folder."""
    found, wanted = (losses(path, file) for path in (out, whole))
    assert found == pytest.approx(wanted, abs=1e-6)
    left = {p.name for p in out.iterdir()} - {"checkpoints"}  # there where a damaged one is kept
    assert left == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize("kills", [2, MANY])
def test_a_killed_train_retriever_is_finished_by_the_same_command(home: Path, kills: int) -> None:
    whole = home / f"whole{kills}"
    assert finish(retriever(home, whole))[0] == 0
    base = home / f"killed{kills}"

    def words(out: Path) -> list[object]:
        return retriever(home, out)

    for out in killed(words, base, "run.json", "training.json", kills, 2.5):
        same_training(out, whole, "training.json")
        assert not (out / "checkpoints").exists()


# --- pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, MANY])
def test_killed_pairs_end_with_the_same_bytes(home: Path, kills: int) -> None:
    def words(out: Path) -> list[object]:
        return ["pairs", home / "data", "--split", "train", "--limit", 24, "--out", out]

    whole = home / f"pairs-whole{kills}"
    code, said = finish(words(whole))
    assert code == 0, said
    base = home / f"pairs-killed{kills}"
    for out in killed(words, base, "traces/journal.log", "pairs.jsonl", kills, 1.5):
        for name in ("pairs.jsonl", "config.json"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()
        assert {p.name for p in out.rglob("*")} == {p.name for p in whole.rglob("*")}


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
    whole = home / f"dpo-whole{kills}"
    code, said = finish(dpo(home, whole))
    assert code == 0, said
    base = home / f"dpo-killed{kills}"
    for out in killed(lambda out: dpo(home, out), base, "run.json", "result.json", kills, 3.0):
        same_training(out, whole, "training_log.jsonl")
        assert not (out / "checkpoints").exists()


# --- damaged checkpoints ----------------------------------------------------------------------


def damage(path: Path, dice: random.Random) -> str:
    data = bytearray(path.read_bytes())
    how = dice.choice(["cut", "flipped", "emptied", "foreign", "missing"])
    if how == "cut":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif how == "flipped":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "emptied" else b"somebody else's")
    return f"{path.parent.name}/{path.name} {how}"


@pytest.mark.parametrize("tries", [2, MANY])
@pytest.mark.parametrize("training", ["retriever", "dpo"])
def test_a_damaged_checkpoint_is_never_trained_on(
    home: Path, pairs: Path, training: str, tries: int
) -> None:
    """Any file of a training that was killed: it goes on from another checkpoint, or from the
    start, or says in one line what is wrong."""
    command = {"retriever": retriever, "dpo": dpo}[training]
    file = {"retriever": "training.json", "dpo": "training_log.jsonl"}[training]
    whole, begun = (home / f"{name}-{training}{tries}" for name in ("sound", "begun"))
    assert finish(command(home, whole))[0] == 0
    third = begun / "checkpoints" / "checkpoint-3" / "complete"
    assert kill(command(home, begun), third, random.Random(), 0), "ended before it was killed"
    dice = random.Random(tries)
    for number in range(tries):
        out = home / f"damaged-{training}{tries}-{number}"
        shutil.copytree(begun, out)
        files = sorted(p for p in out.rglob("*") if p.is_file())
        newest = [p for p in files if p.parent.name == "checkpoint-3"]
        what = damage(dice.choice(newest if number % 3 else files), dice)
        code, said = finish(command(home, out))
        assert one_line(said), (what, said)
        if code:
            assert code == 2 and str(out) in said.splitlines()[-1], (what, said)
        else:
            same_training(out, whole, file)


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
