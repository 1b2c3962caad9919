"""An index: the references of one domain as vectors and rows in an inspectable folder.

Place in the picture: what ``retriever[d].search`` looks into. Layout::

    INDEX/manifest.json          settings, encoder, sha256 of every file; written last, atomically
    INDEX/rows-000003.parquet    the references: text, patient, source, hashes of their images
    INDEX/vectors-000003.faiss   their vectors, in the same order
    INDEX/cache/*.emb            embeddings by content (may be deleted; then encoding repeats)

Public functions (stable); what changes an index is in :mod:`mmedrag.retrieval.index_build`::

    index_info(path) -> dict
    verify_index(path) -> list[str]             # findings; empty: sound
    IndexFolder.open(path) -> IndexFolder
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mmedrag.records import Encoder, Reference, UserError, resolve_object
from mmedrag.retrieval.embeddings import EmbeddingCache, HashOnly
from mmedrag.retrieval.encoders.load import load_encoder
from mmedrag.retrieval.stores import folder
from mmedrag.retrieval.stores.engines import STORES

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)
CHECK_AT_OPEN = 64 << 20  # files up to this size are hashed at each open; verify hashes all
COLUMNS = ("id", "text", "domain", "patient", "split", "source", "licence", "attribution")


@dataclass(frozen=True)
class Filter:
    """Which references may be found; None means any. Dates are ISO strings, ends included."""

    patient: Sequence[str] | None = None
    source: Sequence[str] | None = None
    split: Sequence[str] | None = None
    domain: Sequence[str] | None = None
    date_from: str | None = None
    date_to: str | None = None

    @classmethod
    def parse(cls, conditions: Sequence[str]) -> Filter | None:
        """From ``key=value`` words (``from`` and ``to`` are the dates); values of one key add up.

        Raises:
            UserError: an unknown key, no value, or two dates for one end.
        """
        ends = {"from": "date_from", "to": "date_to"}
        lists: dict[str, list[str]] = {}
        for condition in conditions:
            key, _, value = condition.partition("=")
            if key not in ("patient", "source", "split", "domain", *ends) or not value:
                raise UserError(
                    f"--where {condition}: expected patient=, source=, split=, domain=, from= or "
                    "to= and a value"
                )
            lists.setdefault(key, []).append(value)
        doubled = [key for key in ends if len(lists.get(key, [])) > 1]
        if doubled:
            raise UserError(f"--where {doubled[0]}=: given twice, expected one date")
        dates = {ends[key]: lists.pop(key)[0] for key in ends if key in lists}
        given: dict[str, Any] = {**lists, **dates}
        return cls(**given) if given else None


class IndexFolder:
    """A read-only view of a committed index; a writer's later commit does not disturb it.

    Attributes:
        manifest, store, domain, ids; ``patients`` strings [n] (None: unknown); ``pixels`` S32
        [n, views] and ``phash`` uint64 [n, views] of the rows' own images.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        self.path, self.manifest = path, manifest
        wrong = folder.check_files(path, manifest, CHECK_AT_OPEN)
        if wrong:
            raise folder.Damaged(f"{path}: index is damaged: {'; '.join(wrong)}; {folder.REPAIR}")
        names = {name.split("-")[0]: path / name for name in manifest["files"]}
        # held open: a later commit may unlink the file, what was opened stays readable
        self._file = pq.ParquetFile(names["rows"], memory_map=True)
        self._columns: dict[str, pa.ChunkedArray] = {}
        self.ids: list[str] = self._read("id").to_pylist()
        store = resolve_object(manifest["store"], STORES, "store")
        self.store = store.open(names["vectors"], manifest["vectors"], self.ids)
        strings = np.dtypes.StringDType(na_object=None)
        self.patients = np.array(self._read("patient").to_pylist(), dtype=strings)
        self.pixels, self.phash = _hash_arrays(self._read("pixels"), self._read("phash"))

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the committed state.

        Raises:
            UserError: no index, another format, or a damaged one (with what to do).
        """
        path = Path(path)
        return folder.consistent(path, lambda manifest: cls(path, manifest))

    @property
    def domain(self) -> str | None:
        return self.manifest["domain"]

    def __len__(self) -> int:
        return len(self.ids)

    def texts(self, rows: Iterable[int]) -> list[str]:
        texts = self._column("text")
        return [texts[row].as_py() for row in rows]

    def references(self) -> list[Reference]:
        """The stored rows, in order."""
        return [_reference(row) for row in self.rows()]

    def rows(self) -> list[dict[str, Any]]:
        """The stored rows with every column, in order."""
        return self._file.read().to_pylist()

    def _column(self, name: str) -> pa.ChunkedArray:
        """A stored column, kept from when it is first asked for."""
        if name not in self._columns:
            self._columns[name] = self._read(name)
        return self._columns[name]

    def _read(self, name: str) -> pa.ChunkedArray:
        import pyarrow as pa

        column = self._file.read(columns=[name], use_threads=False)[name]
        pa.default_memory_pool().release_unused()  # unpacking took several times the column
        return column

    def mask(self, wanted: Filter) -> np.ndarray:
        """bool [n]: rows that pass the filter (a row without the field does not)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        keep = np.ones(len(self), dtype=bool)
        for name in ("patient", "source", "split", "domain"):
            values = getattr(wanted, name)
            if values is not None:
                values = [values] if isinstance(values, str) else list(values)
                found = pc.is_in(self._column(name), value_set=pa.array(values, pa.string()))
                keep &= found.to_numpy(zero_copy_only=False)
        for bound, compare in (
            (wanted.date_from, pc.greater_equal),
            (wanted.date_to, pc.less_equal),
        ):
            if bound is not None:
                found = pc.fill_null(compare(self._column("date"), bound), False)
                keep &= found.to_numpy(zero_copy_only=False)
        return keep

    def encoder(self, spec: str | None = None, device: str | None = None) -> Encoder:
        """The encoder this index was built with, from where it was or from ``spec``.

        Raises:
            UserError: not there any more, or another encoder than the index was built with.
        """
        made_with = self.manifest["encoder"]
        encoder = load_encoder(
            spec or found_spec(made_with["spec"], self.path), device, None, made_with["long_text"]
        )
        self.check(encoder)
        return encoder

    def check(self, encoder: Encoder) -> None:
        expected = self.manifest["encoder"]["fingerprint"]
        if encoder.fingerprint != expected:
            raise UserError(
                f"{self.path}: built with encoder {self.manifest['encoder']['spec']} "
                f"({expected[:12]}), got {encoder.fingerprint[:12]}; scores of two encoders "
                "cannot be compared: give the same one, or build the index again"
            )

    def info(self) -> dict[str, Any]:
        m = self.manifest
        return {
            "count": len(self),
            "domain": m["domain"],
            "encoder": m["encoder"],
            "dim": m["encoder"]["dim"],
            "engine": m["vectors"],
            "key": m["key"],
            "generation": m["generation"],
            "format": m["format"],
            "patients": len({p for p in self.patients if p is not None}),
            "bytes": sum(entry["bytes"] for entry in m["files"].values()),
        }


