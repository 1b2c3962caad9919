"""images.noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mmedrag.images.files import load_image
from mmedrag.records import Noise, UserError
from mmedrag.runtime import numpy_rng


def pad_to_square(
    picture: Image.Image, size: int, fill: tuple[int, int, int] = (0, 0, 0)
) -> Image.Image:
    """Padded to a centred square and resized (bicubic) to size x size, RGB."""
    rgb = picture.convert("RGB")
    side = max(rgb.size)
    if rgb.width != rgb.height:
        square = Image.new("RGB", (side, side), fill)
        square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
        rgb = square
    return rgb if side == size else rgb.resize((size, size), Image.Resampling.BICUBIC)


def apply_noise(picture: Image.Image, noise: Noise, size: int) -> Image.Image:
    """x_v* = I(x_v): the degraded picture, RGB size x size, the same for the same seed.

    Drawn at the model's resolution, so that resizing cannot average it away (released fault
    B9: drawn at native size, a large film became near-uniform grey). Kinds and params:

    - ``gaussian_clip``: clip(N(0,1), 0, 1) · 255 as released (train_dpo_2stages.py:93-98); the
      picture is ignored: half of the values are 0, 16 % are 255.
    - ``additive``: picture/255 + sigma · N(0,1), clipped (released report generation);
      ``sigma`` 1.0.
    - ``blank``: one ``value`` everywhere (0..255, 127).
    - ``other_patient``: another picture, the file ``path``.
    - ``shuffle_patches``: squares of ``patch`` pixels (size/8) in random order.
    """
    rng = numpy_rng(noise.seed)
    params = dict(noise.params)

    def number(key: str, default: float) -> float:
        value = params.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"noise {noise.kind}: {key}: got {value!r}, expected a number")
        return float(value)

    if noise.kind == "gaussian_clip":
        drawn = np.clip(rng.standard_normal((size, size, 3)), 0, 1) * 255
    elif noise.kind == "additive":
        base = np.asarray(pad_to_square(picture, size), dtype=np.float64) / 255
        drawn = base + number("sigma", 1.0) * rng.standard_normal((size, size, 3))
        drawn = np.clip(drawn, 0, 1) * 255
    elif noise.kind == "blank":
        drawn = np.full((size, size, 3), np.clip(number("value", 127), 0, 255))
    elif noise.kind == "other_patient":
        other = params.get("path")
        if not isinstance(other, (str, Path)) or not str(other):
            raise UserError("noise other_patient: path: missing, expected the other image's file")
        return pad_to_square(load_image(other), size)
    elif noise.kind == "shuffle_patches":
        patch = int(number("patch", max(1, size // 8)))
        if not 1 <= patch <= size:
            raise UserError(f"noise shuffle_patches: patch: got {patch}, expected 1..{size}")
        drawn = _shuffled(np.asarray(pad_to_square(picture, size)), patch, rng)
    else:
        raise UserError(f"noise: kind {noise.kind!r} is not known")
    return Image.fromarray(drawn.astype(np.uint8))


def _shuffled(pixels: np.ndarray, patch: int, rng: np.random.Generator) -> np.ndarray:
    """Whole patches permuted; a remainder at the right and lower edge stays in place."""
    out, count = pixels.copy(), pixels.shape[0] // patch
    order = rng.permutation(count * count)
    for target, origin in enumerate(order):
        (ty, tx), (oy, ox) = divmod(target, count), divmod(int(origin), count)
        out[ty * patch : (ty + 1) * patch, tx * patch : (tx + 1) * patch] = pixels[
            oy * patch : (oy + 1) * patch, ox * patch : (ox + 1) * patch
        ]
    return out
