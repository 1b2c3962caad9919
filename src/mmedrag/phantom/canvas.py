"""Drawing that gives the same pixels for the same seed on any CPU.

Only operations that IEEE 754 defines exactly are used on pixels: elementwise +, -, *, /,
comparisons, and integer sums. No exp, sin or normal deviates (their last bit depends on the
instruction set), no floating-point reductions (their order does). Scalars come from Python's
Mersenne Twister seeded by a string, pixel noise from PCG64 integers; both are specified streams.

Coordinates: x to the right, y down, both in [0, 1] over the image, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from mmedrag.runtime import named_random, random_words

T = TypeVar("T")
Window = tuple[slice, slice]


class Rng:
    """Named randomness: ``Rng(seed, study, "nodule")`` is independent of every other name, so
    that changing one finding of a study leaves everything else where it was."""

    def __init__(self, *key: object) -> None:
        self._random = named_random(*key).random

    def unit(self) -> float:
        return self._random()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def spread(self, scale: float) -> float:
        """Bell-shaped, mean 0, standard deviation ``scale``, within ±3.5 scale (Irwin-Hall)."""
        total = self._random() + self._random() + self._random() + self._random()
        return scale * (total - 2.0) * 1.7320508

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        point = self._random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            point -= weight
            if point < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.integer(0, i)
            out[i], out[j] = out[j], out[i]
        return out


def turn(angle: float) -> tuple[float, float]:
    """(cos, sin) of an angle in turns, by a polynomial in exact arithmetic (error < 1e-6)."""
    angle = angle - int(angle)
    quarter, rest = divmod(angle * 4.0 + (4.0 if angle < 0 else 0.0), 1.0)
    t = rest * 1.5707963267948966
    t2 = t * t
    sin = t * (1 - t2 / 6 * (1 - t2 / 20 * (1 - t2 / 42 * (1 - t2 / 72 * (1 - t2 / 110)))))
    cos = 1 - t2 / 2 * (1 - t2 / 12 * (1 - t2 / 30 * (1 - t2 / 56 * (1 - t2 / 90))))
    return [(cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)][int(quarter) % 4]


def smooth(t: np.ndarray) -> np.ndarray:
    """Smoothstep: 0 below 0, 1 above 1, 3t²-2t³ between."""
    t = np.minimum(np.maximum(t, np.float32(0)), np.float32(1))
    return t * t * (np.float32(3) - np.float32(2) * t)


class Canvas:
    """Coordinate grids of one image size, and soft shapes on them (float32 in [0, 1])."""

    def __init__(self, size: int) -> None:
        self.size = size
        axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
        self.x = np.broadcast_to(axis, (size, size))
        self.y = np.broadcast_to(axis[:, None], (size, size))

    def full(self, value: float) -> np.ndarray:
        return np.full((self.size, self.size), value, np.float32)

    def window(self, cx: float, cy: float, rx: float, ry: float) -> Window:
        """The pixels within ±rx, ±ry of a point (may be empty)."""
        n = self.size
        clip = lambda v: min(max(int(v), 0), n)  # noqa: E731
        return (
            slice(clip((cy - ry) * n), clip((cy + ry) * n + 2)),
            slice(clip((cx - rx) * n), clip((cx + rx) * n + 2)),
        )

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, soft: float = 0.2, angle: float = 0.0
    ) -> tuple[Window, np.ndarray]:
        """Soft ellipse; ``soft`` is the edge's share of the squared radius, angle in turns.

        Returns the window it covers and the mask inside that window.
        """
        reach = max(rx, ry) if angle else 0.0
        grow = math.sqrt(1.0 + soft)
        at = self.window(cx, cy, (reach or rx) * grow, (reach or ry) * grow)
        dx, dy = self.x[at] - np.float32(cx), self.y[at] - np.float32(cy)
        if angle:
            cos, sin = (np.float32(v) for v in turn(angle))
            dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
        dx, dy = dx / np.float32(rx), dy / np.float32(ry)
        edge = (np.float32(1 + soft) - (dx * dx + dy * dy)) / np.float32(2 * soft)
        return at, smooth(edge)

    def mask(self, *args: float, **kwargs: float) -> np.ndarray:
        """An ellipse as a whole-image mask."""
        out = self.full(0.0)
        at, shape = self.ellipse(*args, **kwargs)
        out[at] = shape
        return out

    def stroke(self, points: Sequence[tuple[float, float]], width: float) -> np.ndarray:
        """A soft polyline of the given width, as a whole-image mask."""
        out = self.full(0.0)
        for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
            at = self.window(
                (x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0) / 2 + width, abs(y1 - y0) / 2 + width
            )
            px, py = self.x[at] - np.float32(x0), self.y[at] - np.float32(y0)
            dx, dy = x1 - x0, y1 - y0
            length2 = max(dx * dx + dy * dy, 1e-9)
            t = (px * np.float32(dx) + py * np.float32(dy)) / np.float32(length2)
            t = np.minimum(np.maximum(t, np.float32(0)), np.float32(1))
            ex, ey = px - t * np.float32(dx), py - t * np.float32(dy)
            line = smooth(np.float32(1) - (ex * ex + ey * ey) / np.float32(width * width))
            out[at] = np.maximum(out[at], line)
        return out

    def below(self, level: np.ndarray | float, soft: float) -> np.ndarray:
        """1 under a horizontal level (y larger), soft edge of ±soft."""
        return smooth((self.y - np.float32(level) + np.float32(soft)) / np.float32(2 * soft))

    def clouds(self, rng: Rng, cells: int) -> np.ndarray:
        """Value noise in [-1, 1] with ``cells`` lattice cells across."""
        grid = np.array(
            [[rng.uniform(-1, 1) for _ in range(cells + 2)] for _ in range(cells + 2)], np.float32
        )
        at = self.x[0] * np.float32(cells)
        low = at.astype(np.int64)
        part = smooth(at - low.astype(np.float32))
        rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
        return rows[:, low] * (1 - part)[None] + rows[:, low + 1] * part[None]


def grain(size: int, channels: int, *key: object) -> np.ndarray:
    """Integer pixel noise [size, size, channels]: bell-shaped, mean 0, s.d. 147.8 (int32)."""
    entropy = named_random(*key).getrandbits(64)
    raw = random_words(entropy, size * size * channels // 2 + 1)
    parts = raw.view(np.uint8)[: size * size * channels * 4].reshape(size, size, channels, 4)
    pairs = parts[..., :2].astype(np.int32) + parts[..., 2:]  # slices: faster than sum(-1)
    return pairs[..., 0] + pairs[..., 1] - 510


def to_uint8(image: np.ndarray, noise: np.ndarray, amplitude: float) -> np.ndarray:
    """Quantise a float image in [0, 1] and add integer grain of ``amplitude`` grey levels s.d.

    The grain is scaled in fixed point, so the result does not depend on rounding modes.
    """
    levels = np.floor(np.minimum(np.maximum(image, 0), 1) * np.float32(255) + np.float32(0.5))
    scaled = (noise * int(amplitude * 65536 / 147.8)) >> 16
    if image.ndim == 2:
        scaled = scaled[..., 0]
    return np.clip(levels.astype(np.int32) + scaled, 0, 255).astype(np.uint8)
