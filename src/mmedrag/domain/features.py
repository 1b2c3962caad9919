"""What a picture looks like in about 280 numbers: colour, texture, layout.

Place in the picture: beside the encoder's features inside the domain model. An encoder trained
to tell findings apart is nearly blind to what it never saw (another colour order, a photograph);
these plain statistics are not. Layer A: numpy and Pillow.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

SIDE = 96
VERSION = 1  # changes whenever a number below changes; a domain model records it
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
_RINGS = (1, 2, 4, 7, 11, 17, 25, 35, 48)  # cycles per picture


def statistics(picture: Image.Image) -> np.ndarray:
    """float32 [280]: all parts below, of the picture squeezed to 96 x 96."""
    shrink = Image.Resampling.BOX if min(picture.size) > SIDE else Image.Resampling.BILINEAR
    rgb = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), shrink), np.float32) / 255
    luma = rgb @ _LUMA
    red_green = rgb[..., 0] - rgb[..., 1]
    blue_yellow = rgb[..., 2] - (rgb[..., 0] + rgb[..., 1]) / 2
    saturation = rgb.max(-1) - rgb.min(-1)
    parts = [
        *(_spread(c) for c in (luma, red_green, blue_yellow, saturation)),
        _chroma(red_green, blue_yellow),
        _histogram(luma, 12),
        np.array(
            [
                _correlation(a, b)
                for a, b in ((luma, red_green), (luma, blue_yellow), (red_green, blue_yellow))
            ]
        ),
        _spectrum(luma, oriented=True),
        _spectrum(saturation, oriented=False),
        *(_texture(level) for level in _pyramid(luma)),
        _layout(luma, red_green, blue_yellow),
    ]
    return np.concatenate([np.asarray(part, dtype=np.float32).ravel() for part in parts])


def is_coloured(picture: Image.Image) -> bool:
    """Does swapping the colour channels change the picture to the eye?"""
    rgb = np.asarray(picture.convert("RGB").resize((32, 32), Image.Resampling.BOX), np.float32)
    return float((rgb.max(-1) - rgb.min(-1)).mean()) > 8


def _spread(channel: np.ndarray) -> np.ndarray:
    ordered = np.sort(channel, axis=None)
    at = [round(q * (ordered.size - 1)) for q in _QUANTILES]
    return np.array([*ordered[at], channel.mean(), channel.std()])


def _histogram(channel: np.ndarray, bins: int) -> np.ndarray:
    index = np.minimum((channel * bins).astype(np.int64), bins - 1)
    return np.sqrt(np.bincount(index.ravel(), minlength=bins) / index.size)


def _chroma(red_green: np.ndarray, blue_yellow: np.ndarray, bins: int = 8) -> np.ndarray:
    """Square roots of the joint histogram of the two opponent colours (ends clipped)."""
    a = np.clip((red_green + 0.6) / 1.2 * bins, 0, bins - 1).astype(np.int64)
    b = np.clip((blue_yellow + 0.6) / 1.2 * bins, 0, bins - 1).astype(np.int64)
    return np.sqrt(np.bincount((a * bins + b).ravel(), minlength=bins * bins) / a.size)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std() + 1e-3))


@cache
def _rings() -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    window = np.hanning(SIDE)[:, None] * np.hanning(SIDE)[None]
    fy, fx = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE), indexing="ij")
    radius, angle = np.hypot(fx, fy) * SIDE, np.arctan2(fy, fx) % np.pi
    rings = [(radius >= a) & (radius < b) for a, b in zip(_RINGS, _RINGS[1:], strict=False)]
    middle = (radius >= 4) & (radius < 35)
    turned = [np.abs((angle - t + np.pi / 2) % np.pi - np.pi / 2) for t in np.arange(4) * np.pi / 4]
    return window, rings, [middle & (off < np.pi / 8) for off in turned]


def _spectrum(channel: np.ndarray, oriented: bool) -> np.ndarray:
    """Log power by frequency, and how it is spread over four directions."""
    window, rings, directions = _rings()
    power = np.abs(np.fft.fft2((channel - channel.mean()) * window)) ** 2
    found = [np.log(power[ring].mean() + 1e-4) for ring in rings]
    if oriented:
        energy = np.array([power[d].mean() for d in directions]) + 1e-6
        found += list(np.log(energy / energy.mean()))
    return np.array(found)


def _pyramid(luma: np.ndarray) -> list[np.ndarray]:
    levels = [luma]
    for _ in range(2):
        half = levels[-1].shape[0] // 2
        levels.append(levels[-1].reshape(half, 2, half, 2).mean(axis=(1, 3)))
    return levels


def _texture(luma: np.ndarray) -> np.ndarray:
    """Edge strengths, and how many of a pixel's neighbours are brighter (local binary count)."""
    gy, gx = np.gradient(luma)
    edges = np.sort(np.hypot(gy, gx), axis=None)
    at = [round(q * (edges.size - 1)) for q in (0.25, 0.5, 0.75, 0.9, 0.98)]
    inner = luma[1:-1, 1:-1] + 0.01
    high, wide = luma.shape
    brighter = np.zeros(inner.shape, dtype=np.int64)
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            if (dy, dx) != (1, 1):
                brighter += luma[dy : high - 2 + dy, dx : wide - 2 + dx] > inner
    counts = np.bincount(brighter.ravel(), minlength=9) / brighter.size
    return np.concatenate([edges[at], [(edges < 0.01).mean()], counts])


def _layout(luma: np.ndarray, red_green: np.ndarray, blue_yellow: np.ndarray) -> np.ndarray:
    """Coarse pictures of brightness and colour, and left-right symmetry."""

    def coarse(channel: np.ndarray, cells: int) -> np.ndarray:
        size = SIDE // cells
        return channel.reshape(cells, size, cells, size).mean(axis=(1, 3))

    small = coarse(luma, 8)
    colours = [coarse(c, 4).ravel() for c in (red_green, blue_yellow)]
    return np.concatenate([small.ravel(), *colours, [_correlation(small, small[:, ::-1])]])
