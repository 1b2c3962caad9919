"""Chest X-ray phantoms: twelve findings with side, severity and count on a drawn thorax.

The patient's left is on the right of the image, as films are hung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mmedrag.phantom.canvas import Canvas, Rng, smooth
from mmedrag.phantom.grammar import Findings
from mmedrag.phantom.scene import Scene
from mmedrag.phantom.words import read_domain

SIDES = (("right", -1), ("left", 1))  # and the sign of their x in the picture


@dataclass
class Film(Scene):
    """A chest film while it is drawn: the patient's build, and the picture so far."""

    STRENGTHS = {"mild": 0.55, "moderate": 0.8, "severe": 1.1, None: 0.8}
    SPREAD = (0.85, 1.15)
    CONTRASTED = True

    def __post_init__(self) -> None:
        body, heart, attributes = self.rng("body"), self.rng("heart"), self.attributes
        self.portable = attributes["view"] == "AP"
        self.wide = {"slim": -0.05, "average": 0.0, "large": 0.06}[attributes["habitus"]]
        self.low = 0.085 if attributes["volumes"] == "low" else 0.0
        self.shift = 0.0
        if attributes["position"] == "rotated":
            self.shift = 0.05 * (1 if body.chance(0.5) else -1)
        self.exposure = body.spread(0.035) + (0.05 if self.portable else 0.0)
        self.girth = 0.43 + self.wide + body.spread(0.012)
        big = self.strength("cardiomegaly")
        self.heart_radius = 0.118 + (0.018 if self.portable else 0.0) + heart.spread(0.006)
        self.heart_radius += 0.062 * big
        self.heart_x = 0.53 + self.shift + 0.35 * (self.heart_radius - 0.118)
        self.base = 0.785 - self.low  # of the heart
        self.image = self.canvas.full(0.06)


@dataclass(frozen=True)
class Lung:
    """One lung: its mask, and where it lies."""

    side: str
    sign: int
    mask: np.ndarray
    cx: float
    top: float
    bottom: float
    rx: float


def render(
    canvas: Canvas,
    findings: Findings,
    attributes: Mapping[str, str],
    rng: Callable[[str], Rng],
    contrast: float = 1.0,
) -> np.ndarray:
    """One frontal chest film, float32 [S, S] in [0, 1] (:class:`Scene` says of what)."""
    film = Film(SPEC, canvas, findings, attributes, rng, contrast)
    torso = _draw_torso(film)
    right, left = lungs = [_lung(film, side, sign) for side, sign in SIDES]
    film.image -= np.maximum(right.mask, left.mask) * np.float32(0.36 + 0.5 * film.exposure)
    # Vessels fan out of the hila; ribs arch over the lungs; both are nuisance, not findings.
    for lung in lungs:
        _draw_hilum(film, lung)
        _draw_ribs(film, lung)
        _draw_clavicle(film, lung)
    _draw_mediastinum(film, torso)
    for lung in lungs:
        for name, paint in PAINT.items():
            if strength := film.strength(name, lung.side):
                paint(film, lung, strength, rng(f"{name}/{lung.side}"))
    if attributes["leads"] == "yes":
        _draw_leads(film, rng("leads"))
    if rng("marker").chance(0.8):
        _draw_marker(film, rng("marker"))
    return film.image


def _draw_torso(film: Film) -> np.ndarray:
    """Soft tissue; returns the torso's mask."""
    canvas, wide = film.canvas, film.wide
    torso = canvas.mask(0.5, 0.62, film.girth, 0.66, soft=0.12)
    film.image += torso * np.float32(0.52 + film.exposure + 0.5 * wide)
    neck = canvas.mask(0.5, 0.02, 0.13 + wide / 2, 0.17, soft=0.2)
    film.image += neck * np.float32(0.22) * (1 - torso)
    film.image += canvas.clouds(film.rng("tissue"), 5) * torso * np.float32(0.03)
    return torso


