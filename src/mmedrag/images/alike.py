"""When are two pictures the same exposure? Perceptual hash, thumbnails, near-duplicates.

Place in the picture: ``data import`` (splits), ``data check`` and the exclusion of look-alikes in
retrieval. Equal pixels are told by :func:`mmedrag.images.alike.pixel_hash`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

MAX_BITS, MIN_LIKENESS = 8, 0.98


@cache
def _cosines() -> np.ndarray:
    """First 8 rows of the DCT-II matrix for 32 samples, without the constant one: [9, 32]."""
    k, n = np.arange(9)[:, None], np.arange(32)[None, :]
    return np.cos(np.pi * k * (2 * n + 1) / 64)


def perceptual_hash(picture: Image.Image) -> int:
    """64-bit DCT hash of what the picture looks like (pHash; Zauner 2010, §3.2.1).

    Grey, 32 x 32 (area-averaged), the 8 x 8 lowest frequencies without the constant row and
    column, one bit each: above their median or not. Survives re-encoding, scaling and small
    changes of brightness; compare with :func:`hamming`.
    """
    grey = picture.convert("L").resize((32, 32), Image.Resampling.BOX)
    waves = _cosines()[1:]
    freq = np.round(waves @ np.asarray(grey, dtype=np.float64) @ waves.T, 3).ravel()
    middle = np.partition(freq, (31, 32))[31:33].mean()  # the median of 64
    return int.from_bytes(np.packbits(freq > middle).tobytes(), "big")


def hamming(a: int, b: int) -> int:
    """How many bits of two hashes differ (0..64)."""
    return (a ^ b).bit_count()


@dataclass(frozen=True)
class Look:
    """What is remembered of one picture in order to recognise it again."""

    pixels: str  # pixel_hash: the same picture
    hash: int  # perceptual_hash: candidates for a near-duplicate
    small: bytes  # 32 x 32 grey values: confirm it

    @classmethod
    def of(cls, picture: Image.Image) -> Look:
        small = picture.convert("L").resize((32, 32), Image.Resampling.BOX).tobytes()
        return cls(pixel_hash(picture), perceptual_hash(picture), small)


def near_identical(a: Look, b: Look) -> bool:
    """The same exposure in another coding, size or brightness (not: a similar patient).

    Hashes within 8 of 64 bits and the fine structure of the thumbnails correlated ≥ 0.98.
    On 999 different medical pictures the largest correlation within 8 bits was 0.969 (fundus
    photographs of one camera; without removing the coarse structure 0.996, above many true
    copies), while JPEG quality 20, half size and ±20 % brightness stayed above 0.98 in 95 %.
    """
    if a.pixels == b.pixels:
        return True
    return hamming(a.hash, b.hash) <= MAX_BITS and likeness(a.small, b.small) >= MIN_LIKENESS


def likeness(a: bytes, b: bytes) -> float:
    """Correlation (-1..1) of the fine structure of two 32 x 32 thumbnails; 0 where one is flat."""
    x, y = fine(a), fine(b)
    return float(x @ y)


def fine(small: bytes) -> np.ndarray:
    """Grey values of a 32 x 32 thumbnail minus their 8 x 8 blur, centred, of unit length."""
    grey = Image.frombytes("L", (32, 32), small)
    coarse = grey.resize((8, 8), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BILINEAR)
    fine = (np.asarray(grey, dtype=np.float64) - np.asarray(coarse, dtype=np.float64)).ravel()
    fine -= fine.mean()
    norm = float(np.sqrt(fine @ fine))
    return fine / norm if norm > 1.0 else np.zeros_like(fine)


def pixel_hash(picture: Image.Image) -> str:
    """sha256 of size and decoded RGB pixels: equal for the same picture in another container."""
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()
