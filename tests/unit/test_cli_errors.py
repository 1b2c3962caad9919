"""How a command fails: one line on stderr, the right exit code, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mmedrag.cli import main as cli_main

RUN = [sys.executable, "-m", "mmedrag.cli.main"]


def call(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *map(str, args)], capture_output=True, text=True)


def complaint(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line that a failed command says."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
    return done.stderr


def test_phantom_gives_one_json_result(tmp_path: Path) -> None:
    args = (
        "data",
        "phantom",
        tmp_path / "d",
        "--studies",
        2,
        "--domain",
        "radiology",
        "--size",
        32,
        "--json",
    )
    done = call(*args)
    assert done.returncode == 0
    assert json.loads(done.stdout)["studies"] == 2
    assert "studies" not in done.stdout.replace('"studies"', "")
    again = call(*args)
    assert again.stdout == done.stdout


def test_bad_usage_is_one_line(tmp_path: Path) -> None:
    assert "Missing argument 'OUT'" in complaint(call("data", "phantom"))
    assert "--studies" in complaint(call("data", "phantom", tmp_path, "--studies", "x"))
    assert "unknown key 'colour'" in complaint(
        call("data", "phantom", tmp_path, "--set", "colour=red")
    )
    assert "key=value" in complaint(call("data", "phantom", tmp_path, "--set", "colour"))
    assert "default" in complaint(call("data", "phantom", tmp_path, "--config", "nope"))
    assert "nope" in complaint(call("data", "import", "nope", tmp_path, tmp_path / "o"))
    assert "none" in complaint(call("run", tmp_path / "none", "--out", tmp_path / "o"))
    assert "no index here" in complaint(call("index", "info", tmp_path))


def test_recipe_gives_defaults_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[phantom]\nstudies = 2\nsize = 32\ndomains = ["radiology"]\nclosed = 1\n')
    done = call("data", "phantom", tmp_path / "d", "--config", recipe, "--json")
    assert json.loads(done.stdout)["truth"] == 2
    settings = json.loads((tmp_path / "d" / "phantom.json").read_text())
    assert (settings["knobs"]["size"], settings["knobs"]["closed"]) == (32, 1)
    done = call("data", "phantom", tmp_path / "e", "--config", recipe, "--studies", 1, "--json")
    assert json.loads(done.stdout)["truth"] == 1
    done = call(
        "data", "phantom", tmp_path / "f", "--config", recipe, "--set", "studies=1", "--json"
    )
    assert json.loads(done.stdout)["truth"] == 1
    recipe.write_text("[index]\nspeed = 3\n")
    assert "unknown key speed" in complaint(call("index", "info", tmp_path, "--config", recipe))


def test_broken_pipe_is_quiet(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*RUN, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupt_is_one_line(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [*RUN, "data", "phantom", str(tmp_path / "d"), "--studies", "5000", "--size", "32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a background job of a shell starts with the signal ignored, and so would this child
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "d" / "phantom.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("interrupted; the same command goes on")
    assert "Traceback" not in err


def test_a_fault_of_ours_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("missing\nthing")

    monkeypatch.setattr("mmedrag.phantom.build_benchmark", broken)
    with pytest.raises(SystemExit) as done:
        cli_main.main(["data", "phantom", str(tmp_path)])
    assert done.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: internal error: KeyError")
    assert shown.err.count("\n") == 1


def test_what_libraries_print_is_kept_out_of_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def chatty(*_: object, **__: object) -> dict[str, object]:
        print("loading ...")
        return {"studies": 1, "share": 0.123456789, "nested": {"a": [1, {"b": 2}]}}

    monkeypatch.setattr("mmedrag.phantom.build_benchmark", chatty)
    for more, shown in (("--json",), '"studies": 1'), ((), "share: 0.1235"):
        with pytest.raises(SystemExit) as done:
            cli_main.main(["data", "phantom", str(tmp_path), *more])
        assert done.value.code == 0
        out, err = capsys.readouterr()
        assert shown in out and "loading" not in out and "loading ..." in err
        assert not more or json.loads(out)["nested"] == {"a": [1, {"b": 2}]}


def test_lists_of_ids(tmp_path: Path) -> None:
    from mmedrag.cli.common import Call

    (tmp_path / "ids").write_text("c\n\nd,e\n")
    call_ = Call("run", {}, {"json_": False, "seed": 0})
    assert call_.names(["a,b", f"@{tmp_path / 'ids'}"]) == ["a", "b", "c", "d,e"]
