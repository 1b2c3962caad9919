"""Fundus photograph phantoms: ten findings on a drawn retina.

A right eye has its optic disc on the right of the image, as the camera sees it. Located
findings lie in the superior or the inferior half of the picture; counts are per half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmedrag.phantom.canvas import Canvas, Dice, Window, smooth, turn
from mmedrag.phantom.fundus_words import ATTRIBUTES, FINDINGS, NORMAL
from mmedrag.phantom.grammar import DomainSpec, Findings, has

Point = tuple[float, float]
Line = tuple[float, float, float, float, float]  # x0, y0, x1, y1, half-width
Colour = tuple[float, float, float]

STRENGTH = {"mild": 0.6, "moderate": 0.85, "severe": 1.1, None: 0.9}
HALVES = (("superior", -1.0), ("inferior", 1.0))
# Retina red, green, blue; and how plainly the choroid shows through.
PIGMENT: dict[str, tuple[Colour, float]] = {
    "light": ((0.90, 0.50, 0.27), 0.085),
    "medium": ((0.75, 0.36, 0.17), 0.045),
    "dark": ((0.50, 0.22, 0.11), 0.02),
}
# Main vessels from the disc (0, 0); x towards the macula at (0.33, 0.02), y away from the axis.
ARCADES: tuple[tuple[Point, ...], ...] = (
    ((-0.012, 0.0), (0.02, 0.15), (0.18, 0.29), (0.42, 0.28), (0.62, 0.15)),
    ((-0.016, 0.0), (-0.05, 0.12), (-0.14, 0.22), (-0.30, 0.30), (-0.50, 0.38)),
)
# Where countable lesions may lie, apart from each other: x and height over the midline.
BLOT_PLACES: tuple[Point, ...] = (
    (-0.26, 0.17),
    (-0.13, 0.27),
    (-0.02, 0.15),
    (0.07, 0.31),
    (0.16, 0.18),
    (0.28, 0.22),
)
WOOL_PLACES: tuple[Point, ...] = (
    (-0.30, 0.11),
    (-0.15, 0.16),
    (-0.04, 0.29),
    (0.08, 0.21),
    (0.27, 0.12),
    (0.21, 0.29),
)


def _strokes(canvas: Canvas, lines: Sequence[Line], soft: float = 1.0) -> np.ndarray:
    """Many short soft lines (or dots, of zero length) at once, as a whole-image mask.

    ``soft`` is the edge's share of the squared half-width.
    """
    n = canvas.size
    out = canvas.full(0.0)
    if not lines:
        return out
    x0, y0, x1, y1, width = np.array(lines, np.float32).T[:, :, None, None]
    scale = np.float32(n)
    reach = [max(abs(a - c), abs(b - d)) + 2 * w for a, b, c, d, w in lines]
    k = min(int(max(reach) * n) + 2, n)
    left = np.floor((np.minimum(x0, x1) - width) * scale).astype(np.int64)
    top = np.floor((np.minimum(y0, y1) - width) * scale).astype(np.int64)
    step = np.arange(k)
    # Windows are shifted into the image; far pixels come out as 0 by their distance.
    cols = np.minimum(np.maximum(left, 0), n - k) + step
    rows = np.minimum(np.maximum(top, 0), n - k) + step[:, None]
    px = (cols.astype(np.float32) + np.float32(0.5)) / scale - x0
    py = (rows.astype(np.float32) + np.float32(0.5)) / scale - y0
    dx, dy = x1 - x0, y1 - y0
    t = (px * dx + py * dy) / np.maximum(dx * dx + dy * dy, np.float32(1e-9))
    t = np.minimum(np.maximum(t, np.float32(0)), np.float32(1))
    ex, ey = px - t * dx, py - t * dy
    mask = smooth((np.float32(1) - (ex * ex + ey * ey) / (width * width)) / np.float32(soft))
    np.maximum.at(out.reshape(-1), (rows * n + cols).reshape(-1), mask.reshape(-1))
    return out


def _path(points: Sequence[Point], steps: int) -> list[Point]:
    """A Bézier curve of any degree, by de Casteljau."""
    out = []
    for i in range(steps + 1):
        t, level = i / steps, list(points)
        while len(level) > 1:
            level = [
                (a + (c - a) * t, b + (d - b) * t)
                for (a, b), (c, d) in zip(level[:-1], level[1:], strict=True)
            ]
        out.append(level[0])
    return out


def _lines(points: Sequence[Point], first: float, last: float) -> list[Line]:
    """A polyline whose half-width tapers from first to last."""
    n = max(len(points) - 1, 1)
    return [
        (*a, *b, first + (last - first) * i / n)
        for i, (a, b) in enumerate(zip(points[:-1], points[1:], strict=True))
    ]


def _blend(image: np.ndarray, at: Window, mask: np.ndarray, colour: Colour, alpha: float) -> None:
    """Mix a colour into the planes of the image under a mask."""
    tint = np.array(colour, np.float32)[:, None, None]
    part = image[:, at[0], at[1]]
    part += (tint - part) * (mask * np.float32(min(alpha, 1.0)))


class _Eye:
    """Places on the retina as places in the picture: mirrored for the side, turned, shifted."""

    def __init__(self, attributes: Mapping[str, str], dice: Dice) -> None:
        self.mirror = 1.0 if attributes["eye"] == "left" else -1.0
        self.cx, self.cy = 0.5 + dice.spread(0.008), 0.5 + dice.spread(0.008)
        self.angle = self.mirror * dice.spread(0.011)  # turns
        self.cos, self.sin = turn(self.angle)
        self.radius = 0.475 + dice.spread(0.006)
        at = -0.30 if attributes["field"] == "macula" else 0.0
        self.dx, self.dy = at + dice.spread(0.014), dice.spread(0.014)
        self.macula = (0.33 + dice.spread(0.01), 0.025 + dice.spread(0.008))

    def middle(self, x: float, y: float) -> Point:
        """From coordinates about the field's centre."""
        return self.cx + x * self.cos - y * self.sin, self.cy + x * self.sin + y * self.cos

    def disc(self, x: float, y: float) -> Point:
        """From coordinates about the disc, x towards the macula."""
        return self.middle(self.mirror * (x + self.dx), y + self.dy)


