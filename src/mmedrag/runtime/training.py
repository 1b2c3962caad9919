"""What every training on ``transformers.Trainer`` shares: whose run it is, checkpoints, progress.

Place in the picture: below ``train retriever`` and ``train dpo``. A training's folder holds
``run.json`` (settings, weights and data that it was begun with), ``checkpoints/checkpoint-STEP``
(the Trainer's own format, and a file ``complete`` once all of it is on disk) while it runs, and
its result file at the end. The same command goes on from the last complete checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmedrag.records import UserError
from mmedrag.runtime import launch, torchvision_shim
from mmedrag.runtime.files import PART, read_json, sha256, sync, write_json
from mmedrag.runtime.processes import Processes

torchvision_shim.ready()
from transformers import (  # noqa: E402
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
STATE = "trainer_state.json"  # of the Trainer, in each checkpoint
COMPLETE = "complete"  # in a checkpoint, written last: name → sha256 of all its other files


@dataclass(frozen=True)
class TrainingFolder:
    """The folder of one training; ``result`` names the file that is written last of all."""

    path: Path
    result: str

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def claim(
        self, identity: Mapping[str, Any], processes: Processes, resume: bool = True
    ) -> dict[str, Any] | None:
        """Take the folder for a run of this identity; the stored result when it is finished.

        Raises:
            UserError: it holds a run of another identity.
        """
        file, result = self.path / "run.json", self.path / self.result
        if resume and file.exists():
            before = _object(file)
            identity = json.loads(json.dumps(identity))
            if changed := [key for key in identity if before.get(key) != identity[key]]:
                raise UserError(
                    f"{self.path}: holds a run with other {', '.join(changed)}; choose another "
                    "folder, or finish it with the same command"
                )
            if result.exists():
                return _object(result)
        self._check_ours(file.exists())
        processes.wait()  # nobody writes before everybody has looked
        if processes.first:
            if not resume:
                self._remove_checkpoints()
                result.unlink(missing_ok=True)
            write_json(file, identity, indent=2)
        processes.wait()
        return None

    def last_checkpoint(self, processes: Processes) -> Path | None:
        """The newest complete checkpoint that holds what was written.

        Incomplete ones (a kill while saving) are removed, damaged ones put aside.
        """
        last = processes.agree(self._sound_checkpoint() if processes.first else None)
        processes.wait()
        return last

    def _sound_checkpoint(self) -> Path | None:
        numbered = ((_number(path), path) for path in self.checkpoints.glob("checkpoint-*"))
        found = sorted((number, path) for number, path in numbered if number is not None)
        for _, path in reversed(found):
            if not (path / COMPLETE).exists():
                log.warning("%s: incomplete, removed", path)
                shutil.rmtree(path, ignore_errors=True)
            elif wrong := self._damage(path):
                aside = path.with_name(f"damaged-{path.name}")
                while aside.exists():
                    aside = aside.with_name(aside.name + "-again")
                os.replace(path, aside)
                log.warning("%s: damaged (%s), kept as %s, not used", path, wrong, aside.name)
            else:
                return path
        return None

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, or with the best one that it goes back to."""
        if wrong := _changed(checkpoint):
            return wrong
        best = _object(checkpoint / STATE).get("best_model_checkpoint")
        wrong = _changed(checkpoint.with_name(Path(best).name)) if best else None
        return f"its best one, {Path(best).name}: {wrong}" if best and wrong else None

    def finish(self, processes: Processes) -> None:
        """Remove the checkpoints, once the first process has written all there is to keep."""
        if processes.first:
            self._remove_checkpoints()
        processes.wait()

    def _check_ours(self, begun: bool) -> None:
        """A training begins in a new or empty folder (curves may be drawn into it already)."""
        if begun or not self.path.is_dir():
            return
        mine = (CHECKPOINTS, "logs", "wandb", "events.out.tfevents")
        for path in sorted(self.path.iterdir()):
            if not path.name.startswith(mine) and not PART.fullmatch(path.name):
                raise UserError(
                    f"{self.path}: holds {path.name} and no training of ours; choose another --out"
                )

    def _remove_checkpoints(self) -> None:
        for path in self.checkpoints.glob("checkpoint-*"):
            if _number(path) is not None:
                shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # something of somebody else's is in it
            self.checkpoints.rmdir()


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: not what a training writes; choose another folder")
    return found


