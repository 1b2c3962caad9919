"""``data import llava``: LLaVA conversations and question files (LLaVA, LLaVA-Med, CARES).

Conversations ``{id, image, conversations [{from, value}, …]}`` give one example per turn; a
turn that asks for a report, caption or description (and puts no question) is a report example
and a corpus row. Question files ``{question_id, image, text, …}`` are read as in ``vqa``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmedrag.data.common import (
    Defaults,
    answer_type,
    clean_question,
    extra_fields,
    image_roots,
    images_of,
    import_rows,
    row_id,
    source_files,
    split_named,
    text_of,
)
from mmedrag.data.formats.vqa import question_row, split_from
from mmedrag.data.rows import SourceRow, read_rows
from mmedrag.data.writer import Writer
from mmedrag.records import UserError

_WRITE = re.compile(
    r"\b(report|caption|describe|description|summar\w+|findings|overview|portray|depict|narrate"
    r"|explain the (?:contents|visual)|walk through)\b",
    re.IGNORECASE,
)
Turns = Literal["auto", "vqa", "report"]
_KNOWN = "id image conversations domain source licence attribution patient split meta".split()


def load(
    src: Path,
    writer: Writer,
    *,
    image_root: Path | None = None,
    domain: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    attribution: str | None = None,
    turns: Turns = "auto",
) -> None:
    """Fill ``writer`` from LLaVA files at ``src``.

    ``turns``: what a turn of a conversation is; ``auto`` decides by its wording.
    """
    if turns not in ("auto", "vqa", "report"):
        raise UserError(f"turns: got {turns!r}, expected auto, vqa or report")
    defaults = Defaults(domain, source, licence, attribution)
    roots = image_roots(src, image_root)

    def use(row: SourceRow) -> None:
        if isinstance(row.value, dict) and "conversations" in row.value:
            _conversation(row, writer, roots, defaults, turns)
        else:
            question_row(row, writer, roots, defaults)

    files = source_files(src, ".json", ".jsonl")
    import_rows((row for file in files for row in read_rows(*file)), writer, use)


def _conversation(
    row: SourceRow, writer: Writer, roots: Sequence[Path], defaults: Defaults, turns: Turns
) -> None:
    value: dict[str, Any] = row.value
    exchanges = _pairs(value["conversations"])
    base = row_id(row, value.get("id", value.get("question_id")))
    image, missing = images_of(value.get("image"), roots, writer)
    shared = defaults.fields(value) | {
        "image": image,
        "patient": text_of(value, "patient", numbers=True),
        "split": split_named(text_of(value, "split")) or split_from(row.file),
    }
    meta: dict[str, Any] = {"study": base} | extra_fields(value, _KNOWN)
    if missing:
        meta["missing_images"] = missing
    in_corpus = False
    for number, (question, answer) in enumerate(exchanges):
        asks = clean_question(question)
        writes = turns == "report" or (
            turns == "auto" and "?" not in asks and bool(_WRITE.search(asks))
        )
        wanted = f"{base}/turn-{number}" if len(exchanges) > 1 else base
        wanted = writer.unique("examples", wanted, row.number)
        if writes:
            writer.example(
                row, id=wanted, task="report", answer=answer, meta=meta | {"prompt": asks}, **shared
            )
            if not in_corpus:
                in_corpus = writer.reference(
                    row,
                    id=writer.unique("corpus", base, row.number),
                    text=answer,
                    meta=meta,
                    **shared,
                )
        else:
            kept, original = answer_type(None, answer)
            writer.example(
                row,
                id=wanted,
                task="vqa",
                question=asks,
                answer=answer,
                answer_type=kept,
                meta=meta | original,
                **shared,
            )
    if not in_corpus:
        corpus_id = writer.unique("corpus", base, row.number)
        writer.reference(row, id=corpus_id, text="", meta=meta, **shared)


def _pairs(turns: Any) -> list[tuple[str, str]]:
    """(human, gpt) pairs; a leading system turn is passed over.

    Raises:
        UserError: turns that do not alternate, or are not text.
    """
    if not isinstance(turns, list) or not turns:
        raise UserError("conversations: expected a list of {from, value}")
    texts: list[str] = []
    for number, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if speaker == "system" and number == 0:
            continue
        expected = ("human", "user") if len(texts) % 2 == 0 else ("gpt", "assistant")
        if speaker not in expected or not isinstance(text, str):
            raise UserError(
                f"conversations.{number}: expected a turn from {expected[0]} with a text value, "
                f"got {speaker!r:.40}"
            )
        texts.append(text)
    if not texts or len(texts) % 2:
        raise UserError("conversations: the last question has no answer")
    return list(zip(texts[::2], texts[1::2], strict=True))
