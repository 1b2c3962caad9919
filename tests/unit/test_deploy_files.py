"""The Dockerfile without an engine: its instructions, what goes in, whom it runs as."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "Dockerfile"
KNOWN = {
    "ARG",
    "FROM",
    "ENV",
    "RUN",
    "COPY",
    "LABEL",
    "USER",
    "WORKDIR",
    "VOLUME",
    "EXPOSE",
    "HEALTHCHECK",
    "STOPSIGNAL",
    "ENTRYPOINT",
    "CMD",
}
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="not a source checkout")


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    text = "\n".join(x for x in FILE.read_text().splitlines() if not x.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def variables() -> dict[str, str]:
    pairs = [item for line in of("ENV") for item in shlex.split(line)]
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def last_stage() -> list[tuple[str, str]]:
    rows = instructions()
    return rows[max(i for i, (name, _) in enumerate(rows) if name == "FROM") :]


def test_instructions_are_known_and_their_shell_is_sound() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) == KNOWN and names[:2] == ["ARG", "FROM"]  # ADD, which fetches, is not used
    for line in of("RUN"):
        subprocess.run(["bash", "-n", "-c", line], check=True)
    for name in ("ENTRYPOINT", "CMD", "VOLUME"):  # exec form: no shell between signal and process
        assert all(isinstance(json.loads(line), list) for line in of(name))


def test_base_images_are_pinned_to_a_python_the_package_takes() -> None:
    (version,) = [x.partition("=")[2] for x in of("ARG") if x.startswith("PYTHON=")]
    assert re.fullmatch(r"3\.\d+-slim-[a-z]+", version)
    assert all(line.startswith("python:${PYTHON}") for line in of("FROM"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, version.partition("-")[0].split("."))) >= needed
    (extras,) = [x.partition("=")[2] for x in of("ARG") if x.startswith("EXTRAS=")]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_it_runs_unprivileged_offline_and_checks_its_health() -> None:
    stage = dict(last_stage())
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", stage["USER"])
    names = [name for name, _ in last_stage()]
    assert names.index("USER") > max(i for i, n in enumerate(names) if n in ("RUN", "COPY"))
    assert variables()["HF_HUB_OFFLINE"] == variables()["TRANSFORMERS_OFFLINE"] == "1"
    assert "HEALTHCHECK" in stage and stage["STOPSIGNAL"] == "SIGTERM"


def test_nothing_secret_and_nothing_of_a_patient_goes_in() -> None:
    """Only named files are let through, and the key file is a path to mount, not a value."""
    from mmedrag.serve.settings import KEYS

    rules = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and x[0] != "#"]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src"}
    copied = [w for x in of("COPY") if "--from" not in x for w in x.split()[:-1]]
    assert set(copied) == allowed and all((ROOT / name).exists() for name in copied)
    assert variables()[KEYS].startswith("/run/secrets/")
    text = FILE.read_text()
    assert "mmr_" not in text and not re.search(r"(?i)(password|token|secret)\s*=", text)
    assert not list((ROOT / "src").rglob("*.key"))


def test_the_command_is_one_that_the_command_line_takes() -> None:
    words = json.loads(of("ENTRYPOINT")[0]) + json.loads(of("CMD")[0])
    from mmedrag.cli.main import cli

    assert words[0] == "mmedrag"
    with cli.make_context("mmedrag", words[1:]) as root:
        noun = cli.get_command(root, words[1])
        with noun.make_context("serve", words[2:], parent=root) as group:  # type: ignore[union-attr]
            with noun.commands["start"].make_context("start", words[3:], parent=group) as start:  # type: ignore[union-attr]
                assert start.params["host"] == "0.0.0.0" and start.params["port"] == 8000
                assert str(start.params["audit"]).startswith("/var/lib/mmedrag/")
    written = {*json.loads(of("VOLUME")[0])}
    assert {variables()["MMEDRAG_CACHE"], "/var/lib/mmedrag"} == written
    assert "MMEDRAG_CACHE" in (ROOT / "src/mmedrag/runtime/cache.py").read_text()


def test_the_health_check_tells_alive_from_dead() -> None:
    pytest.importorskip("fastapi", reason="needs the extra 'serve'")
    pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
    from mmedrag.serve.app import create_app
    from mmedrag.serve.settings import ServeSettings
    from serve_tools import live, make_pipeline

    command = json.loads(of("HEALTHCHECK")[0].partition("CMD ")[2])
    assert command[0] == "python" and ":8000/healthz" in command[2]

    def check(port: str) -> int:
        code = command[2].replace(":8000/", f":{port}/")
        return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode

    settings = ServeSettings(port=0, decoders=1)
    with live(create_app(make_pipeline(), settings), settings) as server:
        port = server.url.rpartition(":")[2]
        assert check(port) == 0
        server.app.state.engine.batcher._thread = type(
            "Dead", (), {"is_alive": lambda s: False, "join": lambda s, t: None}
        )()  # noqa: E501
        assert check(port) != 0
    assert check(port) != 0


def test_what_ships_names_no_folder_of_the_machine_that_made_it() -> None:
    shipped = ROOT / "src" / "mmedrag" / "embedded"
    found = sorted(shipped.glob("adapter*/adapter_config.json"))
    assert len(found) == 7
    for path in found:
        base = json.loads(path.read_text())["base_model_name_or_path"]
        assert base == "src/mmedrag/embedded/vlm", path
