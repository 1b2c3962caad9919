"""Images to projected vision features, each distinct (file, noise) encoded once.

The questions of one image, and the conditions with and without references, share its features:
four conditions need two encodes. Features are kept up to a stated number of bytes, least
recently used first out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmedrag.images import apply_noise, load_image
from mmedrag.records import Noise

View = tuple[Path, Noise | None]


def view_key(view: View) -> str:
    """Identity of what is seen: the file (and its time and size, so a changed one is re-read)
    and the noise."""
    path, noise = view
    try:
        stat = path.stat()
        version = f"{stat.st_mtime_ns}:{stat.st_size}"
    except OSError:
        version = "missing"  # load_image says so, by name
    return f"{path}|{version}|{noise.to_json() if noise else ''}"


def open_view(view: View, size: int) -> Image.Image:
    """The picture as the model's processor gets it; noise is drawn at model resolution."""
    path, noise = view
    picture = load_image(path)
    return apply_noise(picture, noise, size) if noise else picture


def image_size(processor: Any, config: Any) -> int:
    """The side of the model's input, from the processor's crop or size.

    Models of any resolution (Qwen2-VL and its kin: ``size`` is a range of areas) have no such
    side; 448 or the nearest allowed one stands for it.
    """
    images = processor.image_processor
    if hasattr(images, "merge_size"):
        low, high = images.size["shortest_edge"] or 0, images.size["longest_edge"] or 448**2
        return round(min(max(448**2, low), high) ** 0.5)
    sources = [images.crop_size] if getattr(images, "do_center_crop", False) else []
    sources.append(images.size)
    for source in sources:
        for name in ("height", "shortest_edge", "longest_edge", "max_height"):
            value = getattr(source, name, None)
            if value is None and isinstance(source, dict):
                value = source.get(name)
            if value:
                return int(value)
    return int(getattr(getattr(config, "vision_config", config), "image_size", 336))


class VisionFeatures:
    """Features of a LLaVA-shaped model: pixel values → vision tower → projector.

    ``encode`` maps pixel values [n, 3, s, s] to n tensors [tokens, width].
    """

    def __init__(
        self,
        pixels: Callable[[list[Image.Image]], torch.Tensor],
        encode: Callable[[torch.Tensor], Sequence[torch.Tensor]],
        size: int,
        max_bytes: int = 1 << 30,
        batch: int = 32,
    ) -> None:
        self.pixels, self.encode, self.size = pixels, encode, size
        self.max_bytes, self.batch = max_bytes, batch
        self.encoded = self.reused = 0
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, views: Sequence[View]) -> list[torch.Tensor]:
        """One tensor per view, in order; only unseen views are decoded and encoded."""
        keys = [view_key(view) for view in views]
        wanted = dict(zip(keys, views, strict=True))
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        missing = [key for key in wanted if key not in found]
        self.reused += len(views) - len(missing)
        chunks = [missing[i : i + self.batch] for i in range(0, len(missing), self.batch)]
        with ThreadPoolExecutor(1) as reader:  # the next chunk is decoded while this one computes
            ahead = [reader.submit(self._read, [wanted[k] for k in chunk]) for chunk in chunks[:1]]
            for number, chunk in enumerate(chunks):
                pixels = ahead.pop().result()
                if number + 1 < len(chunks):
                    after = [wanted[k] for k in chunks[number + 1]]
                    ahead.append(reader.submit(self._read, after))
                encoded = self.encode(pixels)
                found.update(zip(chunk, encoded, strict=True))
                self.encoded += len(chunk)
        for key in missing:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _read(self, views: list[View]) -> torch.Tensor:
        return self.pixels([open_view(view, self.size) for view in views])

    def _keep(self, key: str, features: torch.Tensor) -> None:
        # a slice of a batch would hold the whole batch in memory
        own = features.clone() if features._base is not None else features
        self._kept[key] = own
        self._bytes += own.numel() * own.element_size()
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0
