"""``data import released``: every row format of the released MMed-RAG data.

There are ten of them (D1 of docs/differences.md), recognised by their fields, one by one, so that
mixed files and single files both work:

- test VQA (``question``, ``answer``): a closed question; with ``report`` also a corpus row
- reports and retriever training (``report`` | ``gpt4_summary`` | ``caption``, image under
  ``image`` or ``image_path``, a string or a list of views): a corpus row and a report example
- answer files (``prompt``, ``answer``, ``gt_answer`` | ``gt_report``): the question asked
- alignment (``conversations``, ``rejected_conversations``): a preference pair

The row as released travels in ``meta.released``, so that ``export_released`` can write it back.
Licensed images are not part of that data: rows whose image is absent are text-only.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag.data.common import (
    ImageRoot,
    answer_type,
    clean_question,
    image_roots,
    images_of,
    row_id,
    source_files,
    split_named,
    text_of,
)
from mmedrag.data.formats.released_pairs import import_released
from mmedrag.data.rows import SourceRow, holds_lines, parse, read_rows
from mmedrag.data.writer import Writer
from mmedrag.records import Example, Pair, Reference, Split, UserError
from mmedrag.runtime import DataFolder, check_own, write_json, write_text

TEXT_KEYS = ("gpt4_summary", "report", "caption")  # Harvard has two; the summary is the target
IMAGE_KEYS = ("image_path", "image")
DOMAINS = {
    "harvard": "ophthalmology",
    "iu": "radiology",
    "mimic": "radiology",
    "pmc": "pathology",
    "quilt": "pathology",
}
AS_WRITTEN: frozenset[str] = frozenset()  # no word is a placeholder: rows go back byte-equal
STYLES = "released.json"  # how each source file was laid out, for a byte-equal way back


@dataclass(frozen=True)
class Study:
    """Which picture a row is about: its dataset, study and (where known) patient."""

    dataset: str | None
    key: str | None
    patient: str | None

    @property
    def name(self) -> str | None:
        return f"{self.dataset or 'other'}/{self.key}" if self.key else None


def identify(row: Mapping[str, Any], file: str) -> Study:
    """Dataset, study and patient, from the file name, the row's fields and its image path."""
    names = image_names(row)
    first = names[0] if names else ""
    root = str(row.get("image_root", "")).lower()
    stem = Path(file).stem.lower()
    tail = first.rsplit("/", 1)[-1]
    if found := re.fullmatch(r"(?:slo_fundus|data)_(\d+)\.\w+", tail):
        return Study("harvard", found[1], f"harvard-{found[1]}")
    if found := re.match(r"(?:.*/)?p\d\d/p(\d+)/(s\d+)/[^/]+$", first):
        return Study("mimic", found[2], f"mimic-{found[1]}")
    if found := re.match(r"(?:.*/)?(CXR\d+_IM[^/]*?)(?:/|\.|$)", first):
        return Study("iu", found[1], f"iu-{found[1].split('_')[0]}")
    for name in ("quilt", "pmc", "harvard", "mimic", "iu"):
        marks = {"pmc": ("pmc",), "quilt": ("quilt",), "iu": ("iuxray", "iu_xray", "iu-xray")}
        if any(mark in stem or mark in root for mark in marks.get(name, (name,))):
            return Study(name, tail.rsplit(".", 1)[0] or None, None)
    if "caption" in row:
        return Study("quilt", tail.rsplit(".", 1)[0] or None, None)
    return Study(None, tail.rsplit(".", 1)[0] or None, None)


def image_names(row: Mapping[str, Any]) -> list[str]:
    """The image paths a row names: under either key, one or several views."""
    for key in IMAGE_KEYS:
        value = row.get(key)
        if isinstance(value, str) and value:
            return [value]
        if isinstance(value, list) and value:
            return [v for v in value if isinstance(v, str)]
    return []


def kind_of(row: Any) -> str | None:
    """Which released format a row has: alignment, answer, vqa, report, or None."""
    if not isinstance(row, dict):
        return None
    if "conversations" in row and "rejected_conversations" in row:
        return "alignment"
    if "answer" in row and ("gt_answer" in row or "gt_report" in row):
        return "answer"
    if "question" in row and "answer" in row:
        return "vqa"
    if any(key in row for key in TEXT_KEYS):
        return "report"
    return None