def _lung(film: Film, side: str, sign: int) -> Lung:
    """A lung over its diaphragm, which may be raised."""
    place = film.rng(f"lung/{side}")
    cx = 0.5 + sign * (0.195 + 0.25 * film.wide + place.spread(0.006)) + film.shift * 0.35
    top, bottom = 0.135 + place.spread(0.008), 0.80 - film.low + place.spread(0.01)
    if side == "left":
        bottom += 0.012
    if raised := film.strength("elevated_hemidiaphragm", side):
        contrast = film.contrast
        bottom -= 0.085 * min(raised / contrast, 1.2) * (0.2 + 0.8 * contrast)
    cy, ry = (top + bottom) / 2 + 0.04, (bottom - top) / 2 + 0.05
    rx = 0.155 + 0.18 * film.wide + place.spread(0.006)
    mask = film.canvas.mask(cx, cy, rx, ry, soft=0.16)
    x, y = film.canvas.x, film.canvas.y
    dome = bottom + 4.0 * (x - np.float32(cx)) * (x - np.float32(cx)) * np.float32(0.5)
    mask = mask * (1 - smooth((y - dome + np.float32(0.012)) / np.float32(0.024)))
    return Lung(side, sign, mask, cx, top, bottom, rx)


def _draw_hilum(film: Film, lung: Lung) -> None:
    """Vessels, and the haze of an edema around them."""
    canvas, sign, place = film.canvas, lung.sign, film.rng(f"vessels/{lung.side}")
    hx, hy = lung.cx - sign * lung.rx * 0.75, 0.46 + place.spread(0.01)
    for _ in range(6):
        ex = lung.cx + sign * lung.rx * place.uniform(-0.1, 0.8)
        ey = hy + place.uniform(-0.26, 0.28)
        mx, my = (hx + ex) / 2 + place.spread(0.012), (hy + ey) / 2 + place.spread(0.02)
        branch = canvas.stroke([(hx, hy), (mx, my), (ex, ey)], 0.011)
        film.image += branch * lung.mask * np.float32(0.075)
    if edema := film.strength("pulmonary_edema"):
        haze = canvas.mask(hx + sign * 0.03, hy + 0.02, 0.15, 0.2, soft=0.9)
        streaks = 0.75 + 0.5 * canvas.clouds(film.rng(f"edema/{lung.side}"), 14)
        film.image += haze * lung.mask * streaks * np.float32(0.17 * edema)


def _draw_ribs(film: Film, lung: Lung) -> None:
    canvas, cx, rx, sign = film.canvas, lung.cx, lung.rx, lung.sign
    place = film.rng(f"ribs/{lung.side}")
    breaks = film.count("rib_fracture") if film.has("rib_fracture", lung.side) else 0
    broken = film.rng(f"rib_fracture/{lung.side}").shuffled(range(1, 6))[:breaks]
    reach = canvas.mask(cx, 0.48, rx + 0.045, 0.42, soft=0.3)
    for rib in range(8):
        y0 = 0.17 + 0.078 * rib + place.spread(0.003)
        bend = 0.9 + place.spread(0.05)
        bow = canvas.x - np.float32(cx + sign * 0.02)
        arch = y0 + bow * bow * np.float32(bend * 2.2)
        arch = arch + np.float32(sign * 0.22) * (canvas.x - np.float32(cx))
        near = canvas.y - arch
        band = smooth(1 - near * near / np.float32(0.000121))
        film.image += band * reach * np.float32(0.085)
        if rib in broken:
            _draw_fracture(film, lung, y0, bend, film.rng(f"rib_fracture/{lung.side}/{rib}"))


def _draw_fracture(film: Film, lung: Lung, y0: float, bend: float, place: Rng) -> None:
    """A gap in a rib, and the end that stands out beside it."""
    sign, fx = lung.sign, lung.cx + lung.sign * lung.rx * place.uniform(0.15, 0.7)
    bow = fx - lung.cx - sign * 0.02
    fy = y0 + bow * bow * bend * 2.2 + sign * 0.22 * (fx - lung.cx)
    gap, mask = film.canvas.ellipse(fx, fy, 0.013, 0.02, soft=0.5)
    film.image[gap] -= mask * np.float32(0.28 * film.contrast)
    step, mask = film.canvas.ellipse(fx + 0.021, fy - 0.014, 0.021, 0.013, soft=0.5)
    film.image[step] += mask * np.float32(0.38 * film.contrast)


