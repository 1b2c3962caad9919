"""DICOM de-identification: PS3.15 basic profile, with pseudonyms and shifted dates.

Place in the picture: ``data import dicom``, before anything of a file is kept. The actions per
attribute are the standard's table E.1-1 as the dicom-anonymizer package holds it (2026c). On
top of it, as the standard's option *Retain Longitudinal Temporal Information with Modified
Dates* allows, dates move by one secret number of days per patient; UIDs and the patient id
become keyed hashes, so that files of one patient stay together. The package treats top-level
attributes; sequences are walked here.
"""

from __future__ import annotations

import hashlib
import hmac
import warnings
from collections.abc import Iterator
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from mmedrag.records import UserError

PROFILE = "dicomfields_2026c"
_BIRTH = (0x0010, 0x0030)  # stays empty: a shifted date of birth is still an age
_METHOD = "PS3.15 basic profile; dates modified"


class Pseudonyms:
    """Keyed, repeatable stand-ins. Who has the key can link them to names; nobody else."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def _digest(self, kind: str, value: str) -> bytes:
        return hmac.new(self._key, f"{kind}:{value}".encode(), hashlib.sha256).digest()

    def name(self, kind: str, value: str) -> str:
        return self._digest(kind, value).hex()[:16]

    def uid(self, value: str) -> str:
        """A UID under 2.25 (PS3.5 B.2), always the same for the same one."""
        return f"2.25.{int.from_bytes(self._digest('uid', value)[:16], 'big')}"

    def shift(self, patient: str) -> timedelta:
        """1 to 3,650 days into the past, one number per patient."""
        return timedelta(days=-1 - int.from_bytes(self._digest("days", patient)[:4], "big") % 3650)


def read_key(path: Path) -> bytes:
    """The secret in ``path``; made on first use, readable by its owner alone."""
    import os
    import secrets

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as out:
            out.write(secrets.token_hex(32) + "\n")
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{path}: key cannot be read: {error.strerror}") from None
    if len(key) < 16:
        raise UserError(f"{path}: key of {len(key)} bytes, expected at least 16")
    return key


def patient_of(dataset: Any) -> str | None:
    """What tells patients apart: the id (with its issuer), else name and date of birth."""
    own = str(dataset.get("PatientID") or "").strip()
    if own:
        return f"{own}|{dataset.get('IssuerOfPatientID') or ''}"
    name = f"{dataset.get('PatientName') or ''}|{dataset.get('PatientBirthDate') or ''}"
    return name if name != "|" else None


@cache
def _profile() -> dict[tuple[int, ...], Any]:
    try:
        from dicomanonymizer.simpledicomanonymizer import initialize_actions
    except ModuleNotFoundError:
        raise UserError("DICOM needs the extra: pip install 'mmedrag[dicom]'") from None
    return initialize_actions(PROFILE)


def deidentify(dataset: Any, names: Pseudonyms) -> Any:
    """The data set, changed in place, with nothing left that the basic profile removes.

    Raises:
        Exception: whatever a damaged attribute provokes; the caller refuses the file.
    """
    import pydicom
    from dicomanonymizer import simpledicomanonymizer as package
    from pydicom.dataset import FileMetaDataset

    patient = patient_of(dataset)
    shift = names.shift(patient or "")
    syntax = dataset.file_meta.TransferSyntaxUID
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        uids = {
            str(uid)
            for element in _elements(dataset)
            if element.VR == "UI"
            for uid in ([element.value] if isinstance(element.value, str) else element.value or [])
        }
        package.dictionary.clear()
        package.dictionary.update({uid: pydicom.uid.UID(names.uid(uid)) for uid in uids if uid})
        moved = {
            (e.tag.group, e.tag.element) for e in _elements(dataset) if e.VR in ("DA", "DT")
        } - {_BIRTH}

        def move(item: Any, tag: tuple[int, int]) -> None:
            element = item.get(tag)
            if element is not None:
                element.value = _moved(element.value, shift)

        rules = dict(_profile()) | {tag: move for tag in moved}

        def visit(item: Any) -> None:
            package.anonymize_dataset(item, base_rules_gen=lambda: dict(rules))
            for element in item:
                if element.VR == "SQ":
                    for child in element.value:
                        visit(child)
                elif element.VR == "PN":
                    element.value = ""  # whatever name the table does not list

        visit(dataset)
        package.dictionary.clear()
    dataset.PatientID = names.name("patient", patient) if patient else ""
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = _METHOD
    dataset.LongitudinalTemporalInformationModified = "MODIFIED"
    dataset.preamble = b"\0" * 128
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    for key, field in (
        ("MediaStorageSOPClassUID", "SOPClassUID"),
        ("MediaStorageSOPInstanceUID", "SOPInstanceUID"),
    ):
        if dataset.get(field):
            setattr(dataset.file_meta, key, dataset.get(field))
    return dataset


def _elements(dataset: Any) -> Iterator[Any]:
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item)


def _moved(value: Any, shift: timedelta) -> Any:
    """DA or DT values on another day (a time of day is dropped); unreadable ones are emptied."""
    if value is None or value == "":
        return ""
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        return [_moved(v, shift) for v in value]
    digits = str(value)[:8]
    try:
        day = date(int(digits[:4]), int(digits[4:6]), int(digits[6:8])) + shift
    except (ValueError, OverflowError):
        return ""
    return day.strftime("%Y%m%d") if day.year >= 1000 else ""
