"""``data check``: what is wrong with a data set, with file and line.

Place in the picture: after an import, before anything is trained or measured. Rows stream
through once; what has to be compared across rows (ids, texts, images, patients, splits) goes
into a temporary SQLite file, so memory does not grow with the data. Pictures are decoded once
each when ``images`` is on.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmedrag.answers import parse_released
from mmedrag.datasets import check_text as text_rules
from mmedrag.datasets.baselines import Baseline, baselines
from mmedrag.datasets.check_rows import Item, read
from mmedrag.datasets.common import clean_question
from mmedrag.datasets.splits import Groups, near_duplicates
from mmedrag.images import Look, load_image
from mmedrag.types import UserError

SEVERITIES = ("error", "warning", "note")
FINDINGS = {  # code: (severity, what it means)
    "bad_row": ("error", "row cannot be read"),
    "image_missing": ("error", "image is not there"),
    "image_undecodable": ("error", "image is truncated or cannot be decoded"),
    "image_bomb": ("error", "image would decode to too many pixels"),
    "duplicate_id": ("error", "id stands twice"),
    "wrong_image": ("error", "row's id names another image than its own"),
    "leak_patient": ("error", "patient is in several splits"),
    "leak_image": ("error", "image is in several splits"),
    "leak_near_duplicate": ("error", "near-identical images are in different splits"),
    "image_token": ("error", "number of <image> marks differs from the number of images"),
    "closed_answer": ("error", "answer to a closed question is neither yes nor no"),
    "contradiction": ("error", "same image and closed question, yes and no"),
    "no_signal": ("error", "chosen and rejected are the same in everything"),
    "identity": ("error", "name-, date-, id- or contact-like words in a text"),
    "repeated_image": ("warning", "one image under several ids with different texts"),
    "duplicate_image": ("warning", "same picture in several files"),
    "near_duplicate": ("warning", "near-identical pictures of different patients"),
    "duplicate_question": ("warning", "same image and question more than once"),
    "question_in_answer": ("warning", "answer repeats the question, or is one"),
    "cut_text": ("warning", "text breaks off in the middle"),
    "identical_texts": ("warning", "chosen and rejected say the same; only the image differs"),
    "duplicate_text": ("note", "same text under several studies"),
    "no_full_stop": ("note", "texts without final punctuation"),
    "made_open": ("note", "closed questions that import made open: neither yes nor no"),
    "wordy_answer": ("note", "closed answers with more than yes or no"),
    "no_id": ("note", "rows without an id"),
    "text_only": ("note", "rows whose image was absent at import"),
}


@dataclass
class Finding:
    """One thing that is wrong; ``count`` is how many rows or files it concerns."""

    code: str
    severity: str
    file: str
    line: int
    message: str
    id: str = ""
    count: int = 1
    related: list[str] = field(default_factory=list)  # other places, file:line
    images: list[str] = field(default_factory=list)  # files worth looking at

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}: {self.message}"


@dataclass
class CheckReport:
    """What a check found. ``exit_code`` is 1 when there is any error."""

    paths: list[str]
    rows: dict[str, int] = field(default_factory=dict)
    images: int = 0
    findings: list[Finding] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)  # all findings, also those not listed
    baselines: list[Baseline] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(n for code, n in self.totals.items() if FINDINGS[code][0] == "error")

    @property
    def exit_code(self) -> int:
        return 1 if self.errors else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"errors": self.errors, "exit_code": self.exit_code}


def check(
    paths: Sequence[str | Path], *, image_root: Path | Mapping[str, Path] | None = None,
    images: bool = True, html: str | Path | None = None, most: int = 5000,
    progress: Callable[[int, int | None], None] | None = None,
) -> CheckReport:  # fmt: skip
    """Check DATA folders or released files; several together are also checked for leakage.

    Args:
        image_root: where images of released files lie (one folder, or one per dataset).
        images: decode pictures (needed for damage and near-duplicates).
        html: write a page with thumbnails of the worst there.
        most: findings of one kind that are listed one by one (``totals`` counts all).

    Raises:
        UserError: nothing there to check.
    """
    if not paths:
        raise UserError("data check: nothing given, expected data folders or released files")
    report = CheckReport([str(p) for p in paths])
    with tempfile.TemporaryDirectory(prefix="mmedrag-check-") as scratch:
        run = _Check(Path(scratch) / "facts.sqlite", report, most)
        done = 0
        for path in paths:
            for item in read(Path(path), image_root):
                done += 1
                if progress and done % 500 == 0:
                    progress(done, None)
                run.row(item)
        if not done:
            raise UserError(f"{', '.join(report.paths)}: no rows in it")
        run.across()
        if images:
            run.pictures(progress)
        report.baselines = baselines(run.db)
        run.close()
    order = {code: n for n, code in enumerate(FINDINGS)}
    report.findings.sort(key=lambda f: (order[f.code], f.file, f.line, f.message))
    report.totals = {code: report.totals[code] for code in FINDINGS if code in report.totals}
    if html:
        from mmedrag.datasets.check_page import write_page

        write_page(report, Path(html))
    return report


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()


class _Check:
    def __init__(self, database: Path, report: CheckReport, most: int) -> None:
        self.report, self.most = report, most
        self.db = sqlite3.connect(database)
        self.db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -16000;"
            "CREATE TABLE place (n INTEGER PRIMARY KEY, file TEXT, line INT, id TEXT, kind TEXT,"
            " split TEXT, patient TEXT, study TEXT);"
            "CREATE TABLE fact (kind TEXT, key BLOB, value BLOB, n INT, shown TEXT);"
            "CREATE TABLE closed (source TEXT, split TEXT, question BLOB, label INT);"
            "CREATE TABLE image (path TEXT, n INT);"
            "CREATE TABLE tail (word TEXT, n INT);"
        )
        self.words = text_rules.Words()
        self.places = 0
        self.loose: Counter[tuple[str, str]] = Counter()  # (code, file) → rows, said once a file
        self.texts: Counter[str] = Counter()
        self.first: dict[tuple[str, str], int] = {}

    def close(self) -> None:
        self.db.close()

    def add(self, code: str, file: str, line: int, message: str, **more: Any) -> None:
        self.report.totals[code] = self.report.totals.get(code, 0) + 1
        if self.report.totals[code] <= self.most:
            finding = Finding(code, FINDINGS[code][0], file, line, message, **more)
            self.report.findings.append(finding)

    # --- one row

    def row(self, item: Item) -> None:
        """Judge a row by itself and note what is compared later."""
        counted = self.report.rows
        counted[item.kind] = counted.get(item.kind, 0) + 1
        where = (item.file, item.line)
        if item.error:
            self.add("bad_row", *where, item.error)
            return
        n = self.places = self.places + 1
        self.db.execute(
            "INSERT INTO place VALUES (?,?,?,?,?,?,?,?)",
            (n, item.file, item.line, item.id, item.kind, item.split, item.patient, item.study),
        )
        if item.id:
            self.fact("id", f"{item.scope}\0{item.id}", item.id, n)
        else:
            self.loosely("no_id", item)
        if item.missing:
            self.loosely("text_only", item)
        if item.patient and item.split:
            self.fact("patient", item.patient, item.split, n, item.patient)
        for name in item.images:
            self.fact("image", name, item.split or "", n, name)
        if item.images and item.kind == "corpus":
            said = f"{item.id}\0{text_rules.normal(item.text or '')}"
            self.fact("owner", item.images[0], said, n, item.images[0])
        for path in item.paths:
            self.db.execute("INSERT INTO image VALUES (?,?)", (str(path), n))
        self.marks(item)
        if item.texts is not None:
            self.pair(item, n)
        if item.question is not None and item.task == "vqa":
            self.question(item, n)
        if item.text and item.text.strip():
            self.text(item, n)
        for told in (item.text, item.question, item.answer if item.task == "vqa" else None):
            for kind, words in text_rules.identity(told or ""):
                self.add("identity", *where, f"{kind}-like: {words!r:.80}", id=item.id)

    def fact(self, kind: str, key: str, value: str, n: int, shown: str = "") -> None:
        self.db.execute(
            "INSERT INTO fact VALUES (?,?,?,?,?)", (kind, _digest(key), _digest(value), n, shown)
        )

    def loosely(self, code: str, item: Item) -> None:
        """Counted per file and said once, at the first line."""
        self.loose[code, item.scope] += 1
        self.first.setdefault((code, item.scope), item.line)

    def marks(self, item: Item) -> None:
        count = len(item.images) + len(item.missing)
        for place, marks in item.tokens:
            if (item.tokens_needed or marks) and marks != max(1, count):
                said = f"{place}: {marks} <image> for {max(1, count)} image(s)"
                self.add("image_token", item.file, item.line, said, id=item.id)

    def pair(self, item: Item, n: int) -> None:
        chosen, rejected = item.texts or ("", "")
        if item.sides and item.sides[0] == item.sides[1]:
            self.add("no_signal", item.file, item.line, f"{chosen!r:.80}", id=item.id)
        elif chosen.strip() == rejected.strip():
            self.add("identical_texts", item.file, item.line, f"{chosen!r:.80}", id=item.id)
        if item.images and item.id:
            self.fact("pair_owner", f"{item.scope}\0{item.images[0]}", item.id, n, item.images[0])

    def question(self, item: Item, n: int) -> None:
        asked, answer = clean_question(item.question or ""), item.answer or ""
        shown = item.images[0] if item.images else f"{item.study}"
        lead = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
        says = lead.group(1).lower() if lead and item.closed else ""
        self.fact("question", f"{shown}\0{text_rules.normal(asked)}", says, n, asked)
        if answer and (text_rules.repeats_question(asked, answer) or answer.rstrip().endswith("?")):
            self.add("question_in_answer", item.file, item.line, f"{answer!r:.100}", id=item.id)
        if item.made_open:
            self.loosely("made_open", item)
        if not item.closed or item.answer is None:
            return
        if not lead:
            self.add("closed_answer", item.file, item.line, f"{answer!r:.100}", id=item.id)
        elif not re.fullmatch(r"\W*(yes|no)\W*", answer, re.IGNORECASE):
            self.loosely("wordy_answer", item)
        self.db.execute(
            "INSERT INTO closed VALUES (?,?,?,?)",
            (item.source, item.split or "", _digest(asked), int(parse_released(answer) == "yes")),
        )

    def text(self, item: Item, n: int) -> None:
        body = item.text or ""
        self.words.add(body)
        self.texts[item.scope] += 1
        if item.kind == "corpus":
            self.fact("text", text_rules.normal(body), item.study or item.id, n, body[:80])
        if len(body.split()) < 4:
            return
        if not text_rules.stops(body):
            self.loosely("no_full_stop", item)
        if why := text_rules.breaks_off(body):
            self.add("cut_text", item.file, item.line, why, id=item.id)
        elif word := text_rules.last_word(body):
            self.db.execute("INSERT INTO tail VALUES (?,?)", (word, n))

    # --- across rows

    def across(self) -> None:
        self.db.execute("CREATE INDEX by_key ON fact (kind, key)")
        self.db.execute("CREATE INDEX by_row ON image (n)")
        for (code, file), count in sorted(self.loose.items()):
            total = self.texts[file] if code == "no_full_stop" else None
            of = f"{count} of {total} texts" if total else f"{count} rows"
            said = f"{of}: {FINDINGS[code][1]}"
            self.add(code, file, self.first[code, file], said, count=count)
        for key, _ in self.groups("id", "COUNT(*) > 1"):
            rows = self.rows("id", key)
            for row in rows[1:]:
                self.add("duplicate_id", row[1], row[2], f"{row[3]!r} stands also in "
                         f"{rows[0][1]}:{rows[0][2]}", id=row[3])  # fmt: skip
        self.leaks()
        self.repeats()
        for word, file, line, row_id in self.db.execute(
            "SELECT t.word, p.file, p.line, p.id FROM tail t JOIN place p ON p.n = t.n"
        ).fetchall():
            if longer := self.words.half(word):
                said = f"ends with {word!r}, the beginning of {longer!r}"
                self.add("cut_text", file, line, said, id=row_id)

    def groups(self, kind: str, having: str) -> list[tuple[bytes, str]]:
        return self.db.execute(
            f"SELECT key, MIN(shown) FROM fact WHERE kind = ? GROUP BY key HAVING {having} "
            "ORDER BY MIN(n)",
            (kind,),
        ).fetchall()

    def rows(self, kind: str, key: bytes) -> list[tuple[Any, ...]]:
        """(value, file, line, id, split, place) of a group, in the order of the files."""
        return self.db.execute(
            "SELECT f.value, p.file, p.line, p.id, p.split, p.n FROM fact f JOIN place p "
            "ON p.n = f.n WHERE f.kind = ? AND f.key = ? ORDER BY p.n",
            (kind, key),
        ).fetchall()

    def files(self, rows: Iterable[tuple[Any, ...]]) -> list[str]:
        """Up to four picture files of these rows, for the page."""
        found: dict[str, None] = {}
        for row in rows:
            for (path,) in self.db.execute("SELECT path FROM image WHERE n = ?", (row[5],)):
                found.setdefault(path)
            if len(found) >= 4:
                break
        return list(found)[:4]

    def leaks(self) -> None:
        for kind in ("patient", "image"):
            for key, shown in self.groups(kind, "COUNT(DISTINCT value) > 1"):
                firsts: dict[str, tuple[Any, ...]] = {}
                for row in self.rows(kind, key):
                    if row[4]:
                        firsts.setdefault(row[4], row)
                if len(firsts) < 2:
                    continue
                *before, last = firsts.values()
                places = [f"{r[1]}:{r[2]}" for r in before]
                said = f"{shown} is in {' and '.join(firsts)}"
                self.add(f"leak_{kind}", last[1], last[2], said, id=last[3], related=places,
                         images=self.files(firsts.values()))  # fmt: skip

    def repeats(self) -> None:
        for key, shown in self.groups("question", "COUNT(*) > 1"):
            rows = self.rows("question", key)
            same = len({row[0] for row in rows}) == 1
            code = "duplicate_question" if same else "contradiction"
            self.add(code, rows[-1][1], rows[-1][2], f"{shown!r:.100}, {len(rows)} times",
                     id=rows[-1][3], count=len(rows), related=_places(rows[:-1]),
                     images=self.files(rows))  # fmt: skip
        for key, shown in self.groups("text", "COUNT(DISTINCT value) > 1"):
            rows = self.rows("text", key)
            self.add("duplicate_text", rows[0][1], rows[0][2], f"{len(rows)} times: {shown!r:.80}",
                     id=rows[0][3], count=len(rows), related=_places(rows[1:]))  # fmt: skip
        for key, shown in self.groups("owner", "COUNT(DISTINCT value) > 1"):
            rows = self.rows("owner", key)
            self.add("repeated_image", rows[0][1], rows[0][2], f"{shown} stands {len(rows)} times",
                     id=rows[0][3], count=len(rows), related=_places(rows[1:]),
                     images=self.files(rows))  # fmt: skip
        for key, shown in self.groups("pair_owner", "COUNT(DISTINCT value) > 1"):
            rows = self.rows("pair_owner", key)
            for row in rows:
                if _names_another(row[3], shown):
                    self.add("wrong_image", row[1], row[2],
                             f"id {row[3]} has the image {shown}, which stands under {len(rows)} "
                             "ids", id=row[3], images=self.files([row]))  # fmt: skip

    # --- pictures

    def pictures(self, progress: Callable[[int, int | None], None] | None) -> None:
        """Decode each file once: damage, duplicates, near-duplicates across splits."""
        names = [row[0] for row in self.db.execute("SELECT DISTINCT path FROM image ORDER BY path")]
        looks: list[Look] = []
        kept: list[str] = []
        for number, name in enumerate(names, 1):
            if progress:
                progress(number, len(names))
            try:
                looks.append(Look.of(load_image(name)))
                kept.append(name)
            except UserError as error:
                self.damaged(name, str(error))
        self.report.images = len(names)
        if not names:
            self.report.notes.append("no image files to look at")
        self.db.execute("CREATE INDEX by_path ON image (path)")
        same = Groups()
        for i, j in near_duplicates(looks):
            same.join(i, j)
        members: dict[Any, list[int]] = {}
        for i in range(len(looks)):
            members.setdefault(same.find(i), []).append(i)
        for cluster in members.values():
            if len(cluster) > 1:
                self.cluster([kept[i] for i in cluster], [looks[i] for i in cluster])

    def damaged(self, name: str, reason: str) -> None:
        file, line, row_id = self.db.execute(
            "SELECT p.file, p.line, p.id FROM image i JOIN place p ON p.n = i.n WHERE i.path = ? "
            "ORDER BY p.n LIMIT 1",
            (name,),
        ).fetchone()
        code = "image_bomb" if "refused" in reason else "image_undecodable"
        code = "image_missing" if not Path(name).exists() else code
        self.add(code, file, line, reason, id=row_id)

    def cluster(self, names: list[str], looks: list[Look]) -> None:
        """Files that show the same: across splits an error, else worth knowing."""
        uses = {
            name: self.db.execute(
                "SELECT p.file, p.line, p.split, p.patient, p.study, p.id FROM image i "
                "JOIN place p ON p.n = i.n WHERE i.path = ? ORDER BY p.n",
                (name,),
            ).fetchall()
            for name in names
        }
        splits = {use[2] for found in uses.values() for use in found if use[2]}
        owners = {use[3] or f"\0{use[4]}" for found in uses.values() for use in found}
        exact = len({look.pixels for look in looks}) == 1
        *others, last = (found[0] for found in uses.values())
        related = [f"{use[0]}:{use[1]}" for use in others[:9]]
        shown = ", ".join(Path(name).name for name in names[:4])
        said = f"{len(names)} files show {'the same' if exact else 'nearly the same'}: {shown}"
        if len(splits) > 1:
            code, said = "leak_near_duplicate", f"{said}; in {' and '.join(sorted(splits))}"
        elif len(owners) == 1:
            return  # one patient, one split: exposures of a study look alike
        else:
            code = "duplicate_image" if exact else "near_duplicate"
        self.add(code, last[0], last[1], said, id=last[5], count=len(names), related=related,
                 images=names[:4])  # fmt: skip


def _places(rows: Iterable[tuple[Any, ...]]) -> list[str]:
    return [f"{row[1]}:{row[2]}" for row in rows][:9]


def _shape(name: str) -> str:
    return re.sub(r"[0-9a-f]+", "x", name.lower())


def _names_another(row_id: str, image: str) -> bool:
    """The id looks like this image's file name (same shape), but is another's."""
    stem = Path(image).stem
    return len(row_id) >= 6 and row_id not in image and _shape(row_id) == _shape(stem)


def findings_of(report: CheckReport, code: str) -> Iterator[Finding]:
    """The listed findings of one kind."""
    return (finding for finding in report.findings if finding.code == code)
