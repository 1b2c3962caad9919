"""H&E tile phantoms: ten findings with place, severity and count on drawn glandular tissue.

The picture is painted as densities of dyes (eosin, haematoxylin, red cells, mucin) and turned
into colour by absorption at the end, so that stain and hue act as they do on a slide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mmedrag.phantom.canvas import Canvas, Rng, smooth, turn
from mmedrag.phantom.grammar import Findings
from mmedrag.phantom.histology_findings import PAINT, paint_mitoses
from mmedrag.phantom.histology_slide import COS, SIN, WHOLE, Slide, blend, draws, spots, texture
from mmedrag.phantom.words import read_domain

# Glands: lattice spacing, half-width and length/width (at high power), lumen's share of radius.
GLANDS = {
    "acinar": (0.33, 0.125, 1.0, 0.38),
    "tubular": (0.31, 0.115, 2.3, 0.34),
    "cystic": (0.42, 0.185, 1.15, 0.76),
}


@lru_cache(maxsize=16)
def _ring(aspect: float, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``count`` points equally spaced along the ellipse (aspect·cos, sin): cos, sin, normal."""
    steps = [turn(k / 512) for k in range(513)]
    length = [0.0]
    for (c0, s0), (c1, s1) in zip(steps[:-1], steps[1:], strict=True):
        dx, dy = aspect * (c1 - c0), s1 - s0
        length.append(length[-1] + math.sqrt(dx * dx + dy * dy))
    at, k = [], 0
    for i in range(count):
        while length[k + 1] <= length[-1] * i / count:
            k += 1
        at.append(k)
    points = np.array([steps[k] for k in at], np.float32)
    normals = []  # direction of the outward normal (cos, aspect·sin) in turns, by search
    for k in at:
        nx, ny = steps[k][0], steps[k][1] * aspect
        normals.append(max(range(256), key=lambda m: float(COS[m]) * nx + float(SIN[m]) * ny))
    return points[:, 0], points[:, 1], np.array(normals, np.float32) / np.float32(256)


def render(
    canvas: Canvas,
    findings: Findings,
    attributes: Mapping[str, str],
    rng: Callable[[str], Rng],
    contrast: float = 1.0,
) -> np.ndarray:
    """One H&E tile, float32 [S, S, 3] in [0, 1] (:class:`Scene` says of what)."""
    slide = Slide(SPEC, canvas, findings, attributes, rng, contrast)
    _draw_stroma(slide)
    glands = _draw_glands(slide)
    outside = 1 - np.maximum(glands.epithelium, glands.lumen)
    for name, nuclei, room in (
        ("stroma", _stroma_nuclei(slide), outside),
        ("glands", glands.nuclei, 1 - glands.lumen),
    ):
        _draw_nuclei(slide, name, nuclei, room)
    slide.nuclei *= np.float32(1.35)
    if strength := slide.strength("fibrosis"):
        _draw_fibrosis(slide, glands, strength)
    _draw_placed(slide)
    if findings["mitoses"].present:
        paint_mitoses(slide)
    if slide.bare:
        _cut_edge(slide)
    return _photograph(slide)


def _draw_stroma(slide: Slide) -> None:
    """Fibres along the tissue's grain, with gaps between them."""
    along, across = slide.along, slide.across
    scale, haem = slide.zoom, slide.base_haem
    fibre = texture(
        slide.rng("fibre"), along * np.float32(7 / scale), across * np.float32(26 / scale)
    )
    eosin = np.float32(0.36 if slide.purple else 0.6)
    slide.eosin += eosin * (1 + np.float32(0.34) * fibre + np.float32(0.1) * slide.fine)
    slide.haem += np.float32(haem) * (1 + np.float32(0.25) * fibre)
    gaps = smooth((fibre - np.float32(0.35)) / np.float32(0.3)) * np.float32(0.45)
    slide.cover(WHOLE, gaps, eosin=0.12, haem=haem * 0.3)


def _stroma_nuclei(slide: Slide) -> list[np.ndarray]:
    """Spindle nuclei on a jittered lattice, as the dots of :func:`spots`."""
    zoom = slide.zoom
    cells = int(11 / zoom) + 3
    rnd = draws(slide.rng("stroma"), 6, cells, cells)
    index = np.arange(cells, dtype=np.float32)
    gap = np.float32(0.098 * zoom)
    x = (index + rnd[0]) * gap - gap
    y = (index[:, None] + rnd[1]) * gap - gap
    r = (np.float32(0.0125) + np.float32(0.006) * rnd[2]) * np.float32(zoom + 0.12)
    tilt = np.float32(slide.turned) + np.float32(0.16) * (rnd[3] - np.float32(0.5)) + np.float32(2)
    dots = [x, y, r * np.float32(1.5), r * np.float32(0.75), tilt, 0.75 + 0.4 * rnd[4]]
    return [part.reshape(-1)[(rnd[5] < 0.72).ravel()] for part in dots]


