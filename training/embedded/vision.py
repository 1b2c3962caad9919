"""A small CLIP vision tower, trained to see findings and attributes (multi-label)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mmedrag.runtime import torchvision_shim

torchvision_shim.ready()
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmedrag.phantom import cells
from training.embedded.data import SIZE, StudySet
from training.embedded.loop import fast_half, fit

MEAN, STD = 0.5, 0.25  # of the image processor, all channels
PATCH = 16  # pixels: 16 image tokens


def config(width: int = 128, layers: int = 4, projection: int = 128) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=projection,
        attention_dropout=0.0,
    )


def to_pixels(batch: np.ndarray) -> torch.Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S], normalised."""
    x = torch.from_numpy(np.ascontiguousarray(batch)).float().div_(255).sub_(MEAN).div_(STD)
    return x.permute(0, 3, 1, 2).contiguous()


class VisionTraining(nn.Module):
    """The tower, and linear read-outs of its mean patch token per domain: cells and attributes."""

    def __init__(self, sets: Mapping[str, StudySet]) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config())
        width = self.tower.config.hidden_size
        self.cells = nn.ModuleDict(
            {name: nn.Linear(width, len(cells(s.domain))) for name, s in sets.items()}
        )
        self.attributes = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.Linear(width, len(a.values)) for a in s.domain.attributes])
                for name, s in sets.items()
            }
        )

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean patch token of each picture, float32 [n, width]."""
        return self.tower(pixel_values=pixels).last_hidden_state[:, 1:].float().mean(1)


def train(
    sets: Mapping[str, Sequence[StudySet]],
    steps: int,
    probes: Mapping[str, StudySet],
    state: Path,
    easy: Callable[[float], float] = lambda done: 0.0,
    batch: int = 64,
    rate: float = 1.2e-3,
    seed: int = 0,
) -> CLIPVisionModel:
    """Train on all domains in turn; resumes from ``state`` when interrupted.

    Args:
        sets: per domain the same studies at the benchmark's contrast and at a higher one.
        probes: unseen studies whose accuracy is logged.
        easy: share of the higher contrast, by the share of steps done.
    """
    torch.manual_seed(seed)
    first, names = {name: found[0] for name, found in sets.items()}, list(sets)
    model = VisionTraining(first)
    labels = {n: torch.from_numpy(s.cells()).float() for n, s in first.items()}
    kinds = {n: torch.from_numpy(s.attributes()) for n, s in first.items()}

    def loss_of(step: int, _: int) -> torch.Tensor:
        rng, name = np.random.default_rng((seed, step)), names[step % len(names)]
        plain = int(rng.random() < easy(step / steps))
        rows = np.sort(rng.integers(len(labels[name]), size=batch))
        pixels = to_pixels(sets[name][plain].pixels[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_half()):
            pooled = model.pooled(pixels)
        loss = F.binary_cross_entropy_with_logits(model.cells[name](pooled), labels[name][rows])
        attributes = model.attributes[name].children()
        for head, kind in zip(attributes, kinds[name][rows].T, strict=True):
            loss = loss + 0.05 * F.cross_entropy(head(pooled), kind)
        return loss

    def check() -> str:
        return "; ".join(f"{n}: {balanced(model, n, s)}" for n, s in probes.items())

    fit(model, lambda todo: todo, loss_of, state, steps, rate, 500, check)
    return model.tower


@torch.no_grad()
def balanced(model: VisionTraining, name: str, check: StudySet) -> str:
    """Balanced accuracy of every cell, and their mean."""
    model.eval()
    parts = [check.pixels[i : i + 128] for i in range(0, len(check.pixels), 128)]
    pooled = torch.cat([model.pooled(to_pixels(part)) for part in parts])
    logits = model.cells[name](pooled).numpy()
    truth = check.cells()
    # Threshold at the base rate's logit, as a balanced question would.
    base = truth.mean(0)
    guess = logits > np.log(base / (1 - base + 1e-9) + 1e-9)
    right = [
        (guess[truth[:, c], c].mean() + (~guess[~truth[:, c], c]).mean()) / 2
        for c in range(truth.shape[1])
    ]
    detail = " ".join(
        f"{finding[:9]}{'/' + side[:1] if side else ''}={value:.2f}"
        for (finding, side), value in zip(cells(check.domain), right, strict=True)
    )
    return f"mean {np.mean(right):.3f} {detail}"
