"""The one encoder class: two towers, a tokenizer and an image transform, from any library.

Place in the picture: ``encoders.hf`` and ``encoders.open_clip`` fill in :class:`Towers`;
:class:`TorchEncoder` does what does not depend on the library: decoding and resizing in threads
while the model runs, batches of similar length, windows for long texts, the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from mmedrag.images import load_image
from mmedrag.records import UserError
from mmedrag.retrieval.encoders.windows import windows

log = logging.getLogger(__name__)
IMAGE_BATCH, TEXT_BATCH, THREADS = 64, 128, 2
CPU_TEXT_BATCH = 32  # the activations stay in the processor's cache, and less is padded
Tokens = dict[str, torch.Tensor]


@dataclass
class Towers:
    """What a library gives: the model, and how its inputs are made.

    ``tokenize(texts)`` pads and truncates to ``context``; ``lengths(texts)`` counts tokens with
    the special ones and without truncation; ``describe`` is all that shapes the inputs, as JSON.
    """

    model: torch.nn.Module
    prepare: Callable[[Image.Image], torch.Tensor]  # [3, H, W] float32
    tokenize: Callable[[list[str]], Tokens]
    lengths: Callable[[list[str]], list[int]]
    image_features: Callable[[torch.Tensor], torch.Tensor]  # [n, 3, H, W] -> [n, dim]
    text_features: Callable[[Tokens], torch.Tensor]
    context: int
    describe: dict[str, Any]
    save: Callable[[Path], None]  # as a folder that load_encoder opens
    frozen: bool = False  # the model is small maps over features that ``prepare`` computes
    cpu_batch: int = IMAGE_BATCH  # pictures at a time on a CPU: wide maps should fit its cache


class TorchEncoder:
    """An :class:`~mmedrag.records.protocols.Encoder` over two torch towers.

    Attributes:
        dim, fingerprint: as in the protocol. ``spec``: the name it was loaded by.
        windowed, truncated: how many texts so far were longer than the context and were
            embedded as windows, or were cut.
    """

    def __init__(
        self, towers: Towers, spec: str, device: str | None, dtype: str | None, long_text: str
    ) -> None:
        self.towers, self.spec, self.long_text = towers, spec, long_text
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.fingerprint = fingerprint(towers.model, {**towers.describe, "long_text": long_text})
        self.model = towers.model.to(self.device).eval()
        self.windowed = self.truncated = 0
        sample = self.prepare(Image.new("RGB", (64, 64)))
        self.dtype = self._choose(dtype or "float32", sample)
        self.model.to(self.dtype)
        self.dim = int(self._embed(sample[None]).shape[1])

    def _choose(self, name: str, sample: torch.Tensor) -> torch.dtype:
        if name == "auto":
            batch = sample[None].repeat(16, 1, 1, 1)

            def run(dtype: torch.dtype) -> None:
                with torch.autocast(self.device.type, dtype, enabled=dtype is torch.bfloat16):
                    self._embed(batch)

            return fastest_dtype(run, self.device)
        chosen = getattr(torch, name, None)
        if not isinstance(chosen, torch.dtype):
            raise UserError(f"encoder: dtype: got {name!r}, expected float32, bfloat16 or auto")
        return chosen

    # --- images -----------------------------------------------------------------------------

    def prepare(self, image: Path | str | Image.Image | torch.Tensor) -> torch.Tensor:
        """One model input [3, H, W]; already prepared tensors pass through. Thread-safe."""
        if isinstance(image, torch.Tensor):
            return image
        picture = image if isinstance(image, Image.Image) else load_image(image)
        return self.towers.prepare(picture.convert("RGB"))

    def images(self, images: Sequence[Path | Image.Image | torch.Tensor]) -> np.ndarray:
        """float32 [n, dim], unit rows. The next batches are decoded while the model runs."""
        size = self.towers.cpu_batch if self.device.type == "cpu" else IMAGE_BATCH
        parts = [self._embed(torch.stack(b)) for b in ahead(self.prepare, images, size)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    @torch.inference_mode()
    def _embed(self, pixels: torch.Tensor) -> np.ndarray:
        dtype = next(self.model.parameters()).dtype
        return _unit(self.towers.image_features(pixels.to(self.device, dtype)))

    # --- texts ------------------------------------------------------------------------------

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim], unit rows; a text over the context is the mean of its windows."""
        pieces: list[str] = []
        owner: list[int] = []
        lengths: list[int] = []
        for i, (text, size) in enumerate(
            zip(texts, self.towers.lengths(list(texts)) if texts else [], strict=True)
        ):
            parts = [text]
            if size > self.towers.context:
                parts = self._long(text)
            pieces += parts
            owner += [i] * len(parts)
            lengths += [size] if len(parts) == 1 else self.towers.lengths(parts)
        if not pieces:
            return np.zeros((0, self.dim), np.float32)
        embedded = np.zeros((len(pieces), self.dim), np.float32)
        order = np.argsort(np.asarray(lengths), kind="stable")  # similar lengths pad less
        batch = CPU_TEXT_BATCH if self.device.type == "cpu" else TEXT_BATCH
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            embedded[rows] = self._embed_texts([pieces[r] for r in rows])
        if len(pieces) == len(texts):
            return embedded
        sums = np.zeros((len(texts), self.dim), np.float64)
        np.add.at(sums, owner, embedded.astype(np.float64))
        return (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)

    def _long(self, text: str) -> list[str]:
        if self.long_text == "truncate":
            self.truncated += 1
            return [text]
        self.windowed += 1
        parts = windows(text, lambda t: self.towers.lengths([t])[0], self.towers.context)
        longest = max(self.towers.lengths(parts), default=0)
        self.truncated += longest > self.towers.context  # a single word over the context
        return parts or [text]

    @torch.inference_mode()
    def _embed_texts(self, texts: list[str]) -> np.ndarray:
        tokens = {k: v.to(self.device) for k, v in self.towers.tokenize(texts).items()}
        return _unit(self.towers.text_features(tokens))