def split_of(file: str, row: Mapping[str, Any]) -> Split | None:
    """From the place of the file (test/, …_train, …_val; alignment comes from the val pool)."""
    words = re.split(r"[^a-z]+", file.lower())
    for word, split in (("alignment", "val"), ("test", "test"), ("train", "train"), ("val", "val")):
        if word in words[-3:] or (word in ("alignment", "test") and word in words):
            return split  # type: ignore[return-value]
    try:
        return split_named(str(row.get("split", row.get("use"))))
    except UserError:
        return None


def sources(src: Path) -> list[tuple[Path, str]]:
    """(file, name relative to ``src``) of every ``.json`` and ``.jsonl`` below ``src``.

    Report files come first, so that a study's own report row is there before its questions.
    """
    files = source_files(src, ".json", ".jsonl")
    return sorted(files, key=lambda file: ("vqa" in file[1].lower(), file[1]))


Roots = ImageRoot | Mapping[str, Path]


def load(src: Path, writer: Writer, *, image_root: Roots | None = None) -> None:
    """Fill ``writer`` from released files at ``src`` (a file, or a folder such as ``data/``).

    ``image_root``: one folder, several, or one per dataset (``harvard``, ``iu``, ``mimic``,
    ``pmc``, ``quilt``). In a single folder, images are also looked for under the dataset's name.
    The absolute ``image_root`` inside rows is a path of the authors' machine: it is not read.
    """
    done, styles = 0, {}
    seen: set[str] = set()  # studies that have a corpus row
    for path, name in sources(src):
        rows: list[Any] = []
        aligned: list[SourceRow] = []
        for row in read_rows(path, name):
            done += 1
            writer.tick(done)
            rows.append(row.value)
            if row.error:
                writer.reject(row, row.error)
                continue
            kind = kind_of(row.value)
            if kind == "alignment":
                aligned.append(row)
                continue
            try:
                _row(row, kind, writer, image_root, seen)
            except UserError as error:
                writer.reject(row, str(error))
        if aligned:
            _alignment(aligned, writer, image_root)
        style = layout(path, rows)
        styles[name] = {"rows": len(rows), "style": style}
        if style is None:
            writer.result.notes.append(f"{name}: unusual layout, an export will not be byte-equal")
    write_json(writer.out / STYLES, styles, indent=2, own=True)


def roots_for(image_root: Roots | None, study: Study) -> list[Path]:
    """Where the images of a study's dataset may lie."""
    if image_root is None:
        return []
    if isinstance(image_root, Mapping):
        return [Path(image_root[name]) for name in (study.dataset or "",) if name in image_root]
    roots = image_roots(Path(), image_root)
    return [*(root / study.dataset for root in roots if study.dataset), *roots]


