"""Preference pairs of other trainers in: TRL, ms-swift, LLaMA-Factory; what `pairs export` writes.

Place in the picture: rows of other trainers ─► pairs; rows of the released repository go on to
``released_pairs``. Read are ``{prompt, chosen, rejected, images}`` (TRL, conversational or plain,
with or without the prompt apart), ``{messages, rejected_response | rejected_messages, images,
rejected_images?}`` (ms-swift), ``{conversations, chosen, rejected, images}`` (LLaMA-Factory) and
``{question, chosen, rejected, image}``. A row that cannot be a pair is a fault; the others go on.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mmedrag.data.common import below, is_placeholder, pick, unmarked
from mmedrag.data.formats.llava import exchanges_of
from mmedrag.data.formats.released_pairs import Fault, import_released, load_rows
from mmedrag.records import KINDS, Pair, PairKind, PairSet, Prompt, Side, UserError

_ASKED = ("prompt", "conversations", "question", "instruction")
_SWIFT = ("rejected_response", "rejected_messages", "rejected_images")
_REFERENCES = re.compile(r"\breference (?:report|caption)", re.IGNORECASE)


def import_pairs(
    path: Path, images: Path | None = None, resist: int | None = None, seed: int = 42
) -> tuple[PairSet, list[Fault]]:
    """Read preference pairs in any of the forms; arguments as :func:`import_released`.

    Returns:
        The pairs, their image paths relative to ``images`` (default: the file's folder), and the
        faults in row order.

    Raises:
        UserError: an unreadable or an empty file.
    """
    rows = load_rows(path)
    if not rows:
        raise UserError(f"{path}: empty, expected rows of pairs")
    if not any(_form(row) for row in rows):
        return import_released(path, images, resist, seed)
    faults: list[Fault] = []
    pairs = []
    for number, row in enumerate(rows, 1):
        try:
            pair, found = _pair(number, row, images or path.parent, path.parent)
        except UserError as error:
            faults.append(Fault(str(path), number, "schema", str(error)))
            continue
        pairs.append(pair)
        faults += [Fault(str(path), number, fault, detail) for fault, detail in found]
    counts = {
        "mode": "imported",
        "rows": len(rows),
        "pairs": dict(sorted(Counter(pair.kind for pair in pairs).items())),
        "kind_unknown": sum(not pair.meta["kind_known"] for pair in pairs),
        "faults": dict(sorted(Counter(fault.fault for fault in faults).items())),
    }
    return PairSet(pairs, counts), faults


def _form(row: Any) -> str | None:
    """Whose row it is; None for the released form and for anything else."""
    if not isinstance(row, dict):
        return None
    if ("messages" in row or "query" in row) and any(row.get(key) for key in _SWIFT):
        return "ms-swift"
    if "chosen" in row and "rejected" in row:
        return "llama-factory" if {"conversations", "instruction"} & set(row) else "trl"
    return None


def _turns(value: Any, speaker: str) -> list[Any]:
    """Turns of a conversation, given as such, as one turn, or as a text."""
    if isinstance(value, list):
        return value
    if value is None:
        return []
    return [value if isinstance(value, dict) else {"role": speaker, "content": value}]


def _conversations(row: dict[str, Any], form: str) -> tuple[list[Any], list[Any]]:
    """The two conversations that a row compares."""
    if form == "ms-swift":
        chosen = _turns(row.get("messages") or row.get("query"), "user")
        if not row.get("messages"):
            chosen = [*chosen, *_turns(row.get("response"), "assistant")]
        if row.get("rejected_messages"):
            return chosen, _turns(row["rejected_messages"], "user")
        if not row.get("rejected_response"):  # only the pictures differ
            return chosen, chosen
        return chosen, [*chosen[:-1], *_turns(row["rejected_response"], "assistant")]
    asked = _turns(row.get(pick(row, _ASKED) or ""), "user")
    if "instruction" in row and row.get("input"):  # Alpaca: what it is about
        asked = _turns(f"{row['instruction']}\n{row['input']}", "user")
    return (
        [*asked, *_turns(row["chosen"], "assistant")],
        [*asked, *_turns(row["rejected"], "assistant")],
    )


def _pair(number: int, row: Any, root: Path, beside: Path) -> tuple[Pair, list[tuple[str, str]]]:
    form = _form(row)
    if form is None:
        raise UserError(
            f"{row!r:.60} has not the form of the others, expected chosen and rejected answers"
        )
    faults: list[tuple[str, str]] = []
    sides = []
    own = row.get("images") or row.get("image")
    for name, turns in zip(("chosen", "rejected"), _conversations(row, form), strict=True):
        exchanges, inside = exchanges_of(turns, name)
        if len(exchanges) != 1:
            raise UserError(f"{name}: {len(exchanges)} questions, expected one with its answer")
        if isinstance(turns[0], dict) and turns[0].get("role", turns[0].get("from")) == "system":
            faults.append(("system_turn", f"{name}: the system turn is left out"))
        ((question, answer),) = exchanges
        given = own or inside
        if name == "rejected":
            given = row.get("rejected_images") or row.get("rejected_image") or given
        image = [
            _place(one, root, beside, faults)
            for one in (given if isinstance(given, list) else [given] if given else [])
        ]
        if not image:
            raise UserError(f"{name}: no image, expected a path in images")
        if not answer.strip() or is_placeholder(answer):
            faults.append(("empty_text", f"the {name} answer is empty: {answer!r}"))
        prompt = Prompt(template=f"{form}/imported", text=unmarked(question), style="chat")
        sides.append(Side(prompt=prompt, image=image[0] if len(image) == 1 else image, text=answer))
    chosen, rejected = sides
    if (chosen.text, chosen.image) == (rejected.text, rejected.image):
        faults.append(("identical_texts", "chosen and rejected say the same: no signal at all"))
    kind, known = _kind(chosen, rejected)
    pair = Pair(
        id=f"{kind}:row{number}",
        kind=kind,
        chosen=chosen,
        rejected=rejected,
        reason=KINDS[kind].reason,
        meta={
            "mode": "imported",
            "format": form,
            "kind_known": known,
            **({"own_id": row["id"]} if "id" in row else {}),
        },
        root=root,
    )
    return pair, list(dict.fromkeys(faults))


def _kind(chosen: Side, rejected: Side) -> tuple[PairKind, bool]:
    """The kind that a row's sides tell, and whether they tell it."""
    references = bool(_REFERENCES.search(chosen.prompt.text))
    if chosen.image != rejected.image:
        return ("cross_modal" if references else "stage1"), True
    return ("resist", False) if references else ("unaided", True)


def _place(given: Any, root: Path, beside: Path, faults: list[tuple[str, str]]) -> str:
    """An image path relative to ``root``, of a file below it or below the rows' own folder.

    Raises:
        UserError: no path, or one that leaves both.
    """
    if isinstance(given, dict):
        given = given.get(pick(given, ("path", "url", "image")) or "")
    if not isinstance(given, str) or not given or "\0" in given:
        raise UserError(f"image: got {given!r:.60}, expected a path")
    name = below(given.removeprefix("file://"), [root, beside])
    for start in (root, beside):
        file = Path(os.path.realpath(start / name))
        if any(file.is_relative_to(os.path.realpath(folder)) for folder in (root, beside)):
            if file.is_file():
                plain = not Path(name).is_absolute() and start == root
                return name if plain else os.path.relpath(file, os.path.realpath(root))
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"image: {given!r:.80} leaves its folder, expected a path below --images")
    faults.append(("image_missing", f"{given!r:.80} is not there (--images names the folder)"))
    return name
