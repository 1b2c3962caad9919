"""Building and changing an index: one writer at a time, each change whole or not at all.

Place in the picture: what fills the folder that ``index`` describes and reads. Public
functions (stable; the commands ``index ...`` call nothing else)::

    build_index(data, out, domain=None, encoder="embedded", split="train", key="text",
                engine="auto", ...) -> dict     # info, with "added", "skipped" [{id, reason}]
    add_to_index(path, data, split=None, ...) -> dict
    update_index(path, data, split=None, ...) -> dict
    remove_from_index(path, ids) -> dict        # "removed", "missing" [ids]
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedrag.records import Encoder, Reference, Reopenable, UserError, Windowing, resolve_object
from mmedrag.retrieval.embeddings import (
    EmbeddingCache,
    HashOnly,
    Progress,
    embed_images,
    embed_texts,
    is_cache_file,
    stored_caches,
    text_key,
)
from mmedrag.retrieval.encoders.load import INSIDE, check_plain, load_encoder
from mmedrag.retrieval.index import COLUMNS, IndexFolder, index_info
from mmedrag.retrieval.stores import folder
from mmedrag.retrieval.stores.engines import STORES
from mmedrag.runtime import PART, DataFolder, counted, new_folder

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)
COPY_LIMIT = 64 << 20  # bytes up to which an encoder's folder is copied into the index
COPIED = (".json", ".safetensors", ".txt", ".model", ".jsonl")


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
    if not folder.is_ours(path, _is_own):
        raise UserError(f"{path}: not empty and no index, expected a new folder or an index")
    if key not in ("text", "image"):
        raise UserError(f"index: key: got {key!r}, expected 'text' or 'image'")
    references = [r for folder_ in data for r in folder_.corpus(split, domain)]
    asked = f"split {split or 'any'}, domain {domain or 'any'}"
    if not references:
        there = counted(row for folder_ in data for row in folder_.corpus())
        raise UserError(f"{path}: no reference to index of {asked}; there are: {there}")
    log.info("index: %d rows of %s", len(references), asked)
    model = load_encoder(encoder, device, None, long_text) if isinstance(encoder, str) else encoder
    spec = (
        encoder if isinstance(encoder, str) else model.spec if isinstance(model, Reopenable) else ""
    )
    manifest: dict[str, Any] = {
        "domain": domain,
        "encoder": {
            "spec": "",
            "fingerprint": model.fingerprint,
            "dim": model.dim,
            "long_text": long_text,
        },
        "key": key,
        "views": views,
        "store": "faiss",
        "split": split,
    }
    with folder.writer(path):
        try:
            folder.read_manifest(path)
        except folder.Damaged as error:
            log.warning("%s", error)
            folder.set_aside(path)
        except UserError:
            log.debug("%s: a new index", path)
        rows, vectors, skipped = _encode(references, model, path, manifest, progress)
        if not rows:
            raise UserError(
                f"{path}: no reference to index (split {split!r}, domain {domain!r}, "
                f"{len(skipped)} skipped), expected corpus rows with {key}"
            )
        store = resolve_object("faiss", STORES, "store")(model.dim, engine, recall)
        store.add([row["id"] for row in rows], vectors)
        manifest["encoder"]["spec"] = _kept_encoder(spec, model, path)
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
        index = IndexFolder.open(path)
        folder.settle(path)
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
            n
            for n, row in enumerate(rows)
            if row["id"] not in old or (replace and row["id"] in changed)
        ]
        unchanged = len(rows) - len(fresh) - (0 if replace else len(changed))
        if fresh:
            store = _writable(index)
            store.remove(changed if replace else [])
            kept = [row for i, row in old.items() if not (replace and i in changed)]
            store.add([rows[n]["id"] for n in fresh], vectors[fresh])
            _commit(path, m, kept + [rows[n] for n in fresh], store)
    replaced = len(changed) if replace else 0
    return _result(
        path,
        model,
        added=len(fresh) - replaced,
        replaced=replaced,
        unchanged=unchanged,
        skipped=skipped,
    )


def update_index(path: str | Path, data: Sequence[DataFolder], **settings: Any) -> dict[str, Any]:
    """As :func:`add_to_index`; rows whose id is there with other content are replaced."""
    return add_to_index(path, data, replace=True, **settings)


def remove_from_index(path: str | Path, ids: Sequence[str]) -> dict[str, Any]:
    """Remove references by id, with their vectors and all cached embeddings.

    Where this was killed, the same call completes it.
    """
    path = Path(path)
    with folder.writer(path):
        index = IndexFolder.open(path)
        known = set(index.ids)
        done = set(folder.settle(path).get("removing", [])) - known  # by a call that was killed
        gone = known.intersection(ids)
        if gone:
            if len(gone) == len(known):
                raise UserError(f"{path}: would remove every reference; delete the folder instead")
            store = _writable(index)
            store.remove(gone)
            rows = [row for row in index.rows() if row["id"] not in gone]
            _forget(index, gone)
            _commit(path, index.manifest, rows, store, {"removing": sorted(gone)})
        else:
            _forget(index, gone)
    gone |= done.intersection(ids)
    return {**index_info(path), "removed": len(gone), "missing": sorted(set(ids) - known - gone)}


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


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = [(name, pa.string()) for name in (*COLUMNS, "date", "meta")]
    lists = [("images", pa.list_(pa.string())), ("pixels", pa.list_(pa.string()))]
    return pa.schema([*text, *lists, ("phash", pa.list_(pa.uint64()))])


def _commit(
    path: Path,
    manifest: dict[str, Any],
    rows: list[dict[str, Any]],
    store: Any,
    note: dict[str, Any] | None = None,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write_rows(target: Path) -> None:
        table = pa.Table.from_pylist(rows, schema=_schema())
        pq.write_table(table, target, compression="zstd")

    folder.commit(path, manifest, {"rows.parquet": write_rows, "vectors.faiss": store.save}, note)


def _writable(index: IndexFolder) -> Any:
    """The same store in memory, where it may change (the opened one is mapped read-only)."""
    name = next(name for name in index.manifest["files"] if name.startswith("vectors-"))
    settings = index.manifest["vectors"]
    return type(index.store).open(index.path / name, settings, index.ids, writable=True)


def _forget(index: IndexFolder, gone: set[str]) -> None:
    """Leave in the caches, of whichever encoder, only what the remaining rows are made of."""
    kept = np.array([i not in gone for i in index.ids])
    texts = index.texts(np.flatnonzero(kept).tolist())
    words = {text_key(text).rstrip(b"\0") for text in texts}
    pixels = {pixel.rstrip(b"\0") for pixel in index.pixels[kept].ravel().tolist()}
    for cache in stored_caches(index.path / "cache"):
        text = cache.path is not None and cache.path.stem.endswith("-text")
        cache.keep("key" if text else "pixels", words if text else pixels)
    for part in (index.path / "cache").glob(".*.part"):
        if PART.fullmatch(part.name) and is_cache_file(part):
            part.unlink()


def _model(index: IndexFolder, encoder: str | Encoder | None, device: str | None) -> Encoder:
    if encoder is None or isinstance(encoder, str):
        return index.encoder(encoder, device)
    index.check(encoder)
    return encoder


def _result(path: Path, model: Encoder, **counts: Any) -> dict[str, Any]:
    cut = (model.windowed, model.truncated) if isinstance(model, Windowing) else (0, 0)
    long = dict(zip(("windowed", "truncated"), cut, strict=True))
    return {**index_info(path), **counts, **long}


def _kept_encoder(spec: str, model: Encoder, path: Path) -> str:
    """What the manifest says of the encoder: a name, or (a small folder of one's own) where the
    copy of it is, so that the index can be used and moved without asking for it again."""
    source = Path(spec)
    if not spec or not source.is_dir():
        return spec
    files = [p for p in source.iterdir() if p.is_file() and p.suffix in COPIED]
    weights = [p for p in source.iterdir() if p.suffix in (".safetensors", ".bin", ".pt")]
    if sum(p.stat().st_size for p in [*files, *weights]) > COPY_LIMIT:
        return spec
    if any(p.suffix != ".safetensors" for p in weights):
        return spec
    try:
        check_plain(source)
    except UserError as error:
        log.info("%s: not copied into the index (%s)", source, error)
        return spec
    name = f"encoder-{model.fingerprint[:12]}"
    if not (path / name).exists():
        with new_folder(path / name) as copy:
            for file in files:
                shutil.copyfile(file, copy / file.name)
    return INSIDE + name


def _is_own(entry: Path) -> bool:
    """Whether an entry beside manifest and rows is what an index folder holds."""
    if entry.is_symlink() or not entry.is_dir():
        return False
    if entry.name == "cache":
        return all(PART.fullmatch(p.name) or is_cache_file(p) for p in entry.iterdir())
    return re.fullmatch(r"encoder-[0-9a-f]{12}", entry.name) is not None
