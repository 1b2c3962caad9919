"""Contrastive training of any CLIP-like towers on ``transformers.Trainer``.

Place in the picture: inside ``train_retriever``; the small shipped encoders are trained by it too.
The Trainer gives optimiser, mixed precision, checkpoints, resume and DDP; ours are what a step
looks at, the loss over all devices, its gradient cache (large batches fit small memory), and a
schedule over the steps there really are. No partial batch is dropped (released faults, SPEC B2).
Every random choice of a step is drawn from (seed, step) alone, so a resumed run repeats them.
(Batch norm, where a tower has it, sees one chunk at a time.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from mmedrag.records import UserError
from mmedrag.retrieval.encoders.base import Towers
from mmedrag.retrieval.encoders.windows import windows
from mmedrag.retrieval.loss import MAX_LOG_SCALE, cached_backward, false_negatives, info_nce
from mmedrag.retrieval.settings import RetrieverTraining
from mmedrag.runtime import Processes, torch_rng, torchvision_shim, training

torchvision_shim.ready()
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

Tracker = Callable[[dict[str, float], int], None]  # (metrics, step), e.g. to TensorBoard
Validate = Callable[[], dict[str, float]]  # with a ``value`` that decides what is best


# --- what a step looks at ---------------------------------------------------------------------


@dataclass
class Pairs:
    """Training pairs: ``pixels`` is a tensor [n, 3, H, W] (float, normalised), or a function
    from picture numbers to such a batch. ``views``: picture numbers of each pair (None: pair i
    has picture i)."""

    texts: list[str]
    pixels: torch.Tensor | Callable[[list[int]], torch.Tensor]
    views: list[list[int]] | None = None

    def batch(self, numbers: list[int]) -> torch.Tensor:
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[numbers].float()
        return self.pixels(numbers)


@dataclass
class Step:
    """What one optimiser step looks at, drawn from (seed, number) alone."""

    number: int
    pairs: list[int]
    pictures: list[int]
    windows: torch.Tensor  # [b] in 0..1: which window of a long text
    crops: torch.Tensor  # [b, 3] in 0..1


class Steps(Sequence[Step]):
    """All steps: every pair once an epoch, the last batch as small as it comes out."""

    def __init__(self, pairs: Pairs, s: RetrieverTraining) -> None:
        self.pairs, self.s = pairs, s
        self.per_epoch = math.ceil(len(pairs.texts) / s.batch_size)
        steps = self.per_epoch * s.epochs
        self.total = min(steps, s.max_steps) if s.max_steps else steps

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: Any) -> Any:
        if number >= self.total:
            raise IndexError(number)
        s, pairs = self.s, self.pairs
        epoch, at = divmod(number, self.per_epoch)
        order = torch.randperm(len(pairs.texts), generator=_rng(s.seed, 0, epoch)).tolist()
        chosen = order[at * s.batch_size : (at + 1) * s.batch_size]
        draw = torch.rand(len(chosen), 5, generator=_rng(s.seed, 1, number))
        views = [[i] for i in chosen] if pairs.views is None else [pairs.views[i] for i in chosen]
        pick = draw[:, 0].tolist() if s.views == "random" else [0.0] * len(chosen)
        pictures = [v[int(r * len(v))] for v, r in zip(views, pick, strict=True)]
        return Step(number, chosen, pictures, draw[:, 1], draw[:, 2:])


def _rng(seed: int, purpose: int, number: int) -> torch.Generator:
    return torch_rng((seed * 2 + purpose) * 1_000_000_007 + number)


class EpochSteps(Sampler[int]):
    """The numbers of an epoch's steps."""

    def __init__(self, steps: Steps, clock: training.Clock) -> None:
        self.steps, self.clock = steps, clock

    def __len__(self) -> int:
        return self.steps.per_epoch

    def __iter__(self) -> Iterator[int]:
        start = self.clock.epoch * len(self)
        return iter(range(start, min(start + len(self), len(self.steps))))


