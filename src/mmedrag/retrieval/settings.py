"""Settings of ``train retriever``; recipes ``paper``, ``released`` and ``default`` differ here.

Layer A, so that the command line can show and check them without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmedrag.records import UserError


@dataclass(frozen=True)
class RetrieverTraining:
    """Settings of the symmetric InfoNCE training.

    Attributes:
        encoder: what to start from (``load_encoder`` names).
        batch_size: pairs that are each other's negatives, over all devices.
        chunk: pairs encoded at a time; smaller than the batch means gradient caching.
        epochs, max_steps: how long (max_steps 0: no limit).
        lr, weight_decay, beta1, beta2, eps: AdamW; 1-d parameters are not decayed.
        warmup: share of the steps when below 1, else a number of steps (released: 10000).
        crop: smallest share of the picture's area in the random crop (1: no crop).
        max_grad_norm: gradient clipping, 0 for none.
        mask_identical: equal texts are no negatives of each other.
        long_text: "window" (a random sentence window per step) or "truncate".
        views: "random" view of a study per step, or the "first" (as released).
        learn_scale: train τ; ``init_scale``: its start, 0 for the checkpoint's own.
        freeze: "none", "image" or "text" tower.
        dtype: "float32", "bfloat16" or "auto" (the faster one, measured).
        evaluate: epochs between validation passes; ``keep``: "best" on validation, or "last".
        patience: stop after so many validation passes without a better one (0: never).
        save_every: steps between checkpoints.
    """

    encoder: str = "embedded"
    batch_size: int = 256
    chunk: int = 64
    epochs: int = 20
    max_steps: int = 0
    lr: float = 5e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: float = 0.1
    crop: float = 0.9
    max_grad_norm: float = 1.0
    mask_identical: bool = True
    long_text: str = "window"
    views: str = "random"
    learn_scale: bool = True
    init_scale: float = 0.0
    freeze: str = "none"
    dtype: str = "float32"
    evaluate: int = 1
    keep: str = "best"
    patience: int = 0
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "long_text": ("window", "truncate"),
            "views": ("random", "first"),
            "freeze": ("none", "image", "text"),
            "keep": ("best", "last"),
            "dtype": ("float32", "bfloat16", "auto"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"retriever: {name}: got {getattr(self, name)!r}, expected {', '.join(allowed)}"
                )
        for name in ("batch_size", "chunk", "epochs", "lr", "save_every"):
            if not getattr(self, name) > 0:
                raise UserError(f"retriever: {name}: got {getattr(self, name)}, expected above 0")
        if not 0 < self.crop <= 1:
            raise UserError(f"retriever: crop: got {self.crop}, expected a share of the area")