def _unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()


def ahead(
    prepare: Callable[[Any], Any], items: Sequence[Any], size: int, threads: int = THREADS
) -> Iterator[list[Any]]:
    """Batches of prepared items; the next two are prepared in threads while one is used."""
    starts = range(0, len(items), size)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        waiting: list[list[Any]] = []
        for start in starts:
            waiting.append([pool.submit(prepare, item) for item in items[start : start + size]])
            if len(waiting) > 2:
                yield [future.result() for future in waiting.pop(0)]
        for batch in waiting:
            yield [future.result() for future in batch]


def fingerprint(model: torch.nn.Module, describe: dict[str, Any]) -> str:
    """sha256 over every weight (name, shape, bytes) and over all that shapes the inputs."""
    digest = hashlib.sha256(json.dumps(describe, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def fastest_dtype(run: Callable[[torch.dtype], Any], device: torch.device) -> torch.dtype:
    """float32, or bfloat16 where ``run`` is measured faster. Some CPUs emulate bfloat16, a hundred
    times slower: its trial ends at the next layer once it took ten times what float32 takes."""
    seconds = {torch.float32: _best_of_three(run, torch.float32, device)}
    try:
        with _limit(max(1.0, 10 * seconds[torch.float32])):
            seconds[torch.bfloat16] = _best_of_three(run, torch.bfloat16, device)
    except TimeoutError:
        log.info("dtype probe: bfloat16 was not done in ten times what float32 takes")
    chosen = min(seconds, key=lambda d: seconds[d])
    log.info("dtype probe: %s; using %s", {str(k): round(v, 5) for k, v in seconds.items()}, chosen)
    return chosen


def _best_of_three(
    run: Callable[[torch.dtype], Any], dtype: torch.dtype, device: torch.device
) -> float:
    run(dtype)  # warms up
    found = []
    for _ in range(3):
        start = time.perf_counter()
        run(dtype)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Forward passes raise TimeoutError at the next layer once the time is over."""
    end = time.perf_counter() + seconds

    def check(*_: Any) -> None:
        if time.perf_counter() > end:
            raise TimeoutError

    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()
