"""``data import vqa``: question files such as VQA-RAD, SLAKE, PathVQA, OmniMedVQA and CARES.

JSON arrays or JSON Lines whose rows hold an image, a question and an answer under one of the
names in use. Every row gives a vqa example, every distinct image a corpus row without text
(enough for domain identification and image-image search).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedrag.data.common import (
    IMAGE_KEYS,
    Defaults,
    ImageRoot,
    below,
    clean_question,
    expect_image,
    extra_fields,
    find,
    image_roots,
    images_of,
    import_rows,
    named_images,
    pick,
    row_id,
    rows_of,
    source_files,
    split_named,
    text_of,
)
from mmedrag.data.options import choice_of
from mmedrag.data.rows import SourceRow
from mmedrag.data.writer import Writer
from mmedrag.records import Split, UserError

NAMES = {  # ours: those in use, in any case; the first that has a value counts
    "question": ("question", "text", "prompt", "query", "instruction"),
    "answer": (
        *("answer", "gt_answer", "gpt4_answer", "fig_caption", "label"),
        *("response", "output", "completion"),
    ),
    "image": (*IMAGE_KEYS, "image_id", "img_id", "filename", "file_name", "file", "path"),
    "id": ("question_id", "qid", "id", "pair_id"),
    "patient": ("patient", "patient_id", "subject_id"),
}
SUFFIXES = ("", ".jpg", ".png", ".jpeg")


def load(
    src: Path,
    writer: Writer,
    *,
    image_root: ImageRoot | None = None,
    domain: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    attribution: str | None = None,
    language: str | None = "en",
) -> None:
    """Fill ``writer`` from question files at ``src`` (a file or a folder of them).

    ``language`` keeps rows of that language where rows name one (SLAKE's ``q_lang``); None
    keeps all. Splits come from file names (train, validate, test) or a ``split`` field; else
    they are drawn by image.
    """
    defaults = Defaults(domain, source, licence, attribution)
    roots = image_roots(src, image_root)
    skipped = 0

    def use(row: SourceRow) -> None:
        nonlocal skipped
        named = row.value.get("q_lang", language) if isinstance(row.value, dict) else language
        if language and named != language:
            skipped += 1
        else:
            question_row(row, writer, roots, defaults)

    files = source_files(src, ".json", ".jsonl")
    import_rows(rows_of(files, writer), writer, use)
    if skipped:
        writer.result.notes.append(f"{skipped} rows in other languages than {language!r} left out")


def split_from(name: str) -> Split | None:
    """Split in a file name: a word such as train, validate, val, dev or test."""
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        try:
            return split_named({"validate": "val"}.get(word, word))
        except UserError:
            continue
    return None


def question_row(row: SourceRow, writer: Writer, roots: Sequence[Path], defaults: Defaults) -> None:
    """One question with its image, as an example and (for a new image) a corpus row."""
    value = row.value
    if not isinstance(value, dict):
        raise UserError("expected an object with image, question and answer")
    names = {kind: pick(value, keys) for kind, keys in NAMES.items()}
    if names["question"] is None:
        talk = (
            "; conversations are read as llava"
            if {"messages", "conversations"} & set(value)
            else ""
        )
        raise UserError(f"question: missing, expected one of {', '.join(NAMES['question'])}{talk}")
    text = text_of(value, names["question"], required=True) or ""
    if names["question"] == "instruction" and value.get("input"):  # Alpaca: what it is about
        text = f"{text}\n{text_of(value, 'input')}"
    pictures, shown = named_images(value, text, NAMES["image"])
    writer.doubt(row, expect_image(text, pictures))
    writer.doubt(row, "its history, earlier turns, is left out" if value.get("history") else None)
    choice = choice_of(
        value, clean_question(text), text_of(value, names["answer"] or "answer", numbers=True)
    )
    answer = choice.answer
    wanted = row_id(row, value.get(names["id"] or "id"))
    image, missing, key = _image(pictures, writer, roots)
    meta: dict[str, Any] = {}
    if key:
        meta["study"] = f"{defaults.source}/{key}" if defaults.source else key
    given = value.get("answer_type")
    kept, original = choice.answer_type(given)
    known = {"answer_type", "domain", "source", "licence", "attribution", "split", "meta"}
    known |= {n for n in names.values() if n} | choice.used | set(shown)
    shared = defaults.fields(value) | {
        "image": image,
        "patient": text_of(value, names["patient"] or "patient", numbers=True),
        "split": defaults.split or split_named(text_of(value, "split")) or split_from(row.file),
    }
    if missing:
        meta["missing_images"] = missing
    if key and not writer.has("corpus", meta["study"]):
        light = {k: value[k] for k in ("modality", "image_organ", "location") if k in value}
        writer.reference(row, id=meta["study"], text="", meta=meta | light, **shared)
    writer.doubt(row, choice.doubt)
    writer.example(
        row,
        id=writer.unique("examples", wanted, row.number),
        task="vqa",
        question=choice.question,
        answer=answer,
        options=choice.options or None,
        answer_type=kept,
        meta=meta | extra_fields(value, known) | original,
        **shared,
    )


def _image(given: Any, writer: Writer, roots: Sequence[Path]) -> tuple[Any, list[str], str | None]:
    """(stored, missing, study key); an image id may stand without its suffix (PathVQA)."""
    if given in (None, "", []):
        return None, [], None
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if not isinstance(given, (str, int)) or len(str(given)) > 1000:  # views, or a picture itself
        image, missing = images_of(given, roots, writer)
        views = [image] if isinstance(image, str) else image or missing
        return image, missing, str(views[0])
    wanted = below(str(given), roots)
    key = re.sub(r"(/source)?\.\w{2,5}$", "", wanted)  # SLAKE: xmlab1/source.jpg
    suffixes = SUFFIXES if "." not in wanted[-6:] else ("",)
    there = next((s for s in suffixes if find(wanted + s, roots)), "")
    return *images_of(wanted + there, roots, writer), key
