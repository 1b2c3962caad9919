"""Kills, damage and full disks of long commands, as users meet them: real processes, real signals.

Each tries a few places by default; marked ``slow``, thirty. A killed command is finished by the
same command, with the bytes (data, runs, pairs) or the losses (trainings) of one never killed.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mmedrag.preference.pairs.files import write_pairs
from mmedrag.records import PairSet

pytestmark = pytest.mark.model
MANY = pytest.param(30, marks=pytest.mark.slow)
SERVER = """
import io, json, os, resource, sys
from pathlib import Path
import mmedrag.preference.dpo.train, mmedrag.preference.pairs.build, mmedrag.retrieval.train
from mmedrag.cli.main import main

for line in sys.stdin:
    words, limit, said = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(0, 2)
        sys.stderr, code = io.StringIO(), 0
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or soft, hard))
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code or 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        Path(said).write_text(sys.stderr.getvalue())
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Starts each command in a process of its own, forked from one that has imported all."""

    def __init__(self, said: Path) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.said = said
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**env, "OMP_NUM_THREADS": "1"},
            bufsize=0,  # a line that is not asked for yet stays in the pipe, where select sees it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, words: Sequence[object], limit: int | None = None) -> int:
        """The process; ``limit``: no file may grow beyond so many bytes (the kernel refuses the
        write as on a full disk)."""
        assert self.server.stdin and self.server.stdout
        asked = [[*map(str, words)], limit, str(self.said)]
        self.server.stdin.write(json.dumps(asked).encode() + b"\n")
        return int(self.server.stdout.readline())

    def ended(self, within: float = 0) -> int | None:
        """Its exit code (asked for once it is there: each is told once)."""
        assert self.server.stdout
        if not select.select([self.server.stdout], [], [], within)[0]:
            return None
        return int(self.server.stdout.readline())

    def finish(self, words: Sequence[object], limit: int | None = None) -> tuple[int, str]:
        self.start(words, limit)
        code = self.ended(within=300)
        assert code is not None, "not ended in 300 s"
        return code, self.said.read_text()

    def kill(self, words: Sequence[object], sign: Path, wait: float) -> bool:
        """Kill the command ``wait`` seconds after ``sign`` (a part of its work) has appeared or
        changed; whether it was still alive."""
        before = sign.stat().st_mtime_ns if sign.exists() else 0
        child = self.start(words)
        while (code := self.ended(0.005)) is None:
            if sign.exists() and sign.stat().st_mtime_ns != before:
                code = self.ended(wait)
                break
        if code is None:
            os.kill(child, signal.SIGKILL)
            code = self.ended(within=60)
        return code == -signal.SIGKILL


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    made = Commands(tmp_path_factory.mktemp("said") / "stderr")
    yield made
    assert made.server.stdin
    made.server.stdin.close()
    made.server.wait(60)


def killed(
    commands: Commands,
    words: Callable[[Path], list[object]],
    base: Path,
    signs: tuple[str, ...],
    result: str,
    kills: int,
    last: float,
) -> Iterator[Path]:
    """Kill a command ``kills`` times, at random moments after one of ``signs`` in turn; the same
    command finishes each folder. A new folder is begun whenever ``result`` is in the last one."""
    dice, out, hits, tries = random.Random(kills), base / "0", 0, 0
    while hits < kills:
        sign = out / signs[tries % len(signs)]
        tries += 1
        assert tries <= 3 * kills, "the machine was too fast for the kills to land"
        hits += commands.kill(words(out), sign, dice.random() * last)
        if (out / result).exists() or hits == kills:
            code, said = commands.finish(words(out))
            assert code == 0, said
            yield out
            out = base / str(tries)


def one_line(said: str) -> bool:
    return "Traceback" not in said and "internal error" not in said


@pytest.fixture(scope="module")
def home(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kills")
    made = ("data", "phantom", path / "data", "--studies", 30, "--domain", "radiology")
    assert commands.finish(made)[0] == 0
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
def test_a_killed_train_retriever_is_finished_by_the_same_command(
    commands: Commands, home: Path, kills: int
) -> None:
    whole = home / f"whole{kills}"
    assert commands.finish(retriever(home, whole))[0] == 0
    base = home / f"killed{kills}"

    def words(out: Path) -> list[object]:
        return retriever(home, out)

    for out in killed(
        commands, words, base, ("run.json", "checkpoints"), "training.json", kills, 2.0
    ):
        same_training(out, whole, "training.json")
        assert not (out / "checkpoints").exists()


# --- pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, MANY])
def test_killed_pairs_end_with_the_same_bytes(commands: Commands, home: Path, kills: int) -> None:
    def words(out: Path) -> list[object]:
        return ["pairs", home / "data", "--split", "train", "--limit", 24, "--out", out]

    base = home / f"pairs{kills}"
    whole = base / "whole"  # as deep as the others: its config says where DATA is from there
    code, said = commands.finish(words(whole))
    assert code == 0, said
    for out in killed(
        commands, words, base, ("traces", "traces/journal.log"), "pairs.jsonl", kills, 1.5
    ):
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
    commands: Commands, home: Path, pairs: Path, kills: int
) -> None:
    whole = home / f"dpo-whole{kills}"
    code, said = commands.finish(dpo(home, whole))
    assert code == 0, said
    base = home / f"dpo-killed{kills}"

    def words(out: Path) -> list[object]:
        return dpo(home, out)

    for out in killed(
        commands, words, base, ("run.json", "checkpoints"), "result.json", kills, 2.0
    ):
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
    commands: Commands, home: Path, pairs: Path, training: str, tries: int
) -> None:
    """Any file of a training that was killed: it goes on from another checkpoint, or from the
    start, or says in one line what is wrong."""
    command = {"retriever": retriever, "dpo": dpo}[training]
    file = {"retriever": "training.json", "dpo": "training_log.jsonl"}[training]
    whole, begun = (home / f"{name}-{training}{tries}" for name in ("sound", "begun"))
    assert commands.finish(command(home, whole))[0] == 0
    third = begun / "checkpoints" / "checkpoint-3" / "complete"
    assert commands.kill(command(home, begun), third, 0), "ended before it was killed"
    dice = random.Random(tries)
    for number in range(tries):
        out = home / f"damaged-{training}{tries}-{number}"
        shutil.copytree(begun, out)
        files = sorted(p for p in out.rglob("*") if p.is_file())
        newest = [p for p in files if p.parent.name == "checkpoint-3"]
        what = damage(dice.choice(newest if number % 3 else files), dice)
        code, said = commands.finish(command(home, out))
        assert one_line(said), (what, said)
        if code:
            assert code == 2 and str(out) in said.splitlines()[-1], (what, said)
        else:
            same_training(out, whole, file)


# --- a full disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("tries", [2, MANY])
def test_a_run_on_a_full_disk_says_so_and_goes_on_later(
    commands: Commands, home: Path, tries: int
) -> None:
    def words(out: Path) -> list[object]:
        only = ("--no-rag", "--limit", 24, "--set", "run.chunk=4")
        return ["run", home / "data", *only, "--out", out]

    whole, full = home / f"run-whole{tries}", home / f"run-full{tries}"
    assert commands.finish(words(whole))[0] == 0
    size, dice = (whole / "traces.jsonl").stat().st_size, random.Random(tries)
    for _ in range(tries):
        code, said = commands.finish(words(full), dice.randrange(100, size))
        assert code == 2 and one_line(said), said
        assert "cannot be written" in said
    code, said = commands.finish(words(full))
    assert code == 0, said
    assert (full / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()
