"""Embeddings by content: encode what was never seen, replay the rest from disk.

Place in the picture: between the encoder and everything that needs vectors (index, queries,
evaluation). The released code encodes the whole corpus, and each image once per question, at
every run (R2 of docs/differences.md). Here a vector is keyed by the sha256 of its content (text, or
bytes of the image file) and by the encoder's fingerprint.

The cache is one append-only file per encoder and kind: a sealed header, then frames of one batch
each, with checksum. Frames are written and fsynced before use; at start the file is replayed:
a torn last frame is cut off by the next writer, frames or vectors that are not sound (checksum,
not finite, not unit length) are rejected and encoded again. A batch is always the same slice of
the same list, so an interrupted run ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from collections import ChainMap
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmedrag.images import decode_image, perceptual_hash, pixel_hash
from mmedrag.records import Encoder, Preparing, UserError
from mmedrag.runtime import append_bytes, lock_file, open_log, replacing

log = logging.getLogger(__name__)
CHUNK = 128  # contents per frame: bounds the pixels in memory
MAGIC = b"mmedrag embeddings 1\n"
_FRAME = struct.Struct("<III")  # records, crc of the payload, crc of the two numbers before
Progress = Callable[[int, int], None]  # (done, total)


def text_key(text: str) -> bytes:
    return hashlib.sha256(b"text\0" + text.encode()).digest()


class Identity(Protocol):
    """What a cache needs to know of an encoder."""

    dim: int
    fingerprint: str


class HashOnly:
    """Stands for "no encoder": only pixel and perceptual hashes of images are kept."""

    dim, fingerprint = 1, hashlib.sha256(b"pixel and perceptual hash 1").hexdigest()


class EmbeddingCache:
    """Vectors of one encoder and kind ("image" or "text"), on disk (``folder``) or in memory.

    Attributes:
        rejected: how many stored vectors were not sound and were not taken.
    """

    def __init__(self, folder: Path | None, encoder: Identity, kind: str) -> None:
        self.record = np.dtype(
            [("key", "S32"), ("pixels", "S32"), ("phash", "<u8"), ("vector", "<f4", encoder.dim)]
        )
        self.frames: list[np.ndarray] = []
        self.at: MutableMapping[bytes, tuple[int, int]] = {}
        self.rejected = 0
        self._end = self._size = 0
        self._torn = False
        name = {"fingerprint": encoder.fingerprint, "kind": kind, "dim": encoder.dim}
        body = json.dumps(name, sort_keys=True).encode()
        self._header = MAGIC + body + f" {zlib.crc32(body):08x}\n".encode()
        self.path = folder / f"{encoder.fingerprint[:16]}-{kind}.emb" if folder else None
        if folder and self.path and (folder.is_symlink() or self.path.is_symlink()):
            raise UserError(f"{self.path}: a link, expected a file of the folder's own")
        if self.path and self.path.exists():
            with open(self.path, "rb") as handle:
                self._replay(handle)

    def __contains__(self, key: bytes) -> bool:
        return key in self.at

    def __len__(self) -> int:
        return len(self.at)

    def get(self, keys: Sequence[bytes]) -> np.ndarray:
        """Records (fields vector, pixels, phash) of keys that are all present."""
        out = np.zeros(len(keys), self.record)
        for i, key in enumerate(keys):
            frame, row = self.at[key]
            out[i] = self.frames[frame][row]
        return out

    def append(self, records: np.ndarray) -> None:
        """Store a batch durably, then use it. Several processes may append to one file."""
        if not len(records):
            return
        if not _sound(records).all():
            raise UserError("encoder: its output is not finite, check the model's weights")
        if self.path is None:
            self._take(records)
            return
        frame = _frame(records)
        with open_log(self.path) as handle:
            lock_file(handle, wait=True)
            self._replay(handle)  # what others appended, and where the sound part ends
            handle.truncate(self._end)
            data = frame if self._end else self._header + frame
            try:
                self._end = append_bytes(handle, data) + len(data)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._take(records)

    def scratch(self) -> EmbeddingCache:
        """This cache with additions that end with the copy: none of them reaches the disk."""
        view = copy(self)
        view.path, view.frames, view.at = None, list(self.frames), ChainMap({}, self.at)
        return view

    def keep(self, field: str, values: set[bytes]) -> None:
        """Rewrite the file with the records alone whose ``field`` is one of ``values``."""
        records = self.get(list(self.at))
        kept = records[[value in values for value in records[field].tolist()]]
        if self.path is None or len(kept) == len(records):
            return
        self.frames, self.at, self._end = [], {}, 0
        if not len(kept):
            self.path.unlink()
            self._size = 0
            return
        with replacing(self.path) as out:
            out.write(self._header)
            for start in range(0, len(kept), CHUNK):
                out.write(_frame(kept[start : start + CHUNK]))
        with open(self.path, "rb") as handle:
            self._replay(handle)

    def problems(self, torn: bool = True) -> list[str]:
        """What the constructor's replay of the file has found. ``torn``: with a last batch that
        is not whole, as a killed or a busy writer leaves it (the next one cuts it off)."""
        found = [f"{self.rejected} vectors rejected"] if self.rejected else []
        rest = self._size - self._end
        if rest > 0 and (torn or not self._torn):
            found.append(f"{rest} bytes after the last sound batch")
        return found

    def _replay(self, handle: Any) -> None:
        """Take the frames from where the last replay ended."""
        self._size = size = os.fstat(handle.fileno()).st_size
        self._torn = False
        handle.seek(self._end)
        if not self._end:
            if handle.read(len(self._header)) != self._header:
                self.rejected += size > 0
                if size:
                    log.warning("%s: not a cache of this encoder, ignored", self.path)
                return
            self._end = len(self._header)
        while True:
            head = handle.read(_FRAME.size)
            if len(head) < _FRAME.size:
                self._torn = True
                return
            count, crc, head_crc = _FRAME.unpack(head)
            payload = b""
            if zlib.crc32(head[:8]) == head_crc:
                payload = handle.read(count * self.record.itemsize)
                self._torn = len(payload) < count * self.record.itemsize
            if not payload or len(payload) < count * self.record.itemsize:
                return  # torn: the next writer cuts it off
            self._end = handle.tell()
            if zlib.crc32(payload) == crc:
                self._take(np.frombuffer(payload, self.record))
            else:
                self.rejected += count
                log.warning("%s: a batch of %d has a wrong checksum, ignored", self.path, count)

    def _take(self, records: np.ndarray) -> None:
        sound = _sound(records)
        self.rejected += int((~sound).sum())
        keys = records["key"].tobytes()  # an element would lose trailing zero bytes
        for row in np.flatnonzero(sound).tolist():
            self.at[keys[32 * row : 32 * row + 32]] = (len(self.frames), row)
        self.frames.append(records)


@dataclass
class _Stored:
    """The identity that the header of a cache tells."""

    dim: int
    fingerprint: str
    kind: str


def stored_caches(folder: Path) -> list[EmbeddingCache]:
    """Every cache in a folder, whichever encoder it is of; other files are left alone."""
    found = []
    for path in sorted(folder.glob("*.emb")) if folder.is_dir() else []:
        stored = _stored(path)
        if stored and path.name == f"{stored.fingerprint[:16]}-{stored.kind}.emb":
            found.append(EmbeddingCache(folder, stored, stored.kind))
    return found


def is_cache_file(path: Path) -> bool:
    """Whether a file is, by its header, a cache of embeddings (or one being written)."""
    return path.is_file() and not path.is_symlink() and _stored(path) is not None


def _stored(path: Path) -> _Stored | None:
    with open(path, "rb") as handle:
        if handle.read(len(MAGIC)) != MAGIC:
            return None
        body, _, crc = handle.readline(4096).rstrip(b"\n").rpartition(b" ")
    if crc != b"%08x" % zlib.crc32(body):
        return None
    return _Stored(**json.loads(body))


def _frame(records: np.ndarray) -> bytes:
    payload = records.tobytes()
    head = struct.pack("<II", len(records), zlib.crc32(payload))
    return head + struct.pack("<I", zlib.crc32(head)) + payload


def _sound(records: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(records["vector"], axis=1)
    return np.abs(norms - 1) < 1e-3  # False for NaN and inf, too


@dataclass
class ImageEmbeddings:
    """Of n items with one or more views each: unit mean vectors and what identifies the views.

    ``pixels`` [n, views] (sha256 of the decoded pixels, b"" where there are fewer views) and
    ``phash`` uint64 [n, views]. ``errors``: item number -> why it could not be read (its vector
    is zero).
    """

    vectors: np.ndarray
    pixels: np.ndarray
    phash: np.ndarray
    errors: dict[int, str]


def embed_texts(
    texts: Sequence[str], encoder: Encoder, cache: EmbeddingCache, progress: Progress | None = None
) -> np.ndarray:
    """float32 [n, dim]; equal texts are encoded once, texts in the cache not at all."""
    keys = [text_key(text) for text in texts]
    distinct = list(dict(zip(keys, texts, strict=True)).items())
    for start in range(0, len(distinct), CHUNK):
        new = [(key, text) for key, text in distinct[start : start + CHUNK] if key not in cache]
        if new:
            records = np.zeros(len(new), cache.record)
            records["key"] = [key for key, _ in new]
            records["vector"] = encoder.texts([text for _, text in new])
            cache.append(records)
        if progress:
            progress(min(start + CHUNK, len(distinct)), len(distinct))
    return cache.get(keys)["vector"]


def embed_images(
    items: Sequence[Sequence[Path]],
    encoder: Encoder | None,
    cache: EmbeddingCache,
    views: str = "mean",
    progress: Progress | None = None,
) -> ImageEmbeddings:
    """Each item is a list of views; ``views`` "mean" averages them, "first" takes the first.

    Files are read and decoded in threads while the model runs. Without an encoder only the
    hashes are computed and cached (``EmbeddingCache`` of :class:`HashOnly`).
    """
    if views not in ("mean", "first"):
        raise UserError(f"views: got {views!r}, expected 'mean' or 'first'")
    chosen = [list(item[:1] if views == "first" else item) for item in items]
    paths = list(dict.fromkeys(path for item in chosen for path in item))
    key_of: dict[Path, bytes | str] = {}
    prepare = encoder.prepare if isinstance(encoder, Preparing) else (lambda picture: picture)
    claimed: set[bytes] = set()

    def read(path: Path) -> Any:
        try:
            data = path.read_bytes()
            key = hashlib.sha256(b"image\0" + data).digest()
            if key in cache:
                return key, None
            picture = decode_image(data, str(path))
            hashes = bytes.fromhex(pixel_hash(picture)), perceptual_hash(picture)
            return key, (*hashes, prepare(picture))
        except OSError as error:
            return f"{path}: image cannot be read: {error.strerror}", None
        except UserError as error:
            return str(error), None

    starts = list(range(0, len(paths), CHUNK))
    with ThreadPoolExecutor(max_workers=2) as pool:
        ahead = [[pool.submit(read, p) for p in paths[s : s + CHUNK]] for s in starts[:1]]
        for n, start in enumerate(starts):
            if n + 1 < len(starts):
                following = paths[starts[n + 1] : starts[n + 1] + CHUNK]
                ahead.append([pool.submit(read, path) for path in following])
            new = []
            for path, future in zip(paths[start : start + CHUNK], ahead.pop(0), strict=True):
                key, made = future.result()
                key_of[path] = key
                if made is not None and key not in cache and key not in claimed:
                    claimed.add(key)
                    new.append((key, *made))
            if new:
                records = np.zeros(len(new), cache.record)
                records["key"] = [row[0] for row in new]
                records["pixels"] = [row[1] for row in new]
                records["phash"] = [row[2] for row in new]
                if encoder is None:
                    records["vector"][:, 0] = 1
                else:
                    records["vector"] = encoder.images([row[3] for row in new])
                cache.append(records)
            if progress:
                progress(min(start + CHUNK, len(paths)), len(paths))

    return _gather(chosen, key_of, cache)


def _gather(
    items: list[list[Path]], key_of: dict[Path, Any], cache: EmbeddingCache
) -> ImageEmbeddings:
    width = max((len(item) for item in items), default=1)
    dim = cache.record["vector"].shape[0]
    out = ImageEmbeddings(
        np.zeros((len(items), dim), np.float32),
        np.zeros((len(items), width), "S32"),
        np.zeros((len(items), width), np.uint64),
        {},
    )
    for i, item in enumerate(items):
        bad = dict.fromkeys(key_of[path] for path in item if isinstance(key_of[path], str))
        if bad or not item:
            out.errors[i] = "; ".join(bad) or "no image"
            continue
        keys = [key_of[path] for path in item]
        found = cache.get(keys)
        out.vectors[i] = found["vector"][0]
        if len(keys) > 1:
            mean = found["vector"].astype(np.float64).mean(axis=0)
            norm = np.linalg.norm(mean)
            if norm > 0:
                out.vectors[i] = mean / norm
        out.pixels[i, : len(keys)] = found["pixels"]
        out.phash[i, : len(keys)] = found["phash"]
    return out
