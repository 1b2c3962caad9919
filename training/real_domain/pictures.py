"""What the fit sees beside the rows: varied copies, drawn outliers, everyday pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from mmedrag.domain import features, outliers
from mmedrag.images import load_image
from mmedrag.records import Row, UserError
from mmedrag.runtime import numpy_rng

COPIES = 4  # varied copies of each picture
DRAWN, FRESH = 2500, 1000  # drawn outliers of the fit; of threshold and judgement
SIDE = 176  # pixels, longest side of a copy; the statistics look at 96
# pictures of scikit-image that its documentation calls CC0; all others are for judging alone
PHOTOS = ("brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png")
PHOTO_COPIES = 40
Rng = np.random.Generator


def vary(rng: Rng, picture: Image.Image) -> Image.Image:
    """The same kind of picture from elsewhere: crop, mirror, exposure, grain, blur, JPEG, rim."""
    wide, high = (max(8, round(s * rng.uniform(0.5, 1))) for s in picture.size)
    x = int(rng.integers(0, picture.width - wide + 1))
    y = int(rng.integers(0, picture.height - high + 1))
    if rng.random() < 0.7:
        picture = picture.crop((x, y, x + wide, y + high))
    for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        if rng.random() < 0.5:
            picture = picture.transpose(turn)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(rng.uniform(0.7, 1.35))
    pixels = (np.asarray(picture, np.float32) / 255) ** np.exp(rng.uniform(-0.5, 0.5))
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(0, 0.05), pixels.shape[:2])[..., None]
    if features.is_coloured(picture):
        pixels = pixels * np.exp(rng.normal(0, 0.04, 3))
    picture = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.4:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8)))
    if rng.random() < 0.25:
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=int(rng.integers(20, 90)))
        picture = Image.open(stored).convert("RGB")
    return _rimmed(rng, picture) if rng.random() < 0.3 else picture


def _rimmed(rng: Rng, picture: Image.Image) -> Image.Image:
    rim = int(rng.integers(2, 40))
    wide = picture.width + (rim if rng.random() < 0.5 else 0)
    ground = (0, 0, 0) if rng.random() < 0.8 else (255, 255, 255)
    larger = Image.new("RGB", (wide, picture.height + rim), ground)
    larger.paste(picture, (rim // 2, rim // 2))
    return larger


def copies(rows: Sequence[Row]) -> Iterator[Image.Image]:
    """``COPIES`` of every row's first view, in the order of the rows."""
    for number, row in enumerate(rows):
        picture = load_image(row.images[0]).convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        for copy in range(COPIES):
            yield vary(numpy_rng(10 * number + copy), picture)


def drawn(number: int, first: int) -> Iterator[Image.Image]:
    """Drawn outliers of the seeds ``first``, ``first`` + 1, …"""
    for seed in range(first, first + number):
        yield outliers.outlier(numpy_rng(seed))


def photo(name: str) -> Image.Image:
    """A picture that scikit-image carries.

    Raises:
        UserError: it is not installed.
    """
    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError("real_domain: needs scikit-image (extra dev)")
    return load_image(Path(found.origin).parent / "data" / name).convert("RGB")


def photo_copies() -> Iterator[Image.Image]:
    """``PHOTO_COPIES`` of each of ``PHOTOS``, in their order."""
    for number, name in enumerate(PHOTOS):
        picture = photo(name)
        picture.thumbnail((SIDE, SIDE))
        for copy in range(PHOTO_COPIES):
            yield vary(numpy_rng(3_000_000 + 100 * number + copy), picture)
