"""What a trained adapter's folder holds beside its weights.

Place in the picture: the end of ``train``. ``README.md`` (model card), ``training_log.jsonl``
(every logged step), ``result.json``, ``train_ids.jsonl`` (id, patient, image sha256).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedrag.preference.dpo.encode import file_hash
from mmedrag.preference.dpo.policy import REFERENCE
from mmedrag.preference.dpo.settings import DpoTraining
from mmedrag.records import Pair

_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def write(
    out: Path,
    result: Mapping[str, Any],
    settings: DpoTraining,
    identity: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    pairs: Sequence[Pair],
    model: str,
) -> None:
    """Write the side files; ``result.json`` comes last and says that the run is finished."""
    (out / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use here
    shutil.rmtree(out / REFERENCE, ignore_errors=True)  # PEFT saves the frozen twin too
    rows = [{k: v for k, v in row.items() if k not in _TIMES} for row in history]
    _put(out / "training_log.jsonl", "".join(json.dumps(row) + "\n" for row in rows if row))
    _put(out / "train_ids.jsonl", "".join(json.dumps(row) + "\n" for row in _ids(pairs)))
    _put(out / "README.md", _card(result, settings, identity, model))
    stored = {**result, "adapter": out.name}
    _put(out / "result.json", json.dumps(stored, indent=2) + "\n")


def _ids(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    rows = {}
    for pair in pairs:
        image = pair.chosen.image
        name = image if isinstance(image, str) else (image or [""])[0]
        digest = file_hash((pair.root or Path()) / name)
        rows[pair.id] = {"id": pair.id, "patient": pair.patient, "sha256": digest}
    return [rows[key] for key in sorted(rows)]


def _put(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _card(
    result: Mapping[str, Any], settings: DpoTraining, identity: Mapping[str, Any], model: str
) -> str:
    metrics = result["metrics"]
    kinds = [k for k in result["kinds"] if f"rewards/accuracies/{k}" in metrics]
    table = [
        f"| {name} | {count} | "
        + " | ".join(
            f"{metrics[f'{metric}{suffix}']:.4f}" if f"{metric}{suffix}" in metrics else "–"
            for metric in ("rewards/accuracies", "rewards/margins", "rewards/chosen")
        )
        + " |"
        for name, count, suffix in [
            ("all", result["pairs"], ""),
            *((k, result["kinds"][k], f"/{k}") for k in kinds),
        ]
    ]
    frozen = "adapters off" if result["reference"] == "base" else "the initial adapter"
    return "\n".join(
        [
            "---",
            "library_name: peft",
            "tags: [rag-pt, dpo, medical, research]",
            "---",
            "",
            f"# RAG-PT adapter of `{model}`",
            "",
            "Preference-tuned against copying and over-reliance on retrieved references. Research "
            "software, not a medical device.",
            "",
            f"- {result['pairs']} preference pairs, {result['steps']} steps; reference policy: "
            f"{frozen}; answers cut to fit: {result['truncated_answers']}",
            f"- base model sha256 `{identity['model'][:16]}…`, pairs sha256 "
            f"`{identity['pairs'][:16]}…`",
            "- what it was trained on: `train_ids.jsonl`; every logged step: `training_log.jsonl`",
            "",
            "Metrics of the last logging interval on training pairs (they say that the loss was "
            "followed, not that the model is better):",
            "",
            "| pairs | n | accuracy | margin | chosen reward |",
            "|---|---|---|---|---|",
            *table,
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in settings.to_dict().items()),
            "",
        ]
    )