def _vessels(eye: _Eye, dice: Dice, wave: Dice, tortuous: float) -> tuple[list[Line], list[Line]]:
    """Lines of the arteries and of the veins; ``tortuous`` bends and widens the veins."""
    trees: tuple[list[Line], list[Line]] = ([], [])
    for half in (-1.0, 1.0):
        for arcade, main in enumerate(ARCADES):
            for kind in (0, 1):
                apart = (0.013 if kind else -0.017) * (1.0 if arcade else -1.0)
                route = [
                    (
                        x + (dice.spread(0.016) + apart if i else 0.0),
                        half * (y + (dice.spread(0.016) + abs(apart) * (1 - kind) if i else 0.01)),
                    )
                    for i, (x, y) in enumerate(main)
                ]
                wide = (0.0115 if kind else 0.0085) * (0.85 if arcade else 1.0)
                bend = 0.020 * tortuous * kind
                wide *= 1.0 + 0.45 * tortuous * kind
                phase, rate = wave.unit(), wave.uniform(3.2, 4.2)
                steps = 36 if bend else 13
                curve = _path(route, steps)
                if bend:
                    waved = []
                    for i, (x, y) in enumerate(curve):
                        t = i / steps
                        grow = min(4 * t, 1.0) * bend
                        cos, sin = turn(phase + rate * t)
                        waved.append((x + grow * 0.6 * cos, y + grow * sin))
                    curve = waved
                trees[kind].extend(_lines([eye.disc(*p) for p in curve], wide, wide * 0.45))
                for branch in range(4):
                    start = dice.uniform(0.16, 0.24) + 0.17 * branch
                    i = int(start * steps)
                    x, y = curve[i]
                    far = 0.16 + dice.uniform(-0.04, 0.05)
                    inward = branch % 2 == kind
                    # Branches inward of the temporal arcades end short of the fovea.
                    ex = x + (far * 0.5 if not arcade else -far * 0.75) + dice.spread(0.02)
                    ey = y + half * (far if not inward else -far * 0.55) + half * dice.spread(0.012)
                    if inward and not arcade:
                        ey = half * max(half * ey, 0.075)
                    mx = (x + ex) / 2 + dice.spread(0.018) + (0.03 if not arcade else -0.03)
                    my = (y + ey) / 2 + dice.spread(0.018)
                    twig = [eye.disc(*p) for p in _path([(x, y), (mx, my), (ex, ey)], 5)]
                    trees[kind].extend(_lines(twig, wide * (0.62 - 0.06 * branch), wide * 0.25))
    return trees