def _number(checkpoint: Path) -> int | None:
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() else None


def _changed(checkpoint: Path) -> str | None:
    """What differs from the mark; the empty mark of an earlier version vouches for anything."""
    mark = checkpoint / COMPLETE
    if not mark.is_file():
        return f"{COMPLETE} is missing"
    if not mark.stat().st_size:
        return None
    try:
        for name, digest in _object(mark).items():
            if sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except UserError as error:
        return str(error)
    return None


def arguments(folder: Path, device: str | None = None, **options: Any) -> TrainingArguments:
    """The Trainer's arguments, with what all trainings have in common; sets up the launch's
    processes. ``device``: cpu, cuda, cuda:1; None takes a GPU where there is one."""
    cpu = not torch.cuda.is_available() or device == "cpu"
    made = TrainingArguments(
        output_dir=str(folder),
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        **options,
    )
    if made.n_gpu > 1:
        made._n_gpu = 1  # several GPUs are several processes, never threads of one
    if device and ":" in device and made.world_size == 1:
        torch.cuda.set_device(device)
        made.__dict__["_setup_devices"] = torch.device(device)  # Trainer would take the first
    return made


def processes_of(arguments: TrainingArguments) -> Processes:
    """The processes of the launch.

    Raises:
        UserError: they are not as many as the launch asked for.
    """
    launch.check_world(arguments.world_size)
    return Processes(arguments.process_index, arguments.world_size)


def is_sharded(arguments: TrainingArguments) -> bool:
    """Whether the launch spreads one model over processes (DeepSpeed, FSDP)."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return getattr(arguments, "deepspeed_plugin", None) is not None or fsdp


def fit(trainer: Trainer, last: Path | None) -> None:
    """Train to the end, from ``last`` where there is one.

    A checkpoint of a training that had ended already (it was killed while its result was written)
    is only loaded: the Trainer itself would take another step.
    """
    for printing in (PrinterCallback, ProgressCallback):  # they write to stdout
        trainer.remove_callback(printing)
    if last is not None:
        state = TrainerState.load_from_json(str(last / STATE))
        log.info("resumed at step %d of %d", state.global_step, state.max_steps)
        if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            trainer.state, best = state, state.best_model_checkpoint
            keeps = trainer.args.load_best_model_at_end and best is not None
            trainer._load_from_checkpoint(str(last.with_name(Path(best).name) if keeps else last))
            return
    trainer.train(resume_from_checkpoint=str(last) if last else None)


# --- callbacks --------------------------------------------------------------------------------


@dataclass
class Clock:
    """The epoch, as samplers and redrawn noise need it."""

    epoch: int = 0


class Epochs(TrainerCallback):
    """Sets the clock, also right after a resume."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.epoch = int(state.epoch or 0)


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as complete once every process has written its part to the disk."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_model_checkpoint:  # the folder may have been moved since
            name = Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(Path(args.output_dir) / name)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes_of(args).wait()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        written = sorted(folder.rglob("*"))
        sync(*written, folder)
        files = (path for path in written if path.is_file())
        held = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
        write_json(folder / COMPLETE, held)


class Steps(TrainerCallback):
    """Tells ``progress(step, steps)``; logged values named in ``shown`` go to the log whenever the
    first of them is there; a loss that is no number ends the training."""

    def __init__(self, progress: Callable[[int, int], None] | None, shown: tuple[str, ...]) -> None:
        self.progress, self.shown = progress, shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if not math.isfinite(logs.get("loss", 0)):
            raise UserError(
                f"train: the loss at step {state.global_step} is {logs['loss']}, expected a finite "
                "number; a smaller learning rate may help"
            )
        if self.shown[0] in logs and state.is_world_process_zero:
            values = " ".join(f"{name} {logs[name]:.4f}" for name in self.shown)
            log.info("step %d of %d: %s", state.global_step, state.max_steps, values)
