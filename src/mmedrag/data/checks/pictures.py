"""The pictures of a check: each file decoded once, damage and look-alikes reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmedrag.data.checks.cross_rows import CrossRowIndex
from mmedrag.data.checks.report import CheckReport
from mmedrag.data.splits import Groups, near_duplicates
from mmedrag.images import Look, load_image
from mmedrag.records import UserError


def look(
    index: CrossRowIndex,
    report: CheckReport,
    progress: Callable[[int, int | None], None] | None = None,
    done: int = 0,
) -> None:
    """Decode every file: damage, duplicates, near-duplicates across splits and patients.

    ``done``: steps that the progress has counted before.
    """
    names = index.paths()
    looks: list[Look] = []
    kept: list[str] = []
    for number, name in enumerate(names, 1):
        if progress:
            progress(done + number, done + len(names))
        try:
            looks.append(Look.of(load_image(name)))
            kept.append(name)
        except UserError as error:
            _damaged(index, report, name, str(error))
    report.images = len(names)
    if not names:
        report.notes.append("no image files to look at")
    same = Groups()
    for i, j in near_duplicates(looks):
        same.join(i, j)
    members: dict[Any, list[int]] = {}
    for i in range(len(looks)):
        members.setdefault(same.find(i), []).append(i)
    for cluster in members.values():
        if len(cluster) > 1:
            exact = len({looks[i].pixels for i in cluster}) == 1
            _cluster(index, report, [kept[i] for i in cluster], exact)


def _damaged(index: CrossRowIndex, report: CheckReport, name: str, reason: str) -> None:
    row = index.users(name, 1)[0]
    code = "image_bomb" if "refused" in reason else "image_undecodable"
    code = "image_missing" if not Path(name).exists() else code
    report.add(code, row.file, row.line, reason, id=row.id)


def _cluster(index: CrossRowIndex, report: CheckReport, names: list[str], exact: bool) -> None:
    """Files that show the same: across splits an error, else worth knowing."""
    uses = [index.users(name) for name in names]
    splits = {use.split for found in uses for use in found if use.split}
    owners = {use.patient or f"\0{use.study}" for found in uses for use in found}
    *others, last = (found[0] for found in uses)
    shown = ", ".join(Path(name).name for name in names[:4])
    message = f"{len(names)} files show {'the same' if exact else 'nearly the same'}: {shown}"
    if len(splits) > 1:
        code, message = "leak_near_duplicate", f"{message}; in {' and '.join(sorted(splits))}"
    elif len(owners) == 1:
        return  # one patient, one split: exposures of a study look alike
    else:
        code = "duplicate_image" if exact else "near_duplicate"
    report.add(
        code,
        last.file,
        last.line,
        message,
        id=last.id,
        count=len(names),
        related=[str(place) for place in others[:9]],
        images=names[:4],
    )
