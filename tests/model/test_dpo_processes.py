"""Two CPU processes (gloo) take the same steps as one, and share the work on the caches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dpo_tools import losses, make_model, make_pairs, quick
from mmedrag.preference.dpo.train import train_dpo

pytestmark = pytest.mark.model
CHILD = Path(__file__).parents[1] / "dpo_child.py"


def test_two_processes_give_the_single_process_loss(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    pairs = make_pairs(tmp_path / "data", 8)
    train_dpo(
        pairs,
        tmp_path / "model",
        tmp_path / "one",
        quick(batch_size=4),
        cache=tmp_path / "cache-one",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = json.dumps(
        {"settings": {"batch_size": 4, "tokens_per_pass": 150}, "count": 8, "cache": "cache-two"}
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(CHILD), str(tmp_path), "two", options],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=400)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    written = sorted(path.name for path in (tmp_path / "cache-two").rglob("index-*.jsonl"))
    assert written == ["index-0.jsonl", "index-0.jsonl", "index-1.jsonl", "index-1.jsonl"]
    assert not (tmp_path / "two/checkpoints").exists()
