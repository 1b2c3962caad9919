"""Training material for the small models: benchmark studies held in memory.

Several seeds are used, because each seed maps phenotypes to findings differently: what a
picture's look says about its findings can then only come from a reference, never from memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmedrag.phantom import (
    Canvas,
    DomainSpec,
    Knobs,
    Study,
    cells,
    has,
    load_domain,
    picture,
    studies,
)

SIZE = 64  # pixels, input of the small models
TRAIN_SEEDS = tuple(range(1000, 1012))  # never those that users or tests build with
PROBE_SEED = 1900  # of the studies that are probed while training
KNOBS = Knobs()


@dataclass
class StudySet:
    """Studies of one domain with their pictures, uint8 [n, 64, 64, 3], at model resolution."""

    domain: DomainSpec
    studies: list[Study]
    pixels: np.ndarray

    def cells(self) -> np.ndarray:
        """bool [n, cells]: presence of each (finding, side)."""
        names = cells(self.domain)
        return np.array(
            [[has(self.domain, s.findings[n], side) for n, side in names] for s in self.studies]
        )

    def attributes(self) -> np.ndarray:
        """int64 [n, attributes]: index of each attribute's value."""
        return np.array(
            [
                [list(a.values).index(s.attributes[a.name]) for a in self.domain.attributes]
                for s in self.studies
            ]
        )


def shrink(pixels: np.ndarray, size: int = SIZE) -> np.ndarray:
    """What the models' image processor makes of a picture: RGB, bicubic, ``size`` pixels."""
    image = Image.fromarray(pixels).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _draw(job: tuple[str, list[Study], Knobs]) -> np.ndarray:
    name, batch, knobs = job
    domain, canvas = load_domain(name), Canvas(knobs.size)
    return np.stack([shrink(picture(domain, study, canvas, knobs)) for study in batch])


def study_set(
    name: str, seeds: Sequence[int], each: int, knobs: Knobs = KNOBS, cache: Path | None = None
) -> StudySet:
    """``each`` studies of every seed, in order. ``cache`` keeps the pictures between runs."""
    domain = load_domain(name)
    everyone = [s for seed in seeds for s in studies(domain, each, seed, knobs)]
    path = cache / f"{name}-{seeds[0]}-{len(seeds)}x{each}-c{knobs.contrast}.npy" if cache else None
    if path and path.exists():
        pixels = np.load(path, mmap_mode="r")
    else:
        jobs = [(name, everyone[i : i + 100], knobs) for i in range(0, len(everyone), 100)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            pixels = np.concatenate(list(pool.map(_draw, jobs)))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, pixels)
    return StudySet(domain, everyone, pixels)
