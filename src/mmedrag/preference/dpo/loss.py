"""Direct preference optimisation as a function of four log-probability tensors.

Place in the picture: ``trainer``. A side is (prompt, image, text), so the two-image, two-prompt
loss of RAG-PT is the plain one: only the inputs of the log-probabilities differ.

    L_pt = −E log σ( β[log π_θ(y_w|x_w) − log π_ref(y_w|x_w)]
                   − β[log π_θ(y_l|x_l) − log π_ref(y_l|x_l)] )

(MMed-RAG, arXiv 2410.13085, §3.3, with its α called β; Rafailov et al. 2023, eq. 7.) A sequence's
log-probability is the sum over its answer tokens, the end token included, not the average.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 25  # logits held at once (128 MiB in float32)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per pair and the implicit rewards of both sides; all tensors are float [pairs].

    The rewards β·(log π_θ − log π_ref) are detached: they are for the log.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def chosen_nll(policy_chosen: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood per token of the chosen texts, float [pairs].

    DPO only widens the gap between two texts, and both may lose probability; with this term the
    preferred one cannot (Pang et al. 2024, "Iterative Reasoning Preference Optimization", eq. 1).

    Args:
        policy_chosen: float [pairs]. tokens: int64 [pairs], length of each chosen text.
    """
    return -policy_chosen / tokens


def token_logps(hidden: Tensor, head: torch.nn.Module, targets: Tensor) -> Tensor:
    """log p(target) at each position, float32 [n], from final hidden states [n, width].

    The vocabulary axis exists for a chunk of positions at a time; with gradients, a chunk's
    logits are computed again in the backward pass instead of being kept.
    """
    vocabulary = int(head.out_features)  # type: ignore[arg-type]
    rows = max(1, CHUNK_LOGITS // vocabulary)

    def logps(states: Tensor, wanted: Tensor) -> Tensor:
        logits = head(states).float()
        return logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)

    if len(targets) <= rows:
        return logps(hidden, targets)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([logps(states, wanted) for states, wanted in parts])
    return torch.cat([checkpoint(logps, h, t, use_reentrant=False) for h, t in parts])