def _draw_clavicle(film: Film, lung: Lung) -> None:
    sign, height = lung.sign, 0.155 + (0.0 if film.portable else 0.035)
    tilt = 0.01 if film.portable else 0.07
    bone = [
        (0.5 + sign * 0.045 + film.shift, height + tilt),
        (0.5 + sign * 0.2, height + tilt / 3),
        (0.5 + sign * (0.34 + film.wide), height - 0.015),
    ]
    film.image += film.canvas.stroke(bone, 0.016) * np.float32(0.13)


def _draw_mediastinum(film: Film, torso: np.ndarray) -> None:
    """Great vessels, heart, spine, and a hernia behind the heart."""
    canvas, image, shift, radius = film.canvas, film.image, film.shift, film.heart_radius
    vessels = canvas.mask(
        0.5 + shift, 0.32, 0.07 + (0.015 if film.portable else 0), 0.34, soft=0.35
    )
    image += vessels * np.float32(0.2)
    image += canvas.mask(
        film.heart_x,
        film.base - 0.125,
        radius,
        0.15 + 0.25 * (radius - 0.118),
        soft=0.16,
        angle=0.06,
    ) * np.float32(0.30)
    spine = canvas.x - np.float32(0.5 + shift * 0.4)
    image += smooth(1 - spine * spine / np.float32(0.001156)) * torso * np.float32(0.07)
    if film.has("hiatal_hernia"):
        place = film.rng("hiatal_hernia")
        strength = film.contrast * place.uniform(0.85, 1.15)
        px, py = 0.515 + shift + place.spread(0.008), film.base - 0.06 + place.spread(0.008)
        at, mask = canvas.ellipse(px, py, 0.062, 0.05, soft=0.25)
        image[at] += mask * np.float32(0.18 * strength)
        at, mask = canvas.ellipse(px, py - 0.012, 0.042, 0.03, soft=0.25)
        image[at] -= mask * np.float32(0.42 * strength)


def _consolidation(film: Film, lung: Lung, strength: float, place: Rng) -> None:
    up = place.chance(0.5)
    cy = lung.top + (lung.bottom - lung.top) * (0.3 if up else 0.68) + place.spread(0.02)
    patch = film.canvas.mask(lung.cx + place.spread(0.02), cy, 0.085, 0.085, soft=0.75)
    mottled = 0.8 + 0.35 * film.canvas.clouds(place, 16)
    film.image += patch * mottled * lung.mask * np.float32(0.37 * strength)


def _pleural_effusion(film: Film, lung: Lung, strength: float, place: Rng) -> None:
    level = lung.bottom - 0.015 - 0.13 * strength
    edge = film.canvas.x - np.float32(lung.cx + lung.sign * lung.rx)
    curve = level + np.float32(0.9) * np.minimum(edge * edge, np.float32(0.2)) * 2
    fluid = smooth((film.canvas.y - curve + np.float32(0.02)) / np.float32(0.04))
    film.image += fluid * lung.mask * np.float32(0.36 * (0.45 + 0.55 * film.contrast))


def _pneumothorax(film: Film, lung: Lung, strength: float, place: Rng) -> None:
    """Air outside the lung's edge, and the edge itself."""
    y, top, bottom = film.canvas.y, lung.top, lung.bottom
    inset = 0.035 + 0.05 * strength
    inner = film.canvas.mask(
        lung.cx - lung.sign * inset * 0.8,
        (top + bottom) / 2 + 0.05 + inset * 0.7,
        lung.rx - inset * 0.35,
        (bottom - top) / 2 + 0.05,
        soft=0.08,
    )
    air = lung.mask * (1 - inner) * (1 - smooth((y - np.float32(0.56)) / np.float32(0.12)))
    film.image -= air * np.float32(0.15 * (0.1 + 0.9 * film.contrast))
    rim = inner * (1 - inner) * lung.mask * np.float32(4)
    rim = rim * (1 - smooth((y - np.float32(0.5)) / np.float32(0.12)))
    film.image += rim * np.float32(0.12 * film.contrast)


