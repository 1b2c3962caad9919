"""docs/extend.md as it stands: its blocks are saved and its commands typed, in its own order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmedrag.phantom import build
from mmedrag.records import Trace
from mmedrag.runtime import read_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.M | re.S)
PARTS = {"notes.py", "grid.py", "rules.py", "quoter.py", "lengths.py"}


def blocks() -> tuple[dict[str, str], list[str]]:
    """Modules by file name, and command lines."""
    modules, lines = {}, []
    for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind:
            modules[text.split("\n", 1)[0].removeprefix("# ")] = text
        else:
            lines += text.replace("\\\n", " ").strip().splitlines()
    return modules, lines


def test_every_part_takes_twenty_lines_or_little_more() -> None:
    modules, _ = blocks()
    assert set(modules) == PARTS
    for name, text in modules.items():
        code = [line for line in text.splitlines()[1:] if line.strip()]
        assert len(code) <= 20, f"{name}: {len(code)} lines"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's modules, and films with their reports as its data format expects them."""
    folder = tmp_path_factory.mktemp("extend")
    for name, text in blocks()[0].items():
        (folder / name).write_text(text)
    drawn = build.build_benchmark(folder / "drawn", studies=4, domains=["radiology"], size=32)
    assert drawn
    films = folder / "FILMS"
    films.mkdir()
    for number, image in enumerate(sorted((folder / "drawn" / "images").glob("*.png"))):
        (films / f"film-{number}.png").write_bytes(image.read_bytes())
        (films / f"film-{number}.txt").write_text(f"The heart is normal. Film {number} is clear.")
    (films / "torn.png").write_bytes(image.read_bytes()[:200])
    (films / "torn.txt").write_text("A film that cannot be read.")
    return folder


def test_the_page_runs_as_printed(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
        )

    for line in blocks()[1]:
        done = typed("-m", *shlex.split(line))
        torn = "data import" in line  # one film is refused, with its reason
        assert done.returncode == int(torn), (line, done.stdout, done.stderr)
        assert ("torn" in done.stdout) == torn, (line, done.stdout)
    traces = list(read_jsonl(folder / "RUN" / "traces.jsonl", Trace))
    assert len(traces) == 4 and all(t.error is None for t in traces)
    assert {t.answer.text for t in traces if t.answer} == {"The heart is normal."}
    assert {t.selection.rule for t in traces if t.selection} == {"rules:above_median"}
    kept = [(len(t.selection.kept), len(t.hits)) for t in traces if t.selection]
    assert kept and all(n == max(1, round(0.3 * hits)) for n, hits in kept)
    measured = typed("lengths.py", "RUN")
    assert re.fullmatch(r"answer : target, in words: [\d. \[\],]+\n", measured.stdout), measured