def _draw_nuclei(slide: Slide, name: str, nuclei: list[np.ndarray], room: np.ndarray) -> None:
    """The nuclei of a tissue; with atypia a part of them large, irregular and dark."""
    speckle = 1 + np.float32(0.16) * slide.fine
    odd = np.zeros(len(nuclei[0]), bool)
    if strength := slide.strength("nuclear_atypia"):
        rnd = draws(slide.rng(f"nuclear_atypia/{name}"), 4, len(odd))
        odd = rnd[0] < np.float32(0.1 + 0.24 * strength)
        swell = (0.3 + 0.7 * slide.contrast) * (0.3 + 0.4 * strength)
        grow = 1 + np.float32(swell) * (0.5 + rnd[1])
        big = [v[odd] for v in nuclei]
        size = np.maximum(big[2] * np.float32(0.75), big[3]) * grow[odd]
        big[2], big[3] = size * (1 + np.float32(0.5) * rnd[2][odd]), size
        big[4] = rnd[3][odd]
        big[5] = big[5] * np.float32(1 + 0.4 * slide.contrast)
        drawn = spots(slide.canvas, big, soft=0.3, rim=0.4)
        slide.nuclei = np.maximum(slide.nuclei, drawn * room * speckle)
    drawn = spots(slide.canvas, [v[~odd] for v in nuclei], rim=0.3)
    slide.nuclei = np.maximum(slide.nuclei, drawn * room * speckle)


def _draw_fibrosis(slide: Slide, glands: Glands, strength: float) -> None:
    """Bands of collagen along the tissue, thin over glands."""
    place, along, across = slide.rng("fibrosis"), slide.along, slide.across
    wave = texture(place, along * np.float32(4), across * np.float32(4))
    level = across * np.float32(3.6) + wave * np.float32(0.38) + np.float32(place.unit() + 8)
    off = level - np.floor(level) - np.float32(0.5)
    width = 0.06 + 0.13 * strength
    room = (1 - np.float32(0.92) * glands.lumen) * (1 - np.float32(0.4) * glands.epithelium)
    band = smooth((np.float32(width + 0.05) - np.maximum(off, -off)) / np.float32(0.1))
    strands = texture(place, along * np.float32(5), level * np.float32(11))
    finer = texture(place, along * np.float32(12), level * np.float32(24))
    strands = strands + np.float32(0.5) * finer
    slide.cover(
        WHOLE,
        band * room * np.float32(min(0.95, 0.35 + 0.6 * slide.contrast)),
        eosin=np.float32(0.92) * (1 + np.float32(0.5) * strands),
        haem=0.02 + slide.base_haem * 0.4,
        nuclei=slide.nuclei * np.float32(0.25),
    )


def _draw_placed(slide: Slide) -> None:
    """Findings with a place, each in a slot of its own, side by side in either half."""
    low, high = slide.span
    for side, cy in (("upper", 0.25), ("lower", 0.75)):
        slots = slide.rng(f"slots/{side}").shuffled(range(len(PAINT)))
        for (name, paint), slot in zip(PAINT.items(), slots, strict=True):
            if strength := slide.strength(name, side):
                place = slide.rng(f"{name}/{side}")
                share = (slot + 0.5) / len(PAINT)
                cx = low + 0.06 + (high - low - 0.12) * share + place.spread(0.01)
                paint(slide, cx, cy + place.spread(0.025), strength, place)


def _cut_edge(slide: Slide) -> None:
    """Bare glass where the tissue ends."""
    way = slide.canvas.x if slide.left else 1 - slide.canvas.x
    ends = way - np.float32(slide.bare) + slide.ragged * np.float32(0.022)
    tissue = smooth((ends + slide.by * np.float32(0.6)) / np.float32(0.016))
    for layer in (slide.eosin, slide.haem, slide.nuclei, slide.blood, slide.mucus):
        layer *= tissue


class Gland(NamedTuple):
    """A gland's centre, half-width, factor of its length, tilt (turns), and how open it is."""

    x: float
    y: float
    size: float
    stretch: float
    tilt: float
    openness: float
    spare: bool  # a gap in the lattice: no gland here


class Glands(NamedTuple):
    """Masks of epithelium and lumen, and the nuclei (dots of :func:`spots`) of all glands."""

    epithelium: np.ndarray
    lumen: np.ndarray
    nuclei: list[np.ndarray]


