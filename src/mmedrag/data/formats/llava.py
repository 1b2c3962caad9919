"""``data import llava``: LLaVA conversations and question files (LLaVA, LLaVA-Med, CARES).

Conversations ``{id, image, conversations [{from, value}, …]}`` give one example per turn, as do
``messages [{role, content}, …]`` with ``images`` (ms-swift, LLaMA-Factory, TRL). A turn that asks
for a report, caption or description (and puts no question) is a report example and a corpus row.
Question files ``{question_id, image, text, …}`` are read as in ``vqa``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmedrag.data.common import (
    IMAGE_KEYS,
    Defaults,
    ImageRoot,
    clean_question,
    expect_image,
    extra_fields,
    image_roots,
    images_of,
    import_rows,
    is_placeholder,
    named_images,
    pick,
    row_id,
    rows_of,
    source_files,
    split_named,
    text_of,
)
from mmedrag.data.formats.vqa import question_row, split_from
from mmedrag.data.options import choice_of
from mmedrag.data.rows import SourceRow
from mmedrag.data.writer import Writer
from mmedrag.records import UserError

_WRITE = re.compile(
    r"\b(report|caption|describe|description|summar\w+|findings|overview|portray|depict|narrate"
    r"|explain the (?:contents|visual)|walk through)\b",
    re.IGNORECASE,
)
Turns = Literal["auto", "vqa", "report"]
_KNOWN = "id domain source licence attribution patient split meta".split()
TALKS = ("conversations", "messages", "conversation")


def load(
    src: Path,
    writer: Writer,
    *,
    image_root: ImageRoot | None = None,
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
        if talk_of(row.value):
            conversation(row, writer, roots, defaults, turns)
        else:
            question_row(row, writer, roots, defaults)

    files = source_files(src, ".json", ".jsonl")
    import_rows(rows_of(files, writer), writer, use)


def talk_of(value: Any) -> list[str]:
    """The fields of a row that hold its conversation: one, or TRL's prompt and completion."""
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("prompt"), list) and isinstance(value.get("completion"), list):
        return ["prompt", "completion"]
    return [key for key in TALKS if value.get(key) is not None][:1]


def conversation(
    row: SourceRow, writer: Writer, roots: Sequence[Path], defaults: Defaults, turns: Turns
) -> None:
    """One conversation with its pictures: an example per turn, and a corpus row."""
    value: dict[str, Any] = row.value
    talk = talk_of(value)
    said = [value[key] for key in talk]
    spoken = [turn for part in said for turn in part] if len(said) > 1 else said[0]
    exchanges, inside = exchanges_of(spoken, talk[0])
    asked = "\n".join(question for question, _ in exchanges)
    pictures, named = named_images(value, asked, IMAGE_KEYS)
    pictures = pictures or inside
    writer.doubt(row, expect_image(asked, pictures))
    if isinstance(pictures, list) and len(pictures) == 1:
        pictures = pictures[0]
    base = row_id(row, value.get("id", value.get("question_id")))
    image, missing = images_of(pictures, roots, writer)
    shared = defaults.fields(value) | {
        "image": image,
        "patient": text_of(value, "patient", numbers=True),
        "split": split_named(text_of(value, "split")) or split_from(row.file),
    }
    meta: dict[str, Any] = {"study": base} | extra_fields(
        value, [*_KNOWN, *talk, *(named or IMAGE_KEYS[:2])]
    )
    if missing:
        meta["missing_images"] = missing
    in_corpus = False
    for number, (question, said_so) in enumerate(exchanges):
        asks = clean_question(question)
        answer = None if is_placeholder(said_so) else said_so
        writer.placeholders += answer is None
        writes = turns == "report" or (
            turns == "auto" and "?" not in asks and bool(_WRITE.search(asks))
        )
        wanted = f"{base}/turn-{number}" if len(exchanges) > 1 else base
        wanted = writer.unique("examples", wanted, row.number)
        if writes and answer is not None:
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
        elif not writes:
            choice = choice_of(value if len(exchanges) == 1 else {}, asks, answer)
            kept, original = choice.answer_type(None)
            writer.doubt(row, choice.doubt)
            writer.example(
                row,
                id=wanted,
                task="vqa",
                question=choice.question,
                answer=choice.answer,
                options=choice.options or None,
                answer_type=kept,
                meta=meta | original,
                **shared,
            )
    if not in_corpus:
        corpus_id = writer.unique("corpus", base, row.number)
        writer.reference(row, id=corpus_id, text="", meta=meta, **shared)


def exchanges_of(turns: Any, field: str) -> tuple[list[tuple[str, str]], list[Any]]:
    """(question, answer) pairs, and the pictures that stand inside them.

    A leading system turn is passed over.

    Raises:
        UserError: turns that do not alternate, or are not text.
    """
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{field}: expected a list of turns, {{from, value}} or {{role, content}}")
    texts: list[str] = []
    pictures: list[Any] = []
    for number, turn in enumerate(turns):
        given = turn if isinstance(turn, dict) else {}
        speaker = given.get("from", given.get("role"))
        if speaker == "system" and number == 0:
            continue
        text = text_in(given.get("value", given.get("content")), pictures)
        expected = ("human", "user") if len(texts) % 2 == 0 else ("gpt", "assistant", "model")
        if speaker not in expected or text is None:
            raise UserError(
                f"{field}.{number}: expected a turn from {expected[0]} with a text value, "
                f"got {turn!r:.80}"
            )
        texts.append(text)
    if not texts or len(texts) % 2:
        raise UserError(f"{field}: the last question has no answer")
    return list(zip(texts[::2], texts[1::2], strict=True)), pictures


def text_in(content: Any, pictures: list[Any]) -> str | None:
    """The text of a turn, which may be a list of parts; ``<image>`` for each part with a picture.

    Pictures that parts name are added to ``pictures``. None where it is no text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            found.append(part["text"])
        elif kind in ("image", "image_url", "input_image"):
            found.append("<image>")
            named = pick(part, ("image", "image_url", "path", "url"))
            pictures += [part[named]] if named else []
        else:
            return None
    return "\n".join(found)
