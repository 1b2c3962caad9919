"""Settings of ``train retriever``; recipes ``paper``, ``released`` and ``default`` differ here.

Importable without an engine, so that the command line can show and check them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmedrag.runtime import Settings, setting


@dataclass(frozen=True)
class RetrieverTraining(Settings):
    """How the symmetric InfoNCE training runs."""

    table = "retriever"

    encoder: str = setting("embedded", "What to start from: a folder, hf:ID, hf-hub:ID, ...")
    batch_size: int = setting(
        256, "Pairs of a step over all devices together, each other's negatives.", minimum=1
    )
    chunk: int = setting(
        64, "Pairs encoded at a time; fewer than the batch means gradient caching.", minimum=1
    )
    epochs: int = setting(20, "Passes over the pairs.", minimum=1)
    max_steps: int = setting(0, "Stop after so many steps; 0: no limit.")
    lr: float = setting(5e-4, "Learning rate of AdamW.", above=0)
    weight_decay: float = setting(0.1, "Of AdamW; 1-d parameters are not decayed.")
    beta1: float = setting(0.9, "Of AdamW.")
    beta2: float = setting(0.98, "Of AdamW.")
    eps: float = setting(1e-6, "Of AdamW.")
    warmup: float = setting(
        0.1, "Share of the steps when below 1, else a number of steps (released: 10000)."
    )
    crop: float = setting(
        0.9,
        "Smallest share of the picture's area in the random crop; 1: no crop.",
        above=0,
        maximum=1,
    )
    max_grad_norm: float = setting(1.0, "Gradient clipping; 0: none.")
    mask_identical: bool = setting(True, "Equal texts are no negatives of each other.")
    long_text: Literal["window", "truncate"] = setting(
        "window", "A random sentence window per step, or what fits the encoder's context."
    )
    views: Literal["random", "first"] = setting(
        "random", "Which view of a study a step takes (released: first)."
    )
    learn_scale: bool = setting(True, "Train the temperature.")
    init_scale: float = setting(0.0, "Its start, as log(1/τ); 0: the checkpoint's own.")
    freeze: Literal["none", "image", "text"] = setting("none", "Tower that stays as it is.")
    dtype: Literal["float32", "bfloat16", "auto"] = setting(
        "float32", "auto: the faster one, measured."
    )
    evaluate: int = setting(1, "Epochs between validation passes.")
    keep: Literal["best", "last"] = setting("best", "Which state is kept: best on validation.")
    patience: int = setting(
        0, "Stop after so many validation passes without a better one; 0: never."
    )
    save_every: int = setting(100, "Steps between checkpoints.", minimum=1)
    seed: int = setting(0, "Seed of all draws.")