def _draw_glands(slide: Slide) -> Glands:
    """Glands on a lattice along the tissue; those that are lost leave a gap."""
    glands = _gland_lattice(slide)
    keep = _kept_glands(slide, glands)
    body, inner = _gland_shapes(slide, glands, keep)
    epithelium = smooth((np.float32(1.1) - body) / np.float32(0.2))
    lumen = smooth((np.float32(1.15) - inner) / np.float32(0.3))
    cleft = smooth((np.float32(1.42) - body) / np.float32(0.2)) * (1 - epithelium)  # to the stroma
    slide.cover(WHOLE, cleft * np.float32(0.5), eosin=0.16, haem=0.04)
    eosin = (0.62 if not slide.purple else 0.42) + 0.06 * slide.fine
    slide.cover(WHOLE, epithelium, eosin=eosin, haem=slide.base_haem + 0.14)
    slide.cover(WHOLE, lumen, eosin=0.03, haem=0.015)
    return Glands(epithelium, lumen, _gland_nuclei(slide, glands, keep))


def _architecture(slide: Slide) -> tuple[float, float, float, float]:
    """Spacing and half-width at this magnification, length/width, lumen's share of radius."""
    gap, radius, aspect, hollow = GLANDS[slide.attributes["architecture"]]
    return gap * slide.zoom, radius * slide.zoom, aspect, hollow


def _gland_lattice(slide: Slide) -> list[Gland]:
    """All glands that reach into the field."""
    gap, radius, aspect, _ = _architecture(slide)
    cos, sin = turn(slide.turned)
    place = slide.rng("glands")
    du, dv = place.uniform(0, gap), place.uniform(0, gap)
    reach, margin = 0.72 + radius * aspect, radius * aspect + 0.05
    n, m = int(reach / gap) + 1, int(reach / (gap * aspect)) + 1
    glands = []
    for j in range(-n, n + 1):
        for i in range(-m, m + 1):
            u = (i + 0.5 * (j % 2)) * gap * aspect + du + place.spread(0.06) * gap
            v = j * gap * 0.94 + dv + place.spread(0.06) * gap
            size = radius * place.uniform(0.86, 1.1)
            shape = (place.uniform(0.85, 1.12), place.spread(0.025), place.uniform(0.85, 1.15))
            spare = place.chance(0.06)
            x, y = 0.5 + u * cos - v * sin, 0.5 + u * sin + v * cos
            if -margin < x < 1 + margin and -margin < y < 1 + margin:
                glands.append(Gland(x, y, size, *shape, spare))
    return glands


def _kept_glands(slide: Slide, glands: list[Gland]) -> list[bool]:
    keep = [not gland.spare for gland in glands]
    loss = slide.findings["gland_loss"]
    if loss.present:
        share = {"mild": 0.4, "moderate": 0.62, "severe": 0.88}[loss.severity or "moderate"]
        share = share * (0.35 + 0.65 * slide.contrast)
        order = slide.rng("gland_loss").shuffled(range(len(glands)))
        for k in order[: int(share * len(order) + 0.5)]:
            keep[k] = False
    return keep


