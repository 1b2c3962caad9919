"""`mmedrag serve` as a process of its own: start, keys, refusals before loading, stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

import httpx  # noqa: E402

from serve_tools import encoded, picture  # noqa: E402

RUN = [sys.executable, "-m", "mmedrag.cli.main", "serve"]
SLOW = """
import time
from mmedrag.answering.generators import ScriptedGenerator

class Slow(ScriptedGenerator):
    def generate(self, requests):
        if any("slow" in r.prompt.text for r in requests):
            time.sleep(2)
        found = super().generate(requests)
        for request, answer in zip(requests, found):
            answer.p_yes = 0.8 if "doubtful" in request.prompt.text else answer.p_yes
        return found
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system file whose model is a class of the user's own."""
    folder = tmp_path_factory.mktemp("system")
    (folder / "slow_model.py").write_text(SLOW)
    file = folder / "system.toml"
    (folder / "model").mkdir()
    (folder / "model" / "mmedrag.json").write_text('{"min_confidence": 0.9}')
    generator = 'kind = "slow_model:Slow"\nmodel = "model"\n'
    file.write_text(f'[domain]\nlabel = "radiology"\n[generator]\n{generator}')
    return file


@contextmanager
def serving(system: Path, *args: object, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    process = subprocess.Popen(
        [*RUN, "--system", str(system), "--port", str(port), *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(system.parent), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while time.monotonic() < until:
            assert process.poll() is None, process.communicate()[1]
            try:
                if httpx.get(url + "/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait()


def ask(url: str, question: str, key: str | None = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    files = {"image": ("a.png", encoded(picture(5)))}
    return httpx.post(
        url + "/v1/ask", files=files, data={"question": question}, headers=headers, timeout=30
    )


def metrics(url: str, key: str) -> str:
    return httpx.get(url + "/metrics", headers={"authorization": f"Bearer {key}"}).text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_what_runs_finish(system: Path, tmp_path: Path, number: int) -> None:
    keys, audit = tmp_path / "keys", tmp_path / "audit.jsonl"
    made = subprocess.run(
        [*RUN, "key", "doctor", "--file", str(keys), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    key = json.loads(made.stdout)["key"]
    assert key not in keys.read_text()
    with serving(system, "--audit", audit, MMEDRAG_API_KEYS=str(keys)) as (process, url):
        assert ask(url, "Is it so?").status_code == 401
        assert ask(url, "Is it so?", key).json()["answer"]["text"] == "yes"
        doubted = ask(url, "Is it doubtful?", key).json()  # the threshold lies beside the model
        assert "0.80 is under the threshold 0.90" in doubted["abstain_reason"]
        found: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: found.append(ask(url, "Is it slow?", key)))
        asking.start()
        until = time.monotonic() + 30
        while "mmedrag_queue_depth 1" not in metrics(url, key) and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(number)
        asking.join(30)
        out, err = process.communicate(timeout=30)
    assert [a.status_code for a in found] == [200] and process.returncode == 0, err
    assert out == "" and "Traceback" not in err and "interrupted" not in err
    rows = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [row["who"] for row in rows] == ["doctor"] * 3
    assert (
        rows[0]["templates"][0].startswith("default/") and rows[0]["versions"]["weights"]["model"]
    )
    checked = subprocess.run([*RUN, "audit", str(audit), "--json"], capture_output=True, text=True)
    assert json.loads(checked.stdout) == {"records": 3, "sound": True}


def test_what_cannot_work_is_refused_before_a_model_is_loaded(system: Path, tmp_path: Path) -> None:
    """The system file names no model that exists: nobody gets as far as looking for it."""
    missing = tmp_path / "system.toml"
    missing.write_text('[generator]\nmodel = "/nowhere/model"\n')

    def refused(what: str, *args: object, **env: str) -> None:
        done = subprocess.run(
            [*RUN, "--system", str(missing), *map(str, args)],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and what in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""

    keys = tmp_path / "keys"
    refused("needs API keys", "--host", "0.0.0.0")
    refused("API keys cannot be read", MMEDRAG_API_KEYS=str(keys))
    keys.write_text("x")
    keys.chmod(0o604)
    refused("expected NAME:SCOPES", MMEDRAG_API_KEYS=str(keys))
    refused("audit log cannot be opened", "--audit", missing / "audit.jsonl")
    refused("unknown key", "--set", "serve.colour=red")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused("cannot listen there", "--port", taken.getsockname()[1])
