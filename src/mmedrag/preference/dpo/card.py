"""What a trained adapter's folder holds beside its weights.

Place in the picture: the end of train_dpo. ``README.md`` (model card), ``training_log.jsonl``
(every logged step), ``result.json``, ``train_ids.jsonl`` (id, patient, image sha256).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedrag.preference.dpo.encode import file_hash
from mmedrag.preference.dpo.policy import REFERENCE
from mmedrag.preference.dpo.settings import DpoTraining
from mmedrag.records import Pair
from mmedrag.runtime import Figures, ModelCard, write_json, write_jsonl

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
    write_jsonl(out / "training_log.jsonl", filter(None, rows))
    write_jsonl(out / "train_ids.jsonl", _ids(pairs))
    _card(result, settings, identity, model).write(out)
    write_json(out / "result.json", {**result, "adapter": out.name}, indent=2)


def _ids(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    rows = {}
    for pair in pairs:
        image = pair.chosen.image
        name = image if isinstance(image, str) else (image or [""])[0]
        digest = file_hash((pair.root or Path()) / name)
        rows[pair.id] = {"id": pair.id, "patient": pair.patient, "sha256": digest}
    return [rows[key] for key in sorted(rows)]


def _card(
    result: Mapping[str, Any], settings: DpoTraining, identity: Mapping[str, Any], model: str
) -> ModelCard:
    metrics = result["metrics"]
    groups = [("all", result["pairs"], "")]
    for kind, count in result["kinds"].items():
        if f"rewards/accuracies/{kind}" in metrics:
            groups.append((kind, count, f"/{kind}"))
    columns = ("rewards/accuracies", "rewards/margins", "rewards/chosen")
    measured = Figures(
        "Metrics of the last logging interval on training pairs (they say that the loss was "
        "followed, not that the model is better):",
        ("pairs", "n", "accuracy", "margin", "chosen reward"),
        [
            (name, count, *(metrics.get(f"{column}{suffix}") for column in columns))
            for name, count, suffix in groups
        ],
    )
    frozen = "adapters off" if result["reference"] == "base" else "the initial adapter"
    return ModelCard(
        title=f"RAG-PT adapter of `{model}`",
        what="Preference-tuned against copying and over-reliance on retrieved references.",
        facts=(
            f"{result['pairs']} preference pairs, {result['steps']} steps; reference policy: "
            f"{frozen}; answers cut to fit: {result['truncated_answers']}",
            f"Base model sha256 `{identity['model'][:16]}…`, pairs sha256 "
            f"`{identity['pairs'][:16]}…`",
            "Every logged step: `training_log.jsonl`",
        ),
        figures=(measured,),
        settings=settings.to_dict(),
        head={"library_name": "peft", "tags": "[rag-pt, dpo, medical, research]"},
    )
