"""Fundus photograph phantoms: ten findings on a drawn retina.

A right eye has its optic disc on the right of the image, as the camera sees it. Located
findings lie in the superior or the inferior half of the picture; counts are per half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmedrag.phantom.canvas import Canvas, Rng, Window, smooth, turn
from mmedrag.phantom.grammar import Findings
from mmedrag.phantom.scene import Scene
from mmedrag.phantom.words import read_domain

Point = tuple[float, float]
Line = tuple[float, float, float, float, float]  # x0, y0, x1, y1, half-width
Colour = tuple[float, float, float]

WHOLE: Window = (slice(None), slice(None))
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


def _scaled(lines: Sequence[Line], factor: float) -> list[Line]:
    """The same lines with another width."""
    return [(a, b, c, d, width * factor) for a, b, c, d, width in lines]


def _lines(points: Sequence[Point], first: float, last: float) -> list[Line]:
    """A polyline whose half-width tapers from first to last."""
    n = max(len(points) - 1, 1)
    return [
        (*a, *b, first + (last - first) * i / n)
        for i, (a, b) in enumerate(zip(points[:-1], points[1:], strict=True))
    ]


class Eye:
    """Places on the retina as places in the picture: mirrored for the side, turned, shifted."""

    def __init__(self, attributes: Mapping[str, str], rng: Rng) -> None:
        self.mirror = 1.0 if attributes["eye"] == "left" else -1.0
        self.cx, self.cy = 0.5 + rng.spread(0.008), 0.5 + rng.spread(0.008)
        self.angle = self.mirror * rng.spread(0.011)  # turns
        self.cos, self.sin = turn(self.angle)
        self.radius = 0.475 + rng.spread(0.006)
        at = -0.30 if attributes["field"] == "macula" else 0.0
        self.dx, self.dy = at + rng.spread(0.014), rng.spread(0.014)
        self.macula = (0.33 + rng.spread(0.01), 0.025 + rng.spread(0.008))

    def middle(self, x: float, y: float) -> Point:
        """From coordinates about the field's centre."""
        return self.cx + x * self.cos - y * self.sin, self.cy + x * self.sin + y * self.cos

    def disc(self, x: float, y: float) -> Point:
        """From coordinates about the disc, x towards the macula."""
        return self.middle(self.mirror * (x + self.dx), y + self.dy)


@dataclass
class Photograph(Scene):
    """A fundus photograph while it is drawn; ``image`` is float32 [3, S, S]."""

    SPREAD = (0.92, 1.08)
    DRAW = "/strength"

    def __post_init__(self) -> None:
        self.eye = Eye(self.attributes, self.rng("eye"))
        self.size_contrast = 0.4 + 0.6 * self.contrast  # of findings that show by their size
        self.image = np.empty((3, self.canvas.size, self.canvas.size), np.float32)

    def blend(
        self, shape: tuple[Window, np.ndarray] | np.ndarray, colour: Colour, alpha: float
    ) -> None:
        """Mix a colour in under a mask: of a window, or of the whole picture."""
        (rows, cols), mask = shape if isinstance(shape, tuple) else (WHOLE, shape)
        part = self.image[:, rows, cols]
        part += (_planes(colour) - part) * (mask * np.float32(min(alpha, 1.0)))

    def strokes(self, lines: Sequence[Line], colour: Colour, alpha: float, soft: float = 1) -> None:
        self.blend(_strokes(self.canvas, lines, soft), colour, alpha)


def _planes(colour: Sequence[float]) -> np.ndarray:
    return np.array(colour, np.float32)[:, None, None]


def render(
    canvas: Canvas,
    findings: Findings,
    attributes: Mapping[str, str],
    rng: Callable[[str], Rng],
    contrast: float = 1.0,
) -> np.ndarray:
    """One fundus photograph, float32 [S, S, 3] in [0, 1] (:class:`Scene` says of what)."""
    photo = Photograph(SPEC, canvas, findings, attributes, rng, contrast)
    _draw_retina(photo)
    _draw_disc(photo)
    for names in DEEP:
        _draw_findings(photo, names)
    _draw_vessels(photo)
    _draw_findings(photo, SUPERFICIAL)
    _expose(photo)
    return np.ascontiguousarray(np.moveaxis(photo.image, 0, -1))


def _draw_findings(photo: Photograph, names: Sequence[str]) -> None:
    """Paint what is there of these findings, half after half, each in the order given."""
    located = SPEC.by_name[names[0]].sided
    for side, sign in HALVES if located else ((None, 1.0),):
        for name in names:
            if strength := photo.strength(name, side):
                place = photo.rng(f"{name}/{side}" if side else name)
                PAINT[name](photo, sign, strength, place)


