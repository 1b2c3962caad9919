"""Preference pairs on disk: the native folder, and other trainers' formats.

Place in the picture: pairs ─► files ─► ``dpo``. ``PAIRS/pairs.jsonl`` holds the rows,
``PAIRS/config.json`` how they were made and, relative to PAIRS, the DATA folder that image paths
start from. Other formats: ``released``, the rows of the released repository (one JSON array) ·
``ms-swift``: ``messages, images, rejected_messages, rejected_images`` · ``trl``: conversational
rows with one image list, so only pairs whose sides share image and prompt. What a format cannot
say is refused with the pair's id and the reason. (Released rows are read by ``data.formats``.)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmedrag.records import Noise, Pair, PairSet, Prompt, Side, UserError
from mmedrag.runtime import DataFolder, check_own, read_jsonl, write_json, write_jsonl, write_text


def write_pairs(found: PairSet, out: Path, data: Path, settings: dict[str, Any]) -> Path:
    """Write a PAIRS folder; ``settings`` says how the pairs were made. Returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "pairs.jsonl", found.pairs, own=True)
    config = {
        "data": os.path.relpath(data.resolve(), out.resolve()),
        "settings": settings,
        "counts": found.counts,
    }
    write_json(out / "config.json", config, indent=2, own=True)
    return out


def read_pairs(path: str | Path, data: str | Path | None = None) -> list[Pair]:
    """Read a PAIRS folder (or a ``pairs.jsonl``); ``data`` overrides the recorded DATA folder."""
    path = Path(path)
    file = path / "pairs.jsonl" if path.is_dir() else path
    config = file.with_name("config.json")
    if data is not None:
        root = Path(data)
    elif config.exists():
        try:
            root = file.parent / json.loads(config.read_text(encoding="utf-8"))["data"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{config}: expected an object with 'data'") from None
    else:
        root = file.parent
    pairs = list(read_jsonl(file, Pair))
    seen: set[str] = set()
    for number, pair in enumerate(pairs, 1):
        if pair.id in seen:
            raise UserError(f"{file}:{number}: id: {pair.id!r} stands twice, expected unique")
        seen.add(pair.id)
        pair.root = root
        pair.model_fields_set.discard("root")
    return pairs


def sources_of(pairs: Sequence[Pair]) -> set[str | None]:
    """Where the pictures of pairs come from: the ``source`` of the DATA folder's rows that show
    them; None where no row does."""
    named: dict[Path, dict[str, str | None]] = {}
    for root in {pair.root or Path() for pair in pairs}:
        data = DataFolder(root) if root.is_dir() else None
        rows = [*data.corpus(), *data.examples()] if data else []
        named[root] = {
            os.path.relpath(view, root): row.source for row in rows for view in row.images
        }
    return {
        named[pair.root or Path()].get(os.path.normpath(name))
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
        for name in ([side.image] if isinstance(side.image, str) else side.image or ())
    }


# --- other trainers' formats ------------------------------------------------------------

# what a raw prompt (a whole conversation) carries around the user turn
_TURN = re.compile(r"<image>\n?(?P<turn>.*?)\s*(?:\[/INST\]|ASSISTANT:)\s*\Z", re.DOTALL)
_PURE_NOISE = "gaussian_clip"


class _Refused(Exception):
    """A pair that the format cannot express; the message is the reason."""


def export_pairs(
    pairs: Sequence[Pair], out: Path, format: str, noise_size: int = 336
) -> dict[str, Any]:
    """Write ``pairs`` to the folder ``out`` in ``format`` (a key of ``FORMATS``).

    ``ms-swift`` knows no noise, so noisy images are drawn at ``noise_size`` (the model's
    resolution) and written to ``out/images``; other image paths stay relative to DATA.

    Returns:
        ``{"file", "rows", "refused": [{"id", "reason"}], "noise_images"}``
    """
    if format not in FORMATS:
        raise UserError(f"pairs export: format {format!r}, expected one of {', '.join(FORMATS)}")
    file = out / ("pairs.json" if format == "released" else "pairs.jsonl")
    check_own(file)
    drawn: set[str] = set()

    def image(pair: Pair, side: Side) -> str:
        if side.noise is None:
            return _one_image(side)
        name = f"images/{_file_name(pair, side)}.png"
        if name not in drawn:
            _draw(pair, side, side.noise, noise_size, out / name)
            drawn.add(name)
        return os.path.relpath((out / name).resolve(), (pair.root or Path()).resolve())

    rows, refused = [], []
    for pair in pairs:
        try:
            rows.append(FORMATS[format](pair, image))
        except _Refused as reason:
            refused.append({"id": pair.id, "reason": str(reason)})
    if format == "released":  # one array, as released
        text = json.dumps(rows, ensure_ascii=False, indent=4)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(file, text, own=True)
    return {"file": str(file), "rows": len(rows), "refused": refused, "noise_images": len(drawn)}


def user_turn(prompt: Prompt) -> str:
    """What the user says in a prompt, without ``<image>`` and the conversation's frame."""
    if prompt.style == "chat":
        return prompt.text
    found = _TURN.search(prompt.text)
    if found is None:
        raise _Refused(f"prompt {prompt.template}: no user turn after <image> was recognised")
    return found["turn"]


def _released(pair: Pair, image: Callable[[Pair, Side], str]) -> dict[str, Any]:
    """One flag says "noise on the rejected image"; its kind is always the pure noise."""
    if pair.chosen.noise is not None or pair.chosen.image != pair.rejected.image:
        raise _Refused("only the rejected image may differ, and only by noise")
    noise = pair.rejected.noise
    if noise is not None and noise.kind != _PURE_NOISE:
        raise _Refused(f"noise {noise.kind!r}, the format knows {_PURE_NOISE!r} only")

    def conversation(side: Side) -> list[dict[str, str]]:
        return [
            {"from": "human", "value": "<image>\n" + user_turn(side.prompt)},
            {"from": "gpt", "value": side.text},
        ]

    return {
        "id": pair.meta.get("released_id", pair.id),
        "image": _one_image(pair.chosen),
        "conversations": conversation(pair.chosen),
        "rejected_conversations": conversation(pair.rejected),
        "rejected_noised": int(noise is not None),
        **({"image_root": pair.meta["image_root"]} if "image_root" in pair.meta else {}),
    }


def _ms_swift(pair: Pair, image: Callable[[Pair, Side], str]) -> dict[str, Any]:
    def messages(side: Side) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": "<image>" + user_turn(side.prompt)},
            {"role": "assistant", "content": side.text},
        ]

    return {
        "messages": messages(pair.chosen),
        "images": [image(pair, pair.chosen)],
        "rejected_messages": messages(pair.rejected),
        "rejected_images": [image(pair, pair.rejected)],
    }


