"""What can lie in an H&E tile: each finding painted over a slide, at a place and a strength."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmedrag.phantom.canvas import Rng, Window, smooth, turn
from mmedrag.phantom.histology_slide import Slide, disc, draws, spots, texture


def _region(
    slide: Slide, cx: float, cy: float, rx: float, ry: float, soft: float
) -> tuple[Window, np.ndarray]:
    """A ragged-edged patch: its window and mask."""
    canvas = slide.canvas
    at = canvas.window(cx, cy, rx * 1.4, ry * 1.4)
    dx, dy = (canvas.x[at] - np.float32(cx)) / np.float32(rx), canvas.y[at] - np.float32(cy)
    dy = dy / np.float32(ry)
    q = dx * dx + dy * dy + slide.ragged[at] * np.float32(0.45)
    inside = smooth((np.float32(1 + soft) - q) / np.float32(2 * soft))
    # Nothing reaches the window's border or the other half of the field.
    return at, inside * smooth((np.float32(1.9) - dx * dx - dy * dy) / np.float32(0.4))


def _necrosis(slide: Slide, cx: float, cy: float, strength: float, place: Rng) -> None:
    r = 0.11 + 0.065 * strength
    at, mask = _region(slide, cx, cy, r * 1.2, r, 0.25)
    canvas = slide.canvas
    dust = texture(place, canvas.x[at] * np.float32(60), canvas.y[at] * np.float32(60))
    show = min(0.97, (0.3 + 0.7 * slide.contrast) * (0.6 + 0.42 * strength))
    slide.cover(
        at,
        mask * np.float32(show),
        eosin=np.float32(0.27) * (1 + np.float32(0.25) * dust),
        haem=0.08 + 0.05 * dust,
        nuclei=slide.nuclei[at] * np.float32(0.1),
        blood=0.1,
        mucus=0.06,
    )
    u, v = disc(place, 46)
    rnd = draws(place, 3, len(u))
    size = np.float32(0.0035) + np.float32(0.0045) * rnd[0]
    debris = spots(
        canvas,
        (
            np.float32(cx) + u * np.float32(r),
            np.float32(cy) + v * np.float32(r * 0.9),
            size,
            size,
            rnd[1],
            np.float32(0.7) + np.float32(0.6) * rnd[2],
        ),
    )[at]
    slide.nuclei[at] = np.maximum(slide.nuclei[at], debris * mask * np.float32(show))


def _fat(slide: Slide, cx: float, cy: float, strength: float, place: Rng) -> None:
    at, mask = _region(slide, cx, cy, 0.18, 0.16, 0.12)
    canvas = slide.canvas
    cell = 0.058 + 0.03 * slide.zoom
    u, v = canvas.x[at] / np.float32(cell), canvas.y[at] / np.float32(cell)
    i, j = np.floor(u), np.floor(v)
    grid = draws(place, 2, 32 * 32) * np.float32(0.6) + np.float32(0.2)
    first, second = np.full_like(u, 9), np.full_like(u, 9)
    for dj in (-1, 0, 1):
        for di in (-1, 0, 1):
            at_cell = ((j + dj).astype(np.int64) & 31) * 32 + ((i + di).astype(np.int64) & 31)
            ex, ey = u - i - di - grid[0][at_cell], v - j - dj - grid[1][at_cell]
            q = ex * ex + ey * ey
            second = np.minimum(second, np.maximum(first, q))
            first = np.minimum(first, q)
    wall = 1 - smooth((second - first) / np.float32(0.2))
    show = np.float32(min(0.98, 0.35 + 0.65 * slide.contrast))
    slide.cover(
        at,
        mask * show,
        eosin=0.02 + 0.7 * wall,
        haem=0.01 + 0.12 * wall,
        nuclei=slide.nuclei[at] * wall * np.float32(0.3),
    )


def _mucin(slide: Slide, cx: float, cy: float, strength: float, place: Rng) -> None:
    at, mask = _region(slide, cx, cy, 0.165, 0.14, 0.35)
    canvas = slide.canvas
    strings = texture(place, canvas.x[at] * np.float32(12), canvas.y[at] * np.float32(40))
    show = np.float32(min(0.97, 0.35 + 0.65 * slide.contrast))
    slide.cover(
        at,
        mask * show,
        eosin=0.02,
        haem=0.02,
        nuclei=slide.nuclei[at] * np.float32(0.06),
        mucus=np.float32(0.27) * (1 + np.float32(0.5) * strings),
    )


def _haemorrhage(slide: Slide, cx: float, cy: float, strength: float, place: Rng) -> None:
    at, mask = _region(slide, cx, cy, 0.15, 0.125, 0.5)
    u, v = disc(place, 210)
    rnd = draws(place, 3, len(u))
    size = (np.float32(0.0105) + np.float32(0.003) * rnd[0]) * np.float32(0.55 + 0.45 * slide.zoom)
    cells = (
        spots(
            slide.canvas,
            (
                np.float32(cx) + u * np.float32(0.16),
                np.float32(cy) + v * np.float32(0.14),
                size,
                size * np.float32(0.85),
                rnd[1],
                np.float32(0.75) + np.float32(0.35) * rnd[2],
            ),
            soft=0.3,
            rim=0.3,
        )[at]
        * mask
    )
    show = np.float32(min(1.0, 0.15 + 0.85 * slide.contrast))
    slide.cover(
        at,
        mask * show * np.float32(0.6),
        eosin=0.2,
        haem=0.03,
        blood=0.28,
        nuclei=slide.nuclei[at] * np.float32(0.5),
    )
    slide.cover(at, np.minimum(cells, 1) * show, blood=1.15, nuclei=slide.nuclei[at] * 0)


def _lymphocytes(slide: Slide, cx: float, cy: float, strength: float, place: Rng) -> None:
    r = 0.085 + 0.055 * strength
    at, mask = _region(slide, cx, cy, r, r * 0.9, 0.4)
    spacing = 0.0235 * (0.5 + 0.5 * slide.zoom)
    u, v = disc(place, int(1.7 * strength * r * r / (spacing * spacing)) + 12)
    rnd = draws(place, 3, len(u))
    size = np.float32(0.4 * spacing) + np.float32(0.1 * spacing) * rnd[0]
    cells = spots(
        slide.canvas,
        (
            np.float32(cx) + u * np.float32(r * 1.1),
            np.float32(cy) + v * np.float32(r),
            size,
            size,
            rnd[1],
            np.float32(1.2) + np.float32(0.4) * rnd[2],
        ),
        soft=0.3,
    )[at]
    show = np.float32(min(1.0, 0.35 + 0.7 * slide.contrast))
    slide.cover(
        at,
        mask * show * np.float32(0.65),
        eosin=0.3,
        haem=0.22,
        nuclei=slide.nuclei[at] * np.float32(0.6),
    )
    dark = np.minimum(mask * np.float32(2), 1) * cells * show * np.float32(1.25)
    slide.nuclei[at] = np.maximum(slide.nuclei[at], dark)


def _calcification(slide: Slide, cx: float, cy: float, strength: float, place: Rng) -> None:
    canvas = slide.canvas
    show = min(1.0, 0.4 + 0.6 * slide.contrast)
    for k in range(place.integer(7, 9)):
        r = place.uniform(0.02, 0.042) * (0.8 + 0.2 * slide.zoom)
        far = 0.0 if k == 0 else place.uniform(0.05, 0.115)
        dx, dy = turn(place.unit())
        gx, gy, tilt = cx + far * dx, cy + far * dy, place.unit()
        at, halo = canvas.ellipse(gx, gy, r * 1.22, r * 1.12, 0.3, tilt)
        slide.cover(at, halo * np.float32(0.85 * show), eosin=0.1, haem=0.03)
        at, grain = canvas.ellipse(gx, gy, r, r * 0.85, 0.2, tilt)
        ex, ey = canvas.x[at] - np.float32(gx), canvas.y[at] - np.float32(gy)
        layers = (ex * ex + ey * ey) / np.float32(r * r) * np.float32(2.5)
        layers = layers - np.floor(layers)
        slide.cover(
            at, grain * np.float32(show), eosin=0.5, haem=np.float32(2.0) - layers * np.float32(0.8)
        )


PAINT: dict[str, Callable[[Slide, float, float, float, Rng], None]] = {
    "necrosis": _necrosis,
    "fat": _fat,
    "mucin": _mucin,
    "haemorrhage": _haemorrhage,
    "lymphocytes": _lymphocytes,
    "calcification": _calcification,
}


def paint_mitoses(slide: Slide) -> None:
    """Dividing cells, one per quadrant: a pale round cell with a plate, or two parting ones."""
    canvas, span, place = slide.canvas, slide.span, slide.rng("mitoses")
    count = slide.count("mitoses")
    show = min(1.0, 0.35 + 0.7 * slide.contrast)
    scale = 0.8 + 0.2 * slide.zoom
    for quarter in place.shuffled(range(4)):
        part = (0.27 if quarter % 2 else 0.73) + place.spread(0.05)
        cx = span[0] + (span[1] - span[0]) * part
        cy = (0.28 if quarter < 2 else 0.72) + place.spread(0.06)
        tilt, parting, length = place.unit(), place.chance(0.5), place.uniform(0.031, 0.037)
        if count == 0:
            continue
        count -= 1
        at, cell = canvas.ellipse(cx, cy, 0.06 * scale, 0.053 * scale, 0.16, tilt)
        slide.cover(at, cell * np.float32(0.92 * show), eosin=0.16, haem=0.02)
        dx, dy = turn(tilt + 0.25)
        for sign in (-1, 1) if parting else (0,):
            off = 0.0185 * scale * sign
            at, plate = canvas.ellipse(
                cx + off * dx, cy + off * dy, length * scale, 0.013 * scale, 0.35, tilt
            )
            dark = plate * np.float32(2.6 * show)
            slide.nuclei[at] = np.maximum(slide.nuclei[at], dark)
