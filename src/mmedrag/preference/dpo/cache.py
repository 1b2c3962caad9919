"""What is computed once: reference log-probabilities and frozen vision features, on disk.

Place in the picture: beside train_dpo; shared by epochs, runs and pair sets. Every entry is named
by its content: a log-probability by (token ids, image bytes, noise) inside a folder named by
(model, reference adapter, number type), a feature by (image bytes, noise) inside (model, number
type). Whatever changes, template, noise, pair or weights, changes a name, so nothing stale is
ever found. Entries are appended and synced, checked when read, and a torn or damaged one is
computed again.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmedrag.records import UserError
from mmedrag.runtime import (
    append_bytes,
    cache_folder,
    journal,
    lock_file,
    open_log,
    sha256_of,
    write_json,
)

log = logging.getLogger(__name__)
VERSION = 1  # of the cached quantities: raised when the computation changes
_WEIGHTS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def default_folder() -> Path:
    """``dpo`` in the cache folder."""
    return cache_folder("dpo")


def folder_fingerprint(folder: Path) -> str:
    """sha256 over names and bytes of a model's or adapter's files (weights, config, processor)."""
    files = [p for p in folder.iterdir() if p.suffix in _WEIGHTS and p.is_file()]
    if not any(p.suffix in (".safetensors", ".bin") for p in files):
        raise UserError(f"{folder}: no weights here, expected *.safetensors")
    return sha256_of(folder, files)


class Journal:
    """``key → value`` of a folder that several processes fill: each appends to a journal of its
    own and reads all."""

    def __init__(self, folder: Path, about: Mapping[str, Any], writer: int = 0) -> None:
        if writer == 0:
            write_json(folder / "about.json", about, indent=2)
        self.folder, self.writer = folder, writer
        self._own = self._open(folder / f"index-{writer}.jsonl")
        self.reload()

    def _open(self, path: Path) -> journal.Journal:
        return journal.Journal(path, shared=True, older=_older)

    def reload(self) -> None:
        """Read all, with what other processes have added."""
        self.entries: dict[str, Any] = {}
        self.damaged = 0
        for path in sorted(self.folder.glob("index-*.jsonl")):
            found = self._open(path)
            self.entries |= zip(found.where, map(json.loads, found.rows(found.where)), strict=True)
            self.damaged += found.damaged
        if self.damaged:
            log.warning("%s: %d damaged entries will be computed again", self.folder, self.damaged)

    def append(self, items: Sequence[tuple[str, Any]]) -> None:
        self._own.append({key: json.dumps(value) for key, value in items})
        self.entries.update(items)

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self.entries]


def _older(line: bytes) -> tuple[str, bytes]:
    """A line as it was before: the JSON list ``[key, value, checksum]``."""
    try:
        key, value, check = json.loads(line)
    except TypeError:
        raise ValueError("not a list of three") from None
    if check != zlib.crc32(json.dumps([key, value]).encode()):
        raise ValueError("its checksum differs")
    return key, json.dumps(value).encode()


class FeatureStore:
    """Vision features [patches, width] by view key, in one flat file per writer (memory-mapped)."""

    def __init__(self, folder: Path, about: Mapping[str, Any], writer: int = 0) -> None:
        self.journal = Journal(folder, about, writer)
        self.maps: dict[str, np.ndarray] = {}
        self.dtype = torch.float32
        self._verify()

    def reload(self) -> None:
        """See what other processes have added."""
        self.journal.reload()
        self._verify()

    def missing(self, keys: Iterable[str]) -> list[str]:
        return self.journal.missing(keys)

    def append(self, keys: Sequence[str], features: Tensor) -> None:
        """Add features [n, patches, width]; the data is on disk before its index lines."""
        raw = _as_bytes(features)
        name = f"features-{self.journal.writer}.bin"
        path = self.journal.folder / name
        with open_log(path) as handle:
            lock_file(handle, wait=True)
            start = append_bytes(handle, raw.tobytes())
        size = raw.shape[1]
        shape, number = list(features.shape[1:]), str(features.dtype).removeprefix("torch.")
        items = [
            (key, [name, start + i * size, size, shape, number, zlib.crc32(raw[i].tobytes())])
            for i, key in enumerate(keys)
        ]
        self.journal.append(items)
        self.maps.pop(name, None)

    def get(self, keys: Sequence[str]) -> Tensor:
        """Features [len(keys), patches, width] on the CPU."""
        return torch.stack([self._one(self.journal.entries[key]) for key in keys])

    def _one(self, entry: list[Any]) -> Tensor:
        name, start, size, shape, number, _ = entry
        flat = torch.from_numpy(self._map(name)[start : start + size].copy())
        return flat.view(getattr(torch, number)).reshape(shape)

    def _map(self, name: str) -> np.ndarray:
        if name not in self.maps:
            self.maps[name] = np.memmap(self.journal.folder / name, dtype=np.uint8, mode="r")
        return self.maps[name]

    def _verify(self) -> None:
        """Forget entries whose bytes are gone or changed."""
        self.maps = {}
        bad = []
        for key, (name, start, size, _, _, check) in self.journal.entries.items():
            path = self.journal.folder / name
            there = path.exists() and path.stat().st_size >= start + size
            if not there or zlib.crc32(self._map(name)[start : start + size].tobytes()) != check:
                bad.append(key)
        for key in bad:
            del self.journal.entries[key]
        if bad:
            log.warning(
                "%s: %d damaged features will be computed again", self.journal.folder, len(bad)
            )


def _as_bytes(features: Tensor) -> np.ndarray:
    """uint8 [n, bytes per item]; bfloat16 has no numpy type, so the bytes are taken."""
    flat = features.detach().cpu().contiguous().flatten(1)
    return flat.view(torch.uint8).numpy()
