"""An index: the references of one domain as vectors and rows in an inspectable folder.

Place in the picture: what ``retriever[d].search`` looks into. Layout::

    INDEX/manifest.json          settings, encoder, sha256 of every file; written last, atomically
    INDEX/rows-000003.parquet    the references: text, patient, source, hashes of their images
    INDEX/vectors-000003.faiss   their vectors, in the same order
    INDEX/cache/*.emb            embeddings by content (may be deleted; then encoding repeats)

Public functions (stable; the commands ``index ...`` call nothing else)::

    build_index(data, out, domain=None, encoder="embedded", split="train", key="text",
                engine="auto", ...) -> dict     # info, with "added", "skipped" [{id, reason}]
    add_to_index(path, data, split=None, ...) -> dict
    update_index(path, data, split=None, ...) -> dict
    remove_from_index(path, ids) -> dict        # "removed", "missing" [ids]
    index_info(path) -> dict
    verify_index(path) -> list[str]             # findings; empty: sound
    Index.open(path) -> Index
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedrag.embeddings import (
    EmbeddingCache,
    HashOnly,
    Progress,
    embed_images,
    embed_texts,
    text_key,
)
from mmedrag.encoders import load_encoder
from mmedrag.protocols import Encoder, resolve
from mmedrag.stores import STORES, folder
from mmedrag.types import DataFolder, Reference, UserError

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


class Index:
    """A read-only view of a committed index; a writer's later commit does not disturb it.

    Attributes:
        manifest, store, domain, ids; ``patients`` object [n] (None: unknown); ``pixels`` S32
        [n, views] and ``phash`` uint64 [n, views] of the rows' own images.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        self.path, self.manifest = path, manifest
        wrong = folder.check_files(path, manifest, CHECK_AT_OPEN)
        if wrong:
            raise folder.Damaged(f"{path}: index is damaged: {'; '.join(wrong)}; {folder.REPAIR}")
        names = {name.split("-")[0]: path / name for name in manifest["files"]}
        light = ["id", "domain", "patient", "split", "source", "date", "pixels", "phash"]
        # held open: a later commit may unlink the file, what was opened stays readable
        self._file = pq.ParquetFile(names["rows"], memory_map=True)
        table = self._file.read(columns=light, use_threads=False)
        self._texts: pa.ChunkedArray | None = None
        self.ids: list[str] = table["id"].to_pylist()
        store = resolve(manifest["store"], STORES, "store")
        self.store = store.open(names["vectors"], manifest["vectors"], self.ids)
        self.patients = np.array(table["patient"].to_pylist(), dtype=object)
        self.pixels, self.phash = _hash_arrays(table)
        self.table = table.drop_columns(["id", "pixels", "phash"])  # kept once, as arrays

    @classmethod
    def open(cls, path: str | Path) -> Index:
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
        if self._texts is None:
            self._texts = self._file.read(columns=["text"])["text"]
        wanted = list(rows)
        return self._texts.take(wanted).to_pylist() if wanted else []

    def references(self) -> list[Reference]:
        """The stored rows, in order."""
        return [_reference(row) for row in self.rows()]

    def rows(self) -> list[dict[str, Any]]:
        """The stored rows with every column, in order."""
        return self._file.read().to_pylist()

    def mask(self, wanted: Filter) -> np.ndarray:
        """bool [n]: rows that pass the filter (a row without the field does not)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        keep = np.ones(len(self), dtype=bool)
        for name in ("patient", "source", "split", "domain"):
            values = getattr(wanted, name)
            if values is not None:
                values = [values] if isinstance(values, str) else list(values)
                found = pc.is_in(self.table[name], value_set=pa.array(values, pa.string()))
                keep &= found.to_numpy(zero_copy_only=False)
        for bound, compare in (
            (wanted.date_from, pc.greater_equal),
            (wanted.date_to, pc.less_equal),
        ):
            if bound is not None:
                found = pc.fill_null(compare(self.table["date"], bound), False)
                keep &= found.to_numpy(zero_copy_only=False)
        return keep

    def encoder(self, spec: str | None = None, device: str | None = None) -> Encoder:
        """The encoder this index was built with, from where it was or from ``spec``.

        Raises:
            UserError: not there any more, or another encoder than the index was built with.
        """
        made_with = self.manifest["encoder"]
        encoder = load_encoder(
            spec or _from_index(made_with["spec"], self.path), device, None, made_with["long_text"]
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
            "count": len(self), "domain": m["domain"], "encoder": m["encoder"],
            "dim": m["encoder"]["dim"], "engine": m["vectors"], "key": m["key"],
            "generation": m["generation"], "format": m["format"],
            "patients": len({p for p in self.patients if p is not None}),
            "bytes": sum(entry["bytes"] for entry in m["files"].values()),
        }  # fmt: skip


# --- commands ----------------------------------------------------------------------------------


def build_index(
    data: Sequence[DataFolder],
    out: str | Path,
    domain: str | None = None,
    encoder: str | Encoder = "embedded",
    split: str | None = "train",
    key: str = "text",
    engine: str = "auto",
    recall: float = 0.99,
    views: str = "mean",
    device: str | None = None,
    long_text: str = "window",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build (or build again) the index of one domain; ``domain`` None takes every row (generic).

    Args:
        key: what a query image is compared with: the references' "text" (paper) or "image".
        engine: auto | flat | ivf | hnsw; ``recall``: recall@10 that ivf and hnsw must reach.
        long_text: "window" or "truncate" (as released) for texts over the encoder's context.

    Returns:
        ``info`` with ``added``, ``skipped`` ([{id, reason}]) and ``windowed``/``truncated``
        (texts longer than the context).
    """
    path = Path(out)
    if path.exists() and any(path.iterdir()) and not _is_index(path):
        raise UserError(f"{path}: not empty and no index, expected a new folder or an index")
    model = load_encoder(encoder, device, None, long_text) if isinstance(encoder, str) else encoder
    spec = encoder if isinstance(encoder, str) else getattr(model, "spec", "")
    manifest = {
        "domain": domain,
        "encoder": {
            "spec": _to_index(spec, path), "fingerprint": model.fingerprint, "dim": model.dim,
            "long_text": long_text,
        },
        "key": key, "views": views, "store": "faiss", "split": split,
    }  # fmt: skip
    if key not in ("text", "image"):
        raise UserError(f"index: key: got {key!r}, expected 'text' or 'image'")
    references = [r for folder_ in data for r in folder_.corpus(split, domain)]
    with folder.writer(path):
        try:
            folder.read_manifest(path)
        except folder.Damaged as error:
            log.warning("%s", error)
            (path / folder.MANIFEST).unlink()
        except UserError:
            log.debug("%s: a new index", path)
        rows, vectors, skipped = _encode(references, model, path, manifest, progress)
        if not rows:
            raise UserError(
                f"{path}: no reference to index (split {split!r}, domain {domain!r}, "
                f"{len(skipped)} skipped), expected corpus rows with {key}"
            )
        store = resolve("faiss", STORES, "store")(model.dim, engine, recall)
        store.add([row["id"] for row in rows], vectors)
        _commit(path, manifest, rows, store)
    return _result(path, model, added=len(rows), skipped=skipped)


