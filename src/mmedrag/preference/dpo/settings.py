"""Settings of RAG-PT tuning and their three recipes, importable without torch.

Place in the picture: pairs ─► *dpo* ─► adapter. ``DpoTraining.recipe("paper")`` gives the
published values, ``released`` those of the released stage-2 script, ``default`` ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmedrag.records import UserError

Reference = Literal["base", "init"]


@dataclass(frozen=True)
class DpoTraining:
    """How a preference tuning runs.

    Args:
        beta: strength of the pull to the reference policy (α in the paper).
        sft_weight: of the chosen texts' negative log-likelihood beside the preference loss; 0, as
            published: none (:func:`mmedrag.preference.dpo.loss.chosen_nll`).
        count_end: an answer's log-probability includes its end token, as published. Where one short
            answer stands on both sides (``cross_modal``), the end token alone can satisfy the loss:
            the model then goes on after the same yes or no on noise images (docs/log.md).
        learning_rate, projector_lr: of the adapter, and of the projector when it is trained
            (None: the same).
        epochs: passes over the pairs; ``max_steps`` > 0 stops earlier.
        batch_size: pairs per step and device; ``accumulation``: steps per update.
        lora_r, lora_alpha: rank and scale of the one adapter. Dropout is off, as DPO's two
            passes must agree.
        lora_targets: names of the language model's linear layers that get it (``q_proj``, ...);
            none: all of them, which leaves ``lm_head``, projector and vision tower out.
        train_projector: also train the image projector (kept inside the adapter, so that the
            reference keeps the original).
        schedule, warmup_ratio, weight_decay, max_grad_norm: as in transformers.
        tokens_per_pass: a batch of more tokens than this takes several passes, with the same
            gradient; bounds memory whatever the batch size.
        share_prefix: what sides of one picture begin with (references, question) is computed
            once in a pass; the gradient stays the same. group_by_length: batches of similar
            length, in which the pairs of one picture stand together.
        max_length: tokens of prompt, image and answer together; only answers are ever cut.
        dtype: ``auto`` = bfloat16 on a GPU that has it, else float32.
        redraw_noise: draw the rejected image's noise anew at every access (released). None:
            as the pairs say. Redrawn noise is neither cached nor are its reference log-probs.
        cache_features, cache_reference: keep frozen vision features and reference log-probs
            on disk.
        save_steps: checkpoint interval in updates (0: at each epoch's end); log_steps likewise.
        report_to: ``none``, ``tensorboard``, ``wandb``, ``trackio`` (their own log-in applies).
        workers: data loading processes (needed only when images are decoded at each step).
    """

    beta: float = 0.1
    sft_weight: float = 0.0
    count_end: bool = True
    learning_rate: float = 1e-4
    projector_lr: float | None = None
    epochs: float = 3
    max_steps: int = 0
    batch_size: int = 16
    accumulation: int = 1
    lora_r: int = 32
    lora_alpha: int = 64
    lora_targets: tuple[str, ...] = ()
    train_projector: bool = False
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    tokens_per_pass: int = 4096
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    share_prefix: bool = True
    group_by_length: bool = True
    redraw_noise: bool | None = None
    cache_features: bool = True
    cache_reference: bool = True
    save_steps: int = 0
    log_steps: int = 10
    report_to: str = "none"
    workers: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("beta", "learning_rate", "epochs", "batch_size", "accumulation", "lora_r"):
            if not getattr(self, name) > 0:
                raise UserError(f"train dpo: {name} is {getattr(self, name)}, expected above 0")
        if self.sft_weight < 0:
            raise UserError(f"train dpo: sft_weight is {self.sft_weight}, expected 0 or more")

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> DpoTraining:
        """The table ``[dpo]`` of a recipe (``paper``, ``released``, ``default``, or a file)."""
        from mmedrag.runtime import config

        table = config.load(name).get("dpo", {})
        return config.settings(cls, {**table, **changes}, f"recipe {name} [dpo]")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lora_targets": list(self.lora_targets)}  # as JSON gives it back
