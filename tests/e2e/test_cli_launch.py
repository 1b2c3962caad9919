"""``mmedrag launch``: trainings on two processes through the command line, as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmedrag.cli.main import main
from mmedrag.embedded import path
from mmedrag.records import UserError
from mmedrag.runtime import launch
from mmedrag.runtime.launch import check_world

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data folder and preference pairs of its images."""
    place = tmp_path_factory.mktemp("drawn")
    with pytest.raises(SystemExit) as done:
        main(["data", "phantom", str(place / "data"), "--studies", "16", "--seed", "5"])
    assert done.value.code == 0
    rows = [json.loads(line) for line in (place / "data/examples.jsonl").open()]
    closed = [r for r in rows if r.get("answer_type") == "closed" and r["split"] == "train"][:8]
    made = []
    for number, row in enumerate(closed):
        prompt = {"template": "test", "text": row["question"], "style": "chat"}
        side = {"prompt": prompt, "image": row["image"], "noise": None}
        made.append(
            {
                "id": f"pair-{number}",
                "kind": "resist",
                "chosen": {**side, "text": "Yes."},
                "rejected": {**side, "text": "No."},
                "reference_ids": [],
                "trace_ids": [],
                "reason": "made for the test",
            }
        )
    folder = place / "pairs"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return place


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmedrag", *map(str, words)],
        env={
            **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )


def trained(
    place: Path, noun: str, *, processes: int, strategy: str = "ddp"
) -> tuple[dict[str, object], Path]:
    out = place / f"{noun}-{processes}-{strategy}"
    words: dict[str, list[object]] = {
        "dpo": [
            *("dpo", place / "pairs", "--data", place / "data", "--model", "embedded:vlm"),
            *("--set", "batch_size=4", "--set", "epochs=2", "--set", "count_end=false"),
        ],
        "retriever": [
            *("retriever", place / "data", "--domain", "radiology"),
            *("--set", "batch_size=6", "--set", "epochs=2"),
        ],
        "domain": ["domain", place / "data", "--encoder", "none"],
    }
    several = ["launch", "--processes", processes, "--strategy", strategy, "--cpu", "--json", "--"]
    start = several if processes > 1 else []
    done = command(*start, "train", *words[noun], "--out", out, *([] if start else ["--json"]))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), out  # one JSON, or this fails


SHARDED = [pytest.param("dpo", name, marks=pytest.mark.slow) for name in ("fsdp", "zero2", "zero3")]


@pytest.mark.parametrize(
    ("noun", "strategy"), [("retriever", "ddp"), ("dpo", "ddp"), ("domain", "ddp"), *SHARDED]
)
def test_two_processes_give_the_weights_of_one(noun: str, strategy: str, drawn: Path) -> None:
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    said, one = trained(drawn, noun, processes=1)
    again, two = trained(drawn, noun, processes=2, strategy=strategy)
    assert set(said) == set(again)
    names = {p.name for p in one.rglob("*.safetensors")}
    assert names and names == {p.name for p in two.rglob("*.safetensors")}
    for file in one.rglob("*.safetensors"):
        first, second = load_file(file), load_file(two / file.relative_to(one))
        assert set(first) == set(second)
        assert max((first[k].double() - second[k].double()).abs().max() for k in first) < 1e-5


def refused(*words: object, processes: int = 2) -> str:
    """The one line of a launch that ends with exit code 2."""
    done = command("launch", "--processes", processes, "--cpu", "--", "train", *words)
    assert done.returncode == 2 and not done.stdout
    said = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    return said[0]


def test_what_ends_every_process_is_said_once(drawn: Path) -> None:
    dpo = ("--model", path("vlm"), "--out", drawn / "x")
    assert "cannot be read" in refused("dpo", drawn / "none", *dpo)
    assert "No such option" in refused("dpo", drawn / "none", *dpo, "--nope")


def test_a_batch_that_does_not_divide_is_named(drawn: Path) -> None:
    words = ("--data", drawn / "data", "--model", "embedded:vlm", "--out", drawn / "y")
    said = refused("dpo", drawn / "pairs", *words, "--set", "batch_size=3")
    assert "expected a multiple of the 2 processes" in said


def test_another_world_than_asked_for_is_said_once(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's world cut to one, as a wrong launcher of another package makes it."""
    (drawn / "sitecustomize.py").write_text(
        "import os\nif 'RANK' in os.environ: os.environ |= {'RANK': '0', 'WORLD_SIZE': '1'}\n"
    )
    monkeypatch.syspath_prepend(str(drawn))
    words = ("--domain", "radiology", "--out", drawn / "z")
    said = refused("retriever", drawn / "data", *words)
    assert "2 processes were asked for, this one is of 1" in said


def test_a_killed_process_is_named(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (drawn / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1': os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.syspath_prepend(str(drawn))
    words = ("retriever", drawn / "data", "--domain", "radiology", "--out", drawn / "k")
    done = command("launch", "--processes", 2, "--cpu", "--", "train", *words)
    assert done.returncode == 137
    assert "error: launch: process 1 ended: Signal 9 (SIGKILL)" in done.stderr


def test_other_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["launch", "--processes", "2", "--", "run", "data", "--out", "r"])
    assert done.value.code == 2
    assert "launch runs train commands, got 'run'" in capsys.readouterr().err


def test_another_world_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_world(1)
    monkeypatch.setenv("MMEDRAG_PROCESSES", "2")
    check_world(2)
    with pytest.raises(UserError, match="2 processes were asked for, this one is of 1"):
        check_world(1)


@pytest.mark.parametrize(("strategy", "stage"), [("zero2", "2"), ("zero3", "3"), ("fsdp", None)])
def test_shipped_files_reach_the_processes(
    strategy: str, stage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate makes of recipes/accelerate; without the package, for DeepSpeed's two."""
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: True)
    made = launch._environment(3, strategy, cpu=False)
    assert made["MMEDRAG_PROCESSES"] == "3" and made["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert made.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == stage
    assert made.get("ACCELERATE_USE_FSDP") == (None if stage else "true")
    assert launch._environment(2, strategy, cpu=True)["ACCELERATE_MIXED_PRECISION"] == "no"
