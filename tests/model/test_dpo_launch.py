"""The shipped launch files: they parse, and a sharded run takes the single process's steps."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from dpo_tools import losses, make_model, make_pairs, quick

pytestmark = pytest.mark.model
CHILD = Path(__file__).parents[1] / "dpo_child.py"
LAUNCH = (
    "from mmedrag.retrieval.encoders import torchvision_shim; torchvision_shim.ready();"
    "from accelerate.commands.accelerate_cli import main; main()"
)


def launch_file(name: str) -> Path:
    return Path(str(files("mmedrag") / "recipes" / "accelerate" / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "kind", "stage"),
    [("zero2", "DEEPSPEED", 2), ("zero3", "DEEPSPEED", 3), ("fsdp", "FSDP", None)],
)
def test_launch_files_parse(name: str, kind: str, stage: int | None) -> None:
    config = pytest.importorskip("accelerate.commands.config.config_args")
    found = config.ClusterConfig.from_yaml_file(str(launch_file(name)))
    assert found.distributed_type == kind and found.mixed_precision == "bf16"
    if stage:
        assert found.deepspeed_config["zero_stage"] == stage
    else:
        assert found.fsdp_config["fsdp_version"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "zero2", "zero3"])
def test_sharded_runs_give_the_single_process_loss(name: str, tmp_path: Path) -> None:
    if name != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    from mmedrag.preference.dpo.train import train_dpo

    make_model(tmp_path / "model")
    pairs = make_pairs(tmp_path / "data", 8)
    train_dpo(
        pairs,
        tmp_path / "model",
        tmp_path / "one",
        quick(batch_size=4),
        cache=tmp_path / "cache-one",
    )
    text = launch_file(name).read_text().replace("num_processes: 4", "num_processes: 2")
    text = text.replace("mixed_precision: bf16", 'mixed_precision: "no"')
    (tmp_path / "cpu.yaml").write_text(text.replace("use_cpu: false", "use_cpu: true"))
    options = json.dumps({"settings": {"batch_size": 4}, "count": 8, "cache": "cache-two"})
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LAUNCH,
            "launch",
            "--config_file",
            str(tmp_path / "cpu.yaml"),
            str(CHILD),
            str(tmp_path),
            "two",
            options,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