def _trl(pair: Pair, image: Callable[[Pair, Side], str]) -> dict[str, Any]:
    """TRL's vision collator gives both sides the same image and prompt."""
    chosen, rejected = pair.chosen, pair.rejected
    if (chosen.image, chosen.noise) != (rejected.image, rejected.noise) or chosen.noise:
        raise _Refused("the sides' images differ, TRL rows share one")
    if user_turn(chosen.prompt) != user_turn(rejected.prompt):
        raise _Refused("the sides' prompts differ, TRL rows share one")
    content = [{"type": "image"}, {"type": "text", "text": user_turn(chosen.prompt)}]

    def answer(side: Side) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": side.text}]}]

    return {
        "prompt": [{"role": "user", "content": content}],
        "chosen": answer(chosen),
        "rejected": answer(rejected),
        "images": [image(pair, chosen)],
    }


FORMATS: dict[str, Callable[[Pair, Callable[[Pair, Side], str]], dict[str, Any]]] = {
    "released": _released,
    "ms-swift": _ms_swift,
    "trl": _trl,
}


def _one_image(side: Side) -> str:
    name = side.image if isinstance(side.image, str) else (side.image or [""])[0]
    if not name:
        raise _Refused("no image")
    return name


def _file_name(pair: Pair, side: Side) -> str:
    which = "chosen" if side is pair.chosen else "rejected"
    return re.sub(r"[^\w.-]+", "_", f"{pair.id}-{which}")


def _draw(pair: Pair, side: Side, noise: Noise, size: int, path: Path) -> None:
    from mmedrag.images import apply_noise, files

    picture = files.load_image((pair.root or Path()) / _one_image(side))
    path.parent.mkdir(parents=True, exist_ok=True)
    apply_noise(picture, noise, size).save(path)
