"""For the tests of RAG-PT tuning: a random LLaVA, pictures and preference pairs about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedrag.preference.dpo.settings import DpoTraining
from mmedrag.records.records import Noise, Pair, PairKind, Prompt, Side

QUICK: dict[str, Any] = dict(
    batch_size=4, epochs=2, learning_rate=5e-3, lora_r=4, lora_alpha=8, log_steps=1, beta=0.1
)


def quick(**changes: Any) -> DpoTraining:
    return DpoTraining(**{**QUICK, **changes})


def make_model(folder: Path) -> Path:
    from mmedrag.answering.generators.random_model import random_llava

    return random_llava(folder, "tiny", seed=1)


def make_pairs(root: Path, count: int, kinds: tuple[PairKind, ...] = ()) -> list[Pair]:
    """Pairs of different prompt and answer lengths; cross_modal differs in the image alone."""
    rng = np.random.default_rng(7)
    root.mkdir(parents=True, exist_ok=True)
    names = kinds or ("cross_modal", "resist", "copy", "stage1")
    pairs = []
    for i in range(count):
        kind, image = names[i % len(names)], f"{i}.png"
        pixels = rng.integers(0, 255, (28 + i % 5, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / image)
        text = f"Reference: 1. finding {i}{' and more' * (i % 3)}\nIs it there?"
        prompt = Prompt(template="t/x@1", text=text)
        noise = Noise(kind="gaussian_clip", seed=i) if kind in ("cross_modal", "stage1") else None
        right, wrong = ("yes", "no") if i % 2 else ("no", "yes, it is there")
        rejected = right if kind == "cross_modal" else wrong
        pairs.append(
            Pair(
                id=f"{kind}:e{i}",
                kind=kind,
                chosen=Side(prompt=prompt, image=image, text=right),
                rejected=Side(prompt=prompt, image=image, noise=noise, text=rejected),
                patient=f"p{i}",
                root=root,
            )
        )
    return pairs


def losses(folder: Path) -> list[float]:
    """The loss of every logged step of a finished run."""
    import json

    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