def render(
    canvas: Canvas,
    findings: Findings,
    attributes: Mapping[str, str],
    dice: Callable[[str], Dice],
    contrast: float = 1.0,
) -> np.ndarray:
    """One fundus photograph, float32 [S, S, 3] in [0, 1].

    ``dice(name)`` gives independent randomness per part, so a finding can be switched without
    moving anything else. ``contrast`` scales how plainly every finding shows.
    """
    shape_contrast = 0.4 + 0.6 * contrast  # of findings that show by their size

    def state(name: str, side: str | None = None) -> float:
        """Visible strength of a finding on a side; 0 when absent."""
        found = findings[name]
        if not has(SPEC, found, side):
            return 0.0
        return STRENGTH[found.severity] * dice(f"{name}/{side}/strength").uniform(0.92, 1.08)

    whole: Window = (slice(None), slice(None))
    eye = _Eye(attributes, dice("eye"))
    camera = dice("camera")
    colour, choroid = PIGMENT[attributes["pigmentation"]]
    skin = dice("retina")
    warm = skin.spread(0.04)
    base = (colour[0] * (1 + warm / 2), colour[1] * (1 - warm), colour[2] * (1 - 2 * warm))
    image = np.empty((3, canvas.size, canvas.size), np.float32)
    image[:] = np.array(base, np.float32)[:, None, None]

    # Retina: blotches of pigment, choroidal vessels between them, and the macula's pigment.
    blotches = canvas.clouds(skin, 5) * np.float32(0.05)
    ridge = canvas.clouds(skin, 9) + canvas.clouds(skin, 16)
    ridge = smooth(np.float32(1) - ridge * ridge * np.float32(6)) * np.float32(choroid)
    image *= np.float32(1) + blotches + ridge * np.array((1, 1.5, 1.5), np.float32)[:, None, None]
    mx, my = eye.disc(*eye.macula)
    for radius, depth in ((0.135, 0.22), (0.05, 0.28)):
        at, mask = canvas.ellipse(mx, my, radius, radius * 0.92, soft=0.9)
        _blend(image, at, mask, (base[0] * 0.55, base[1] * 0.4, base[2] * 0.4), depth + 0.06)

    # Disc with cup, and atrophy beneath its margin.
    nerve = dice("disc")
    px, py = eye.disc(0.0, 0.0)
    rx, ry = 0.068 + nerve.spread(0.0025), 0.076 + nerve.spread(0.0025)
    if grade := state("peripapillary_atrophy"):
        place = dice("peripapillary_atrophy")
        grow = 1.12 + 0.6 * grade * shape_contrast
        ax, ay = eye.disc(0.03 * grade, place.spread(0.004))
        at, mask = canvas.ellipse(ax, ay, rx * grow + 0.012, ry * grow + 0.012, 0.15, eye.angle)
        _blend(image, at, mask, (0.20, 0.10, 0.07), 0.8 * contrast)
        at, mask = canvas.ellipse(ax, ay, rx * grow, ry * grow, 0.12, eye.angle)
        _blend(image, at, mask, (0.94, 0.78, 0.56), 1.0 * contrast)
    pale = nerve.spread(0.03)
    at, mask = canvas.ellipse(px, py, rx, ry, 0.14, eye.angle)
    _blend(image, at, mask, (0.95, 0.62 + pale, 0.33 + pale), 0.95)
    ratio = 0.34 + nerve.spread(0.025)
    if grade := state("cup_to_disc"):
        ratio += 0.47 * grade * shape_contrast
    ratio = min(ratio, 0.9)
    at, mask = canvas.ellipse(px, py, rx * ratio, ry * min(ratio * 1.04, 0.92), 0.22, eye.angle)
    _blend(image, at, mask, (1.0, 0.95, 0.80), 0.9)

    _draw_deep(canvas, image, eye, findings, dice, contrast, state)

    tortuous = shape_contrast if findings["tortuous_veins"].present else 0.0
    trees = _vessels(eye, dice("vessels"), dice("tortuous_veins"), tortuous)
    for lines, keep in zip(trees, ((0.84, 0.56, 0.52), (0.62, 0.34, 0.36)), strict=True):
        mask = _strokes(canvas, lines, soft=0.7)
        image *= 1 - mask * (1 - np.array(keep, np.float32)[:, None, None])

    _draw_superficial(canvas, image, eye, findings, dice, contrast)

    # Camera: uneven light, haze of the media, exposure and white balance, aperture, reflexes.
    x, y = canvas.x - np.float32(eye.cx), canvas.y - np.float32(eye.cy)
    r2 = x * x + y * y
    lx, ly = camera.spread(0.07), camera.spread(0.07)
    light = np.float32(1.1) - np.float32(1.5) * r2
    light = light + np.float32(lx) * x * 4 + np.float32(ly) * y * 4
    image *= light
    if attributes["media"] == "hazy":
        veil = np.float32(0.46) + canvas.clouds(dice("haze"), 3) * np.float32(0.08)
        veil = veil * (np.float32(1.1) - np.float32(1.2) * r2)
        image += (np.array((0.66, 0.58, 0.46), np.float32)[:, None, None] - image) * veil
    gain = 1.0 + camera.spread(0.055)
    tone = (gain, gain * (1 + camera.spread(0.025)), gain * (1 + camera.spread(0.05)))
    image *= np.array(tone, np.float32)[:, None, None]
    edge = np.float32(eye.radius * eye.radius)
    aperture = smooth((edge - r2) / np.float32(0.014) + np.float32(0.5))
    glare = dice("reflex")
    if attributes["reflex"] == "yes":
        cos, sin = turn(glare.uniform(0.0, 1.0))
        # A crescent: inside the aperture but outside a shifted, equally large circle.
        sx, sy = x + np.float32(0.10 * cos), y + np.float32(0.10 * sin)
        crescent = smooth((sx * sx + sy * sy - edge) / np.float32(0.075))
        _blend(image, whole, crescent, (0.98, 0.88, 0.68), 0.9)
    image *= aperture
    image += np.array((0.022, 0.018, 0.018), np.float32)[:, None, None]
    if camera.chance(0.3):  # the camera's notch
        nx = eye.cx + 0.7071 * eye.radius
        at, mask = canvas.ellipse(nx, eye.cy - 0.7071 * eye.radius, 0.017, 0.017, 0.2)
        _blend(image, at, mask, (0.02, 0.02, 0.02), 1.0)
    return np.ascontiguousarray(np.moveaxis(image, 0, -1))


