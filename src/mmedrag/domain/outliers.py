"""Pictures that belong to no domain, made without a single photograph.

Place in the picture: training of the domain model. "Unknown" is learned by outlier exposure
(Hendrycks et al. 2019) to what can be drawn by a program: noise, blanks, patterns, pages, and
"dead leaves" - overlapping shapes, whose statistics resemble those of photographs (Lee, Mumford
and Huang 2001) - and to the training pictures themselves with exchanged colour channels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

SWAPS = ((1, 2, 0), (2, 0, 1), (0, 2, 1), (1, 0, 2), (2, 1, 0))  # every order but the true one
Rng = np.random.Generator


def swap_channels(picture: Image.Image, order: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(np.asarray(picture.convert("RGB"))[..., order]))


def vary(rng: Rng, picture: Image.Image) -> Image.Image:
    """The same kind of picture seen a little differently: crop, mirror, exposure, stain."""
    wide, high = (max(1, round(s * rng.uniform(0.75, 1.0))) for s in picture.size)
    x = int(rng.integers(0, picture.width - wide + 1))
    y = int(rng.integers(0, picture.height - high + 1))
    picture = picture.crop((x, y, x + wide, y + high))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(rng.uniform(0.82, 1.2))
    return picture


def outlier(rng: Rng, size: int = 128) -> Image.Image:
    """One drawn picture, of a random kind."""
    kinds = (dead_leaves, fractal, page, checkerboard, noise, blank)
    kind = kinds[int(rng.choice(len(kinds), p=(0.45, 0.15, 0.12, 0.06, 0.12, 0.1)))]
    return Image.fromarray(np.clip(kind(rng, size), 0, 255).astype(np.uint8))


def _colour(rng: Rng, grey: bool) -> np.ndarray:
    return np.repeat(rng.integers(0, 256), 3) if grey else rng.integers(0, 256, 3)


def fractal(
    rng: Rng, size: int, steep: float | None = None, grey: bool | None = None
) -> np.ndarray:
    """1/f^a noise with correlated colours: clouds, rough surfaces."""
    steep = float(rng.uniform(0, 2.2)) if steep is None else steep
    grey = rng.random() < 0.4 if grey is None else grey
    f = np.fft.fftfreq(size) * size
    radius = np.maximum(np.hypot(f[:, None], f[None]), 1)
    white = rng.standard_normal((1 if grey else 3, size, size))
    field = np.moveaxis(np.real(np.fft.ifft2(np.fft.fft2(white) / radius**steep)), 0, 2)
    field = field / (field.std(axis=(0, 1)) + 1e-6)
    if not grey:
        mix = np.eye(3) * rng.uniform(0.2, 1) + rng.standard_normal((3, 3)) * rng.uniform(0.2, 1)
        field = field @ mix
    middle = rng.integers(40, 216, 1 if grey else 3)
    return np.broadcast_to(field * rng.uniform(15, 70) + middle, (size, size, 3))


def dead_leaves(rng: Rng, size: int) -> np.ndarray:
    """Overlapping discs, boxes and polygons of few colours, shaded, textured, blurred."""
    grey = rng.random() < 0.4
    palette = [_colour(rng, grey) for _ in range(int(rng.integers(2, 8)))]
    picture = Image.new("RGB", (size, size), tuple(int(v) for v in _colour(rng, grey)))
    draw = ImageDraw.Draw(picture)
    shape = int(rng.integers(4))
    for _ in range(int(rng.integers(3, 250))):
        radius = max(1.5, size * 0.5 * rng.random() ** rng.uniform(1.5, 5))
        x, y = rng.uniform(0, size, 2)
        shift = np.repeat(rng.normal(0, 20), 3) if grey else rng.normal(0, 20, 3)
        colour = palette[int(rng.integers(len(palette)))] + shift
        fill = tuple(int(v) for v in np.clip(colour, 0, 255))
        kind = shape if shape < 3 else int(rng.integers(3))
        flat = radius * rng.uniform(0.25, 1)
        if kind == 2:
            turns = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
            corners = [(x + radius * np.cos(t), y + radius * np.sin(t)) for t in turns]
            draw.polygon(corners, fill=fill)
        else:
            box = (x - radius, y - flat, x + radius, y + flat)
            (draw.ellipse if kind == 0 else draw.rectangle)(box, fill=fill)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2)))
    pixels = np.asarray(picture, dtype=np.float64)
    if rng.random() < 0.6:
        surface = fractal(rng, size, rng.uniform(0.5, 2), grey=True) / 255 - 0.5
        pixels = pixels * (1 + rng.uniform(0, 0.9) * surface)
    if rng.random() < 0.5:
        slope = np.linspace(0, 1, size)
        light = rng.uniform(-0.5, 0.5) * slope[None] + rng.uniform(-0.5, 0.5) * slope[:, None]
        pixels = pixels * (1 + light[..., None])
    return pixels


def page(rng: Rng, size: int) -> np.ndarray:
    """Rows of dark marks on a light ground, or the reverse: print, bricks, windows."""
    ground, ink = float(rng.integers(120, 256)), float(rng.integers(0, 120))
    if rng.random() < 0.3:
        ground, ink = ink, ground
    pixels = np.full((size, size), ground)
    high, gap = int(rng.integers(2, 16)), int(rng.integers(1, 8))
    longest = int(rng.integers(4, 40))
    for top in range(int(rng.integers(0, 10)), size - high, high + gap):
        x = int(rng.integers(0, 12))
        while x < size - 4:
            wide = int(rng.integers(2, longest))
            block = pixels[top : top + high, x : x + wide]
            block[...] = ink + rng.normal(0, 25, block.shape)
            x += wide + int(rng.integers(1, 5))
    pixels = pixels * (1 + rng.uniform(-0.3, 0.3) * np.linspace(0, 1, size)[None])
    tint = rng.uniform(0.7, 1, 3) if rng.random() < 0.5 else np.ones(3)
    return pixels[..., None] * tint


def checkerboard(rng: Rng, size: int) -> np.ndarray:
    cells = np.arange(size) * int(rng.integers(2, 12)) // size
    odd = ((cells[:, None] + cells[None]) % 2)[..., None]
    grey = rng.random() < 0.5
    return odd * _colour(rng, grey) + (1 - odd) * _colour(rng, grey)


def noise(rng: Rng, size: int) -> np.ndarray:
    """Independent pixels: clipped normal (the released noise), uniform, grey; coarse or fine."""
    kind, small = int(rng.integers(4)), size // int(rng.choice([1, 1, 2, 4]))
    if kind == 0:
        drawn = np.clip(rng.standard_normal((small, small, 3)), 0, 1) * 255
    elif kind == 1:
        drawn = rng.uniform(0, 255, (small, small, 3))
    else:
        channels = 1 if kind == 2 or rng.random() < 0.5 else 3
        drawn = rng.normal(rng.uniform(30, 225), rng.uniform(5, 90), (small, small, channels))
    drawn = np.broadcast_to(np.clip(drawn, 0, 255), (small, small, 3)).astype(np.uint8)
    resized = Image.fromarray(drawn).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float64)


def blank(rng: Rng, size: int) -> np.ndarray:
    """One colour, or a slope between two, with hardly any grain."""
    pixels = np.broadcast_to(_colour(rng, rng.random() < 0.5), (size, size, 3)).astype(np.float64)
    if rng.random() < 0.5:
        pixels = pixels + np.linspace(-1, 1, size)[None, :, None] * rng.uniform(0, 60, 3)
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, rng.uniform(0, 4), (size, size, 1))
    return pixels
