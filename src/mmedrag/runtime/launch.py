"""One command on several processes of this machine, through torch's elastic launcher.

Place in the picture: above a training's processes. Each is ``python -m mmedrag COMMAND`` with the
launcher's environment (rank, world size, where to meet) and, for a sharded strategy, the variables
that ``accelerate launch`` makes of the shipped file. The processes find each other themselves; that
they are as many as asked for is checked where they meet (:func:`check_world`). What ends a process
goes to the launcher (:func:`report`), which tells the first one, once for all.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mmedrag.records import UserError

STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
ASKED, RANK = "MMEDRAG_PROCESSES", "RANK"  # the world that was asked for; the launcher's own
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where the launcher reads what ended a process


def rank() -> int:
    """This process's rank in a launch; 0 without one."""
    return int(os.environ.get(RANK, 0))


def world() -> int:
    """How many processes a launch has; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_world(size: int) -> None:
    """Refuse a world of another size than the launch asked for.

    Raises:
        UserError: the processes have not found each other.
    """
    asked = int(os.environ.get(ASKED, size))
    if asked != size:
        raise UserError(f"launch: {asked} processes were asked for, this one is of {size}")


def report(line: str) -> bool:
    """Leave the line that ends this process to its launcher; False where there is none."""
    if ASKED not in os.environ or not (file := os.environ.get(ERROR_FILE)):
        return False
    Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    return True


def launch(command: Sequence[str], processes: int, strategy: str = "ddp", cpu: bool = False) -> int:
    """Run ``mmedrag COMMAND`` on so many processes and wait.

    Args:
        command: words after ``mmedrag``.
        strategy: ``ddp``, every process a whole model, or a shipped file of recipes/accelerate.
        cpu: gloo on CPUs, also where there are GPUs.

    Returns:
        The exit code of the process that failed first; where a signal ended it, 128 and its number.

    Raises:
        UserError: fewer GPUs than processes, or a strategy whose package is missing.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from mmedrag.runtime import torchvision_shim

    torchvision_shim.ready()  # before accelerate looks for it
    from torch.distributed import run

    environment = _environment(processes, strategy, _on_cpu(processes, cpu))
    words = ["--standalone", "--nproc-per-node", str(processes), "-m", "mmedrag", *command]
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # what failed has said so itself
    try:
        with _variables(environment):
            run.run(run.get_args_parser().parse_args(words))
    except ChildFailedError as error:
        return _tell(error.failures)
    return 0


def _tell(failures: Mapping[int, Any]) -> int:
    """The line of the process that failed first, to stderr; its exit code. The launcher ends the
    others, and what they lost by the first one's end is not what went wrong."""
    said = [rank for rank, one in failures.items() if os.path.isfile(one.error_file)]
    rank = min(said or failures, key=lambda rank: failures[rank].timestamp)
    first = failures[rank]
    text = first.message if said else f"error: launch: process {rank} ended: {first.message}"
    print(text, file=sys.stderr)
    return int(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)


def _on_cpu(processes: int, cpu: bool) -> bool:
    import torch

    if cpu or not torch.cuda.is_available():
        return True
    if (found := torch.cuda.device_count()) < processes:
        raise UserError(
            f"launch: {processes} processes need as many GPUs, found {found}; --cpu runs them "
            "without"
        )
    return False


def _environment(processes: int, strategy: str, cpu: bool) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    found = {"OMP_NUM_THREADS": str(threads), **os.environ, ASKED: str(processes)}
    if cpu:
        found |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return found if strategy == "ddp" else found | _sharded(processes, strategy, cpu)


def _sharded(processes: int, strategy: str, cpu: bool) -> dict[str, str]:
    """What ``accelerate launch --config_file`` puts into the environment."""
    from accelerate.commands import launch as accelerate
    from accelerate.utils import is_deepspeed_available
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    if strategy.startswith("zero") and not is_deepspeed_available():
        raise UserError(f"launch: {strategy} needs the package deepspeed, which is not installed")
    with as_file(files("mmedrag") / "recipes" / "accelerate" / f"{strategy}.yaml") as file:
        words = ["--config_file", str(file), "--num_processes", str(processes)]
        words += ["--main_process_port", "0", *(["--mixed_precision", "no"] if cpu else [])]
        asked = accelerate.launch_command_parser().parse_args([*words, "-m", "mmedrag"])
        asked, _, _ = accelerate._validate_launch_command(asked)
    asked.use_cpu, asked.deepspeed_fields_from_accelerate_config = cpu, ""  # as launch_command does
    made: Any
    if strategy == "fsdp":
        made = prepare_multi_gpu_env(asked)
    else:
        _, made = prepare_deepspeed_cmd_env(asked)
    return {k: v for k, v in made.items() if k not in os.environ}


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
