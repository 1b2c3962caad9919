"""What is computed once: reference log-probabilities and frozen vision features, on disk.

Place in the picture: beside ``train``; shared by epochs, runs and pair sets. Every entry is named
by its content: a log-probability by (token ids, image bytes, noise) inside a folder named by
(model, reference adapter, number type), a feature by (image bytes, noise) inside (model, number
type). Whatever changes, template, noise, pair or weights, changes a name, so nothing stale is
ever found. Entries are appended and synced, checked when read, and a torn or damaged one is
computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmedrag.records import UserError

log = logging.getLogger(__name__)
VERSION = 1  # of the cached quantities: raised when the computation changes
_WEIGHTS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def default_folder() -> Path:
    """``$MMEDRAG_CACHE/dpo``, else ``~/.cache/mmedrag/dpo``."""
    base = os.environ.get("MMEDRAG_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "mmedrag") / "dpo"


def folder_fingerprint(folder: Path) -> str:
    """sha256 over names and bytes of a model's or adapter's files (weights, config, processor)."""
    total = hashlib.sha256()
    files = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS and p.is_file())
    if not any(p.suffix in (".safetensors", ".bin") for p in files):
        raise UserError(f"{folder}: no weights here, expected *.safetensors")
    for path in files:
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{path.name}\0{digest}\n".encode())
    return total.hexdigest()


class Journal:
    """Append-only JSON Lines of ``key → value``, each line with a checksum.

    Several processes may fill one journal: each appends to its own file and reads all.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], writer: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if writer == 0:
            (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
        self.folder, self.writer = folder, writer
        self.entries: dict[str, Any] = {}
        self.damaged = 0
        self.reload()

    def reload(self) -> None:
        self.entries, self.damaged = {}, 0
        for path in sorted(self.folder.glob("index-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                if not line:
                    continue
                try:
                    key, value, check = json.loads(line)
                    sound = check == _checksum(key, value)
                except (ValueError, TypeError):
                    sound = False
                if sound:
                    self.entries[key] = value
                else:
                    self.damaged += 1
        if self.damaged:
            log.warning("%s: %d damaged entries will be computed again", self.folder, self.damaged)

    def append(self, items: Sequence[tuple[str, Any]]) -> None:
        path = self.folder / f"index-{self.writer}.jsonl"
        lines = [json.dumps([k, v, _checksum(k, v)]) + "\n" for k, v in items]
        with open(path, "ab") as handle:
            torn = handle.tell() > 0 and _last_byte(path) != b"\n"
            handle.write(("\n" * torn + "".join(lines)).encode())
            handle.flush()
            os.fsync(handle.fileno())
        self.entries.update(items)

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self.entries]


def _checksum(key: str, value: Any) -> int:
    return zlib.crc32(json.dumps([key, value]).encode())


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read()


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
        with open(path, "ab") as handle:
            start = handle.tell()
            handle.write(raw.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
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
