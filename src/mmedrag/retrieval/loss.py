"""The retriever's loss: symmetric InfoNCE, and its gradient for batches that do not fit.

Place in the picture: ``train_retriever``. Paper §3.1 / open_clip's ClipLoss:
L = ½ [CE(τ V Tᵀ, I) + CE(τ T Vᵀ, I)] with unit rows V (images), T (texts) and a learned τ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F

MAX_LOG_SCALE = 4.605170185988092  # ln 100, the released clamp (train.py:190)


def false_negatives(texts: Sequence[str]) -> torch.Tensor:
    """bool [b, b]: pairs (i, j), i != j, whose texts are the same, so that neither may push the
    other away ("No acute findings." is the right report of both images)."""
    number: dict[str, int] = {}
    ids = torch.tensor([number.setdefault(" ".join(t.split()), len(number)) for t in texts])
    same = ids[:, None] == ids[None]
    return same & ~torch.eye(len(ids), dtype=torch.bool)


def info_nce(
    images: torch.Tensor,
    texts: torch.Tensor,
    log_scale: torch.Tensor,
    masked: torch.Tensor | None = None,
) -> torch.Tensor:
    """L of the module's text, a scalar.

    Args:
        images, texts: [b, dim], row i of one belongs to row i of the other; not normalised.
        log_scale: ln τ. masked: bool [b, b], pairs that do not count as negatives.
    """
    v, t = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    logits = log_scale.float().exp() * v @ t.T
    if masked is not None:
        logits = logits.masked_fill(masked.to(logits.device), float("-inf"))
    target = torch.arange(len(v), device=v.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


Encode = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


def cached_backward(
    encode: Encode,
    chunks: Sequence[Any],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    defer: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> torch.Tensor:
    """Gradient of a batch loss with the memory of one chunk (Gao et al. 2021, GradCache).

    1. every chunk is encoded without a graph; 2. the loss gives gradients with respect to the
    embeddings (and to its own parameters, such as τ); 3. every chunk is encoded again and
    back-propagates its part. Dropout repeats itself: random states are saved in 1, restored
    in 3. Parameter gradients are accumulated and equal those of the plain loss.

    Args:
        encode: chunk → (images, texts), each [rows of the chunk, dim].
        loss: of all images and texts, [b, dim] each.
        defer: context of every backward pass of a chunk but the last (DDP's ``no_sync``).

    Returns:
        The loss, without a graph.
    """
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state())
            parts.append(encode(chunk))
    images, texts = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    value = loss(images, texts)
    value.backward()
    assert images.grad is not None and texts.grad is not None
    sizes = [len(part[0]) for part in parts]
    grads = list(zip(images.grad.split(sizes), texts.grad.split(sizes), strict=True))
    after = _random_state()
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        _restore(state)
        with nullcontext() if number + 1 == len(chunks) else defer():
            sides = zip(encode(chunk), grads[number], strict=True)
            trained = [side for side in sides if side[0].requires_grad]
            rows, given = [pair[0] for pair in trained], [pair[1] for pair in trained]
            if rows:  # none are, where only τ learns
                torch.autograd.backward(rows, given)
    _restore(after)
    return value.detach()


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def _restore(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
