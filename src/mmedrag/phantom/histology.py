"""H&E tile phantoms: ten findings with place, severity and count on drawn glandular tissue.

The picture is painted as densities of dyes (eosin, haematoxylin, red cells, mucin) and turned
into colour by absorption at the end, so that stain and hue act as they do on a slide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np

from mmedrag.phantom.canvas import Canvas, Dice, smooth, turn
from mmedrag.phantom.grammar import DomainSpec, Findings, has
from mmedrag.phantom.histology_findings import PAINT, paint_mitoses
from mmedrag.phantom.histology_slide import COS, SIN, Slide, blend, draws, spots, texture
from mmedrag.phantom.histology_words import ATTRIBUTES, FINDINGS, NORMAL

STRENGTH = {"mild": 0.6, "moderate": 0.85, "severe": 1.1, None: 0.9}
# Glands: lattice spacing, half-width and length/width (at high power), lumen's share of radius.
GLANDS = {
    "acinar": (0.33, 0.125, 1.0, 0.38),
    "tubular": (0.31, 0.115, 2.3, 0.34),
    "cystic": (0.42, 0.185, 1.15, 0.76),
}
PLACED = ("necrosis", "fat", "mucin", "haemorrhage", "lymphocytes", "calcification")


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
    dice: Callable[[str], Dice],
    contrast: float = 1.0,
) -> np.ndarray:
    """One H&E tile, float32 [S, S, 3] in [0, 1].

    ``dice(name)`` gives independent randomness per part, so a finding can be switched without
    moving anything else. ``contrast`` scales how plainly every finding shows.
    """
    x, y = canvas.x, canvas.y
    zoom = 1.0 if attributes["magnification"] == "high" else 0.56
    purple = attributes["hue"] == "purple"
    slide = Slide(canvas)

    def strength(name: str, side: str | None = None) -> float:
        """Severity of a finding on a side, 0 when absent; contrast not included."""
        found = findings[name]
        if not has(SPEC, found, side):
            return 0.0
        return STRENGTH[found.severity] * dice(f"{name}/{side}").uniform(0.9, 1.1)

    # Coordinates along and across the tissue's grain, bent a little.
    layout = dice("layout")
    turned = layout.unit()
    cos, sin = turn(turned)
    bend = dice("bend")
    bx = canvas.clouds(bend, 4) * np.float32(0.035)
    by = canvas.clouds(bend, 4) * np.float32(0.035)
    wx, wy = x + bx, y + by
    along = wx * np.float32(cos) + wy * np.float32(sin)
    across = wy * np.float32(cos) - wx * np.float32(sin)
    fibre = texture(dice("fibre"), along * np.float32(7 / zoom), across * np.float32(26 / zoom))
    ragged = canvas.clouds(dice("ragged"), 9)
    fine = canvas.clouds(dice("fine"), 46)

    # Stroma, glands and their nuclei.
    base_haem = 0.3 if purple else 0.05
    base_eosin = 0.36 if purple else 0.6
    slide.eosin += np.float32(base_eosin) * (1 + np.float32(0.34) * fibre + np.float32(0.1) * fine)
    slide.haem += np.float32(base_haem) * (1 + np.float32(0.25) * fibre)
    gaps = smooth((fibre - np.float32(0.35)) / np.float32(0.3)) * np.float32(0.45)
    slide.cover((slice(None), slice(None)), gaps, eosin=0.12, haem=base_haem * 0.3)
    ring, gland_nuclei = _glands(slide, attributes, findings, dice, contrast, bx, by, zoom, turned)
    epithelium, lumen = ring
    whole = (slice(None), slice(None))
    slide.cover(
        whole, epithelium, eosin=(0.62 if not purple else 0.42) + 0.06 * fine, haem=base_haem + 0.14
    )
    slide.cover(whole, lumen, eosin=0.03, haem=0.015)

    # Spindle nuclei of the stroma on a jittered lattice.
    cells = int(11 / zoom) + 3
    part = dice("stroma")
    rnd = draws(part, 6, cells, cells)
    index = np.arange(cells, dtype=np.float32)
    gap = np.float32(0.098 * zoom)
    sx = (index + rnd[0]) * gap - gap
    sy = (index[:, None] + rnd[1]) * gap - gap
    r = (np.float32(0.0125) + np.float32(0.006) * rnd[2]) * np.float32(zoom + 0.12)
    tilt = np.float32(turned) + np.float32(0.16) * (rnd[3] - np.float32(0.5)) + np.float32(2)
    stroma = [sx, sy, r * np.float32(1.5), r * np.float32(0.75), tilt, 0.75 + 0.4 * rnd[4]]
    stroma_nuclei = [part.reshape(-1)[(rnd[5] < 0.72).ravel()] for part in map(np.asarray, stroma)]

    outside = 1 - np.maximum(epithelium, lumen)
    speckle = 1 + np.float32(0.16) * fine
    grade = strength("nuclear_atypia")
    for name, nuclei, room in (
        ("stroma", stroma_nuclei, outside),
        ("glands", gland_nuclei, 1 - lumen),
    ):
        odd = np.zeros(len(nuclei[0]), bool)
        if grade:
            rnd = draws(dice(f"nuclear_atypia/{name}"), 4, len(odd))
            odd = rnd[0] < np.float32(0.1 + 0.24 * grade)
            grow = 1 + np.float32((0.3 + 0.7 * contrast) * (0.3 + 0.4 * grade)) * (0.5 + rnd[1])
            big = [v[odd] for v in nuclei]
            size = np.maximum(big[2] * np.float32(0.75), big[3]) * grow[odd]
            big[2], big[3] = size * (1 + np.float32(0.5) * rnd[2][odd]), size
            big[4] = rnd[3][odd]
            big[5] = big[5] * np.float32(1 + 0.4 * contrast)
            drawn = spots(canvas, big, soft=0.3, rim=0.4)
            slide.nuclei = np.maximum(slide.nuclei, drawn * room * speckle)
        drawn = spots(canvas, [v[~odd] for v in nuclei], rim=0.3)
        slide.nuclei = np.maximum(slide.nuclei, drawn * room * speckle)
    slide.nuclei *= np.float32(1.35)

    if grade := strength("fibrosis"):
        part = dice("fibrosis")
        wave = texture(part, along * np.float32(4), across * np.float32(4))
        level = across * np.float32(3.6) + wave * np.float32(0.38) + np.float32(part.unit() + 8)
        off = level - np.floor(level) - np.float32(0.5)
        width = 0.06 + 0.13 * grade
        room = (1 - np.float32(0.92) * lumen) * (1 - np.float32(0.4) * epithelium)
        band = smooth((np.float32(width + 0.05) - np.maximum(off, -off)) / np.float32(0.1))
        strands = texture(part, along * np.float32(5), level * np.float32(11))
        strands = strands + np.float32(0.5) * texture(
            part, along * np.float32(12), level * np.float32(24)
        )
        slide.cover(
            whole,
            band * room * np.float32(min(0.95, 0.35 + 0.6 * contrast)),
            eosin=np.float32(0.92) * (1 + np.float32(0.5) * strands),
            haem=0.02 + base_haem * 0.4,
            nuclei=slide.nuclei * np.float32(0.25),
        )

    # Glass beside the tissue; placed findings share the width that is left.
    edge = dice("edge")
    left = edge.chance(0.5)
    bare = 0.15 + edge.spread(0.01) if attributes["edge"] == "yes" else 0.0
    span = (bare if left else 0.0, 1.0 - (0.0 if left else bare))
    for side, cy in (("upper", 0.25), ("lower", 0.75)):
        slots = dice(f"slots/{side}").shuffled(range(len(PLACED)))
        for name, slot in zip(PLACED, slots, strict=True):
            if grade := strength(name, side):
                place = dice(f"{name}/{side}")
                share = (slot + 0.5) / len(PLACED)
                cx = span[0] + 0.06 + (span[1] - span[0] - 0.12) * share + place.spread(0.01)
                PAINT[name](
                    slide, cx, cy + place.spread(0.025), grade, contrast, place, ragged, zoom
                )
    if findings["mitoses"].present:
        paint_mitoses(slide, findings["mitoses"].count or 1, contrast, dice("mitoses"), span, zoom)

    if bare:
        way = x if left else 1 - x
        tissue = smooth(
            (way - np.float32(bare) + ragged * np.float32(0.022) + by * np.float32(0.6))
            / np.float32(0.016)
        )
        for layer in (slide.eosin, slide.haem, slide.nuclei, slide.blood, slide.mucus):
            layer *= tissue

    return _photograph(slide, attributes, dice)


def _glands(
    slide: Slide,
    attributes: Mapping[str, str],
    findings: Findings,
    dice: Callable[[str], Dice],
    contrast: float,
    bx: np.ndarray,
    by: np.ndarray,
    zoom: float,
    turned: float,
) -> tuple[tuple[np.ndarray, np.ndarray], list[np.ndarray]]:
    """Epithelium and lumen masks, and the basal nuclei of the glands that are left."""
    canvas = slide.canvas
    gap, radius, aspect, hollow = GLANDS[attributes["architecture"]]
    gap, radius = gap * zoom, radius * zoom
    cos, sin = turn(turned)
    part = dice("glands")
    du, dv = part.uniform(0, gap), part.uniform(0, gap)
    reach = 0.72 + radius * aspect
    centres = []
    n = int(reach / gap) + 1
    m = int(reach / (gap * aspect)) + 1
    for j in range(-n, n + 1):
        for i in range(-m, m + 1):
            u = (i + 0.5 * (j % 2)) * gap * aspect + du + part.spread(0.06) * gap
            v = j * gap * 0.94 + dv + part.spread(0.06) * gap
            size = radius * part.uniform(0.86, 1.1)
            extra = (part.uniform(0.85, 1.12), part.spread(0.025), part.uniform(0.85, 1.15))
            spare = part.chance(0.06)
            px, py = 0.5 + u * cos - v * sin, 0.5 + u * sin + v * cos
            margin = radius * aspect + 0.05
            if -margin < px < 1 + margin and -margin < py < 1 + margin:
                centres.append((px, py, size, *extra, spare))
    keep = [not c[6] for c in centres]
    if findings["gland_loss"].present:
        part = dice("gland_loss")
        share = {"mild": 0.4, "moderate": 0.62, "severe": 0.88}[
            findings["gland_loss"].severity or "moderate"
        ] * (0.35 + 0.65 * contrast)
        order = part.shuffled(range(len(centres)))
        for k in order[: int(share * len(order) + 0.5)]:
            keep[k] = False

    body, inner = canvas.full(9.0), canvas.full(9.0)
    count = int(6.2832 * radius * (0.5 + aspect / 2) / (0.030 * (zoom + 0.12))) + 1
    ring_cos, ring_sin, ring_turn = _ring(aspect, count)
    rows = []
    for (px, py, size, stretch, tilt, open_, _), kept in zip(centres, keep, strict=True):
        angle = turned + tilt
        ca, sa = (np.float32(v) for v in turn(angle))
        rx, ry = size * aspect * stretch, size
        if kept:
            wide = max(rx, ry) * 1.15 + 0.035
            at = canvas.window(px, py, wide, wide)
            dx = canvas.x[at] + bx[at] - np.float32(px)
            dy = canvas.y[at] + by[at] - np.float32(py)
            u = (dx * ca + dy * sa) / np.float32(rx)
            v = (dy * ca - dx * sa) / np.float32(ry)
            q = u * u + v * v
            body[at] = np.minimum(body[at], q)
            inner[at] = np.minimum(inner[at], q / np.float32(hollow * open_ * hollow * open_))
        rows.append((px, py, rx, ry, float(ca), float(sa), angle - math.floor(angle), hollow))
    epithelium = smooth((np.float32(1.1) - body) / np.float32(0.2))
    lumen = smooth((np.float32(1.15) - inner) / np.float32(0.3))
    # A thin cleft between gland and stroma.
    cleft = smooth((np.float32(1.42) - body) / np.float32(0.2)) * (1 - epithelium)
    slide.cover((slice(None), slice(None)), cleft * np.float32(0.5), eosin=0.16, haem=0.04)

    table = np.array(rows, np.float32)[:, :, None]
    gx, gy, width, height, cos_, sin_, tilts = (table[:, k] for k in range(7))
    rnd = draws(dice("gland nuclei"), 4, len(rows), count)
    depth = np.float32(0.5 + 0.5 * hollow) + np.float32(0.14) * (rnd[0] - np.float32(0.35))
    depth = np.minimum(depth, np.float32(0.93))
    u, v = width * ring_cos * depth, height * ring_sin * depth
    gx, gy = gx + u * cos_ - v * sin_, gy + u * sin_ + v * cos_
    # Glands are drawn in bent coordinates: take the nuclei along.
    size = canvas.size
    col = np.minimum(np.maximum((gx * np.float32(size)).astype(np.int64), 0), size - 1)
    row = np.minimum(np.maximum((gy * np.float32(size)).astype(np.int64), 0), size - 1)
    gx, gy = gx - bx[row, col], gy - by[row, col]
    r = (np.float32(0.0135) + np.float32(0.004) * rnd[1]) * np.float32(zoom + 0.12)
    tall = np.float32(0.85 if attributes["architecture"] == "cystic" else 1.4)
    nuclei = [
        gx,
        gy,
        r * tall,
        r * np.float32(0.85),
        ring_turn + tilts + 1 + 0 * r,
        np.float32(0.85) + np.float32(0.4) * rnd[2],
    ]
    chosen = np.repeat(np.array(keep), count)
    return (epithelium, lumen), [v.reshape(-1)[chosen] for v in nuclei]


def _soften(image: np.ndarray, axis: int, step: int) -> np.ndarray:
    """The weights 1 2 1 over neighbours ``step`` pixels apart; the border repeats itself."""
    ahead, back = (np.roll(image, shift, axis) for shift in (-step, step))
    first, last = [slice(None)] * 3, [slice(None)] * 3
    first[axis], last[axis] = slice(None, step), slice(-step, None)
    back[tuple(first)], ahead[tuple(last)] = image[tuple(first)], image[tuple(last)]
    return (image * np.float32(2) + back + ahead) * np.float32(0.25)


def _photograph(
    slide: Slide, attributes: Mapping[str, str], dice: Callable[[str], Dice]
) -> np.ndarray:
    """Stain, light, focus, dust and pen: what the laboratory and the scanner add."""
    canvas, scan = slide.canvas, dice("scan")
    dark = attributes["stain"] == "dark"
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
    pen = dice("pen")
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


SPEC = DomainSpec(
    name="pathology",
    modality="H&E tile",
    findings=FINDINGS,
    attributes=ATTRIBUTES,
    normal=NORMAL,
    sides={
        "upper": ("upper", "in the upper field"),
        "lower": ("lower", "in the lower field"),
        "diffuse": ("diffuse", "throughout the field"),
    },
    both="diffuse",
    visibility=0.9,
    render=render,
    grain=8.0,
)
