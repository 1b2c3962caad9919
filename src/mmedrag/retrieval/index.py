"""An index: the references of one domain as vectors and rows in an inspectable folder.

Place in the picture: what ``retriever[d].search`` looks into. Layout::

    INDEX/manifest.json          settings, encoder, sha256 of every file; written last, atomically
    INDEX/rows-000003.parquet    the references: text, patient, source, hashes of their images
    INDEX/vectors-000003.faiss   their vectors, in the same order
    INDEX/encoder-<hash>/        a copy of the encoder, when it is a small folder of one's own
    INDEX/cache/*.emb            embeddings by content (may be deleted; then encoding repeats)

An index is data: it names no code, and nothing outside of itself is read because of it.

Public functions (stable); what changes an index is in :mod:`mmedrag.retrieval.index_build`::

    index_info(path) -> dict
    verify_index(path) -> list[str]             # findings; empty: sound
    IndexFolder.open(path) -> IndexFolder
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mmedrag.records import Encoder, Reference, UserError, resolve_object
from mmedrag.retrieval.embeddings import EmbeddingCache, stored_caches, text_key
from mmedrag.retrieval.encoders.load import encoder_of_folder, is_shipped, load_encoder
from mmedrag.retrieval.stores import folder
from mmedrag.retrieval.stores.engines import STORES

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)
SAMPLE = 64  # rows that verify encodes again where no cached vector tells
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
        self.path, self.manifest = path, manifest
        wrong = folder.check_files(path, manifest, CHECK_AT_OPEN)
        if wrong:
            raise folder.Damaged(f"{path}: index is damaged: {'; '.join(wrong)}; {folder.REPAIR}")
        try:
            self._open()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise folder.Damaged(f"{path}: not what an index holds ({what})") from None

    def _open(self) -> None:
        import pyarrow.parquet as pq

        path, manifest = self.path, self.manifest
        if manifest["store"] not in STORES:
            raise UserError(
                f"{path}: its store {str(manifest['store'])!r} is not one of {', '.join(STORES)}; "
                "names of code are not taken from a folder"
            )
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
        found = spec or encoder_of_folder(made_with["spec"], self.path)
        encoder = load_encoder(found, device, None, made_with["long_text"])
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
        return folder.consistent(path, lambda manifest: _verify(path, manifest))
    except folder.Damaged as error:
        return [str(error)]


def _verify(path: Path, manifest: dict[str, Any]) -> list[str]:
    if wrong := folder.check_files(path, manifest):
        raise folder.Damaged("; ".join(wrong))  # looked at again, if a writer has just committed
    findings = []
    index = IndexFolder(path, manifest)
    vectors = index.store.vectors()
    if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        findings.append("vectors: not all of unit length")
    if manifest["vectors"]["kind"] in ("flat", "ivf", "hnsw") and manifest["key"] == "text":
        findings += _mismatched(index, vectors)
    spec = manifest["encoder"]["spec"]
    if spec:
        try:
            encoder_of_folder(spec, path)
        except UserError as error:
            if not _of_the_user(spec):
                findings.append(str(error))
    caches = stored_caches(path / "cache")
    for cache in caches:
        if cache.path:
            findings += [f"cache/{cache.path.name}: {p}" for p in cache.problems(torn=False)]
    read = {cache.path for cache in caches}
    for file in sorted(set((path / "cache").glob("*.emb")) - read):
        if file.is_file() and file.stat().st_size:  # nothing is in it where the disk was full
            findings.append(f"cache/{file.name}: not a cache of embeddings (damaged, or not ours)")
    return findings


def _of_the_user(spec: str) -> bool:
    """A name that may be given by ``--retriever``, which an index may well tell but not use."""
    return not spec.startswith("inside:")


def _mismatched(index: IndexFolder, vectors: np.ndarray) -> list[str]:
    """Rows whose text is not what their vector was made of: by the cache, else (for an encoder
    that ships) by encoding some of them again."""
    texts = index.texts(range(len(index)))
    cache = EmbeddingCache(index.path / "cache", Named(index.manifest["encoder"]), "text")
    known = [n for n, text in enumerate(texts) if text_key(text) in cache]
    expected: np.ndarray
    if known:
        expected = cache.get([text_key(texts[n]) for n in known])["vector"]
    elif is_shipped(index.manifest["encoder"]["spec"]):
        known = list(range(0, len(texts), -(-len(texts) // SAMPLE)))
        expected = index.encoder(device="cpu").texts([texts[n] for n in known])
    else:
        return []
    wrong = np.flatnonzero(np.abs(expected - vectors[known]).max(axis=1) > 1e-2)
    if not len(wrong):
        return []
    first = index.ids[known[wrong[0]]]
    return [f"rows and vectors do not belong together: {len(wrong)} of {len(known)}, as {first!r}"]


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
