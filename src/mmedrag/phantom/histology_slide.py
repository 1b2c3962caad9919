"""The H&E slide: dyes as densities, many small bodies at once, texture and lie of the tissue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmedrag.phantom.canvas import Canvas, Rng, Window, smooth, turn
from mmedrag.phantom.scene import Scene
from mmedrag.runtime import random_words

# What each dye takes from red, green and blue; proportions of common H&E colours.
EOSIN, HAEM = (0.15, 1.0, 0.55), (0.78, 1.0, 0.36)
BLOOD, MUCUS = (0.2, 1.0, 0.82), (1.0, 0.7, 0.18)
COS, SIN = np.array([turn(k / 256) for k in range(256)], np.float32).T


def draws(rng: Rng, *shape: int) -> np.ndarray:
    """Uniform float32 in [0, 1), 24 random bits each."""
    bits = random_words(int(rng.unit() * 2**53), math.prod(shape))
    return ((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).reshape(shape)


def spots(
    canvas: Canvas, dots: Sequence[np.ndarray], soft: float = 0.45, rim: float = 0.0
) -> np.ndarray:
    """The maximum of many small soft ellipses at once, which does not depend on their order.

    ``dots`` are equally long arrays x, y, rx, ry, angle (turns, not negative) and weight;
    ``rim`` above 0 makes the middle lighter.
    """
    x, y, rx, ry, angle, weight = dots
    n = canvas.size
    reach = float(max(rx.max(), ry.max())) * math.sqrt(1 + soft) if len(x) else 0.0
    half = int(reach * n) + 1
    row, col = (np.floor(v * np.float32(n)).astype(np.int64) for v in (y, x))
    inside = (row >= -half) & (row < n + half) & (col >= -half) & (col < n + half)
    row, col, x, y, rx, ry, angle, weight = (
        v[inside] for v in (row, col, x, y, rx, ry, angle, weight)
    )
    step = np.arange(-half, half + 1)
    rows, cols = row[:, None] + step, col[:, None] + step
    scale = np.float32(n)
    dx = ((cols.astype(np.float32) + np.float32(0.5)) / scale - x[:, None])[:, None, :]
    dy = ((rows.astype(np.float32) + np.float32(0.5)) / scale - y[:, None])[:, :, None]
    at = (angle * np.float32(256)).astype(np.int64) & 255
    cos, sin = COS[at][:, None, None], SIN[at][:, None, None]
    u = (dx * cos + dy * sin) / rx[:, None, None]
    v = (dy * cos - dx * sin) / ry[:, None, None]
    q = u * u + v * v
    shape = smooth((np.float32(1 + soft) - q) / np.float32(2 * soft))
    if rim:
        shape *= np.float32(1 - rim) + np.float32(rim) * np.minimum(q, np.float32(1))
    shape *= weight[:, None, None]
    wide = n + 4 * half + 2
    out = np.zeros(wide * wide, np.float32)
    place = (rows[:, :, None] + 2 * half) * wide + (cols[:, None, :] + 2 * half)
    np.maximum.at(out, place.ravel(), shape.ravel())
    return out.reshape(wide, wide)[2 * half : 2 * half + n, 2 * half : 2 * half + n]


def texture(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Value noise in [-1, 1] at lattice coordinates of any direction (cells of size 1)."""
    grid = draws(rng, 64 * 64) * np.float32(2) - np.float32(1)
    i, j = np.floor(u), np.floor(v)
    s, t = smooth(u - i), smooth(v - j)
    i, j = i.astype(np.int64), j.astype(np.int64)
    i0, i1, j0, j1 = i & 63, (i + 1) & 63, (j & 63) * 64, ((j + 1) & 63) * 64
    near = grid[j0 + i0] * (1 - s) + grid[j0 + i1] * s
    far = grid[j1 + i0] * (1 - s) + grid[j1 + i1] * s
    return near * (1 - t) + far * t


def blend(old: np.ndarray, new: np.ndarray | float, mask: np.ndarray) -> np.ndarray:
    """``new`` over ``old`` as far as ``mask`` (0..1) covers it."""
    return old + (np.asarray(new, np.float32) - old) * mask


def disc(rng: Rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` points in the unit disc: a jittered lattice ordered at random, denser inside."""
    u = draws(rng, 2, 4 * n) * np.float32(2) - np.float32(1)
    keep = np.flatnonzero(u[0] * u[0] + u[1] * u[1] < 1)[:n]
    return u[0, keep], u[1, keep]


WHOLE: Window = (slice(None), slice(None))


@dataclass
class Slide(Scene):
    """One tile while it is painted: dye densities, and the tissue that everything follows."""

    def __post_init__(self) -> None:
        canvas, rng = self.canvas, self.rng
        self.eosin, self.haem, self.nuclei = (canvas.full(0.0) for _ in range(3))
        self.blood, self.mucus = canvas.full(0.0), canvas.full(0.0)
        self.zoom = 1.0 if self.attributes["magnification"] == "high" else 0.56
        self.purple = self.attributes["hue"] == "purple"
        self.base_haem = 0.3 if self.purple else 0.05
        # Coordinates along and across the tissue's grain, bent a little.
        self.turned = rng("layout").unit()
        cos, sin = turn(self.turned)
        bend = rng("bend")
        self.bx = canvas.clouds(bend, 4) * np.float32(0.035)
        self.by = canvas.clouds(bend, 4) * np.float32(0.035)
        x, y = canvas.x + self.bx, canvas.y + self.by
        self.along = x * np.float32(cos) + y * np.float32(sin)
        self.across = y * np.float32(cos) - x * np.float32(sin)
        self.ragged = canvas.clouds(rng("ragged"), 9)
        self.fine = canvas.clouds(rng("fine"), 46)
        # Glass beside the tissue; what lies in the tissue shares the width that is left.
        edge = rng("edge")
        self.left = edge.chance(0.5)
        self.bare = 0.15 + edge.spread(0.01) if self.attributes["edge"] == "yes" else 0.0
        self.span = (self.bare if self.left else 0.0, 1.0 - (0.0 if self.left else self.bare))

    def cover(
        self,
        at: Window,
        mask: np.ndarray,
        eosin: np.ndarray | float = 0.0,
        haem: np.ndarray | float = 0.0,
        nuclei: np.ndarray | float = 0.0,
        blood: np.ndarray | float = 0.0,
        mucus: np.ndarray | float = 0.0,
    ) -> None:
        """Put a layer of the given densities over the window, ``mask`` its opacity."""
        for layer, value in (
            (self.eosin, eosin),
            (self.haem, haem),
            (self.nuclei, nuclei),
            (self.blood, blood),
            (self.mucus, mucus),
        ):
            layer[at] = blend(layer[at], value, mask)

    def absorb(self, stain: float, tint: Sequence[float]) -> np.ndarray:
        """Light through the dyes, 1 / (1 + d + d²/2): close to exp(-d), and exact everywhere."""
        haem = self.haem + self.nuclei
        channels = []
        for c in range(3):
            d = self.eosin * np.float32(stain * EOSIN[c]) + haem * np.float32(stain * HAEM[c])
            d += self.blood * np.float32(stain * BLOOD[c])
            d += self.mucus * np.float32(stain * MUCUS[c])
            channels.append(np.float32(tint[c]) / (1 + d + d * d * np.float32(0.5)))
        return np.stack(channels, -1)
