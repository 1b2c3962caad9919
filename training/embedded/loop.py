"""The loop that trains vision tower and answering model: AdamW, one cycle, clipped gradients.

It resumes from its state file, to the same numbers as if it had not been interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from mmedrag.runtime import replacing

log = logging.getLogger(__name__)
B = TypeVar("B")
LOG_EVERY = 50  # steps


def fit(
    model: nn.Module,
    batches: Callable[[range], Iterable[B]],
    loss_of: Callable[[int, B], torch.Tensor],
    state: Path,
    steps: int,
    rate: float,
    every: int,
    check: Callable[[], object] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """Train what of ``model`` requires gradients; leaves it in evaluation mode.

    Args:
        batches: gives one batch for each step of a range.
        loss_of: the loss of a step's batch.
        state: file of the state, written and ``check`` called each ``every`` steps and at the end.
        rate: the cycle's highest learning rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=betas)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start = saved["step"]
    model.train()
    began, losses, todo = time.time(), list[float](), range(start, steps)
    for step, batch in zip(todo, batches(todo), strict=True):
        loss = loss_of(step, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        done, last = step + 1, step + 1 == steps
        if done % LOG_EVERY == 0 or last:
            recent, spent = np.mean(losses[-LOG_EVERY:]), time.time() - began
            log.info("%s %d loss %.4f %.0fs", state.stem, done, recent, spent)
        if done % every == 0 or last:
            if check:
                log.info("%s %d %s", state.stem, done, check())
                model.train()
            with replacing(state) as out:
                torch.save({k: v.state_dict() for k, v in parts.items()} | {"step": done}, out)
    model.eval()


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