def _nodule(film: Film, lung: Lung, strength: float, place: Rng) -> None:
    for _ in range(film.count("nodule")):
        x = lung.cx + lung.sign * lung.rx * place.uniform(-0.4, 0.65)
        y = lung.top + (lung.bottom - lung.top) * place.uniform(0.15, 0.8)
        radius = place.uniform(0.02, 0.03)
        at, mask = film.canvas.ellipse(x, y, radius, radius, soft=0.35)
        film.image[at] += mask * np.float32(0.44 * film.contrast * place.uniform(0.9, 1.1))


def _atelectasis(film: Film, lung: Lung, strength: float, place: Rng) -> None:
    for k in range(2):
        y = lung.bottom - 0.075 - 0.05 * k + place.spread(0.008)
        line = [
            (lung.cx - lung.rx * 0.7, y + place.spread(0.012)),
            (lung.cx + lung.rx * 0.65, y + place.spread(0.012)),
        ]
        plate = film.canvas.stroke(line, 0.014)
        film.image += plate * lung.mask * np.float32(0.3 * film.contrast)


def _central_line(film: Film, lung: Lung, strength: float, place: Rng) -> None:
    sign, shift = lung.sign, film.shift
    path = [
        (0.5 + sign * 0.2 + place.spread(0.01), 0.1),
        (0.5 + sign * 0.1 + shift, 0.19 + place.spread(0.01)),
        (0.475 + shift, 0.27),
        (0.47 + shift + place.spread(0.004), 0.47 + place.spread(0.02)),
    ]
    film.image += film.canvas.stroke(path, 0.009) * np.float32(0.34 * film.contrast)


def _pacemaker(film: Film, lung: Lung, strength: float, place: Rng) -> None:
    sign, shift = lung.sign, film.shift
    x, y = 0.5 + sign * (0.245 + place.spread(0.012)), 0.235 + place.spread(0.012)
    at, mask = film.canvas.ellipse(x, y, 0.05, 0.038, soft=0.12, angle=place.uniform(0, 0.2))
    film.image[at] += mask * np.float32(0.38 * film.contrast)
    lead = [
        (x - sign * 0.03, y),
        (0.5 + shift, 0.29),
        (0.49 + shift, 0.5),
        (film.heart_x + 0.02, film.base - 0.09),
    ]
    film.image += film.canvas.stroke(lead, 0.008) * np.float32(0.26 * film.contrast)


# Findings of one side, in the order in which they lie over each other. The others change the
# shape of what is there: heart, lungs, vessels and ribs.
PAINT: dict[str, Callable[[Film, Lung, float, Rng], None]] = {
    "consolidation": _consolidation,
    "pleural_effusion": _pleural_effusion,
    "pneumothorax": _pneumothorax,
    "nodule": _nodule,
    "atelectasis": _atelectasis,
    "central_line": _central_line,
    "pacemaker": _pacemaker,
}


def _draw_leads(film: Film, place: Rng) -> None:
    for k in range(4):
        x = 0.3 + 0.4 * (k % 2) + place.spread(0.03)
        y = 0.33 + 0.33 * (k // 2) + place.spread(0.03)
        at, mask = film.canvas.ellipse(x, y, 0.015, 0.015, soft=0.2)
        film.image[at] += mask * np.float32(0.4)
        wire = [(x, y), (x + place.spread(0.08), y + 0.15), (0.5 + place.spread(0.1), 0.99)]
        film.image += film.canvas.stroke(wire, 0.006) * np.float32(0.12)


def _draw_marker(film: Film, place: Rng) -> None:
    """The radiographer's letter."""
    x, y = 0.08 + place.spread(0.01), 0.09 + place.spread(0.01)
    bowl, stem = [(x, y - 0.03), (x + 0.025, y - 0.03), (x + 0.025, y)], (x, y + 0.035)
    letter = [stem, *bowl, (x, y), (x + 0.028, y + 0.035)]
    film.image += film.canvas.stroke(letter, 0.009) * np.float32(0.7)


SPEC = read_domain("chest.toml", render, visibility=1.2)
