"""The training of RAG-PT on ``transformers.Trainer``.

Place in the picture: inside train_dpo. The Trainer gives optimiser, schedule, checkpoints, resume,
DDP, DeepSpeed and FSDP; ours are the loss on four log-probability tensors, the batch order and the
metrics (named as TRL names them, also per kind).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedrag.preference.dpo.collate import KIND_NAMES, Collator, LengthGrouped, PairDataset
from mmedrag.preference.dpo.encode import EncodedPair
from mmedrag.preference.dpo.loss import chosen_nll, dpo_loss
from mmedrag.preference.dpo.policy import as_reference
from mmedrag.preference.dpo.settings import DpoTraining
from mmedrag.records import UserError
from mmedrag.runtime import launch, torchvision_shim, training

torchvision_shim.ready()
from transformers import Trainer, TrainingArguments  # noqa: E402

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def arguments(settings: DpoTraining, folder: Path) -> TrainingArguments:
    """The Trainer's arguments of these settings; also sets up the launch's processes.

    Raises:
        UserError: the batch cannot be divided evenly among the processes.
    """
    processes = launch.world()
    if settings.batch_size % processes:
        raise UserError(
            f"train dpo: batch_size is {settings.batch_size}, expected a multiple of the "
            f"{processes} processes that share it"
        )
    gpu = torch.cuda.is_available()
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and gpu and _has_bf16())
    every: dict[str, Any] = {"save_strategy": "epoch"}
    if settings.save_steps:
        every = {"save_strategy": "steps", "save_steps": settings.save_steps}
    known = {f.name for f in fields(TrainingArguments)}  # renamed in transformers 5
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    recompute: dict[str, Any] = {
        name: settings.gradient_checkpointing,
        f"{name}_kwargs": {"use_reentrant": False},
    }
    return training.arguments(
        folder,
        per_device_train_batch_size=settings.batch_size // processes,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_steps,
        logging_first_step=True,
        save_total_limit=2,
        report_to=settings.report_to,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.workers,
        bf16=half,
        ddp_find_unused_parameters=False,
        **every,
        **recompute,
    )


def number_type(settings: DpoTraining, arguments: TrainingArguments) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if arguments.bf16 else "float32"


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported()


class DpoTrainer(Trainer):
    """Two-image DPO of a PEFT policy whose forward gives answer log-probabilities."""

    loss_is_scaled_for_ga = False  # the parts of a batch sum up to the mean over its pairs

    def __init__(
        self,
        policy: Any,
        arguments: TrainingArguments,
        pairs: Sequence[EncodedPair],
        collator: Collator,
        settings: DpoTraining,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.settings, self.pairs, self.clock = settings, pairs, training.Clock()
        super().__init__(
            model=policy,
            args=arguments,
            train_dataset=PairDataset(pairs, self.clock),
            data_collator=collator,
            callbacks=[
                training.Epochs(self.clock),
                training.Checkpoints(),
                training.Steps(progress, ("loss", "rewards/accuracies", "rewards/margins")),
            ],
        )
        self.model_accepts_loss_kwargs = False
        self._totals = self._zeros()
        self._shown: dict[str, float] = {}

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One batch in its parts; gradients are exchanged between processes after the last."""
        *early, last = inputs["parts"]
        total = torch.zeros((), device=self.args.device)
        for part in early:
            with self.accelerator.no_sync(model):
                total += super().training_step(model, part)
        return total + super().training_step(model, last)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        kinds, whole = inputs.pop("kinds"), inputs.pop("whole")
        frozen = inputs.pop("reference", None)
        logps = model(**inputs)
        if frozen is None:
            with torch.no_grad(), as_reference(self.accelerator.unwrap_model(self.model)):
                frozen = model(**inputs)
        (own, other), (own_ref, other_ref) = logps.chunk(2), frozen.float().chunk(2)
        losses, chosen, rejected = dpo_loss(own, other, own_ref, other_ref, self.settings.beta)
        if self.settings.sft_weight:
            tokens = inputs["side"].bincount(minlength=len(logps))[: len(own)]
            losses = losses + self.settings.sft_weight * chosen_nll(own, tokens)
        self._record(kinds, chosen, rejected, logps)
        loss = losses.sum() / whole
        return (loss, logps) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate knows neither cached features nor shared prompts

    # --- metrics ------------------------------------------------------------------------------

    def _zeros(self) -> Tensor:
        """Sums per kind: [kinds, metrics + 1], the last column counts pairs."""
        return torch.zeros(len(KIND_NAMES), len(METRICS) + 1, dtype=torch.float64)

    def _record(self, kinds: Tensor, chosen: Tensor, rejected: Tensor, logps: Tensor) -> None:
        own, other = logps.detach().chunk(2)
        right = (chosen > rejected).float()
        values = [chosen, rejected, chosen - rejected, right, own, other, torch.ones_like(own)]
        table = torch.stack(values, dim=1).double().cpu()
        self._totals.index_add_(0, kinds.cpu(), table)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            totals = self._totals.to(self.args.device, torch.float32)
            totals = self.accelerator.reduce(totals, "sum").cpu().double()
            self._totals = self._zeros()
            self._shown = _means(totals.sum(0), "")
            for name, row in zip(KIND_NAMES, totals, strict=True):
                if row[-1] > 0:
                    self._shown.update(_means(row, f"/{name}"))
            logs.update(self._shown)
        super().log(logs, start_time)

    def outcome(self) -> dict[str, Any]:
        """``steps``, and ``loss`` and ``metrics`` of the last logging interval (also after a
        resume that had nothing to do)."""
        rows = [row for row in self.state.log_history if "loss" in row]
        metrics = {k: v for k, v in (rows[-1] if rows else {}).items() if "/" in k or k == "loss"}
        return {"steps": self.state.global_step, "loss": metrics.get("loss"), "metrics": metrics}

    # --- order and optimiser --------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        lengths = [pair.length for pair in self.pairs]
        whole = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(
            lengths,
            whole * self.args.world_size,
            self.clock,
            self.settings.seed,
            self.settings.group_by_length,
            [pair.chosen.view.key for pair in self.pairs],
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with the projector in a group of its own, if it has its own learning rate."""
        rate = self.settings.projector_lr
        if self.optimizer is None and rate is not None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            whole: Any = self.model if model is None else model
            mine: dict[bool, list[Any]] = {True: [], False: []}
            for name, parameter in whole.named_parameters():
                if parameter.requires_grad:
                    mine["multi_modal_projector" in name].append(parameter)
            decay = {"weight_decay": self.settings.weight_decay}
            groups: list[dict[str, Any]] = [{"params": mine[False], **decay}]
            if mine[True]:
                groups.append({"params": mine[True], "lr": rate, **decay})
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)


def _means(row: Tensor, suffix: str) -> dict[str, float]:
    return {f"{m}{suffix}": float(v / row[-1]) for m, v in zip(METRICS, row, strict=False)}
