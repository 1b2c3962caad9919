"""Chance by name: every draw that decides an output is a function of a seed and names.

Place in the picture: under splits, noise, sampling, benchmarks and bounds. What is drawn for a row
depends on the seed and on what the row is called, never on what was drawn before it, so that
another order, batch or number of processes gives the same. One formula hashes the names
(:func:`seeded_int`); the others hand a seed to a stream that Python, numpy or torch specifies.
The separators and widths are those that files already made were drawn with.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seeded_int(seed: object, *names: object, joint: str = "\0", bits: int = 31) -> int:
    """The first ``bits`` bits (at most 256) of the sha256 of seed and names, ``joint`` between
    them; the same on every machine."""
    text = joint.join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") >> (256 - bits)


def seeded_share(seed: int, *names: object) -> float:
    """A number in [0, 1): below p for a share p of all names (splits, held-out patients)."""
    return seeded_int(seed, *names, joint=":", bits=64) / 2**64


def python_rng(seed: int) -> random.Random:
    """Python's Mersenne Twister, seeded by a number: for shuffles."""
    return random.Random(seed)


def named_random(*names: object) -> random.Random:
    """The same, seeded by ``a/b/c``: for scalars."""
    return random.Random("/".join(str(part) for part in names))


def numpy_rng(seed: int, *stream: int) -> np.random.Generator:
    """numpy's default generator, for arrays; ``stream`` numbers keep the uses of a seed apart."""
    return np.random.default_rng([seed, *stream])


def random_words(seed: int, count: int) -> np.ndarray:
    """uint64 [count]: the bits of PCG64 themselves, for what no library may convert (its way from
    bits to floats may change between versions)."""
    return np.random.PCG64(seed).random_raw(count)


def torch_rng(seed: int) -> torch.Generator:
    """A generator on the CPU: its numbers do not depend on the device that trains."""
    import torch

    return torch.Generator().manual_seed(seed)