def _draw_retina(photo: Photograph) -> None:
    """Blotches of pigment, choroidal vessels between them, and the macula's pigment."""
    canvas, place = photo.canvas, photo.rng("retina")
    colour, choroid = PIGMENT[photo.attributes["pigmentation"]]
    warm = place.spread(0.04)
    base = (colour[0] * (1 + warm / 2), colour[1] * (1 - warm), colour[2] * (1 - 2 * warm))
    photo.image[:] = _planes(base)
    blotches = canvas.clouds(place, 5) * np.float32(0.05)
    ridge = canvas.clouds(place, 9) + canvas.clouds(place, 16)
    ridge = smooth(np.float32(1) - ridge * ridge * np.float32(6)) * np.float32(choroid)
    photo.image *= np.float32(1) + blotches + ridge * _planes((1, 1.5, 1.5))
    mx, my = photo.eye.disc(*photo.eye.macula)
    dark = (base[0] * 0.55, base[1] * 0.4, base[2] * 0.4)
    for radius, depth in ((0.135, 0.22), (0.05, 0.28)):
        photo.blend(canvas.ellipse(mx, my, radius, radius * 0.92, soft=0.9), dark, depth + 0.06)


def _draw_disc(photo: Photograph) -> None:
    """The disc with its cup, and atrophy beneath its margin."""
    canvas, eye, place = photo.canvas, photo.eye, photo.rng("disc")
    x, y = eye.disc(0.0, 0.0)
    rx, ry = 0.068 + place.spread(0.0025), 0.076 + place.spread(0.0025)
    if strength := photo.strength("peripapillary_atrophy"):
        grow = 1.12 + 0.6 * strength * photo.size_contrast
        shift = photo.rng("peripapillary_atrophy").spread(0.004)
        ax, ay = eye.disc(0.03 * strength, shift)
        ring = canvas.ellipse(ax, ay, rx * grow + 0.012, ry * grow + 0.012, 0.15, eye.angle)
        photo.blend(ring, (0.20, 0.10, 0.07), 0.8 * photo.contrast)
        bare = canvas.ellipse(ax, ay, rx * grow, ry * grow, 0.12, eye.angle)
        photo.blend(bare, (0.94, 0.78, 0.56), 1.0 * photo.contrast)
    pale = place.spread(0.03)
    disc = canvas.ellipse(x, y, rx, ry, 0.14, eye.angle)
    photo.blend(disc, (0.95, 0.62 + pale, 0.33 + pale), 0.95)
    ratio = 0.34 + place.spread(0.025)
    if strength := photo.strength("cup_to_disc"):
        ratio += 0.47 * strength * photo.size_contrast
    ratio = min(ratio, 0.9)
    cup = canvas.ellipse(x, y, rx * ratio, ry * min(ratio * 1.04, 0.92), 0.22, eye.angle)
    photo.blend(cup, (1.0, 0.95, 0.80), 0.9)


def _draw_vessels(photo: Photograph) -> None:
    """Arteries and veins; tortuous veins are bent and wide."""
    tortuous = photo.size_contrast if photo.has("tortuous_veins") else 0.0
    place, wave = photo.rng("vessels"), photo.rng("tortuous_veins")
    trees: tuple[list[Line], list[Line]] = ([], [])
    for half in (-1.0, 1.0):
        for arcade in range(len(ARCADES)):
            for kind, tree in enumerate(trees):
                tree += _vessel(photo.eye, place, wave, tortuous * kind, half, arcade, kind)
    for lines, keep in zip(trees, ((0.84, 0.56, 0.52), (0.62, 0.34, 0.36)), strict=True):
        mask = _strokes(photo.canvas, lines, soft=0.7)
        photo.image *= 1 - mask * (1 - _planes(keep))


def _vessel(
    eye: Eye, place: Rng, wave: Rng, tortuous: float, half: float, arcade: int, kind: int
) -> list[Line]:
    """An artery (``kind`` 0) or vein (1) of an arcade, with its branches."""
    apart = (0.013 if kind else -0.017) * (1.0 if arcade else -1.0)
    route = [
        (
            x + (place.spread(0.016) + apart if i else 0.0),
            half * (y + (place.spread(0.016) + abs(apart) * (1 - kind) if i else 0.01)),
        )
        for i, (x, y) in enumerate(ARCADES[arcade])
    ]
    wide = (0.0115 if kind else 0.0085) * (0.85 if arcade else 1.0)
    wide *= 1.0 + 0.45 * tortuous
    phase, rate, bend = wave.unit(), wave.uniform(3.2, 4.2), 0.020 * tortuous
    steps = 36 if bend else 13
    curve = _path(route, steps)
    if bend:
        for i, (x, y) in enumerate(curve):
            grow = min(4 * (i / steps), 1.0) * bend
            cos, sin = turn(phase + rate * (i / steps))
            curve[i] = (x + grow * 0.6 * cos, y + grow * sin)
    lines = _lines([eye.disc(*p) for p in curve], wide, wide * 0.45)
    for branch in range(4):
        start = place.uniform(0.16, 0.24) + 0.17 * branch
        inward = branch % 2 == kind
        twig = _twig(curve[int(start * steps)], place, half, arcade, inward)
        lines += _lines([eye.disc(*p) for p in twig], wide * (0.62 - 0.06 * branch), wide * 0.25)
    return lines


