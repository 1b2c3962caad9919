"""Chest X-ray phantoms: twelve findings with side, severity and count on a drawn thorax.

The patient's left is on the right of the image, as films are hung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mmedrag.phantom.canvas import Canvas, Dice, smooth
from mmedrag.phantom.chest_words import ATTRIBUTES, FINDINGS, NORMAL
from mmedrag.phantom.grammar import DomainSpec, Findings, has

STRENGTH = {"mild": 0.55, "moderate": 0.8, "severe": 1.1, None: 0.8}


def render(
    canvas: Canvas,
    findings: Findings,
    attributes: Mapping[str, str],
    dice: Callable[[str], Dice],
    contrast: float = 1.0,
) -> np.ndarray:
    """One frontal chest film, float32 [S, S] in [0, 1].

    ``dice(name)`` gives independent randomness per part, so a finding can be switched without
    moving anything else. ``contrast`` scales how plainly every finding shows.
    """
    x, y = canvas.x, canvas.y
    body = dice("body")
    portable = attributes["view"] == "AP"
    wide = {"slim": -0.05, "average": 0.0, "large": 0.06}[attributes["habitus"]]
    low = 0.085 if attributes["volumes"] == "low" else 0.0
    shift = 0.05 * (1 if body.chance(0.5) else -1) if attributes["position"] == "rotated" else 0.0
    exposure = body.spread(0.035) + (0.05 if portable else 0.0)

    def state(name: str, side: str | None = None) -> float:
        """Visible strength of a finding on a side; 0 when absent."""
        found = findings[name]
        if not has(SPEC, found, side):
            return 0.0
        return contrast * STRENGTH[found.severity] * dice(f"{name}/{side}").uniform(0.85, 1.15)

    image = canvas.full(0.06)
    torso = canvas.mask(0.5, 0.62, 0.43 + wide + body.spread(0.012), 0.66, soft=0.12)
    image += torso * np.float32(0.52 + exposure + 0.5 * wide)
    neck = canvas.mask(0.5, 0.02, 0.13 + wide / 2, 0.17, soft=0.2)
    image += neck * np.float32(0.22) * (1 - torso)
    image += canvas.clouds(dice("tissue"), 5) * torso * np.float32(0.03)

    lungs = {}
    lung_all = canvas.full(0.0)
    for side, sign in (("right", -1), ("left", 1)):
        part = dice(f"lung/{side}")
        cx = 0.5 + sign * (0.195 + 0.25 * wide + part.spread(0.006)) + shift * 0.35
        top, bottom = 0.135 + part.spread(0.008), 0.80 - low + part.spread(0.01)
        if side == "left":
            bottom += 0.012
        raised = state("elevated_hemidiaphragm", side)
        if findings["elevated_hemidiaphragm"].present and raised:
            bottom -= 0.085 * min(raised / contrast, 1.2) * (0.2 + 0.8 * contrast)
        cy, ry = (top + bottom) / 2 + 0.04, (bottom - top) / 2 + 0.05
        rx = 0.155 + 0.18 * wide + part.spread(0.006)
        lung = canvas.mask(cx, cy, rx, ry, soft=0.16)
        dome = bottom + 4.0 * (x - np.float32(cx)) * (x - np.float32(cx)) * np.float32(0.5)
        lung = lung * (1 - smooth((y - dome + np.float32(0.012)) / np.float32(0.024)))
        lungs[side] = (lung, cx, top, bottom, rx)
        lung_all = np.maximum(lung_all, lung)
    image -= lung_all * np.float32(0.36 + 0.5 * exposure)

    # Vessels fan out of the hila; ribs arch over the lungs; both are nuisance, not findings.
    for side, sign in (("right", -1), ("left", 1)):
        lung, cx, top, bottom, rx = lungs[side]
        part = dice(f"vessels/{side}")
        hx, hy = cx - sign * rx * 0.75, 0.46 + part.spread(0.01)
        for _ in range(6):
            ex, ey = cx + sign * rx * part.uniform(-0.1, 0.8), hy + part.uniform(-0.26, 0.28)
            mx, my = (hx + ex) / 2 + part.spread(0.012), (hy + ey) / 2 + part.spread(0.02)
            branch = canvas.stroke([(hx, hy), (mx, my), (ex, ey)], 0.011)
            image += branch * lung * np.float32(0.075)
        edema = state("pulmonary_edema")
        if edema:
            haze = canvas.mask(hx + sign * 0.03, hy + 0.02, 0.15, 0.2, soft=0.9)
            streaks = 0.75 + 0.5 * canvas.clouds(dice(f"edema/{side}"), 14)
            image += haze * lung * streaks * np.float32(0.17 * edema)
        ribs = dice(f"ribs/{side}")
        broken = findings["rib_fracture"]
        breaks = (broken.count or 1) if has(SPEC, broken, side) else 0
        at_ribs = dice(f"rib_fracture/{side}").shuffled(range(1, 6))[:breaks]
        for k in range(8):
            y0 = 0.17 + 0.078 * k + ribs.spread(0.003)
            bend = 0.9 + ribs.spread(0.05)
            arch = y0 + (x - np.float32(cx + sign * 0.02)) * (
                x - np.float32(cx + sign * 0.02)
            ) * np.float32(bend * 2.2)
            arch = arch + np.float32(sign * 0.22) * (x - np.float32(cx))
            near = y - arch
            band = smooth(1 - near * near / np.float32(0.000121))
            reach = canvas.mask(cx, 0.48, rx + 0.045, 0.42, soft=0.3)
            image += band * reach * np.float32(0.085)
            if k in at_ribs:
                place = dice(f"rib_fracture/{side}/{k}")
                fx = cx + sign * rx * place.uniform(0.15, 0.7)
                bow = fx - cx - sign * 0.02
                fy = y0 + bow * bow * bend * 2.2 + sign * 0.22 * (fx - cx)
                gap, mask = canvas.ellipse(fx, fy, 0.013, 0.02, soft=0.5)
                image[gap] -= mask * np.float32(0.28 * contrast)
                step, mask = canvas.ellipse(fx + 0.021, fy - 0.014, 0.021, 0.013, soft=0.5)
                image[step] += mask * np.float32(0.38 * contrast)
        clav = 0.155 + (0.0 if portable else 0.035)
        tilt = 0.01 if portable else 0.07
        bone = canvas.stroke(
            [
                (0.5 + sign * 0.045 + shift, clav + tilt),
                (0.5 + sign * 0.2, clav + tilt / 3),
                (0.5 + sign * (0.34 + wide), clav - 0.015),
            ],
            0.016,
        )
        image += bone * np.float32(0.13)

    # Mediastinum, spine and heart.
    big = state("cardiomegaly")
    heart = dice("heart")
    hr = 0.118 + (0.018 if portable else 0.0) + heart.spread(0.006) + 0.062 * big
    base = 0.785 - low
    hx = 0.53 + shift + 0.35 * (hr - 0.118)
    image += canvas.mask(
        0.5 + shift, 0.32, 0.07 + (0.015 if portable else 0), 0.34, soft=0.35
    ) * np.float32(0.2)
    silhouette = canvas.mask(
        hx, base - 0.125, hr, 0.15 + 0.25 * (hr - 0.118), soft=0.16, angle=0.06
    )
    image += silhouette * np.float32(0.30)
    spine = x - np.float32(0.5 + shift * 0.4)
    image += smooth(1 - spine * spine / np.float32(0.001156)) * torso * np.float32(0.07)
    if findings["hiatal_hernia"].present:
        place = dice("hiatal_hernia")
        strength = contrast * place.uniform(0.85, 1.15)
        px, py = 0.515 + shift + place.spread(0.008), base - 0.06 + place.spread(0.008)
        at, mask = canvas.ellipse(px, py, 0.062, 0.05, soft=0.25)
        image[at] += mask * np.float32(0.18 * strength)
        at, mask = canvas.ellipse(px, py - 0.012, 0.042, 0.03, soft=0.25)
        image[at] -= mask * np.float32(0.42 * strength)

    for side, sign in (("right", -1), ("left", 1)):
        lung, cx, top, bottom, rx = lungs[side]
        if grade := state("consolidation", side):
            place = dice(f"consolidation/{side}")
            up = place.chance(0.5)
            cy = top + (bottom - top) * (0.3 if up else 0.68) + place.spread(0.02)
            patch = canvas.mask(cx + place.spread(0.02), cy, 0.085, 0.085, soft=0.75)
            mottled = 0.8 + 0.35 * canvas.clouds(place, 16)
            image += patch * mottled * lung * np.float32(0.37 * grade)
        if grade := state("pleural_effusion", side):
            place = dice(f"pleural_effusion/{side}")
            level = bottom - 0.015 - 0.13 * grade
            edge = x - np.float32(cx + sign * rx)
            curve = level + np.float32(0.9) * np.minimum(edge * edge, np.float32(0.2)) * 2
            fluid = smooth((y - curve + np.float32(0.02)) / np.float32(0.04))
            image += fluid * lung * np.float32(0.36 * (0.45 + 0.55 * contrast))
        if grade := state("pneumothorax", side):
            place = dice(f"pneumothorax/{side}")
            inset = 0.035 + 0.05 * grade
            inner = canvas.mask(
                cx - sign * inset * 0.8,
                (top + bottom) / 2 + 0.05 + inset * 0.7,
                rx - inset * 0.35,
                (bottom - top) / 2 + 0.05,
                soft=0.08,
            )
            air = lung * (1 - inner) * (1 - smooth((y - np.float32(0.56)) / np.float32(0.12)))
            image -= air * np.float32(0.15 * (0.1 + 0.9 * contrast))
            rim = inner * (1 - inner) * lung * np.float32(4)
            image += (
                rim
                * (1 - smooth((y - np.float32(0.5)) / np.float32(0.12)))
                * np.float32(0.12 * contrast)
            )
        nodules = findings["nodule"]
        if has(SPEC, nodules, side):
            place = dice(f"nodule/{side}")
            for _ in range(nodules.count or 1):
                nx = cx + sign * rx * place.uniform(-0.4, 0.65)
                ny = top + (bottom - top) * place.uniform(0.15, 0.8)
                r = place.uniform(0.02, 0.03)
                at, mask = canvas.ellipse(nx, ny, r, r, soft=0.35)
                image[at] += mask * np.float32(0.44 * contrast * place.uniform(0.9, 1.1))
        if has(SPEC, findings["atelectasis"], side):
            place = dice(f"atelectasis/{side}")
            for k in range(2):
                ay = bottom - 0.075 - 0.05 * k + place.spread(0.008)
                line = canvas.stroke(
                    [
                        (cx - rx * 0.7, ay + place.spread(0.012)),
                        (cx + rx * 0.65, ay + place.spread(0.012)),
                    ],
                    0.014,
                )
                image += line * lung * np.float32(0.3 * contrast)
        if has(SPEC, findings["central_line"], side):
            place = dice(f"central_line/{side}")
            sx = 0.5 + sign * 0.2 + place.spread(0.01)
            path = [
                (sx, 0.1),
                (0.5 + sign * 0.1 + shift, 0.19 + place.spread(0.01)),
                (0.475 + shift, 0.27),
                (0.47 + shift + place.spread(0.004), 0.47 + place.spread(0.02)),  # noqa: E501
            ]
            image += canvas.stroke(path, 0.009) * np.float32(0.34 * contrast)
        if has(SPEC, findings["pacemaker"], side):
            place = dice(f"pacemaker/{side}")
            px, py = 0.5 + sign * (0.245 + place.spread(0.012)), 0.235 + place.spread(0.012)
            at, mask = canvas.ellipse(px, py, 0.05, 0.038, soft=0.12, angle=place.uniform(0, 0.2))
            image[at] += mask * np.float32(0.38 * contrast)
            lead = [
                (px - sign * 0.03, py),
                (0.5 + shift, 0.29),
                (0.49 + shift, 0.5),
                (hx + 0.02, base - 0.09),
            ]
            image += canvas.stroke(lead, 0.008) * np.float32(0.26 * contrast)

    if attributes["leads"] == "yes":
        place = dice("leads")
        for k in range(4):
            lx, ly = (
                0.3 + 0.4 * (k % 2) + place.spread(0.03),
                0.33 + 0.33 * (k // 2) + place.spread(0.03),
            )
            at, mask = canvas.ellipse(lx, ly, 0.015, 0.015, soft=0.2)
            image[at] += mask * np.float32(0.4)
            wire = [(lx, ly), (lx + place.spread(0.08), ly + 0.15), (0.5 + place.spread(0.1), 0.99)]
            image += canvas.stroke(wire, 0.006) * np.float32(0.12)
    if dice("marker").chance(0.8):
        place = dice("marker")
        mx, my = 0.08 + place.spread(0.01), 0.09 + place.spread(0.01)
        letter = [
            (mx, my + 0.035),
            (mx, my - 0.03),
            (mx + 0.025, my - 0.03),
            (mx + 0.025, my),
            (mx, my),
            (mx + 0.028, my + 0.035),
        ]
        image += canvas.stroke(letter, 0.009) * np.float32(0.7)
    return image


SPEC = DomainSpec(
    name="radiology",
    modality="chest X-ray",
    findings=FINDINGS,
    attributes=ATTRIBUTES,
    normal=NORMAL,
    sides={
        "left": ("left", "on the left"),
        "right": ("right", "on the right"),
        "bilateral": ("bilateral", "on both sides"),
    },
    both="bilateral",
    visibility=1.2,
    render=render,
)