def add_to_index(
    path: str | Path,
    data: Sequence[DataFolder],
    split: str | None = None,
    encoder: str | Encoder | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Append references; only content that was never seen is encoded.

    A row whose id and content are in the index already counts as ``unchanged``; the same id
    with other content is skipped with a reason (:func:`update_index` replaces it). ``split``
    None takes the split the index was built from.
    """
    path = Path(path)
    with folder.writer(path):
        index = Index.open(path)
        m = index.manifest
        model = _model(index, encoder, device)
        split = split or m["split"]
        given = [r for folder_ in data for r in folder_.corpus(split, m["domain"])]
        rows, vectors, skipped = _encode(given, model, path, m, progress)
        old = {row["id"]: row for row in index.rows()}
        changed = [r["id"] for r in rows if r["id"] in old and r != old[r["id"]]]
        if not replace:
            skipped += [
                {"id": i, "reason": "id is in the index with other content, use update"}
                for i in changed
            ]
        fresh = [
            n for n, row in enumerate(rows)
            if row["id"] not in old or (replace and row["id"] in changed)
        ]  # fmt: skip
        unchanged = len(rows) - len(fresh) - (0 if replace else len(changed))
        if fresh:
            store = _writable(index)
            store.remove(changed if replace else [])
            kept = [row for i, row in old.items() if not (replace and i in changed)]
            store.add([rows[n]["id"] for n in fresh], vectors[fresh])
            _commit(path, m, kept + [rows[n] for n in fresh], store)
    replaced = len(changed) if replace else 0
    return _result(
        path, model, added=len(fresh) - replaced, replaced=replaced, unchanged=unchanged,
        skipped=skipped,
    )  # fmt: skip


def update_index(path: str | Path, data: Sequence[DataFolder], **settings: Any) -> dict[str, Any]:
    """As :func:`add_to_index`; rows whose id is there with other content are replaced."""
    return add_to_index(path, data, replace=True, **settings)


def remove_from_index(path: str | Path, ids: Sequence[str]) -> dict[str, Any]:
    """Remove references by id, with their vectors and cached embeddings."""
    path = Path(path)
    with folder.writer(path):
        index = Index.open(path)
        known = set(index.ids)
        gone = known.intersection(ids)
        if gone:
            if len(gone) == len(known):
                raise UserError(f"{path}: would remove every reference; delete the folder instead")
            store = _writable(index)
            store.remove(gone)
            rows = [row for row in index.rows() if row["id"] not in gone]
            _commit(path, index.manifest, rows, store)
            _forget(index, gone)
    return {**index_info(path), "removed": len(gone), "missing": sorted(set(ids) - known)}


def index_info(path: str | Path) -> dict[str, Any]:
    return Index.open(path).info()


def verify_index(path: str | Path) -> list[str]:
    """Every file against the manifest, rows against vectors, and the caches. Empty: sound."""
    path = Path(path)
    try:
        manifest = folder.read_manifest(path)
        findings = folder.check_files(path, manifest)
        if not findings:
            index = Index.open(path)
            norms = np.linalg.norm(index.store.vectors(), axis=1)
            if not np.allclose(norms, 1, atol=1e-3):
                findings.append("vectors: not all of unit length")
    except folder.Damaged as error:
        return [str(error)]
    encoder = _Named(manifest["encoder"])
    for kind, of in (("text", encoder), ("image", encoder), ("image", HashOnly())):
        cache = EmbeddingCache(path / "cache", of, kind)
        if cache.path:
            findings += [f"cache/{cache.path.name}: {p}" for p in cache.problems()]
    return findings


# --- inside ------------------------------------------------------------------------------------


class _Named:
    """The identity of an encoder that is not loaded."""

    def __init__(self, manifest_encoder: dict[str, Any]) -> None:
        self.fingerprint, self.dim = manifest_encoder["fingerprint"], manifest_encoder["dim"]


def _encode(
    references: list[Reference],
    model: Encoder,
    path: Path,
    manifest: dict[str, Any],
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], np.ndarray, list[dict[str, str]]]:
    """Rows and vectors of the usable references, and why the others are not."""
    views = manifest["views"]
    skipped, usable = [], []
    seen: set[str] = set()
    for r in references:
        missing = not (r.images if manifest["key"] == "image" else r.text.strip())
        reason = f"no {manifest['key']}" if missing else "id stands twice" if r.id in seen else None
        seen.add(r.id)
        if reason:
            skipped.append({"id": r.id, "reason": reason})
        else:
            usable.append(r)
    cache = path / "cache"
    of_image: Any = model if manifest["key"] == "image" else None
    image_cache = EmbeddingCache(cache, of_image or HashOnly(), "image")
    images = [r.images for r in usable]
    if manifest["key"] == "text":  # pictures are decoded and hashed while the model reads texts
        with ThreadPoolExecutor(max_workers=1) as pool:
            looking = pool.submit(embed_images, images, None, image_cache, views)
            words = EmbeddingCache(cache, model, "text")
            vectors = embed_texts([r.text for r in usable], model, words, progress)
            pictures = looking.result()
    else:
        pictures = embed_images(images, of_image, image_cache, views, progress)
        vectors = pictures.vectors
    bad = {n for n in pictures.errors if usable[n].images}
    skipped += [{"id": usable[n].id, "reason": pictures.errors[n]} for n in sorted(bad)]
    good = [n for n in range(len(usable)) if n not in bad]
    vectors = vectors[good]
    rows = [_row(usable[n], pictures.pixels[n], pictures.phash[n]) for n in good]
    return rows, vectors, skipped


def _row(r: Reference, pixels: np.ndarray, phash: np.ndarray) -> dict[str, Any]:
    known = [(bytes(p).ljust(32, b"\0").hex(), int(h)) for p, h in zip(pixels, phash, strict=True)]
    known = [(p, h) for p, h in known if p.strip("0")]
    date = r.meta.get("date")
    return {
        **{name: getattr(r, name) for name in COLUMNS},
        "images": [r.image] if isinstance(r.image, str) else list(r.image or []),
        "date": date if isinstance(date, str) else None,
        "meta": json.dumps(r.meta, sort_keys=True, ensure_ascii=False),
        "pixels": [p for p, _ in known],
        "phash": [h for _, h in known],
    }


def _reference(row: dict[str, Any]) -> Reference:
    given = {name: row[name] for name in COLUMNS if row[name] is not None}
    if row["images"]:
        given["image"] = row["images"][0] if len(row["images"]) == 1 else row["images"]
    return Reference(**given, meta=json.loads(row["meta"]))


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = [(name, pa.string()) for name in (*COLUMNS, "date", "meta")]
    lists = [("images", pa.list_(pa.string())), ("pixels", pa.list_(pa.string()))]
    return pa.schema([*text, *lists, ("phash", pa.list_(pa.uint64()))])


def _commit(path: Path, manifest: dict[str, Any], rows: list[dict[str, Any]], store: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write_rows(target: Path) -> None:
        table = pa.Table.from_pylist(rows, schema=_schema())
        pq.write_table(table, target, compression="zstd")

    folder.commit(path, manifest, {"rows.parquet": write_rows, "vectors.faiss": store.save})


def _writable(index: Index) -> Any:
    """The same store in memory, where it may change (the opened one is mapped read-only)."""
    name = next(name for name in index.manifest["files"] if name.startswith("vectors-"))
    settings = index.manifest["vectors"]
    return type(index.store).open(index.path / name, settings, index.ids, writable=True)


def _forget(index: Index, gone: set[str]) -> None:
    """Drop the removed rows' content from the caches, unless a remaining row has it too."""
    names = [i in gone for i in index.ids]
    dropped, kept = np.array(names), ~np.array(names)
    texts = np.array(index.texts(range(len(index))), dtype=object)
    words = set(map(text_key, texts[dropped])) - set(map(text_key, texts[kept]))
    pixels = set(index.pixels[dropped].ravel().tolist()) - set(index.pixels[kept].ravel().tolist())
    encoder = _Named(index.manifest["encoder"])
    for of, kind, field, what in (
        (encoder, "text", "key", words),
        (encoder, "image", "pixels", pixels),
        (HashOnly(), "image", "pixels", pixels),
    ):
        cache = EmbeddingCache(index.path / "cache", of, kind)
        cache.drop(field, {key.rstrip(b"\0") for key in what})


def _model(index: Index, encoder: str | Encoder | None, device: str | None) -> Encoder:
    if encoder is None or isinstance(encoder, str):
        return index.encoder(encoder, device)
    index.check(encoder)
    return encoder


def _result(path: Path, model: Encoder, **counts: Any) -> dict[str, Any]:
    long = {name: getattr(model, name, 0) for name in ("windowed", "truncated")}
    return {**index_info(path), **counts, **long}


def _is_index(path: Path) -> bool:
    names = {p.name for p in path.iterdir()}
    return folder.MANIFEST in names or names <= {folder.LOCK, "cache"} or folder.LOCK in names


def _hash_arrays(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """sha256 S32 and perceptual hashes uint64 [n, views] of lists of either, b"" and 0 padded."""
    import pyarrow.compute as pc

    counts = pc.list_value_length(table["pixels"]).to_numpy().astype(np.int64)
    width, total = int(counts.max(initial=0)) or 1, int(counts.sum())
    row = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    of_pixels = np.zeros((len(counts), width), "S32")
    of_phash = np.zeros((len(counts), width), np.uint64)
    if total:
        flat = pc.list_flatten(table["pixels"])
        digits = b"".join(_characters(chunk) for chunk in flat.chunks if len(chunk))
        of_pixels[row, column] = np.frombuffer(bytes.fromhex(digits.decode()), "S32")
        of_phash[row, column] = pc.list_flatten(table["phash"]).to_numpy()
    return of_pixels, of_phash


def _characters(strings: pa.StringArray) -> bytes:
    """All strings of an array one after the other (without an object for each)."""
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int32)[strings.offset :]
    return data.slice(ends[0], ends[len(strings)] - ends[0]).to_pybytes()


def _to_index(spec: str, path: Path) -> str:
    """Folders are stored relative to the index, so that both can move together."""
    return f"relative:{os.path.relpath(spec, path)}" if spec and Path(spec).is_dir() else spec


def _from_index(spec: str, path: Path) -> str:
    if not spec.startswith("relative:"):
        return spec
    target = Path(os.path.normpath(path / spec.removeprefix("relative:")))
    if not target.is_dir():
        raise UserError(f"{path}: its encoder is not at {target} any more, give --retriever")
    return str(target)
