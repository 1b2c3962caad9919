"""Fine-tuning the encoder of a domain model: its picture side learns to tell domains apart.

Place in the picture: ``train domain`` with ``fine_tune`` epochs; the tuned encoder is saved beside
the head, which is then fitted on its features as on those of a frozen one. A small learning rate
and few epochs: domains differ grossly, and a tower that forgets what it knew would know less of
what is unknown. The text side stays; normalisation layers keep their statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from mmedrag.domain.fit import DomainTraining
from mmedrag.images import load_image
from mmedrag.records import Row, UserError
from mmedrag.retrieval.encoders import ahead, load_towers
from mmedrag.runtime import torch_rng

log = logging.getLogger(__name__)
BATCH = 32
HEAD_LR = 0.1  # of the linear head over unit features, which is thrown away afterwards


def fine_tune(
    encoder: str, rows: Sequence[Row], out: Path, settings: DomainTraining, device: str | None
) -> Path:
    """Train ``encoder`` and a linear head by class-balanced cross-entropy; save the encoder.

    Args:
        rows: training rows with a domain and a picture; unreadable pictures are left out.
        out: the encoder's new folder, which ``load_encoder`` opens.

    Raises:
        UserError: an encoder without torch towers, or no readable picture.
    """
    towers = load_towers(encoder)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = towers.model.to(place, torch.float32).eval()
    labels = sorted({str(row.domain) for row in rows})

    def read(row: Row) -> tuple[torch.Tensor, int] | None:
        try:
            picture = load_image(row.images[0])
        except UserError:
            return None  # reported when the features are computed
        return towers.prepare(picture.convert("RGB")), labels.index(str(row.domain))

    with torch.no_grad():
        blank = towers.prepare(Image.new("RGB", (64, 64)))[None].to(place)
        head = torch.nn.Linear(towers.image_features(blank).shape[1], len(labels)).to(place)
    counts = torch.tensor([sum(row.domain == label for row in rows) for label in labels])
    weight = (counts.sum() / (len(labels) * counts)).float().to(place)
    groups = [
        {"params": list(model.parameters()), "lr": settings.fine_tune_lr},
        {"params": list(head.parameters()), "lr": HEAD_LR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # leaves what has no gradient alone
    torch.nn.init.zeros_(head.weight)
    dice = torch_rng(settings.seed)
    for epoch in range(settings.fine_tune):
        order = [rows[i] for i in torch.randperm(len(rows), generator=dice).tolist()]
        losses = []
        for batch in ahead(read, order, BATCH):
            seen = [made for made in batch if made is not None]
            if not seen:
                continue
            pixels = torch.stack([picture for picture, _ in seen]).to(place)
            wanted = torch.tensor([label for _, label in seen], device=place)
            features = F.normalize(towers.image_features(pixels), dim=-1)
            optimizer.zero_grad()
            loss = F.cross_entropy(head(features), wanted, weight=weight)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if not losses:
            raise UserError("train domain: no readable picture to fine-tune the encoder on")
        log.info("fine-tuning: epoch %d, loss %.4f", epoch + 1, sum(losses) / len(losses))
    towers.save(out)
    return out