def index_info(path: str | Path) -> dict[str, Any]:
    return IndexFolder.open(path).info()


def verify_index(path: str | Path) -> list[str]:
    """Every file against the manifest, rows against vectors, and the caches. Empty: sound."""
    path = Path(path)
    try:
        manifest = folder.read_manifest(path)
        findings = folder.check_files(path, manifest)
        if not findings:
            index = IndexFolder.open(path)
            norms = np.linalg.norm(index.store.vectors(), axis=1)
            if not np.allclose(norms, 1, atol=1e-3):
                findings.append("vectors: not all of unit length")
    except folder.Damaged as error:
        return [str(error)]
    encoder = Named(manifest["encoder"])
    for kind, of in (("text", encoder), ("image", encoder), ("image", HashOnly())):
        cache = EmbeddingCache(path / "cache", of, kind)
        if cache.path:
            findings += [f"cache/{cache.path.name}: {p}" for p in cache.problems()]
    return findings


class Named:
    """The identity of an encoder that is not loaded."""

    def __init__(self, manifest_encoder: dict[str, Any]) -> None:
        self.fingerprint, self.dim = manifest_encoder["fingerprint"], manifest_encoder["dim"]


def _reference(row: dict[str, Any]) -> Reference:
    given = {name: row[name] for name in COLUMNS if row[name] is not None}
    if row["images"]:
        given["image"] = row["images"][0] if len(row["images"]) == 1 else row["images"]
    return Reference(**given, meta=json.loads(row["meta"]))


def _hash_arrays(pixels: pa.ChunkedArray, phash: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """sha256 S32 and perceptual hashes uint64 [n, views] of lists of either, b"" and 0 padded."""
    import pyarrow.compute as pc

    counts = _numbers(pc.list_value_length(pixels)).astype(np.int64)
    width, total = int(counts.max(initial=0)) or 1, int(counts.sum())
    row = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    of_pixels = np.zeros((len(counts), width), "S32")
    of_phash = np.zeros((len(counts), width), np.uint64)
    if total:
        flat = pc.list_flatten(pixels)
        digits = b"".join(_characters(chunk) for chunk in flat.chunks if len(chunk))
        of_pixels[row, column] = np.frombuffer(bytes.fromhex(digits.decode()), "S32")
        of_phash[row, column] = _numbers(pc.list_flatten(phash))
    return of_pixels, of_phash


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """As an array, by a way that does not import pandas (``to_numpy`` does: 25 MiB)."""
    return np.from_dlpack(column.combine_chunks())


def _characters(strings: pa.StringArray) -> bytes:
    """All strings of an array one after the other (without an object for each)."""
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int32)[strings.offset :]
    return data.slice(ends[0], ends[len(strings)] - ends[0]).to_pybytes()


def stored_spec(spec: str, path: Path) -> str:
    """Folders are stored relative to the index, so that both can move together."""
    return f"relative:{os.path.relpath(spec, path)}" if spec and Path(spec).is_dir() else spec


def found_spec(spec: str, path: Path) -> str:
    if not spec.startswith("relative:"):
        return spec
    target = Path(os.path.normpath(path / spec.removeprefix("relative:")))
    if not target.is_dir():
        raise UserError(f"{path}: its encoder is not at {target} any more, give --retriever")
    return str(target)
