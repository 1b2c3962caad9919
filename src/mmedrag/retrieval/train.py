"""``train retriever``: an image-text encoder of one domain, by symmetric InfoNCE.

Place in the picture: makes the encoder inside ``retriever[d]`` (paper §3.1).

Public functions (stable)::

    train_retriever(data, out, domain, settings=RetrieverTraining(), device=None,
                    tracker=None, progress=None) -> dict      # metrics; resumes by itself
    train_towers(towers, pairs, settings, folder=None, validate=None, device=None,
        tracker=None, progress=None) -> dict                  # any pairs, weights in place
    Pairs(texts, pixels, views=None)                          # pixels: tensor or function
    open_tracker(name, folder) -> Tracker                     # "tensorboard" or "wandb"
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from math import comb
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mmedrag.images import load_image
from mmedrag.records import Reference, UserError, resolve_object
from mmedrag.retrieval.encoders.base import TorchEncoder, Towers, ahead, fastest_dtype
from mmedrag.retrieval.encoders.load import load_towers
from mmedrag.retrieval.ranks import per_query, relevant
from mmedrag.retrieval.settings import RetrieverTraining
from mmedrag.retrieval.trainer import (
    Pairs,
    RetrieverTrainer,
    Steps,
    Tracker,
    TwoTowers,
    Validate,
    arguments,
    losses_of,
    validations_of,
)
from mmedrag.runtime import (
    DataFolder,
    Figures,
    ModelCard,
    counted,
    training,
    write_json,
    write_train_ids,
)

__all__ = ["Pairs", "RetrieverTraining", "train_towers", "open_tracker", "train_retriever"]
log = logging.getLogger(__name__)
IN_MEMORY = 2 << 30  # bytes of prepared pictures that are kept instead of decoded every epoch


def train_retriever(
    data: Sequence[DataFolder],
    out: str | Path,
    domain: str | None = None,
    settings: RetrieverTraining | None = None,
    device: str | None = None,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
    towers: Towers | None = None,
) -> dict[str, Any]:
    """Train on the corpus rows (split ``train``) of a domain that have an image and a text.

    Validation on split ``val``: each picture's own report among all of them (MRR). ``out``
    becomes an encoder folder with model card and ``train_ids.jsonl``; an interrupted run goes
    on with the same command. ``towers``: what is trained, where it is more than the name
    ``settings.encoder`` says.

    Returns:
        ``metrics`` on validation, ``steps``, ``best_step``, ``loss``, counts.

    Raises:
        UserError: no pairs, ``out`` holds a model or another training, unusable settings.
    """
    settings, out = settings or RetrieverTraining(), Path(out)
    folder = training.TrainingFolder(out, "training.json")
    _check_empty(folder)
    train, val = (usable(data, domain, split) for split in ("train", "val"))
    if not train:
        rows = [row for one in data for row in one.corpus()]
        there = counted(row for row in rows if row.images and row.text.strip())
        raise UserError(
            f"train retriever: no pairs of split train, {_named(domain)}, expected corpus rows "
            f"with image and text; there are: {there}"
        )
    log.info(
        "train retriever: %d pairs of split train, %d of split val, %s",
        len(train),
        len(val),
        _named(domain),
    )
    towers = towers or load_towers(settings.encoder)
    pairs = pairs_of(train, towers)
    validate = None
    if len(val) >= 2:
        validate = partial(_validate, towers, pairs_of(val, towers), settings.long_text)
    result = train_towers(towers, pairs, settings, folder, validate, device, tracker, progress)
    record = {
        "domain": domain,
        "settings": asdict(settings),
        "metrics": _metrics(result, settings),
        "train_pairs": len(pairs.texts),
        "val_pairs": len(val),
        "leave_one_source_out": _left_out(train + val, towers, settings, result["processes"].size),
        **{name: result[name] for name in ("steps", "best_step", "loss", "dtype")},
    }
    processes = result["processes"]
    if processes.first:
        towers.model.to("cpu")
        towers.save(out)
        _card(record).write(out)
        write_train_ids(out / "train_ids.jsonl", train)
        write_json(out / folder.result, record)
    folder.finish(processes)
    return {"out": str(out), **{k: v for k, v in record.items() if k != "settings"}}


def train_towers(
    towers: Towers,
    pairs: Pairs,
    settings: RetrieverTraining,
    folder: training.TrainingFolder | None = None,
    validate: Validate | None = None,
    device: str | None = None,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train ``towers`` in place; afterwards they hold the best (or last) weights, in float32.

    Args:
        folder: of the running training, which goes on from its last checkpoint; None: a
            temporary one. validate: called after every ``settings.evaluate`` epochs and at the
            end, with the model in eval mode; its ``value`` decides what is best.

    Returns:
        ``steps``, ``loss`` (last), ``losses``, ``history`` (of validation), ``best_step``,
        ``dtype``, ``processes``.
    """
    if not pairs.texts:
        raise UserError("train retriever: no pairs, expected corpus rows with image and text")
    if folder is None:
        with TemporaryDirectory() as place:
            own = training.TrainingFolder(Path(place), "training.json")
            return train_towers(towers, pairs, settings, own, validate, device, tracker, progress)
    steps, model = Steps(pairs, settings), TwoTowers(towers, settings)
    options = arguments(folder.checkpoints, steps, validate is not None, device)
    processes = training.processes_of(options)
    model.to(options.device)
    if processes.agree(_bf16(model, pairs, settings)):
        options = arguments(folder.checkpoints, steps, validate is not None, device, bf16=True)
    digest = hashlib.sha256("\0".join(pairs.texts).encode()).hexdigest()
    folder.claim({"settings": asdict(settings), "data": digest}, processes)
    trainer = RetrieverTrainer(model, options, steps, validate, tracker, progress)
    training.fit(trainer, folder.last_checkpoint(processes))
    model.eval()
    losses = losses_of(trainer.state)
    return {
        "steps": trainer.state.global_step,
        "loss": losses[-1] if losses else None,
        "losses": losses,
        "history": validations_of(trainer.state),
        "best_step": trainer.state.best_global_step or 0,
        "dtype": "bfloat16" if options.bf16 else "float32",
        "processes": processes,
    }


