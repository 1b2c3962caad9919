"""``data import``: a source in any format becomes a DATA folder.

Place in the picture: before everything. Each format is one module with
``load(src, writer, **options)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmedrag.data.result import ImportResult
from mmedrag.data.writer import Writer
from mmedrag.records import Split, UserError, resolve_object
from mmedrag.runtime import sha256

FORMATS = {
    "data": "mmedrag.data.formats.folders:load",
    "dicom": "mmedrag.data.formats.dicom:load",
    "llava": "mmedrag.data.formats.llava:load",
    "manifest": "mmedrag.data.formats.manifest:load",
    "released": "mmedrag.data.formats.released:load",
    "table": "mmedrag.data.formats.table:load",
    "vqa": "mmedrag.data.formats.vqa:load",
}


def import_data(
    format: str,
    src: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    shares: Mapping[Split, float] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> ImportResult:
    """Import ``src`` into the DATA folder ``out`` (``data import FORMAT SRC OUT``).

    Args:
        format: a name of ``FORMATS``, or ``package.module:function`` with the same signature.
        seed, shares: how rows without a split are divided (patient- and look-alike-wise).
        progress: called with (rows done, rows in all or None).
        options: of the format; its ``load`` documents them. An option set to None counts as
            not given.

    Returns:
        What was imported; ``exit_code`` is 1 when rows were refused (``rejected.jsonl``) or
        nothing was found (``nothing`` says why).

    Raises:
        UserError: unreadable source, occupied target, unknown format or option.
    """
    load = resolve_object(
        format, FORMATS, "data format", {"pydicom": "dicom", "dicomanonymizer": "dicom"}
    )
    given = {key: value for key, value in options.items() if value is not None}
    for key in ("image_root", "key"):
        if isinstance(given.get(key), str):
            given[key] = Path(given[key])
    if isinstance(given.get("image_root"), (list, tuple)):
        given["image_root"] = [Path(root) for root in given["image_root"]]
    for root in _roots(given.get("image_root")):
        if not root.is_dir():
            raise UserError(f"{root}: no such folder, expected one with images (image_root)")
    known = [p for p in inspect.signature(load).parameters if p not in ("src", "writer")]
    for key in given:
        if key not in known:
            raise UserError(
                f"data import {format}: option {key!r} is not known, "
                f"expected {', '.join(known) or 'none'}"
            )
    source = Path(src)
    if not source.exists():
        raise UserError(f"{source}: does not exist")
    named = format != "dicom"  # names of DICOM files and folders can be names of patients
    settings = {
        "format": format,
        "source": source.name if named else None,
        "seed": seed,
        "shares": dict(shares) if shares else None,
        "inputs": _inputs(source) if named else {},
        "options": {key: _plain(value) for key, value in sorted(given.items())},
    }
    writer = Writer(Path(out), settings, seed, dict(shares) if shares else None, progress)
    try:
        load(source, writer, **given)
    except BaseException:  # an interrupt, too: what is stored need not be stored again
        writer.abandon()
        raise
    return writer.finish()


def _roots(given: Any) -> list[Path]:
    """The folders of an ``image_root``: one, several, or one per dataset."""
    if given is None or isinstance(given, Path):
        return [given] if given else []
    return [Path(root) for root in (given.values() if isinstance(given, Mapping) else given)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def _inputs(source: Path) -> dict[str, str]:
    """sha256 of the row files directly given: another content is another import."""
    files = [source] if source.is_file() else sorted(source.glob("*.json*"))
    return {path.name: sha256(path) for path in files if path.is_file() and path.name[0] != "."}