def _draw_deep(
    canvas: Canvas,
    image: np.ndarray,
    eye: _Eye,
    findings: Findings,
    dice: Callable[[str], Dice],
    contrast: float,
    state: Callable[..., float],
) -> None:
    """Findings beneath the vessels: scars, drusen, hard exudates."""
    whole: Window = (slice(None), slice(None))
    mx, my = eye.disc(*eye.macula)
    if findings["macular_scar"].present:
        place = dice("macular_scar")
        turned = place.unit()
        at, mask = canvas.ellipse(mx, my, 0.098, 0.078, 0.3, turned)
        _blend(image, at, mask, (0.17, 0.09, 0.07), 0.7 * contrast)
        at, mask = canvas.ellipse(mx, my, 0.078, 0.058, 0.3, turned)
        _blend(image, at, mask, (0.93, 0.82, 0.62), 0.85 * contrast)
        clumps = [
            (cx, cy, cx, cy, place.uniform(0.010, 0.016))
            for cx, cy in ((mx + place.spread(0.022), my + place.spread(0.017)) for _ in range(3))
        ]
        _blend(image, whole, _strokes(canvas, clumps), (0.15, 0.08, 0.06), 0.7 * contrast)
    if grade := state("drusen"):
        place = dice("drusen")
        dots: list[Line] = []
        for k in range(int(6 + 30 * (grade - 0.45))):
            cos, sin = turn(0.382 * k + place.uniform(-0.04, 0.04))
            far = 0.035 + 0.105 * place.unit()
            cx, cy = mx + far * cos, my + far * sin * 0.85
            dots.append((cx, cy, cx, cy, place.uniform(0.013, 0.020)))
        halos = [(a, b, c, d, w * 1.4) for a, b, c, d, w in dots]
        _blend(image, whole, _strokes(canvas, halos), (0.30, 0.13, 0.06), 0.4 * contrast)
        _blend(image, whole, _strokes(canvas, dots), (1.0, 0.90, 0.52), 1.1 * contrast)
    for side, sign in HALVES:
        if has(SPEC, findings["laser_scars"], side):
            place = dice(f"laser_scars/{side}")
            spots: list[Line] = []
            for ring, number in ((0.325, 7), (0.405, 9)):
                for k in range(number):
                    turns = 0.07 + 0.36 * (k + 0.5) / number + place.spread(0.004)
                    cos, sin = turn(turns)
                    far = ring + place.spread(0.006)
                    cx, cy = eye.middle(far * cos, sign * far * sin)
                    spots.append((cx, cy, cx, cy, place.uniform(0.021, 0.026)))
            ring_mask = _strokes(canvas, spots, soft=0.4)
            _blend(image, whole, ring_mask, (0.94, 0.80, 0.52), 0.8 * contrast)
            cores = [(a, b, c, d, w * 0.66) for a, b, c, d, w in spots]
            _blend(image, whole, _strokes(canvas, cores), (0.14, 0.08, 0.06), 1.2 * contrast)
        if grade := state("hard_exudates", side):
            place = dice(f"hard_exudates/{side}")
            cx, cy = place.uniform(-0.13, 0.13), sign * place.uniform(0.16, 0.21)
            specks: list[Line] = []
            for k in range(int(4 + 26 * (grade - 0.45))):
                cos, sin = turn(0.382 * k + place.uniform(-0.05, 0.05))
                far = (0.03 + 0.07 * grade) * (0.25 + 0.75 * place.unit())
                x0, y0 = eye.middle(cx + far * cos, cy + far * sin * 0.7)
                x1, y1 = x0 + place.spread(0.006), y0 + place.spread(0.006)
                specks.append((x0, y0, x1, y1, place.uniform(0.008, 0.014)))
            mask = _strokes(canvas, specks, soft=0.5)
            _blend(image, whole, mask, (1.0, 0.98, 0.58), 1.4 * contrast)


