"""``train retriever``: an image-text encoder of one domain, by symmetric InfoNCE.

Place in the picture: makes the encoder inside ``retriever[d]`` (paper §3.1).

Public functions (stable)::

    train_retriever(data, out, domain, settings=RetrieverTraining(), device=None,
                    tracker=None, progress=None) -> dict      # metrics; resumes by itself
    train_towers(towers, pairs, settings, checkpoint=None, validate=None, device=None,
        tracker=None, progress=None) -> dict                  # the loop, on any pairs
    Pairs(texts, pixels, views=None)                          # pixels: tensor or function
    open_tracker(name, folder) -> Tracker                     # "tensorboard" or "wandb"
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmedrag.images import load_image
from mmedrag.records import Reference, UserError, resolve_object
from mmedrag.retrieval.encoders.base import TorchEncoder, Towers, ahead
from mmedrag.retrieval.encoders.load import load_towers
from mmedrag.retrieval.ranks import per_query, relevant
from mmedrag.retrieval.settings import RetrieverTraining
from mmedrag.retrieval.train_loop import Pairs, Tracker, train_towers
from mmedrag.runtime import DataFolder, Processes, write_train_ids

__all__ = ["Pairs", "RetrieverTraining", "train_towers", "open_tracker", "train_retriever"]
IN_MEMORY = 2 << 30  # bytes of prepared pictures that are kept instead of decoded every epoch


def train_retriever(
    data: Sequence[DataFolder],
    out: str | Path,
    domain: str | None = None,
    settings: RetrieverTraining | None = None,
    device: str | None = None,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train on the corpus rows (split ``train``) of a domain that have an image and a text.

    Validation on split ``val``: each picture's own report among all of them (MRR). ``out``
    becomes an encoder folder with model card and ``train_ids.jsonl``; an interrupted run goes
    on with the same command.

    Returns:
        ``metrics`` on validation, ``steps``, ``best``, counts.
    """
    settings = settings or RetrieverTraining()
    out = Path(out)
    if (out / "config.json").exists() or (out / "open_clip_config.json").exists():
        raise UserError(f"{out}: holds a model already, expected a new folder")
    towers = load_towers(settings.encoder)
    train, val = (usable(data, domain, split) for split in ("train", "val"))
    pairs = pairs_of(train, towers)
    validate = None
    if len(val) >= 2:
        held = pairs_of(val, towers)
        validate = _validator(towers, held, settings, device)
    result = train_towers(
        towers, pairs, settings, out / "checkpoint", validate, device, tracker, progress
    )
    if Processes.of_launch().first:
        towers.model.to("cpu", torch.float32)
        towers.save(out)
        metrics = {k: v for k, v in (result["history"] or [{}])[-1].items() if k != "step"}
        best = [h for h in result["history"] if h["step"] == result["best"]["step"]]
        if settings.keep == "best" and best:
            metrics = {k: v for k, v in best[0].items() if k != "step"}
        record = {
            "domain": domain,
            "settings": asdict(settings),
            "metrics": metrics,
            "train_pairs": len(pairs.texts),
            "val_pairs": len(val),
            "steps": result["steps"],
            "best_step": result["best"]["step"],
            "loss": result["loss"],
            "dtype": result["dtype"],
        }
        text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
        (out / "training.json").write_text(text + "\n", encoding="utf-8")
        (out / "README.md").write_text(_card(record), encoding="utf-8")
        write_train_ids(out / "train_ids.jsonl", train)
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    return {"out": str(out), **{k: v for k, v in record.items() if k != "settings"}}


def usable(data: Sequence[DataFolder], domain: str | None, split: str) -> list[Reference]:
    rows = [r for folder in data for r in folder.corpus(split, domain)]
    return [r for r in rows if r.images and r.text.strip()]


def pairs_of(rows: list[Reference], towers: Towers) -> Pairs:
    """Pairs of rows whose pictures can be read; small sets are decoded once, into memory."""
    paths = list(dict.fromkeys(path for row in rows for path in row.images))
    number = {path: n for n, path in enumerate(paths)}
    views = [[number[path] for path in row.images] for row in rows]

    def prepare(path: Path) -> torch.Tensor:
        return towers.prepare(load_image(path))

    def read(numbers: list[int]) -> torch.Tensor:
        batches = ahead(prepare, [paths[n] for n in numbers], 64)
        return torch.stack([picture for batch in batches for picture in batch])

    size = read([0]).nbytes if paths else 0
    pixels = read(list(range(len(paths)))) if 0 < size * len(paths) <= IN_MEMORY else read
    return Pairs([row.text for row in rows], pixels, views)


def _validator(
    towers: Towers, held: Pairs, s: RetrieverTraining, device: str | None
) -> Callable[[], dict[str, float]]:
    right = relevant(held.texts, range(len(held.texts)))
    first = [view[0] for view in held.views or []]

    def validate() -> dict[str, float]:
        encoder = TorchEncoder(
            towers,
            "",
            str(device or next(towers.model.parameters()).device),
            "float32",
            s.long_text,
        )
        v = encoder.images([picture for picture in held.batch(first)])
        values = per_query(v @ encoder.texts(held.texts).T, right)
        found = {name: round(float(x.mean()), 6) for name, x in values.items()}
        return {"value": found["mrr"], **found}

    return validate


def open_tracker(name: str, folder: Path) -> Tracker:
    """Training curves for TensorBoard (files under ``folder``) or Weights & Biases.

    Raises:
        UserError: an unknown name, or the package is missing.
    """
    if name == "tensorboard":
        table = {name: "torch.utils.tensorboard:SummaryWriter"}
        writer = resolve_object(name, table, "tracker", {"tensorboard": "scale"})(str(folder))

        def write(metrics: dict[str, float], step: int) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return write
    if name == "wandb":  # its key comes from its own login or environment
        run = resolve_object(name, {name: "wandb:init"}, "tracker")(dir=str(folder))
        return lambda metrics, step: run.log(metrics, step=step)
    raise UserError(f"tracker: got {name!r}, expected tensorboard or wandb")


def _card(record: dict[str, Any]) -> str:
    rows = "\n".join(f"| {k} | {v} |" for k, v in sorted(record["metrics"].items()))
    return (
        f"# Retriever ({record['domain'] or 'all domains'})\n\n"
        f"Image-text encoder trained with symmetric InfoNCE on {record['train_pairs']} pairs, "
        f"{record['steps']} steps (best at {record['best_step']}), "
        f"from `{record['settings']['encoder']}`.\n\n"
        f"Validation ({record['val_pairs']} pairs, each picture's own report among all):\n\n"
        f"| metric | value |\n|---|---|\n{rows}\n\n"
        "Settings: `training.json`. Training rows: `train_ids.jsonl`. "
        "Research software, not a medical device.\n"
    )
