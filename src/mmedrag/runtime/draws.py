"""Random numbers from a seed and keys: the same on every machine and in every order."""

from __future__ import annotations

import hashlib


def seeded_int(seed: int, *keys: str) -> int:
    """A 31-bit number from a seed and keys; the same on every machine."""
    text = "\0".join([str(seed), *keys])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