def _draw_superficial(
    canvas: Canvas,
    image: np.ndarray,
    eye: _Eye,
    findings: Findings,
    dice: Callable[[str], Dice],
    contrast: float,
) -> None:
    """Findings in front of the vessels: cotton wool, new vessels, blood."""
    whole: Window = (slice(None), slice(None))
    for side, sign in HALVES:
        wool = findings["cotton_wool_spots"]
        if has(SPEC, wool, side):
            place = dice(f"cotton_wool_spots/{side}")
            tufts: list[Line] = []
            for u, v in place.shuffled(WOOL_PLACES)[: wool.count or 1]:
                cx, cy = eye.middle(u + place.spread(0.008), sign * (v + place.spread(0.008)))
                for _ in range(4):
                    x0, y0 = cx + place.spread(0.008), cy + place.spread(0.006)
                    tufts.append(
                        (x0, y0, x0 + place.spread(0.008), y0, place.uniform(0.026, 0.034))
                    )
            _blend(image, whole, _strokes(canvas, tufts), (1.0, 0.96, 0.88), 1.1 * contrast)
        if has(SPEC, findings["neovascularisation"], side):
            place = dice(f"neovascularisation/{side}")
            cx, cy = place.uniform(-0.2, 0.2), sign * place.uniform(0.2, 0.27)
            at, mask = canvas.ellipse(*eye.middle(cx, cy), 0.085, 0.085, 0.8)
            _blend(image, at, mask, (0.66, 0.12, 0.10), 0.6 * contrast)
            curls: list[Line] = []
            for k in range(8):
                cos, sin = turn((k + place.uniform(-0.3, 0.3)) / 8)
                far, bow = place.uniform(0.055, 0.085), place.spread(0.03)
                ends = [
                    (cx, cy),
                    (cx + far * cos * 0.7 - bow * sin, cy + far * sin * 0.7 + bow * cos),
                    (cx + far * cos + bow * sin, cy + far * sin - bow * cos),
                    (cx + far * cos * 0.6 + bow * sin, cy + far * sin * 0.6 - 2 * bow * cos),
                ]
                curls += _lines([eye.middle(*p) for p in _path(ends, 7)], 0.0075, 0.006)
            mask = _strokes(canvas, curls, soft=0.8)
            _blend(image, whole, mask, (0.36, 0.02, 0.04), 1.3 * contrast)
        blood = findings["haemorrhage"]
        if has(SPEC, blood, side):
            place = dice(f"haemorrhage/{side}")
            blots: list[Line] = []
            for u, v in place.shuffled(BLOT_PLACES)[: blood.count or 1]:
                cx, cy = eye.middle(u + place.spread(0.01), sign * (v + place.spread(0.01)))
                for _ in range(3):
                    x0, y0 = cx + place.spread(0.010), cy + place.spread(0.010)
                    x1, y1 = x0 + place.spread(0.010), y0 + place.spread(0.010)
                    blots.append((x0, y0, x1, y1, place.uniform(0.017, 0.026)))
            mask = _strokes(canvas, blots, soft=0.4)
            _blend(image, whole, mask, (0.28, 0.02, 0.03), 1.1 * contrast)


SPEC = DomainSpec(
    name="ophthalmology",
    modality="fundus photograph",
    findings=FINDINGS,
    attributes=ATTRIBUTES,
    normal=NORMAL,
    sides={
        "superior": ("superior", "in the superior retina"),
        "inferior": ("inferior", "in the inferior retina"),
        "diffuse": ("diffuse", "in both hemifields"),
    },
    both="diffuse",
    visibility=1.9,
    render=render,
    grain=6.0,
)