def _gland_shapes(
    slide: Slide, glands: list[Gland], keep: list[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance from the nearest gland's middle, 1 at its wall; and at its lumen's."""
    canvas, (_, _, aspect, hollow) = slide.canvas, _architecture(slide)
    body, inner = canvas.full(9.0), canvas.full(9.0)
    for gland, kept in zip(glands, keep, strict=True):
        if not kept:
            continue
        ca, sa = (np.float32(v) for v in turn(slide.turned + gland.tilt))
        rx, ry = gland.size * aspect * gland.stretch, gland.size
        wide = max(rx, ry) * 1.15 + 0.035
        at = canvas.window(gland.x, gland.y, wide, wide)
        dx = canvas.x[at] + slide.bx[at] - np.float32(gland.x)
        dy = canvas.y[at] + slide.by[at] - np.float32(gland.y)
        u = (dx * ca + dy * sa) / np.float32(rx)
        v = (dy * ca - dx * sa) / np.float32(ry)
        q = u * u + v * v
        body[at] = np.minimum(body[at], q)
        opening = hollow * gland.openness * hollow * gland.openness
        inner[at] = np.minimum(inner[at], q / np.float32(opening))
    return body, inner


def _gland_nuclei(slide: Slide, glands: list[Gland], keep: list[bool]) -> list[np.ndarray]:
    """Basal nuclei around the lumina of the glands that are left."""
    zoom, size = slide.zoom, slide.canvas.size
    _, radius, aspect, hollow = _architecture(slide)
    count = int(6.2832 * radius * (0.5 + aspect / 2) / (0.030 * (zoom + 0.12))) + 1
    ring_cos, ring_sin, ring_turn = _ring(aspect, count)
    rows = []
    for g in glands:
        angle = slide.turned + g.tilt
        rows.append((g.x, g.y, g.size * aspect * g.stretch, g.size, *turn(angle), angle % 1))
    x, y, width, height, cos, sin, tilts = np.array(rows, np.float32).T[:, :, None]
    rnd = draws(slide.rng("gland nuclei"), 4, len(rows), count)
    depth = np.float32(0.5 + 0.5 * hollow) + np.float32(0.14) * (rnd[0] - np.float32(0.35))
    depth = np.minimum(depth, np.float32(0.93))
    u, v = width * ring_cos * depth, height * ring_sin * depth
    x, y = x + u * cos - v * sin, y + u * sin + v * cos
    # Glands are drawn in bent coordinates: take the nuclei along.
    col = np.minimum(np.maximum((x * np.float32(size)).astype(np.int64), 0), size - 1)
    row = np.minimum(np.maximum((y * np.float32(size)).astype(np.int64), 0), size - 1)
    x, y = x - slide.bx[row, col], y - slide.by[row, col]
    r = (np.float32(0.0135) + np.float32(0.004) * rnd[1]) * np.float32(zoom + 0.12)
    tall = np.float32(0.85 if slide.attributes["architecture"] == "cystic" else 1.4)
    tilt = ring_turn + tilts + 1 + 0 * r
    weight = np.float32(0.85) + np.float32(0.4) * rnd[2]
    chosen = np.repeat(np.array(keep), count)
    dots = [x, y, r * tall, r * np.float32(0.85), tilt, weight]
    return [part.reshape(-1)[chosen] for part in dots]


def _soften(image: np.ndarray, axis: int, step: int) -> np.ndarray:
    """The weights 1 2 1 over neighbours ``step`` pixels apart; the border repeats itself."""
    ahead, back = (np.roll(image, shift, axis) for shift in (-step, step))
    first, last = [slice(None)] * 3, [slice(None)] * 3
    first[axis], last[axis] = slice(None, step), slice(-step, None)
    back[tuple(first)], ahead[tuple(last)] = image[tuple(first)], image[tuple(last)]
    return (image * np.float32(2) + back + ahead) * np.float32(0.25)


def _photograph(slide: Slide) -> np.ndarray:
    """Stain, light, focus, dust and pen: what the laboratory and the scanner add."""
    canvas, scan = slide.canvas, slide.rng("scan")
    dark = slide.attributes["stain"] == "dark"
    stain = (1.45 if dark else 0.68) * (1 + scan.spread(0.04))
    light = 0.965 + scan.spread(0.012)
    tint = [light + scan.spread(0.008) for _ in range(3)]
    image = slide.absorb(stain, tint)
    sx, sy = scan.spread(0.025), scan.spread(0.025)
    shade = 1 + (canvas.x - np.float32(0.5)) * np.float32(sx)
    image *= (shade + (canvas.y - np.float32(0.5)) * np.float32(sy))[..., None]
    if scan.chance(0.3):  # out of focus, by the same share of the field at every size
        for step in (1, 2, 4, 8):
            if step == 1 or step * 128 <= canvas.size:
                image = _soften(_soften(image, 0, step), 1, step)
    for _ in range(scan.integer(0, 2)):
        r = scan.uniform(0.012, 0.022)
        at, speck = canvas.ellipse(scan.unit(), scan.unit(), r, r * 0.8, 0.9, scan.unit())
        image[at] *= 1 - speck[..., None] * np.float32(0.22)
    pen = slide.rng("pen")
    if pen.chance(0.15):
        ink = pen.choice(((0.1, 0.25, 0.6), (0.05, 0.4, 0.2), (0.1, 0.1, 0.12)))
        px, py = pen.choice((0.02, 0.98)), pen.choice((0.02, 0.98))
        inward = 1 if px < 0.5 else -1
        line = canvas.stroke(
            [
                (px, py + pen.spread(0.02)),
                (px + inward * 0.1, py + pen.spread(0.015)),
                (px + inward * pen.uniform(0.16, 0.26), py + pen.spread(0.015)),
            ],
            0.035,
        )
        image = blend(image, np.array(ink, np.float32), (line * np.float32(0.8))[..., None])
    return image


SPEC = read_domain("histology.toml", render, visibility=0.9, grain=8.0)