class StepPixels(Dataset[dict[str, Any]]):
    """Step number → the step, and the pictures of this process's part of it; those of the next
    step are read while one is used."""

    def __init__(self, steps: Steps, processes: Processes) -> None:
        self.steps, self.processes = steps, processes
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.waiting: dict[int, Future[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> dict[str, Any]:
        for n in (number, number + 1):
            if n not in self.waiting and n < len(self):
                self.waiting[n] = self.pool.submit(self._read, n)
        return self.waiting.pop(number).result()

    def _read(self, number: int) -> dict[str, Any]:
        step = self.steps[number]
        mine = step.pictures[self.processes.mine(len(step.pairs))]
        return {"step": step, "pixels": self.steps.pairs.batch(mine)}


def crop(pixels: torch.Tensor, smallest: float, draw: torch.Tensor) -> torch.Tensor:
    """Random crop of ``smallest``..1 of the area, resized back (open_clip trains on 0.9..1).

    ``draw`` [b, 3] in 0..1: size, left-right, up-down.
    """
    if smallest >= 1 or pixels.ndim < 4:  # features of a frozen tower have no area
        return pixels
    side = torch.sqrt(smallest + (1 - smallest) * draw[:, 0])
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = (1 - side)[:, None] * (2 * draw[:, 1:] - 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False).to(pixels.device)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


# --- the trainer ------------------------------------------------------------------------------


class TwoTowers(torch.nn.Module):
    """Both towers as one module, float32, so that Trainer and DDP wrap them as any model."""

    _keys_to_ignore_on_save = None  # the Trainer asks when a state dict lacks shared weights
    _ddp_params_and_buffers_to_ignore = ("model.logit_scale",)  # the loss's own: see training_step

    def __init__(self, towers: Towers, s: RetrieverTraining) -> None:
        super().__init__()
        self.model, self.towers = towers.model.float(), towers
        scale = getattr(self.model, "logit_scale", None)  # ln τ, as both libraries call it
        if not isinstance(scale, torch.nn.Parameter):
            raise UserError(f"train retriever: {type(self.model).__name__} has no logit_scale")
        self._freeze(s)
        if s.init_scale:
            scale.data.fill_(s.init_scale)

    @property
    def log_scale(self) -> torch.nn.Parameter:
        scale = self.model.logit_scale
        assert isinstance(scale, torch.nn.Parameter)
        return scale

    def forward(
        self, pixels: torch.Tensor, tokens: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of images and texts, float32 [n, dim] each, not normalised."""
        texts = self.towers.text_features(tokens)
        return self.towers.image_features(pixels).float(), texts.float()

    def _freeze(self, s: RetrieverTraining) -> None:
        """Towers are told apart by the names both libraries use: ``visual`` or ``vision_model``."""
        for name, parameter in self.model.named_parameters():
            image = name.split(".")[0].startswith("vis")
            if name == "logit_scale":
                parameter.requires_grad_(s.learn_scale)
            elif s.freeze != "none" and parameter.requires_grad:
                parameter.requires_grad_(image != (s.freeze == "image"))


def learning_rate(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate: linear warm-up, then half a cosine down to 0 over the steps there
    really are; the first step learns already (open_clip's schedule)."""
    warm = round(warmup * total) if warmup < 1 else int(warmup)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def arguments(
    folder: Path, steps: Steps, validated: bool, device: str | None = None, bf16: bool = False
) -> TrainingArguments:
    """The Trainer's arguments of a training's settings; sets up the launch's processes."""
    s = steps.s
    made = training.arguments(
        folder,
        device,
        per_device_train_batch_size=1,  # an item of the data is a whole step
        max_steps=len(steps),
        learning_rate=s.lr,
        weight_decay=s.weight_decay,
        adam_beta1=s.beta1,
        adam_beta2=s.beta2,
        adam_epsilon=s.eps,
        optim="adamw_torch",
        max_grad_norm=s.max_grad_norm,
        bf16=bf16,
        logging_steps=1,
        eval_strategy="steps" if validated else "no",
        eval_steps=s.evaluate * steps.per_epoch,
        metric_for_best_model="value",
        greater_is_better=True,
        save_strategy="steps",
        save_steps=s.save_every,
        save_total_limit=3,  # the best, the last complete one, and the one that is being written
        seed=s.seed,
        report_to="none",
        ddp_find_unused_parameters=True,  # SigLIP's logit_bias, for one
        ddp_broadcast_buffers=False,  # processes differ in how many chunks they encode
    )
    if training.is_sharded(made):
        raise UserError(
            "train retriever: the launch shards the model (DeepSpeed, FSDP); encoders are small, "
            "start it with mmedrag launch --strategy ddp"
        )
    # every new best is saved (see _Validation), so the steps between checkpoints are free
    made.load_best_model_at_end = validated and s.keep == "best"
    return made


class RetrieverTrainer(Trainer):
    """Symmetric InfoNCE over the batch of all processes, with gradient caching."""

    def __init__(
        self,
        towers: TwoTowers,
        arguments: TrainingArguments,
        steps: Steps,
        validate: Validate | None = None,
        tracker: Tracker | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.s, self.steps, self.towers, self.validate = steps.s, steps, towers, validate
        self.processes, self.clock = training.processes_of(arguments), training.Clock()
        pairs = steps.pairs
        if 0 < (last := len(pairs.texts) % self.s.batch_size) < self.processes.size:
            raise UserError(
                f"train retriever: the last batch has {last} pairs for "
                f"{self.processes.size} processes, choose another batch_size"
            )
        self.pixels = StepPixels(steps, self.processes)
        self.windows = [_windows(towers.towers, text, self.s.long_text) for text in pairs.texts]
        super().__init__(
            model=towers,
            args=arguments,
            train_dataset=self.pixels,
            eval_dataset=validate,  # which evaluate() asks; the Trainer only wants there to be one
            callbacks=[
                training.Epochs(self.clock),
                training.Checkpoints(),
                training.Steps(progress, ("eval_value", "eval_loss")),
                _Clamp(),
                _Validation(self.s),
                *([_Tracking(tracker)] if tracker else []),
            ],
        )
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item a step, which is this process's part already."""
        order = EpochSteps(self.steps, self.clock)
        return DataLoader(self.pixels, batch_size=1, sampler=order, collate_fn=itemgetter(0))

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of one batch. Returns the loss over all processes.

        τ belongs to the loss, which every process computes whole; DDP averages the towers.
        """
        inputs = self._prepare_inputs({**inputs, "chunks": self._chunks(inputs)})
        largest = math.ceil(len(inputs["step"].pairs) / self.processes.size)
        if largest <= self.s.chunk:
            value = super().training_step(model, inputs)
        else:
            model.train()
            value = cached_backward(
                lambda chunk: model(**chunk),
                inputs["chunks"],
                partial(self._loss, inputs["step"]),
                partial(self.accelerator.no_sync, model),
            )
        scale = self.towers.log_scale
        if self.processes.size > 1 and scale.grad is not None:
            scale.grad = self.accelerator.reduce(scale.grad, "mean")
        return value

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        [chunk] = inputs["chunks"]
        features = model(**chunk)
        loss = self._loss(inputs["step"], *features)
        return (loss, features) if return_outputs else loss

    def _chunks(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """This process's part of the batch as the towers take it, ``chunk`` pairs at a time."""
        step, size = inputs["step"], self.s.chunk
        mine = self.processes.mine(len(step.pairs))
        texts = [
            self.windows[i][int(r * len(self.windows[i]))]
            for i, r in zip(step.pairs[mine], step.windows[mine].tolist(), strict=True)
        ]
        pixels = crop(inputs["pixels"].to(self.args.device), self.s.crop, step.crops[mine])
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        return [
            {"pixels": seen, "tokens": self.towers.towers.tokenize(part)}
            for seen, part in zip(pixels.split(size), parts, strict=True)
        ]

    def _loss(self, step: Step, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        masked = None
        if self.s.mask_identical:
            masked = false_negatives([self.steps.pairs.texts[i] for i in step.pairs])
        both = self.processes.gather(torch.cat([images, texts], dim=1), len(step.pairs))
        images, texts = both.chunk(2, dim=1)
        return info_nce(images, texts, self.towers.log_scale, masked)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What ``validate`` finds, and the mean training loss of the epoch."""
        found: dict[str, float] = {}
        if self.validate is not None and self.processes.first:
            self.towers.eval()
            found = self.validate()
        losses = losses_of(self.state)[-self.steps.per_epoch :]
        found = {"loss": sum(losses) / len(losses), **self.processes.agree(found)}
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Gains, biases and τ are not decayed, as in open_clip's trainer."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        rate = partial(learning_rate, total=num_training_steps, warmup=self.s.warmup)
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, dict(_weights(self.towers)))


def losses_of(state: Any) -> list[float]:
    """The loss of every step so far."""
    return [row["loss"] for row in state.log_history if "loss" in row]


def validations_of(state: Any) -> list[dict[str, float]]:
    """``step`` and what was found, of every validation so far."""
    return [
        {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_") or k == "step"}
        for row in state.log_history
        if "eval_value" in row
    ]


class _Clamp(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].log_scale.data.clamp_(0, MAX_LOG_SCALE)


class _Validation(TrainerCallback):
    """Saves what is better than all before, and ends a training that no longer gets better."""

    def __init__(self, s: RetrieverTraining) -> None:
        self.s = s

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values = [found["value"] for found in validations_of(state)]
        since = len(values) - 1 - values.index(max(values))
        control.should_save |= since == 0 and self.s.keep == "best"
        control.should_training_stop |= bool(self.s.patience) and since >= self.s.patience


class _Tracking(TrainerCallback):
    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            scale = float(kwargs["model"].log_scale.detach().exp())
            self.tracker({"loss": logs["loss"], "scale": scale}, state.global_step)
        elif "eval_value" in logs:
            found = validations_of(state)[-1]
            self.tracker({f"val/{k}": v for k, v in found.items()}, state.global_step)


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict, tensors that share memory once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            yield name, tensor.contiguous()


def _windows(towers: Towers, text: str, long_text: str) -> list[str]:
    if long_text == "truncate":
        return [text]
    return windows(text, lambda t: towers.lengths([t])[0], towers.context) or [text]