def _twig(start: Point, place: Rng, half: float, arcade: int, inward: bool) -> list[Point]:
    x, y = start
    far = 0.16 + place.uniform(-0.04, 0.05)
    ex = x + (far * 0.5 if not arcade else -far * 0.75) + place.spread(0.02)
    ey = y + half * (far if not inward else -far * 0.55) + half * place.spread(0.012)
    if inward and not arcade:  # inward of the temporal arcades: end short of the fovea
        ey = half * max(half * ey, 0.075)
    mx = (x + ex) / 2 + place.spread(0.018) + (0.03 if not arcade else -0.03)
    my = (y + ey) / 2 + place.spread(0.018)
    return _path([(x, y), (mx, my), (ex, ey)], 5)


def _expose(photo: Photograph) -> None:
    """Camera: uneven light, haze of the media, exposure and white balance, aperture, reflexes."""
    canvas, eye, camera = photo.canvas, photo.eye, photo.rng("camera")
    x, y = canvas.x - np.float32(eye.cx), canvas.y - np.float32(eye.cy)
    r2 = x * x + y * y
    lx, ly = camera.spread(0.07), camera.spread(0.07)
    light = np.float32(1.1) - np.float32(1.5) * r2
    light = light + np.float32(lx) * x * 4 + np.float32(ly) * y * 4
    photo.image *= light
    if photo.attributes["media"] == "hazy":
        veil = np.float32(0.46) + canvas.clouds(photo.rng("haze"), 3) * np.float32(0.08)
        veil = veil * (np.float32(1.1) - np.float32(1.2) * r2)
        photo.image += (_planes((0.66, 0.58, 0.46)) - photo.image) * veil
    gain = 1.0 + camera.spread(0.055)
    photo.image *= _planes(
        (gain, gain * (1 + camera.spread(0.025)), gain * (1 + camera.spread(0.05)))
    )
    edge = np.float32(eye.radius * eye.radius)
    aperture = smooth((edge - r2) / np.float32(0.014) + np.float32(0.5))
    if photo.attributes["reflex"] == "yes":
        cos, sin = turn(photo.rng("reflex").uniform(0.0, 1.0))
        # A crescent: inside the aperture but outside a shifted, equally large circle.
        sx, sy = x + np.float32(0.10 * cos), y + np.float32(0.10 * sin)
        crescent = smooth((sx * sx + sy * sy - edge) / np.float32(0.075))
        photo.blend(crescent, (0.98, 0.88, 0.68), 0.9)
    photo.image *= aperture
    photo.image += _planes((0.022, 0.018, 0.018))
    if camera.chance(0.3):  # the camera's notch
        nx, ny = eye.cx + 0.7071 * eye.radius, eye.cy - 0.7071 * eye.radius
        photo.blend(canvas.ellipse(nx, ny, 0.017, 0.017, 0.2), (0.02, 0.02, 0.02), 1.0)


def _macular_scar(photo: Photograph, sign: float, strength: float, place: Rng) -> None:
    canvas, contrast = photo.canvas, photo.contrast
    mx, my = photo.eye.disc(*photo.eye.macula)
    turned = place.unit()
    rim = canvas.ellipse(mx, my, 0.098, 0.078, 0.3, turned)
    photo.blend(rim, (0.17, 0.09, 0.07), 0.7 * contrast)
    scar = canvas.ellipse(mx, my, 0.078, 0.058, 0.3, turned)
    photo.blend(scar, (0.93, 0.82, 0.62), 0.85 * contrast)
    clumps = [
        (cx, cy, cx, cy, place.uniform(0.010, 0.016))
        for cx, cy in ((mx + place.spread(0.022), my + place.spread(0.017)) for _ in range(3))
    ]
    photo.strokes(clumps, (0.15, 0.08, 0.06), 0.7 * contrast)


def _drusen(photo: Photograph, sign: float, strength: float, place: Rng) -> None:
    mx, my = photo.eye.disc(*photo.eye.macula)
    dots: list[Line] = []
    for k in range(int(6 + 30 * (strength - 0.45))):
        cos, sin = turn(0.382 * k + place.uniform(-0.04, 0.04))
        far = 0.035 + 0.105 * place.unit()
        cx, cy = mx + far * cos, my + far * sin * 0.85
        dots.append((cx, cy, cx, cy, place.uniform(0.013, 0.020)))
    photo.strokes(_scaled(dots, 1.4), (0.30, 0.13, 0.06), 0.4 * photo.contrast)
    photo.strokes(dots, (1.0, 0.90, 0.52), 1.1 * photo.contrast)


