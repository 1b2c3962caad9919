"""Released alignment rows in, with their faults said.

Place in the picture: the released repository's preference files ─► pairs. Rows look like
``{id, image, conversations[2], rejected_conversations[2], rejected_noised 0|1, image_root?}``.
A row is refused only when it cannot be a pair; every other oddity becomes a fault and the row
stays. Known faults of the released files: one image under many ids (136 of 137 MIMIC rows),
589 identical texts, empty ids, hedges among the preferred answers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag.data.rows import read_rows
from mmedrag.records import KINDS, Noise, Pair, PairKind, PairSet, Prompt, Side, UserError, answers

# Files store D_cm, then resist, then copy without saying where the latter start. Sizes known
# from the paper's tables (D_cm, rest) → resist; others are told by the order of their images.
_KNOWN_SPLITS = {(142, 285): 78, (96, 193): 65, (137, 275): 61, (824, 1030): 1030}
_REFERENCES = re.compile(r"reference (?:report|caption)\(s\)|Reference (?:reports|captions):")


@dataclass(frozen=True)
class Fault:
    """One oddity of a released row; ``row`` counts from 1."""

    file: str
    row: int
    fault: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.fault}: {self.detail}"


def import_released(
    path: Path, images: Path | None = None, resist: int | None = None, seed: int = 42
) -> tuple[PairSet, list[Fault]]:
    """Read a released alignment file.

    Args:
        path: JSON array (or JSON Lines) of released rows.
        images: folder that the rows' image paths start from.
        resist: how many of the rows without noise are ``resist`` (they come before ``copy``);
            None finds out by known sizes or by the restart of the image order.
        seed: of the noise that ``rejected_noised`` stands for.

    Returns:
        The pairs, and the faults in row order.
    """
    faults: list[Fault] = []
    rows = load_rows(path)
    parts: list[tuple[int, dict[str, Any], str, str]] = []  # (row, content, image, id)
    for number, row in enumerate(rows, 1):
        problem, image = _shape(row)
        if problem is not None:
            faults.append(Fault(str(path), number, "schema", problem))
            continue
        parts.append((number, row, image, _id(row)))
        faults += _oddities(str(path), number, row, image)
    faults += _repeated_images(str(path), parts)
    kinds = _kinds([(row, image) for _, row, image, _ in parts], resist)
    pairs = [
        _pair(number, row, image, kind, known, images, seed)
        for (number, row, image, _), (kind, known) in zip(parts, kinds, strict=True)
    ]
    faults.sort(key=lambda fault: (fault.row, fault.fault))
    counts = {
        "mode": "released",
        "rows": len(rows),
        "pairs": dict(sorted(Counter(pair.kind for pair in pairs).items())),
        "kind_unknown": sum(not pair.meta["kind_known"] for pair in pairs),
        "faults": dict(sorted(Counter(fault.fault for fault in faults).items())),
    }
    return PairSet(pairs, counts), faults


def load_rows(path: Path) -> list[Any]:
    """Rows of a JSON array or of JSON Lines; a row that is no JSON becomes a text saying so."""
    rows = list(read_rows(path, nulls=True))
    if len(rows) == 1 and rows[0].error:
        raise UserError(f"{path}: {rows[0].error}")
    return [row.error or row.value for row in rows]


def _shape(row: Any) -> tuple[str | None, str]:
    """Why a row cannot be a pair (or None), and its image."""
    if not isinstance(row, dict):
        return f"{row!r:.60} is not an object", ""
    for name in ("conversations", "rejected_conversations"):
        turns = row.get(name)
        if not isinstance(turns, list) or len(turns) != 2:
            return f"{name}: expected two turns", ""
        for turn, speaker in zip(turns, ("human", "gpt"), strict=True):
            if not isinstance(turn, dict) or turn.get("from") != speaker:
                return f"{name}: expected turns from human and gpt", ""
            if not isinstance(turn.get("value"), str):
                return f"{name}: a turn's value is not text", ""
    if row.get("rejected_noised") not in (0, 1):
        return f"rejected_noised: {row.get('rejected_noised')!r}, expected 0 or 1", ""
    image = row.get("image")
    if isinstance(image, list) and image:
        image = image[0]
    if not isinstance(image, str) or not image:
        return f"image: {image!r:.60}, expected a path", ""
    return None, image


def _id(row: dict[str, Any]) -> str:
    return "" if row.get("id") is None else str(row["id"])


def _oddities(file: str, number: int, row: dict[str, Any], image: str) -> list[Fault]:
    chosen, rejected = row["conversations"], row["rejected_conversations"]
    texts = [turn[1]["value"].strip() for turn in (chosen, rejected)]
    found: list[tuple[str, str]] = []
    if not _id(row):
        found.append(("no_id", "id is empty"))
    if isinstance(row["image"], list):
        found.append(("image_list", f"{len(row['image'])} images, the first is used"))
    if image.startswith("/") or ".." in Path(image).parts:
        found.append(("image_path", f"{image!r:.80} leaves the image folder"))
    for name, turn in (("chosen", chosen[0]["value"]), ("rejected", rejected[0]["value"])):
        if turn.count("<image>") != 1:
            found.append(("image_token", f"{name} prompt has {turn.count('<image>')} <image>"))
    if chosen[0]["value"] != rejected[0]["value"]:
        found.append(("prompts_differ", "chosen and rejected prompts differ"))
    if not all(texts):
        found.append(("empty_text", "an answer is empty"))
    elif texts[0] == texts[1]:
        same = "only the image differs" if row["rejected_noised"] else "no signal at all"
        found.append(("identical_texts", f"chosen and rejected say the same: {same}"))
    if "[yes, no]" in chosen[0]["value"]:
        if answers.parse_strict(texts[0]) == "unclear":
            found.append(("unclear_chosen", f"preferred answer is no yes or no: {texts[0]!r:.60}"))
        same_side = answers.parse_released(texts[0]) == answers.parse_released(texts[1])
        if texts[0] != texts[1] and same_side != bool(row["rejected_noised"]):
            side = "same" if same_side else "opposite"
            found.append(("polarity", f"chosen and rejected have the {side} polarity"))
    return [Fault(file, number, fault, detail) for fault, detail in found]


def _repeated_images(file: str, parts: list[tuple[int, dict[str, Any], str, str]]) -> list[Fault]:
    """One image under several ids of reports: all but the row that carries its own name."""
    ids: dict[str, set[str]] = defaultdict(set)
    reports = [p for p in parts if p[3] and "[yes, no]" not in p[1]["conversations"][0]["value"]]
    for _, _, image, name in reports:
        ids[image].add(name)
    return [
        Fault(file, number, "wrong_image", f"{image} stands under {len(ids[image])} ids")
        for number, _, image, name in reports
        if len(ids[image]) > 1 and name not in image
    ]


def _kinds(
    rows: list[tuple[dict[str, Any], str]], resist: int | None
) -> list[tuple[PairKind, bool]]:
    """Kind of each row and whether it is certain, per source (``image_root``) of the file."""
    kinds: list[tuple[PairKind, bool]] = [("resist", False)] * len(rows)
    sources: dict[str, list[int]] = defaultdict(list)
    for at, (row, _) in enumerate(rows):
        sources[str(row.get("image_root", ""))].append(at)
    if resist is not None and len(sources) > 1:
        raise UserError("pairs import: resist= counts one source, the file has several")
    for members in sources.values():
        rest = []
        for at in members:
            row = rows[at][0]
            if row["rejected_noised"]:
                refs = _REFERENCES.search(row["conversations"][0]["value"])
                kinds[at] = ("cross_modal" if refs else "stage1", True)
            else:
                rest.append(at)
        count = resist
        if count is None:
            count = _KNOWN_SPLITS.get((len(members) - len(rest), len(rest)))
        if count is None:
            count = _restart([rows[at][1] for at in rest])
        for position, at in enumerate(rest):
            if count is not None:
                kinds[at] = ("resist" if position < count else "copy", True)
    return kinds


def _restart(images: list[str]) -> int | None:
    """Where an otherwise ascending order of image names starts again; None if that is unclear."""

    def natural(name: str) -> list[tuple[int, int | str]]:
        return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name)]

    falls = [i for i in range(1, len(images)) if natural(images[i]) < natural(images[i - 1])]
    return falls[0] if len(falls) == 1 else None


def _pair(
    number: int,
    row: dict[str, Any],
    image: str,
    kind: PairKind,
    known: bool,
    root: Path | None,
    seed: int,
) -> Pair:
    def side(name: str, noise: Noise | None) -> Side:
        human, answer = (turn["value"] for turn in row[name])
        text = human.removeprefix("<image>\n") if human.startswith("<image>\n") else human
        prompt = Prompt(template="released/imported", text=text, style="chat")
        return Side(prompt=prompt, image=image, noise=noise, text=answer)

    noise = Noise(kind="gaussian_clip", seed=seed + number) if row["rejected_noised"] else None
    return Pair(
        id=f"{kind}:row{number}",
        kind=kind,
        chosen=side("conversations", None),
        rejected=side("rejected_conversations", noise),
        reason=KINDS[kind].reason,
        meta={
            "mode": "released",
            "kind_known": known,
            "redraw_noise": True,
            "released_id": row.get("id", ""),
            **({"image_root": row["image_root"]} if "image_root" in row else {}),
        },
        root=root,
    )