def _row(
    row: SourceRow, kind: str | None, writer: Writer, image_root: Roots | None, seen: set[str]
) -> None:
    value = row.value
    if kind is None:
        keys = ", ".join(map(str, list(value)[:8])) if isinstance(value, dict) else "no object"
        raise UserError(f"none of the released row formats (fields: {keys or 'none'})")
    study, split = identify(value, row.file), split_of(row.file, value)
    image, missing = _images(value, writer, image_root, study)
    meta: dict[str, Any] = {"study": study.name} if study.name else {}
    if missing:
        meta["missing_images"] = missing
    shared = {
        "image": image,
        "patient": study.patient,
        "split": split,
        "source": study.dataset,
        "domain": DOMAINS.get(study.dataset or ""),
    }
    stem = row.file.rsplit(".", 1)[0]
    wanted = row_id(row, value.get("question_id", value.get("id")), f"row-{row.number}")
    released = {"released": {"file": row.file, "row": row.number, "fields": value}}
    if kind == "report":
        text_key = next(key for key in TEXT_KEYS if key in value)
        text = text_of(value, text_key, absent=AS_WRITTEN) or ""
        writer.reference(
            row,
            id=writer.unique("corpus", wanted, row.number),
            text=text,
            meta=meta | released,
            **shared,
        )
        if study.name:
            seen.add(study.name)
        if text.strip():
            writer.example(
                row,
                id=writer.unique("examples", wanted, row.number),
                task="report",
                answer=text,
                meta=meta,
                **shared,
            )
        return
    report = text_of(value, "report", absent=AS_WRITTEN)
    if report and study.name and study.name not in seen:
        seen.add(study.name)
        corpus_id = writer.unique("corpus", f"{stem}/report/{study.key}", row.number)
        writer.reference(row, id=corpus_id, text=report, meta=meta, **shared)
    if kind == "answer":
        question = text_of(value, "prompt", required=True, absent=AS_WRITTEN) or ""
        target = text_of(value, "gt_answer", absent=AS_WRITTEN) or text_of(
            value, "gt_report", absent=AS_WRITTEN
        )
        task = "report" if "gt_report" in value else "vqa"
    else:
        question = text_of(value, "question", required=True, absent=AS_WRITTEN) or ""
        target, task = text_of(value, "answer", absent=AS_WRITTEN), "vqa"
    closed: dict[str, Any] = {}
    if task == "vqa":
        kept, original = answer_type("closed", target)
        closed = {"answer_type": kept, "question": clean_question(question)}
        options = value.get("options")  # as an export writes them; the released rows have none
        if isinstance(options, list) and target in options:
            closed["options"] = options
        meta |= original
    writer.example(
        row,
        id=writer.unique("examples", wanted, row.number),
        task=task,
        answer=target,
        meta=meta | released,
        **closed,
        **shared,
    )


def _images(
    value: Mapping[str, Any], writer: Writer, image_root: Roots | None, study: Study
) -> tuple[str | list[str] | None, list[str]]:
    key = next((key for key in IMAGE_KEYS if value.get(key)), None)
    if key is None:
        return None, []
    roots = roots_for(image_root, study)
    prefix = f"{study.dataset}/" if study.dataset else ""
    image, missing = images_of(value[key], roots, writer, prefix=prefix)
    other = value.get("filename")  # Harvard: the array from which the .jpg was made
    if image is None and isinstance(other, str) and roots:
        array, _ = images_of(other, roots, writer, prefix=prefix)
        writer.missing.pop(prefix + other, None)
        if array is not None:
            for name in missing:
                writer.missing.pop(prefix + name, None)
            return array, []
    return image, missing


# --- preference pairs ---------------------------------------------------------------------------


def _alignment(rows: Sequence[SourceRow], writer: Writer, image_root: Roots | None) -> None:
    """Alignment rows as native pairs; what each row means is ``released_pairs``'s business."""
    with tempfile.TemporaryDirectory(prefix="mmedrag-") as scratch:
        sound = Path(scratch) / "rows.json"  # without what could not be read as JSON
        sound.write_text(json.dumps([row.value for row in rows]), encoding="utf-8")
        found, faults = import_released(sound)
    for fault in faults:
        if fault.fault == "schema":
            writer.reject(rows[fault.row - 1], fault.detail)
    for pair in found.pairs:
        row = rows[int(pair.id.rsplit("row", 1)[1]) - 1]  # its ids count rows from 1
        study = identify(row.value, row.file)
        stem = row.file.rsplit(".", 1)[0]
        fields = pair.model_dump(exclude_unset=True, exclude={"root"})
        try:
            image, missing = _images(row.value, writer, image_root, study)
        except UserError as error:
            writer.reject(row, str(error))
            continue
        for side in (fields["chosen"], fields["rejected"]):
            side["image"] = image
            if image is None:
                del side["image"]
            side["noise"] or side.pop("noise")
        fields |= {"id": f"{stem}/{pair.kind}:row{row.number + 1}", "patient": study.patient}
        fields["meta"] |= {
            "study": study.name,
            "source": study.dataset,
            "split": split_of(row.file, row.value),
            "released": {"file": row.file, "row": row.number, "fields": row.value},
        }
        if missing:
            fields["meta"]["missing_images"] = missing
        writer.pair(row, **fields)


# --- the way back --------------------------------------------------------------------------------