def _laser_scars(photo: Photograph, sign: float, strength: float, place: Rng) -> None:
    burns: list[Line] = []
    for ring, number in ((0.325, 7), (0.405, 9)):
        for k in range(number):
            cos, sin = turn(0.07 + 0.36 * (k + 0.5) / number + place.spread(0.004))
            far = ring + place.spread(0.006)
            cx, cy = photo.eye.middle(far * cos, sign * far * sin)
            burns.append((cx, cy, cx, cy, place.uniform(0.021, 0.026)))
    photo.strokes(burns, (0.94, 0.80, 0.52), 0.8 * photo.contrast, soft=0.4)
    photo.strokes(_scaled(burns, 0.66), (0.14, 0.08, 0.06), 1.2 * photo.contrast)


def _hard_exudates(photo: Photograph, sign: float, strength: float, place: Rng) -> None:
    cx, cy = place.uniform(-0.13, 0.13), sign * place.uniform(0.16, 0.21)
    specks: list[Line] = []
    for k in range(int(4 + 26 * (strength - 0.45))):
        cos, sin = turn(0.382 * k + place.uniform(-0.05, 0.05))
        far = (0.03 + 0.07 * strength) * (0.25 + 0.75 * place.unit())
        x0, y0 = photo.eye.middle(cx + far * cos, cy + far * sin * 0.7)
        x1, y1 = x0 + place.spread(0.006), y0 + place.spread(0.006)
        specks.append((x0, y0, x1, y1, place.uniform(0.008, 0.014)))
    photo.strokes(specks, (1.0, 0.98, 0.58), 1.4 * photo.contrast, soft=0.5)


def _cotton_wool(photo: Photograph, sign: float, strength: float, place: Rng) -> None:
    tufts: list[Line] = []
    for u, v in place.shuffled(WOOL_PLACES)[: photo.count("cotton_wool_spots")]:
        cx, cy = photo.eye.middle(u + place.spread(0.008), sign * (v + place.spread(0.008)))
        for _ in range(4):
            x0, y0 = cx + place.spread(0.008), cy + place.spread(0.006)
            tufts.append((x0, y0, x0 + place.spread(0.008), y0, place.uniform(0.026, 0.034)))
    photo.strokes(tufts, (1.0, 0.96, 0.88), 1.1 * photo.contrast)


def _new_vessels(photo: Photograph, sign: float, strength: float, place: Rng) -> None:
    cx, cy = place.uniform(-0.2, 0.2), sign * place.uniform(0.2, 0.27)
    blush = photo.canvas.ellipse(*photo.eye.middle(cx, cy), 0.085, 0.085, 0.8)
    photo.blend(blush, (0.66, 0.12, 0.10), 0.6 * photo.contrast)
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
        curls += _lines([photo.eye.middle(*p) for p in _path(ends, 7)], 0.0075, 0.006)
    photo.strokes(curls, (0.36, 0.02, 0.04), 1.3 * photo.contrast, soft=0.8)


def _haemorrhage(photo: Photograph, sign: float, strength: float, place: Rng) -> None:
    blots: list[Line] = []
    for u, v in place.shuffled(BLOT_PLACES)[: photo.count("haemorrhage")]:
        cx, cy = photo.eye.middle(u + place.spread(0.01), sign * (v + place.spread(0.01)))
        for _ in range(3):
            x0, y0 = cx + place.spread(0.010), cy + place.spread(0.010)
            x1, y1 = x0 + place.spread(0.010), y0 + place.spread(0.010)
            blots.append((x0, y0, x1, y1, place.uniform(0.017, 0.026)))
    photo.strokes(blots, (0.28, 0.02, 0.03), 1.1 * photo.contrast, soft=0.4)


# ``sign`` is that of the half's y (1 for findings of the macula).
PAINT: dict[str, Callable[[Photograph, float, float, Rng], None]] = {
    "macular_scar": _macular_scar,
    "drusen": _drusen,
    "laser_scars": _laser_scars,
    "hard_exudates": _hard_exudates,
    "cotton_wool_spots": _cotton_wool,
    "neovascularisation": _new_vessels,
    "haemorrhage": _haemorrhage,
}
# Beneath the vessels: first at the macula, then in the halves. Disc and veins change in shape.
DEEP = (("macular_scar", "drusen"), ("laser_scars", "hard_exudates"))
SUPERFICIAL = ("cotton_wool_spots", "neovascularisation", "haemorrhage")

SPEC = read_domain("fundus.toml", render, grain=6.0, visibility=1.9)
