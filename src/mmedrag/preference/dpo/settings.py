"""Settings of RAG-PT tuning and their three recipes, importable without torch.

Place in the picture: pairs ─► *dpo* ─► adapter. ``DpoTraining.recipe("paper")`` gives the
published values, ``released`` those of the released stage-2 script, ``default`` ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmedrag.runtime import Settings, setting

Reference = Literal["base", "init"]


@dataclass(frozen=True)
class DpoTraining(Settings):
    """How a preference tuning runs."""

    table = "dpo"

    beta: float = setting(
        0.1, "Strength of the pull to the reference policy (α in the paper).", above=0
    )
    sft_weight: float = setting(
        0.0,
        "Weight of the chosen texts' negative log-likelihood beside the preference loss; 0, as "
        "published: none.",
        minimum=0,
    )
    count_end: bool = setting(
        True,
        "An answer's log-probability includes its end token, as published. Where one short answer "
        "stands on both sides (cross_modal), the end token alone can satisfy the loss: the model "
        "then goes on after the same yes or no on noise images (docs/log.md).",
    )
    learning_rate: float = setting(1e-4, "Learning rate of the adapter.", above=0)
    projector_lr: float | None = setting(
        None, "Learning rate of the projector when it is trained; by default that of the adapter."
    )
    epochs: float = setting(3, "Passes over the pairs.", above=0)
    max_steps: int = setting(0, "Stop after so many updates; 0: no limit.")
    batch_size: int = setting(16, "Pairs of a step over all devices together.", minimum=1)
    accumulation: int = setting(1, "Steps per update.", minimum=1)
    lora_r: int = setting(
        32, "Rank of the one adapter. Dropout is off, as DPO's two passes must agree.", minimum=1
    )
    lora_alpha: int = setting(64, "Scale of the adapter.")
    lora_targets: tuple[str, ...] = setting(
        (),
        "Names of the language model's linear layers that get it (q_proj, ...); none: all of them, "
        "which leaves lm_head, projector and vision tower out.",
    )
    train_projector: bool = setting(
        False,
        "Also train the image projector (kept inside the adapter, so that the reference keeps the "
        "original).",
    )
    schedule: str = setting("cosine", "Schedule of the learning rate, as transformers names it.")
    warmup_ratio: float = setting(0.03, "Share of the updates with a rising learning rate.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = setting(1.0, "Gradient clipping.")
    max_length: int = setting(
        1024, "Tokens of prompt, image and answer together; only answers are ever cut."
    )
    tokens_per_pass: int = setting(
        4096,
        "A batch of more tokens takes several passes, with the same gradient; bounds memory "
        "whatever the batch size.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "auto: bfloat16 on a GPU that has it, else float32."
    )
    gradient_checkpointing: bool = setting(False, "Compute activations twice to save memory.")
    share_prefix: bool = setting(
        True,
        "Compute once in a pass what sides of one picture begin with (references, question); the "
        "gradient stays the same.",
    )
    group_by_length: bool = setting(
        True, "Batches of similar length, in which the pairs of one picture stand together."
    )
    redraw_noise: bool | None = setting(
        None,
        "Draw the rejected image's noise anew at every access (released); by default as the pairs "
        "say. Redrawn noise is neither cached nor are its reference log-probabilities.",
    )
    cache_features: bool = setting(True, "Keep frozen vision features on disk.")
    cache_reference: bool = setting(True, "Keep reference log-probabilities on disk.")
    save_steps: int = setting(0, "Updates between checkpoints; 0: at each epoch's end.")
    log_steps: int = setting(10, "Updates between lines of the log.")
    report_to: str = setting(
        "none", "none, tensorboard, wandb or trackio (their own log-in applies)."
    )
    workers: int = setting(
        0, "Data loading processes (needed only when images are decoded at each step)."
    )
    seed: int = setting(42, "Seed of all draws.")

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> DpoTraining:
        """The table ``[dpo]`` of a recipe (``paper``, ``released``, ``default``, or a file)."""
        from mmedrag.runtime import config

        table = config.load(name).get("dpo", {})
        return config.settings(cls, {**table, **changes}, f"recipe {name} [dpo]")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lora_targets": list(self.lora_targets)}  # as JSON gives it back