def layout(path: Path, rows: Sequence[Any]) -> dict[str, Any] | None:
    """How a file was written: the ``json.dumps`` options that give its bytes again, or None."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    end = "\n" if text.endswith("\n") else ""
    lines = holds_lines(path)
    for ascii_only in (True, False):
        for indent in (None,) if lines else (4, None, 2, 1):
            style = {"lines": lines, "ascii": ascii_only, "indent": indent, "end": end}
            if render(rows, style) == text:
                return style
    return None


def render(rows: Sequence[Any], style: Mapping[str, Any]) -> str:
    """Rows in a layout as found by :func:`layout`."""
    ascii_only, end = bool(style["ascii"]), str(style["end"])
    if style["lines"]:
        return "\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in rows) + end
    return json.dumps(list(rows), ensure_ascii=ascii_only, indent=style["indent"]) + end


def export_released(data: str | Path, out: str | Path) -> dict[str, int]:
    """Write a DATA folder in the released formats; {file: rows}.

    Rows that came from released files go back to a file of the same name, byte-equal where the
    import found its layout; a changed question, answer or text is written into its field. Other
    rows become ``test``-style VQA (.jsonl) and report (.json) files per split.
    """
    data, out, folder = Path(data), Path(out), DataFolder(data)
    files: dict[str, dict[int, Any]] = {}
    own: dict[str, list[Any]] = {}
    pairs = folder._rows("pairs.jsonl", Pair)
    done: set[str] = set()
    records: list[Reference | Example | Pair] = [*folder.corpus(), *folder.examples(), *pairs]
    for record in records:
        origin = record.meta.get("released")
        if isinstance(origin, dict):
            files.setdefault(origin["file"], {})[origin["row"]] = _back(record, origin["fields"])
            done.add(str(record.meta.get("study")))
    reports = {r.meta.get("study"): r.text for r in folder.corpus() if r.meta.get("study")}
    for number, example in enumerate(folder.examples()):
        if "released" in example.meta or (
            example.task == "report" and str(example.meta.get("study")) in done
        ):
            continue
        image = example.image or ""
        if example.task == "vqa":
            own.setdefault(f"{example.split}/vqa.jsonl", []).append(
                {
                    "question_id": number,
                    "question": f"{example.question}\n<image>",
                    "answer": example.answer,
                    "image": image if isinstance(image, str) else image[0],
                    "report": reports.get(example.meta.get("study"), ""),
                    **({"options": example.options} if example.options else {}),
                }
            )
        else:
            views = [image] if isinstance(image, str) else image
            own.setdefault(f"{example.split}/report.json", []).append(
                {
                    "id": example.id,
                    "report": example.answer,
                    "image_path": views,
                    "split": example.split,
                }
            )
    styles_file = data / STYLES
    styles = parse(styles_file.read_text(encoding="utf-8")) if styles_file.is_file() else {}
    for name, numbered in sorted(files.items()):
        own[name] = [numbered[number] for number in sorted(numbered)]
    for name in own:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{data}: meta.released.file {name!r} leaves the folder")
        check_own(out / name)
    written = {}
    for name, rows in sorted(own.items()):
        style = (styles.get(name) or {}).get("style") or {
            "lines": name.endswith("jsonl"),
            "ascii": True,
            "indent": 4,
            "end": "\n" if name.endswith("jsonl") else "",
        }
        write_text(out / name, render(rows, style), own=True)
        written[name] = len(rows)
    return written


def _back(record: Reference | Example | Pair, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The released row again, with what has since been changed in the record."""
    row = dict(fields)
    if isinstance(record, Reference):
        key = next(key for key in TEXT_KEYS if key in row)
        if (row[key] or "") != record.text:
            row[key] = record.text
    elif isinstance(record, Example):
        key = "question" if "question" in row else "prompt"
        if record.question is not None and clean_question(str(row[key])) != record.question:
            row[key] = f"{record.question}\n<image>"
        target = next(key for key in ("gt_answer", "gt_report", "answer") if key in row)
        if record.answer is not None and row[target] != record.answer:
            row[target] = record.answer
    elif isinstance(record, Pair):
        for side, key in (
            (record.chosen, "conversations"),
            (record.rejected, "rejected_conversations"),
        ):
            if row[key][1]["value"] != side.text:
                row[key] = [row[key][0], {**row[key][1], "value": side.text}]
    return row
