"""Text burned into pictures: find it, black it out (extra ``ocr``: rapidocr, offline models)."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmedrag.records import UserError

MIN_SCORE = 0.5
MIN_SIDES = (16, 6)  # pixels: three letters cannot be read in less
MAX_SIGN = 0.25  # of the picture's height: a taller single sign is anatomy, not an overlay


@dataclass(frozen=True)
class Burned:
    """One line of text in a picture: its box (left, top, right, bottom) and reading."""

    box: tuple[int, int, int, int]
    text: str

    @property
    def tells(self) -> bool:
        """More than a side or view marker (L, R, AP): three letters, or any digit."""
        signs = [c for c in self.text if c.isalnum()]
        return len(signs) >= 3 or any(c.isdigit() for c in signs)


def available() -> bool:
    return importlib.util.find_spec("rapidocr") is not None


@cache
def _engine() -> Any:
    try:
        from rapidocr import RapidOCR
    except ModuleNotFoundError:
        raise UserError(
            "looking for burned-in text needs the extra: pip install 'mmedrag[ocr]'"
        ) from None
    engine = RapidOCR()
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    return engine


def find_text(picture: Image.Image) -> list[Burned]:
    """Lines of text that can be read in a picture, from top to bottom."""
    if picture.width < MIN_SIDES[0] or picture.height < MIN_SIDES[1]:
        return []
    scale = max(1, round(800 / max(picture.size)))  # small letters need some pixels
    big = picture.convert("RGB").resize((picture.width * scale, picture.height * scale))
    result = _engine()(np.asarray(big))
    if result.boxes is None:
        return []
    found = []
    for corners, text, score in zip(result.boxes, result.txts, result.scores, strict=True):
        if score < MIN_SCORE or not text.strip():
            continue
        xs, ys = np.asarray(corners, dtype=float).T / scale
        box = (int(xs.min()), int(ys.min()), int(np.ceil(xs.max())), int(np.ceil(ys.max())))
        if len(text.strip()) > 1 or box[3] - box[1] <= MAX_SIGN * picture.height:
            found.append(Burned(box, text.strip()))
    return sorted(found, key=lambda line: (line.box[1], line.box[0]))


def mask(picture: Image.Image, lines: list[Burned]) -> Image.Image:
    """The picture with black boxes, a little larger than the text, over ``lines``."""
    out = picture.convert("RGB").copy()
    draw = ImageDraw.Draw(out)
    for line in lines:
        left, top, right, bottom = line.box
        edge = 2 + (bottom - top) // 4
        draw.rectangle((left - edge, top - edge, right + edge, bottom + edge), fill=(0, 0, 0))
    return out
