"""``data check``: what is wrong with a data set, with file and line.

Place in the picture: after an import, before anything is trained or measured. Rows stream
through once; what has to be compared across rows (ids, texts, images, patients, splits) goes
into a temporary SQLite file, so memory does not grow with the data. Pictures are decoded once
each when ``images`` is on.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from mmedrag.data.checks import text as text_rules
from mmedrag.data.checks.baselines import baselines
from mmedrag.data.checks.cross_rows import CrossRowIndex, Group, Place
from mmedrag.data.checks.pictures import look
from mmedrag.data.checks.report import FINDINGS, CheckReport
from mmedrag.data.checks.rows import Item, read
from mmedrag.data.common import clean_question
from mmedrag.data.formats.released import Roots
from mmedrag.records import UserError, parse_released
from mmedrag.runtime import check_own


def check(
    paths: Sequence[str | Path],
    *,
    image_root: Roots | None = None,
    images: bool = True,
    html: str | Path | None = None,
    most: int = 5000,
    progress: Callable[[int, int | None], None] | None = None,
) -> CheckReport:
    """Check DATA folders or released files; several together are also checked for leakage.

    Args:
        image_root: where images of released files lie (one folder, several, or one per dataset).
        images: decode pictures (needed for damage and near-duplicates).
        html: write a page with thumbnails of the worst there.
        most: findings of one kind that are listed one by one (``totals`` counts all).

    Raises:
        UserError: nothing there to check.
    """
    if not paths:
        raise UserError("data check: nothing given, expected data folders or released files")
    if html:
        check_own(html)
    report = CheckReport([str(p) for p in paths], most)
    with tempfile.TemporaryDirectory(prefix="mmedrag-check-") as scratch:
        index = CrossRowIndex(Path(scratch) / "rows.sqlite")
        run = _Check(index, report)
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
            look(index, report, progress, done)
        report.baselines = baselines(index.db)
        index.close()
    report.sort()
    if html:
        from mmedrag.data.checks.page import write_page

        write_page(report, Path(html))
    return report


class _Check:
    def __init__(self, index: CrossRowIndex, report: CheckReport) -> None:
        self.index, self.report = index, report
        self.words = text_rules.Words()
        self.loose: Counter[tuple[str, str]] = Counter()  # (code, file) → rows, said once a file
        self.texts: Counter[str] = Counter()
        self.first: dict[tuple[str, str], int] = {}

    # --- one row

    def row(self, item: Item) -> None:
        """Judge a row by itself and note what is compared later."""
        counted = self.report.rows
        counted[item.kind] = counted.get(item.kind, 0) + 1
        if item.error:
            self.report.add("bad_row", item.file, item.line, item.error)
            return
        n = self.index.place(item.file, item.line, item.id, item.split, item.patient, item.study)
        if item.id:
            self.index.add("id", f"{item.scope}\0{item.id}", item.id, n, item.id)
        else:
            self.once_a_file("no_id", item)
        if item.missing:
            self.once_a_file("text_only", item)
        if item.patient and item.split:
            self.index.add("patient", item.patient, item.split, n, item.patient)
        for name in item.named:
            self.index.add("image", name, item.split or "", n, name)
        if item.named and item.kind == "corpus":
            own = f"{item.id}\0{text_rules.normal(item.text or '')}"
            self.index.add("owner", item.named[0], own, n, item.named[0])
        for path in item.paths:
            self.index.image(path, n)
        self.marks(item)
        if item.texts is not None:
            self.pair(item, n)
        if item.question is not None and item.task == "vqa":
            self.question(item, n)
        if item.text and item.text.strip():
            self.text(item, n)
        elif item.task == "report" and item.text is not None:
            self.add("empty_text", item, "report")
        for text in item.readable_texts:
            for kind, words in text_rules.identity(text):
                self.index.text_finding("identity", text, f"{kind}-like: {words!r:.80}", n)

    def add(self, code: str, item: Item, message: str) -> None:
        self.report.add(code, item.file, item.line, message, id=item.id)

    def once_a_file(self, code: str, item: Item) -> None:
        """Counted per file and said once, at the first line."""
        self.loose[code, item.scope] += 1
        self.first.setdefault((code, item.scope), item.line)

    def marks(self, item: Item) -> None:
        count = max(1, len(item.images) + len(item.missing))
        for place, marks in item.tokens:
            if (item.tokens_needed or marks) and marks != count:
                self.add("image_token", item, f"{place}: {marks} <image> for {count} image(s)")

    def pair(self, item: Item, n: int) -> None:
        chosen, rejected = item.texts or ("", "")
        if item.sides and item.sides[0] == item.sides[1]:
            self.add("no_signal", item, f"{chosen!r:.80}")
        elif chosen.strip() == rejected.strip():
            self.add("identical_texts", item, f"{chosen!r:.80}")
        if item.named and item.own_id:
            name = item.named[0]
            key = f"{item.scope}\0{name}"
            self.index.add("pair_owner", key, item.own_id, n, name)
            if _names_another(item.own_id, name):
                self.index.add("stranger", key, item.own_id, n)

    def question(self, item: Item, n: int) -> None:
        asked, answer = clean_question(item.question or ""), item.answer or ""
        shown = item.named[0] if item.named else f"{item.study}"
        lead = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
        says = lead.group(1).lower() if lead and item.closed else ""
        if asked:
            key = f"{shown}\0{text_rules.normal(asked)}"
            self.index.add("question", key, says, n, asked)
        for name, text in (("question", asked), ("answer", item.answer)):
            if text is not None and not text.strip():
                self.add("empty_text", item, name)
        if text_rules.repeats_question(asked, answer) or text_rules.asks(answer, item.closed):
            self.add("question_in_answer", item, f"{answer!r:.100}")
        if item.made_open:
            self.once_a_file("made_open", item)
        if not item.closed or item.answer is None:
            return
        if text_rules.answers_itself(asked):
            self.add("answer_in_question", item, f"ends with {asked[-30:]!r}")
        if answer.strip() and not lead:
            self.add("closed_answer", item, f"{answer!r:.100}")
        elif lead and not re.fullmatch(r"\W*(yes|no)\W*", answer, re.IGNORECASE):
            self.once_a_file("wordy_answer", item)
        yes = parse_released(answer) == "yes"
        self.index.closed(item.source, item.split or "", asked, yes)

    def text(self, item: Item, n: int) -> None:
        body = item.text or ""
        self.words.add(body)
        self.texts[item.scope] += 1
        if item.kind == "corpus":
            key = text_rules.normal(body)
            self.index.add("text", key, item.study or item.id, n, body[:80])
        if len(body.split()) < 4:
            return
        if not text_rules.stops(body):
            self.once_a_file("no_full_stop", item)
        if why := text_rules.breaks_off(body):
            self.index.text_finding("cut_text", body, why, n)
        elif word := text_rules.last_word(body):
            self.index.tail(word, body, n)

    # --- across rows

    def across(self) -> None:
        self.index.finish()
        for (code, file), count in sorted(self.loose.items()):
            total = self.texts[file] if code == "no_full_stop" else None
            of = f"{count} of {total} texts" if total else f"{count} rows"
            message = f"{of}: {FINDINGS[code][1]}"
            self.report.add(code, file, self.first[code, file], message, count=count)
        for group in self.index.groups("id", rows=2):
            rows = self.index.rows("id", group.key)
            first = next(rows)
            for row in rows:
                message = f"{row.id!r} stands also in {first}"
                self.report.add("duplicate_id", row.file, row.line, message, id=row.id)
        self.leaks()
        self.repeats()
        self.texts_at_fault()

    def leaks(self) -> None:
        for kind in ("patient", "image"):
            for group in self.index.groups(kind, values=2):
                firsts = self.index.first_of_each_split(kind, group.key)
                if len(firsts) < 2:
                    continue
                message = f"{group.shown} is in {' and '.join(str(row.split) for row in firsts)}"
                self.repeat(f"leak_{kind}", message, 1, [firsts[-1], *firsts[:-1]])

    def repeats(self) -> None:
        for group in self.index.groups("question", rows=2):
            *before, at = self.index.rows("question", group.key, 10)
            opposed = self.index.holds("question", group.key, "yes", "no")
            code = "contradiction" if opposed else "duplicate_question"
            message = f"{group.shown!r:.100}, {group.rows} times"
            self.repeat(code, message, group.rows, [at, *before])
        for group in self.index.groups("text", values=2):
            message = f"{group.rows} times: {group.shown!r:.80}"
            self.repeat("duplicate_text", message, group.rows, self.places("text", group), False)
        for group in self.index.groups("owner", values=2):
            message = f"{group.shown} stands {group.rows} times"
            self.repeat("repeated_image", message, group.rows, self.places("owner", group))
        for group in self.index.groups("pair_owner", values=2):
            message = f"its id is that of another image than {group.shown}, which stands under "
            for row in self.index.rows("stranger", group.key):
                self.repeat("wrong_image", f"{message}{group.values} ids", 1, [row])

    def places(self, kind: str, group: Group) -> list[Place]:
        return list(self.index.rows(kind, group.key, 10))

    def repeat(
        self, code: str, message: str, count: int, rows: list[Place], show: bool = True
    ) -> None:
        """A finding at the first of ``rows``, related to the others."""
        at, *others = rows
        self.report.add(
            code,
            at.file,
            at.line,
            message,
            id=at.id,
            count=count,
            related=[str(row) for row in others],
            images=self.index.pictures(rows) if show else [],
        )

    def texts_at_fault(self) -> None:
        """Texts with identity in them, or cut; one finding for a text that stands often."""
        for word, text, rows in self.index.tails():
            if longer := self.words.half(word, rows):
                message = f"ends with {word!r}, the beginning of {longer!r}"
                self.index.cut(word, text, message)
        for code, message, count, places in self.index.text_findings():
            self.repeat(code, message, count, places, False)


def _shape(name: str) -> str:
    return re.sub(r"[0-9a-f]+", "x", name.lower())


def _names_another(row_id: str, image: str) -> bool:
    """The id looks like this image's file name (same shape), but is another's."""
    stem = Path(image).stem
    return len(row_id) >= 6 and row_id not in image and _shape(row_id) == _shape(stem)
