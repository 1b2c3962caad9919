"""The one way rows and images get into a DATA folder: checked, bare of metadata, resumable.

Place in the picture: the end of every importer. Rows are collected, images are stored one by
one as they come (each atomically, remembered in the journal ``import-cache.jsonl``), and ``finish``
draws missing splits and writes the JSON Lines files. Running an interrupted import again reuses
the stored images and ends with the same bytes. What was changed by hand since is never written
over: the journal tells the hash of each image, the folder's ledger those of the row files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmedrag.data import splits as groups
from mmedrag.data.result import ImportResult, first
from mmedrag.data.rows import SourceRow
from mmedrag.images import Look, clean_copy
from mmedrag.records import Example, Pair, Record, Reference, Split, Truth, UserError
from mmedrag.runtime import (
    BadRow,
    Journal,
    check_own,
    explain,
    read_json,
    sha256,
    sync,
    write_json,
    write_jsonl,
    write_unsynced,
)

KINDS = ("examples", "corpus", "pairs", "truth")
CACHE, SETTINGS = "import-cache.jsonl", "import.json"
FILES = (*(f"{kind}.jsonl" for kind in KINDS), "rejected.jsonl", "released.json")
GROUP = 64  # images that are made durable together; a kill stores at most so many again


class Writer:
    """Collects the rows of one import and writes the DATA folder.

    Args:
        out: the DATA folder; new, empty, or left by the same import.
        settings: everything that decides the result; kept in ``import.json``.
        progress: called with (rows done, rows in all or None).
    """

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        seed: int = 0,
        shares: dict[Split, float] | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        self.out, self.seed, self.shares = Path(out), seed, shares
        self.result = ImportResult(str(out), str(settings.get("format", "")))
        self.rows: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        self.rejected: list[BadRow] = []
        self._ids: dict[str, set[str]] = {kind: set() for kind in KINDS}
        self._progress = progress
        self._looks: dict[str, Look] = {}  # stored image → what it looks like
        self._stored: dict[str, str] = {}  # source file → stored image
        # image names that rows give, but that are not there → where they were looked for
        self.missing: dict[str, str] = {}
        self._bare: list[str] = []  # questions whose rows name no image
        self._doubts: list[str] = []
        self.placeholders = 0  # texts such as nan that were read as no text
        self._claim(settings)
        self._cache = Journal(self.out / CACHE, older=_older)
        rows = self._cache.rows(self._cache.where)
        self._known = dict(zip(self._cache.where, map(json.loads, rows), strict=True))
        self._written: dict[str, set[str]] = {}  # stored image → each sha256 that we gave it
        for entry in self._known.values():
            for name, digest in entry.get("sha256", {}).items():
                self._written.setdefault(name, set()).add(digest)
        self._check_unchanged()
        self._notes: dict[str, str] = {}
        self._unsynced: list[Path] = []  # stored images that the notes are about

    def _claim(self, settings: Mapping[str, Any]) -> None:
        """OUT belongs to this import, or is refused before anything is written."""
        path = self.out / SETTINGS
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out}: is a file, expected a folder to write to")
        if path.is_file():
            if read_json(path) != json.loads(json.dumps(dict(settings))):
                raise UserError(
                    f"{self.out}: holds another import (see {SETTINGS}), expected an empty folder; "
                    "to join imports, give each a folder of its own below one, ALL, then: "
                    "mmedrag data import data ALL OUT"
                )
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise UserError(f"{self.out}: is not empty, expected a new or empty folder")
        check_own(*(self.out / name for name in FILES))
        if not path.exists():
            write_json(path, dict(settings), indent=2, sort_keys=True)

    def _check_unchanged(self) -> None:
        for name, digests in self._written.items():
            path = self.out / name
            if path.is_file() and sha256(path) not in digests:
                self._cache.close()
                raise UserError(
                    f"{path}: is no longer what this import wrote; move it away, or import into "
                    "another folder"
                )

    # --- images

    def image(self, source: Path, name: str, sha256: str | None = None) -> str:
        """Store the picture of ``source`` without metadata; its path relative to OUT.

        ``name`` is the wanted path under ``images/``; its suffix follows the stored format.
        ``sha256`` (of the source file) is checked when given.

        Raises:
            UserError: unreadable, undecodable, damaged.
        """
        key = str(source)
        if key in self._stored:
            return self._stored[key]
        try:
            stat = source.stat()
        except OSError as error:
            raise UserError(f"{source}: image cannot be read: {error.strerror}") from None
        stamp = [stat.st_size, stat.st_mtime_ns, sha256]
        known = self._known.get(key)
        if known and known["stamp"] == stamp and (self.out / known["image"]).is_file():
            return self._remember(key, known["image"], _unpacked(known))
        try:
            data = source.read_bytes()
        except OSError as error:
            raise UserError(f"{source}: image cannot be read: {error.strerror}") from None
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{source}: sha256 differs from the manifest's: damaged or replaced")
        bare, suffix, picture = clean_copy(data, key)
        return self._keep(key, bare, safe_name(name, suffix), Look.of(picture), stamp)

    def picture(self, key: str, data: bytes, name: str) -> str:
        """Store an image made in memory (a DICOM frame, an array, a table's bytes)."""
        if key in self._stored:
            return self._stored[key]
        bare, suffix, picture = clean_copy(data, key)
        return self._keep(key, bare, safe_name(name, suffix), Look.of(picture), None)

    def _keep(self, key: str, data: bytes, name: str, look: Look, stamp: Any) -> str:
        if name in self._looks or self._is_foreign(name, data):  # of another source file, or person
            stem, dot, end = name.rpartition(".")
            name = f"{stem}-{_short_hash(key)}{dot}{end}"
        write_unsynced(self.out / name, data)
        self._unsynced.append(self.out / name)
        digest = hashlib.sha256(data).hexdigest()
        entry = {"source": f"stored {name}", "sha256": {name: digest}}
        if stamp is not None:
            entry |= {"source": key, "stamp": stamp, "image": name} | _packed(look)
        self._note(entry)
        return self._remember(key, name, look)

    def _is_foreign(self, name: str, data: bytes) -> bool:
        """Whether somebody else's file has this name (a power cut may leave ours, but empty)."""
        path = self.out / name
        if name in self._written or not path.exists():
            return False
        return path.stat().st_size > 0 and path.read_bytes() != data

    def _remember(self, key: str, name: str, look: Look) -> str:
        self._looks[name] = look
        self._stored[key] = name
        return name

    def _note(self, entry: dict[str, Any]) -> None:
        self._notes[entry["source"]] = json.dumps(entry)
        if len(self._notes) >= GROUP:
            self._settle()

    def _settle(self) -> None:
        """The journal names images that are on disk, and no others."""
        sync(*self._unsynced, *{path.parent for path in self._unsynced})
        self._unsynced = []
        if self._notes:
            self._cache.append(self._notes)
            self._notes = {}

    def remember(self, key: str, fields: dict[str, Any], images: list[str]) -> None:
        """Keep what a costly source file gave, for the next run of the same command."""
        looks = {name: _packed(self._looks[name]) for name in images}
        self._note({"source": key, "fields": fields, "looks": looks})

    def recall(self, key: str) -> dict[str, Any] | None:
        """What :meth:`remember` kept, if its images are still there."""
        known = self._known.get(key)
        if known is None or not all((self.out / name).is_file() for name in known["looks"]):
            return None
        for name, look in known["looks"].items():
            self._remember(f"{key}/{name}", name, _unpacked(look))
        return dict(known["fields"])

    # --- rows

    def reject(self, row: SourceRow, reason: str, shown: str | None = None) -> None:
        """Refuse a source row; it goes to ``rejected.jsonl`` as it was, if JSON can hold it.

        ``shown`` is a name for the user's eyes alone (a path that may identify a patient).
        """
        reason = " ".join(reason.split())
        value = row.value if row.text is None else row.text
        try:
            BadRow(file=row.file, line=row.line, reason=reason, row=value).to_json().encode()
        except (ValueError, TypeError, RecursionError):
            value = ascii(value)[:2000]
        self.rejected.append(BadRow(file=row.file, line=row.line, reason=reason, row=value))
        self.result.refusals.append(f"{shown or f'{row.file}:{row.line}'}: {reason}")

    def example(self, row: SourceRow, **fields: Any) -> bool:
        return self._add("examples", Example, row, fields)

    def reference(self, row: SourceRow, **fields: Any) -> bool:
        return self._add("corpus", Reference, row, fields)

    def pair(self, row: SourceRow, **fields: Any) -> bool:
        return self._add("pairs", Pair, row, fields)

    def truth(self, row: SourceRow, **fields: Any) -> bool:
        return self._add("truth", Truth, row, fields)

    def _add(
        self, kind: str, record: type[Record], source: SourceRow, fields: dict[str, Any]
    ) -> bool:
        """A record that came from ``source`` is kept, or refused with its reason. True if kept."""
        given = {k: v for k, v in fields.items() if v is not None and v != {}}
        try:
            row: Any = record.model_validate(given)
            row.to_json().encode("utf-8")
        except ValidationError as error:
            self.reject(source, explain(error))
            return False
        except (UnicodeEncodeError, ValueError, RecursionError) as error:
            self.reject(source, f"cannot be written as JSON: {error}"[:200])
            return False
        name = "study" if kind == "truth" else "id"
        if (own := getattr(row, name)) in self._ids[kind]:
            self.reject(source, f"{name}: {own!r} stands twice, expected unique")
            return False
        self._ids[kind].add(own)
        self.rows[kind].append(row)
        if isinstance(row, Example) and row.question and not row.image:
            if "missing_images" not in row.meta:
                self._bare.append(f"{source.file}:{source.line}")
        return True

    def doubt(self, row: SourceRow, words: str | None) -> None:
        """A row that is kept as it stands, but may mean more than was understood."""
        if words:
            self._doubts.append(f"{row.file}:{row.line}: {words}")

    def unique(self, kind: str, wanted: str, number: int) -> str:
        """``wanted``, or with the row number where that id is taken (sources repeat ids)."""
        return wanted if wanted not in self._ids[kind] else f"{wanted}#{number}"

    def has(self, kind: str, row_id: str) -> bool:
        return row_id in self._ids[kind]

    def tick(self, done: int, total: int | None = None) -> None:
        if self._progress:
            self._progress(done, total)

    # --- end

    def abandon(self) -> None:
        """The import cannot go on: an OUT in which nothing is stored yet is free again."""
        self._settle()
        self._cache.close()
        own = {self.out / SETTINGS, self.out / CACHE}
        if set(self.out.iterdir()) == own and not (self.out / CACHE).stat().st_size:
            for path in own:
                path.unlink()
            self.out.rmdir()

    def finish(self) -> ImportResult:
        """Draw missing splits, write the files, and say what was done."""
        self._draw_splits()
        self._settle()
        result = self.result
        for kind, rows in self.rows.items():
            if rows or kind in ("examples", "corpus"):
                write_jsonl(self.out / f"{kind}.jsonl", rows, own=True)
            setattr(result, kind, len(rows))
        result.rejected = write_rejected(self.out / "rejected.jsonl", self.rejected)
        result.images = len(set(self._stored.values()))
        splits = Counter(str(row.split) for row in self.rows["examples"] + self.rows["corpus"])
        result.splits = dict(sorted(splits.items()))
        kept = [row for kind in KINDS[:3] for row in self.rows[kind]]
        result.pictures(self.missing, kept, self._bare)
        if self.placeholders:
            result.notes.append(
                f"{self.placeholders} texts that say nan, N/A or the like are no text"
            )
        if self._doubts:
            result.notes.append(f"{len(self._doubts)} doubtful rows: {first(self._doubts)}")
        self._cache.close()
        return result

    def _draw_splits(self) -> None:
        rows = self.rows["examples"] + self.rows["corpus"]
        if all(row.split for row in rows):
            return
        keyed = []
        for row in rows:
            names = [row.image] if isinstance(row.image, str) else row.image or []
            looks = [self._looks[name] for name in names if name in self._looks]
            keyed.append((row, _study(row), looks))
        drawn = groups.assign(
            ((study, row.patient, looks, row.split) for row, study, looks in keyed),
            self.seed,
            self.shares,
        )
        for row, study, _ in keyed:
            if row.split is None:
                row.split = drawn[study]


def _study(row: Any) -> str:
    """Rows of one study share their split whatever else is known."""
    study = row.meta.get("study")
    return study if isinstance(study, str) else row.id


def write_rejected(path: Path, rows: list[BadRow]) -> int:
    """``rejected.jsonl``, or its absence when nothing was refused."""
    if rows:
        return write_jsonl(path, rows, own=True)
    check_own(path)
    path.unlink(missing_ok=True)
    return 0


def _older(line: bytes) -> tuple[str, bytes]:
    """A line of the cache as it was before it was a journal: the entry alone."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        raise ValueError("not an entry")
    return entry["source"], line


def _packed(look: Look) -> dict[str, Any]:
    return {"pixels": look.pixels, "hash": look.hash, "small": look.small.hex()}


def _unpacked(entry: dict[str, Any]) -> Look:
    return Look(entry["pixels"], entry["hash"], bytes.fromhex(entry["small"]))


def _short_hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:10]


_PLAIN = re.compile(r"[^A-Za-z0-9._+=,@ -]")


def safe_name(name: str, suffix: str) -> str:
    """``images/…`` for any wanted name: inside the folder, plain characters, fitting suffix.

    One wanted name always gives the same result and two give different ones: what is replaced
    or shortened leaves a short hash behind.
    """
    parts = [p for p in name.replace("\\", "/").split("/") if p not in ("", ".", "..")]
    if parts[:1] == ["images"]:
        parts = parts[1:]
    wanted = "/".join(parts)
    plain = "/".join(_PLAIN.sub("_", part).strip(" .")[:80] or "_" for part in parts[-8:])
    if plain != wanted or not parts:
        plain = f"{plain or 'image'}-{_short_hash(name)}"
    stem, dot, end = plain.rpartition(".")
    if dot and "/" not in end:
        if end.lower() == suffix[1:] or (suffix == ".jpg" and end.lower() == "jpeg"):
            return f"images/{plain}"
        if end.lower() in ("dcm", "dicom"):
            return f"images/{stem}{suffix}"
    return f"images/{plain}{suffix}"
