"""Stage 1: a small CLIP vision tower that sees findings and attributes (multi-label)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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

log = logging.getLogger(__name__)
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


class Heads(nn.Module):
    """Linear read-outs of the mean patch token, per domain: cells and attributes."""

    def __init__(self, width: int, sets: Mapping[str, StudySet]) -> None:
        super().__init__()
        self.cells = nn.ModuleDict(
            {name: nn.Linear(width, len(cells(s.domain))) for name, s in sets.items()}
        )
        self.attributes = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.Linear(width, len(a.values)) for a in s.domain.attributes])
                for name, s in sets.items()
            }
        )


def train(
    sets: Mapping[str, Sequence[StudySet]],
    steps: int,
    checks: Mapping[str, StudySet],
    out: Path,
    easy: Callable[[float], float] = lambda done: 0.0,
    batch: int = 64,
    rate: float = 1.2e-3,
    seed: int = 0,
) -> CLIPVisionModel:
    """Train on all domains in turn; resumes from ``out/vision.pt`` when interrupted.

    Args:
        sets: per domain the same studies at the benchmark's contrast and at a higher one.
        easy: share of the latter, by the share of steps done.
    """
    torch.manual_seed(seed)
    first = {name: found[0] for name, found in sets.items()}
    tower = CLIPVisionModel(config())
    heads = Heads(tower.config.hidden_size, first)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    names, labels = list(sets), {n: torch.from_numpy(s.cells()).float() for n, s in first.items()}
    kinds = {n: torch.from_numpy(s.attributes()) for n, s in first.items()}
    state, start = out / "vision.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        tower.load_state_dict(saved["tower"])
        heads.load_state_dict(saved["heads"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
    half, began, losses = fast_half(), time.time(), []
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        name = names[step % len(names)]
        plain = int(rng.random() < easy(step / steps))
        rows = np.sort(rng.integers(len(labels[name]), size=batch))
        pixels = to_pixels(sets[name][plain].pixels[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            tokens = tower(pixel_values=pixels).last_hidden_state[:, 1:]
        pooled = tokens.float().mean(1)
        loss = F.binary_cross_entropy_with_logits(heads.cells[name](pooled), labels[name][rows])
        attributes = heads.attributes[name].children()
        for head, kind in zip(attributes, kinds[name][rows].T, strict=True):
            loss = loss + 0.05 * F.cross_entropy(head(pooled), kind)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            log.info(
                "vision %d loss %.4f %.0fs", step + 1, np.mean(losses[-100:]), time.time() - began
            )
        if step % 500 == 499 or step == steps - 1:
            for check in checks:
                log.info(
                    "vision %d %s %s", step + 1, check, balanced(tower, heads, check, checks[check])
                )
            torch.save(
                {
                    "tower": tower.state_dict(),
                    "heads": heads.state_dict(),
                    "step": step + 1,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                },
                state,
            )
    return tower.eval()


@lru_cache(maxsize=1)
def fast_half() -> bool:
    """Is a bfloat16 matrix product faster than a float32 one here? On some CPUs it is emulated."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 512).to(dtype), torch.randn(512, 512).to(dtype)
        a @ b
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        seconds.append(time.perf_counter() - began)
    return seconds[1] < seconds[0]


@torch.no_grad()
def balanced(tower: CLIPVisionModel, heads: Heads, name: str, check: StudySet) -> str:
    """Balanced accuracy of every cell, and their mean."""
    tower.eval()
    pooled = torch.cat(
        [
            tower(pixel_values=to_pixels(check.pixels[i : i + 128]))
            .last_hidden_state[:, 1:]
            .mean(1)
            for i in range(0, len(check.pixels), 128)
        ]
    )
    tower.train()
    logits = heads.cells[name](pooled).numpy()
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
