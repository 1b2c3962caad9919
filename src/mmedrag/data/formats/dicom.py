"""``data import dicom``: DICOM files and folders, de-identified before anything is written.

Every file with pixels gives one corpus row without text: its picture (several frames: up to
``max_frames`` of them, evenly spaced, as views), pseudonyms for patient and study, a shifted
date, and the few attributes that say what is shown. Reports can be joined later by study.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmedrag.data import ocr as burned
from mmedrag.data.deidentify import Pseudonyms, deidentify, patient_of, read_key
from mmedrag.data.rows import SourceRow
from mmedrag.data.writer import Writer
from mmedrag.images import count_frames, looks_like_dicom, pictures, png_bytes, read
from mmedrag.records import UserError

log = logging.getLogger(__name__)
SUFFIXES = (".dcm", ".dicom", ".ima", "")
MAX_REMARKS = 5  # shown after an import
SHOWN = {
    "modality": "Modality",
    "body_part": "BodyPartExamined",
    "view": "ViewPosition",
    "laterality": "ImageLaterality",
    "side": "Laterality",
    "photometric": "PhotometricInterpretation",
}
DOMAINS = {
    **dict.fromkeys(("SM", "GM"), "pathology"),
    **dict.fromkeys(("OP", "OPT", "OPM", "OPV", "OAM"), "ophthalmology"),
    **dict.fromkeys(
        ("CR", "CT", "DR", "DX", "IO", "MG", "MR", "NM", "PT", "PX", "RF", "RG", "US", "XA"),
        "radiology",
    ),
}
Ocr = Literal["auto", "mask", "refuse", "off"]


def load(
    src: Path,
    writer: Writer,
    *,
    domain: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    attribution: str | None = None,
    max_frames: int = 16,
    ocr: Ocr = "auto",
    key: Path | None = None,
) -> None:
    """Fill ``writer`` from DICOM files at ``src``.

    Args:
        domain: of all files; without it, what each file's Modality stands for.
        ocr: what to do about text in the picture that is more than a side marker: ``mask``
            blacks it out, ``refuse`` refuses the file, ``off`` does not look. ``auto`` masks
            when the extra ``ocr`` is installed; without it, files that say
            BurnedInAnnotation = YES are refused.
        key: file with the secret behind pseudonyms and date shifts (default: ``OUT.key`` beside
            the data folder, made on first use). Keep it to add files later, delete it to make
            the pseudonyms final; it never belongs into the folder.
    """
    if ocr not in ("auto", "mask", "refuse", "off"):
        raise UserError(f"ocr: got {ocr!r}, expected auto, mask, refuse or off")
    if max_frames < 1:
        raise UserError(f"max_frames: got {max_frames}, expected at least 1")
    look = {"auto": "mask" if burned.available() else "trust"}.get(ocr, ocr)
    if look == "trust":
        writer.result.notes.append(
            "burned-in text was not looked for: install the extra 'ocr', or say ocr=off"
        )
    secret = key or writer.out.with_name(writer.out.name + ".key")
    names = Pseudonyms(read_key(secret))
    fixed = {"domain": domain, "source": source, "licence": licence, "attribution": attribution}
    files, others = _files(src)
    if others:
        writer.result.notes.append(f"{others} files are not DICOM: left out")
    odd: dict[str, list[str]] = {}
    for number, path in enumerate(files):
        # a path may hold a name: what is written calls the file by its number
        row = SourceRow(f"dicom-{number}", number + 1, number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydicom's remarks on odd but usable values
                for remark in _file(path, row, writer, names, fixed, look, max_frames):
                    odd.setdefault(remark, []).append(path.name)
        except UserError as error:
            reason = str(error).removeprefix(f"{row.file}: ")
            writer.reject(row, reason, shown=str(path))
        writer.tick(number + 1, len(files))
    for remark, paths in sorted(odd.items(), key=lambda item: -len(item[1]))[:MAX_REMARKS]:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        writer.result.notes.append(f"{paths[0]}{more}: {remark}")
    if len(odd) > MAX_REMARKS:
        writer.result.notes.append(
            f"{len(odd) - MAX_REMARKS} other remarks: meta.remarks of the rows"
        )


def _files(src: Path) -> tuple[list[Path], int]:
    """Files that are, or may be, DICOM; and how many others lie there."""
    if src.is_file():
        return [src], 0
    found, others = [], 0
    for path in sorted(p for p in src.rglob("*") if p.is_file()):
        with open(path, "rb") as handle:
            head = handle.read(132)
        if looks_like_dicom(head) or path.suffix.lower() in SUFFIXES[:-1]:
            found.append(path)
        else:
            others += 1
    if not found:
        raise UserError(f"{src}: no DICOM files in it")
    return found, others


def _file(
    path: Path,
    row: SourceRow,
    writer: Writer,
    names: Pseudonyms,
    fixed: dict[str, Any],
    look: str,
    max_frames: int,
) -> list[str]:
    """One file's row; what the file states and its pixels contradict."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    content = hashlib.sha256(data).hexdigest()
    # 3: pictures of before that may have been read wrongly are made anew
    key = f"dicom:3:{names.name('file', content)}:{look}:{max_frames}"
    fields = writer.recall(key)
    if fields is None:
        fields = _content(data, content, row.file, writer, names, look, max_frames)
        shown = fields["image"]
        writer.remember(key, fields, [shown] if isinstance(shown, str) else shown)
    domain = fixed["domain"] or DOMAINS.get(fields["meta"].get("modality", ""))
    writer.reference(row, text="", **fields, **fixed | {"domain": domain})
    return list(fields["meta"].get("remarks", []))