def _check_empty(folder: training.TrainingFolder) -> None:
    out = folder.path
    models = [out / n for n in ("config.json", "open_clip_config.json", "projections.json")]
    unfinished = (out / "run.json").exists() and not (out / folder.result).exists()
    if any(path.exists() for path in models) and not unfinished:
        raise UserError(f"{out}: holds a model already, expected a new folder")
    if (out / "checkpoint").exists():
        raise UserError(
            f"{out}: holds a training that an earlier version left unfinished (folder "
            "checkpoint), which cannot go on; choose another folder"
        )


def _bf16(model: TwoTowers, pairs: Pairs, s: RetrieverTraining) -> bool:
    """Whether to compute in bfloat16; "auto": where it is measured to be faster."""
    if s.dtype != "auto":
        return s.dtype == "bfloat16"
    device = model.log_scale.device
    sample = pairs.batch([0] * 16).to(device)

    def run(dtype: torch.dtype) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            model.towers.image_features(sample).float().sum().backward()
        model.zero_grad(set_to_none=True)

    return fastest_dtype(run, device) is torch.bfloat16


def _metrics(result: dict[str, Any], s: RetrieverTraining) -> dict[str, float]:
    """Of the weights that are kept: at the best step, or the last."""
    history = result["history"]
    best = [found for found in history if found["step"] == result["best_step"]]
    kept = best if s.keep == "best" and best else history[-1:]
    return {k: v for found in kept for k, v in found.items() if k != "step"}


def _named(domain: str | None) -> str:
    return f"domain {domain}" if domain else "any domain"


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


def _left_out(
    rows: list[Reference], towers: Towers, settings: RetrieverTraining, processes: int
) -> dict[str, dict[str, float]]:
    """Source -> what maps over frozen features, fitted on the other sources only, find in it.

    Beside recall and MRR over all of its pairs stand ``n`` and ``chance`` (of recall@5). Empty
    where a whole tower is trained (that would be a training a source) or there is one source.
    """
    sources = sorted({row.source for row in rows if row.source})
    if not towers.frozen or len(sources) < 2 or processes > 1:
        return {}
    found = {}
    for source in sources:
        held = [row for row in rows if row.source == source]
        if len(held) < 2 or len(held) == len(rows):
            continue
        fresh = load_towers(settings.encoder)
        others = pairs_of([row for row in rows if row.source != source], fresh)
        train_towers(fresh, others, settings)
        own = pairs_of(held, fresh)
        right = relevant(own.texts, range(len(held))).sum(axis=1)
        misses = [comb(len(held) - int(m), 5) / comb(len(held), 5) for m in right]
        values = _validate(fresh, own, settings.long_text)
        values.pop("value")
        chance = 1 - sum(misses) / len(misses) if len(held) > 5 else 1.0
        found[source] = {"n": len(held), **values, "chance": round(chance, 6)}
    return found


def _validate(towers: Towers, held: Pairs, long_text: str) -> dict[str, float]:
    """Each picture's own report among all held-out ones; ``value`` is the MRR."""
    device = next(towers.model.parameters()).device
    encoder = TorchEncoder(towers, "", str(device), "float32", long_text)
    v = encoder.images(list(held.batch([view[0] for view in held.views or []])))
    right = relevant(held.texts, range(len(held.texts)))
    values = per_query(v @ encoder.texts(held.texts).T, right)
    found = {name: round(float(x.mean()), 6) for name, x in values.items()}
    return {"value": found["mrr"], **found}


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


def _card(record: dict[str, Any]) -> ModelCard:
    measured = Figures(
        f"Validation ({record['val_pairs']} pairs, each picture's own report among all):",
        ("metric", "value"),
        sorted(record["metrics"].items()),
    )
    return ModelCard(
        title=f"Retriever ({record['domain'] or 'all domains'})",
        what=f"Image-text encoder trained with symmetric InfoNCE on {record['train_pairs']} pairs, "
        f"{record['steps']} steps (best at {record['best_step']}), "
        f"from `{record['settings']['encoder']}`.",
        figures=(measured, *_transfer(record["leave_one_source_out"])),
        settings=record["settings"],
    )


def _transfer(left_out: dict[str, dict[str, float]]) -> list[Figures]:
    rows = [(source, v["n"], v["recall@5"], v["chance"]) for source, v in left_out.items()]
    title = "Sources that the maps were not fitted on (a fit of its own for each):"
    return [Figures(title, ("source", "n", "recall@5", "chance"), rows)] if rows else []
