"""Two linear maps over the frozen towers of a small encoder: what a retriever has left to learn.

Pictures and texts pass the towers once; a step costs next to nothing, so that a published schedule
of a thousand steps of 512 pairs takes a minute. Saved, the maps are the projections of an ordinary
CLIPModel.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmedrag.retrieval.encoders import Towers, load_towers


class Maps(nn.Module):
    """Untrained projections of both sides, under the names that training knows them by."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.visual, self.text = (nn.Linear(width, width, bias=False) for _ in range(2))
        for part in (self.visual, self.text):
            nn.init.normal_(part.weight, std=width**-0.5, generator=rng)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07), as CLIP starts


def trainable(spec: str, seed: int = 0) -> Towers:
    """The towers of a CLIP encoder, frozen, below two maps that start at random.

    Args:
        spec: the encoder, as ``load_encoder`` takes it. seed: of the maps.
    """
    whole = load_towers(spec)
    model: Any = whole.model.float().eval().requires_grad_(False)
    maps = Maps(model.config.projection_dim, seed)
    known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def prepare(picture: Image.Image) -> torch.Tensor:
        return model.vision_model(pixel_values=whole.prepare(picture)[None]).pooler_output[0]

    @torch.no_grad()
    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        new = sorted({text for text in texts if text not in known}, key=len)
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            found = model.text_model(**whole.tokenize(part)).pooler_output
            known.update(zip(part, found, strict=True))
        return {"features": torch.stack([known[text] for text in texts])}

    def save(folder: Path) -> None:
        for part, weight in (("visual", maps.visual.weight), ("text", maps.text.weight)):
            getattr(model, f"{part}_projection").weight.data.copy_(weight.detach())
        model.logit_scale.data.copy_(maps.logit_scale.detach())
        whole.save(folder)

    return replace(
        whole,
        model=maps,
        prepare=prepare,
        tokenize=tokenize,
        image_features=lambda found: maps.visual(found.to(maps.visual.weight)),
        text_features=lambda found: maps.text(found["features"].to(maps.text.weight)),
        save=save,
        frozen=True,
    )