def _content(
    data: bytes,
    content: str,
    label: str,
    writer: Writer,
    names: Pseudonyms,
    look: str,
    max_frames: int,
) -> dict[str, Any]:
    """One file's row: identifying attributes are gone before its first picture is stored."""
    dataset = read(data, label)
    count = count_frames(dataset, label)
    patient, own = patient_of(dataset), str(dataset.get("SOPInstanceUID") or "") or content
    study = str(dataset.get("StudyInstanceUID") or "") or own
    identity = names.name("instance", own)
    if writer.has("corpus", f"dicom/{identity}"):
        raise UserError("SOPInstanceUID is that of a file before it: the same image again")
    declared = str(dataset.get("BurnedInAnnotation") or "").upper() == "YES"
    if declared and look == "trust":
        raise UserError("BurnedInAnnotation is YES and the extra 'ocr' is not installed")
    try:
        deidentify(dataset, names)
    except UserError:
        raise
    except Exception as error:  # a damaged attribute: nothing of this file may be kept
        log.debug("%s: %s", label, error)
        raise UserError(f"cannot be de-identified ({type(error).__name__})") from None
    wanted = (
        list(range(count))
        if count <= max_frames
        else [round(i * (count - 1) / max(1, max_frames - 1)) for i in range(max_frames)]
    )
    remarks: list[str] = []
    stored, eraser = [], _Eraser(refuse=look == "refuse")
    clean = eraser if look in ("mask", "refuse") else None
    for number in wanted:
        picture = pictures(dataset, label, [number], clean, remarks)[0]
        name = f"dicom/{identity}" + (f"-{number}" if len(wanted) > 1 else "")
        stored.append(writer.picture(f"{label}#{number}", png_bytes(picture), name))
    meta: dict[str, Any] = {"study": f"dicom/{names.name('study', study)}"}
    for key, field in SHOWN.items():
        value = dataset.get(field)
        if isinstance(value, str) and value.strip() and len(value) <= 32:
            meta[key] = value.strip()
    day = str(dataset.get("StudyDate") or dataset.get("AcquisitionDate") or "")
    if len(day) == 8 and day.isdigit():
        meta["date"] = f"{day[:4]}-{day[4:6]}-{day[6:]}"
    if count > 1:
        meta["frames"] = count
    if remarks:
        meta["remarks"] = remarks
    if eraser.lines:
        meta["masked_text"] = eraser.lines
    return {
        "id": f"dicom/{identity}",
        "image": stored[0] if len(stored) == 1 else stored,
        "patient": f"dicom-{names.name('patient', patient)}" if patient else None,
        "meta": meta,
    }


class _Eraser:
    """Blacks out text in pictures and counts its lines, or refuses a picture that has any."""

    def __init__(self, refuse: bool) -> None:
        self.refuse, self.lines = refuse, 0

    def __call__(self, picture: Image.Image) -> Image.Image:
        lines = [line for line in burned.find_text(picture) if line.tells]
        if lines and self.refuse:
            raise UserError(f"burned-in text in {len(lines)} places")
        self.lines += len(lines)
        return burned.mask(picture, lines) if lines else picture
