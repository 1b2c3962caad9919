"""RAG-PT tuning: two-image, two-prompt DPO of one adapter against a frozen reference.

Place in the picture: pairs ─► *train_dpo* ─► adapter ─► generator. Read it top to bottom: ``load``
the model and encode every pair; ``prepare`` what never changes (vision features, reference
log-probabilities) and keep it on disk; ``fit`` with ``transformers.Trainer``; ``write`` adapter,
card, log, training ids.

The reference is the same model with adapters off (``base``), or with the first stage's adapter
(``init``). A trained projector is part of the adapter, so it never leaks into the reference.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmedrag.answering.generators import Inputs
from mmedrag.models import Loaded, attach, load_model
from mmedrag.preference.dpo import card, trainer
from mmedrag.preference.dpo.cache import default_folder
from mmedrag.preference.dpo.collate import Collator
from mmedrag.preference.dpo.encode import EncodedPair, PairTokenizer
from mmedrag.preference.dpo.policy import REFERENCE, install, linear_targets, switch_off_dropout
from mmedrag.preference.dpo.prepare import (
    fill_features,
    fill_reference,
    fingerprints,
    image_tokens,
    pixel_reader,
    unsharded,
)
from mmedrag.preference.dpo.settings import DpoTraining, Reference
from mmedrag.records import Pair, UserError
from mmedrag.runtime import training

__all__ = ["DpoTraining", "train_dpo"]
log = logging.getLogger(__name__)
PROJECTOR = "multi_modal_projector"


def train_dpo(
    pairs: Sequence[Pair],
    model: str | Path,
    out: str | Path,
    settings: DpoTraining | None = None,
    *,
    init_adapter: str | Path | None = None,
    reference: Reference = "base",
    resume: bool = True,
    cache: str | Path | None = None,
    prepare_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Tune an adapter of ``model`` on preference pairs; writes the trained folder ``out``.

    Args:
        pairs: with ``root`` set (see :func:`mmedrag.preference.pairs.files.read_pairs`).
        model: folder of a LLaVA-shaped model. out: the adapter's folder.
        init_adapter: adapter of an earlier stage to go on from; the model's own otherwise fresh.
        reference: ``base`` = adapters off; ``init`` = the model with ``init_adapter``.
        resume: go on from the last complete checkpoint of the same run in ``out``.
        cache: folder of features and reference log-probabilities (default: the user's cache).
        prepare_only: fill the caches and stop (they can then be used elsewhere).
        progress: told (steps done, steps) after each.

    Returns:
        ``adapter`` (folder), ``pairs``, ``kinds``, ``steps``, last ``loss`` and ``metrics``,
        ``cache`` (found and computed), ``resumed_from``, ``seconds``, ...; every logged step is
        in ``out/training_log.jsonl``. A finished run is not repeated: its result is given again.

    Raises:
        UserError: unusable pairs (by id), a model of another shape, an ``out`` of another run.
    """
    settings, began = settings or DpoTraining(), time.perf_counter()
    if not pairs:
        raise UserError("train dpo: no pairs, expected at least one")
    if reference == "init" and init_adapter is None:
        raise UserError("train dpo: reference 'init' needs an initial adapter")
    folder = training.TrainingFolder(Path(out), "result.json")
    options = trainer.arguments(settings, folder.checkpoints)
    processes = training.processes_of(options)

    source = load(pairs, model, init_adapter, settings, options)
    identity = _identity(settings, source.folders, reference, source.pairs)
    if not prepare_only:
        done = folder.claim(identity, processes, resume)
        if done is not None:
            log.info("%s: already trained with these pairs and settings", out)
            return done
    policy = _policy(source.loaded.model, settings, init_adapter, reference)
    place = Path(cache) if cache else default_folder()
    collator, facts = prepare(source, policy, settings, reference, place, options)
    prepared = time.perf_counter() - began
    if prepare_only:
        return {**facts, "seconds": {"prepare": prepared}}

    tuned = trainer.DpoTrainer(policy, options, source.pairs, collator, settings, progress)
    last = folder.last_checkpoint(processes) if resume else None
    training.fit(tuned, last)
    trained = time.perf_counter() - began - prepared
    result = {
        "adapter": str(out),
        **facts,
        **tuned.outcome(),
        "resumed_from": last.name if last else None,
        "images_encoded_in_training": collator.encoded,
    }
    tuned.save_model(str(out))  # gathers a sharded model; PEFT writes safetensors
    if processes.first:
        history = tuned.state.log_history
        card.write(Path(out), result, settings, identity, history, pairs, Path(str(model)).name)
    folder.finish(processes)
    return {**result, "seconds": {"prepare": prepared, "train": trained}}


# --- prepare ----------------------------------------------------------------------------------


@dataclass
class Source:
    """The model that is tuned, and the pairs as it reads them."""

    loaded: Loaded
    number: str  # type of its weights: float32 or bfloat16
    folders: dict[str, str]  # fingerprints of the model, the initial adapter, ...
    inputs: Inputs
    pairs: list[EncodedPair]
    truncated: int  # answers that were cut to fit


def load(
    pairs: Sequence[Pair],
    model: str | Path,
    init: str | Path | None,
    settings: DpoTraining,
    options: trainer.TrainingArguments,
) -> Source:
    """Load the model once, and encode and check every pair for it."""
    number = trainer.number_type(settings, options)
    with unsharded(options):
        loaded = load_model(model, str(options.device), number)
    install(loaded.model)
    inputs = Inputs(loaded.model, loaded.processor, max_images=1, cache_bytes=0)
    folders = fingerprints(model, init)
    context = getattr(loaded.model.config.text_config, "max_position_embeddings", None)
    longest = min(settings.max_length, context or settings.max_length)
    tokenizer = PairTokenizer(inputs, image_tokens(loaded), longest, settings.count_end)
    encoded = tokenizer(pairs, settings.redraw_noise)
    return Source(loaded, number, folders, inputs, encoded, tokenizer.truncated)


def prepare(
    source: Source,
    policy: Any,
    settings: DpoTraining,
    reference: Reference,
    place: Path,
    options: trainer.TrainingArguments,
) -> tuple[Collator, dict[str, Any]]:
    """The collator with what never changes, computed once into ``place``; and what the result
    says of it."""
    pixels, processes = pixel_reader(source.inputs), training.processes_of(options)
    collator = Collator(
        pixels,
        pad=source.inputs.pad_id,
        share=_may_share(source.loaded.model, settings),
        tokens=settings.tokens_per_pass,
        whole=training.is_sharded(options),
    )
    caches: dict[str, Any] = {}
    weights = source.folders["model"][:16]
    if settings.cache_features:
        folder = place / "features" / f"{weights}-{source.number}"
        collator.features, caches["features"] = fill_features(
            folder, source.pairs, source.loaded, pixels, processes
        )
    if settings.cache_reference and not any(pair.redraw for pair in source.pairs):
        name = f"{weights}-{source.folders[reference][:16]}-{source.number}"
        collator.reference, caches["reference"] = fill_reference(
            place / "reference" / name, source.pairs, collator, policy, processes
        )
    return collator, {
        "pairs": len(source.pairs),
        "kinds": dict(sorted(Counter(pair.kind for pair in source.pairs).items())),
        "truncated_answers": source.truncated,
        "reference": reference,
        "live_reference": collator.reference is None,
        "cache": caches,
    }


def _policy(
    model: Any, settings: DpoTraining, init: str | Path | None, reference: Reference
) -> Any:
    """The model with one adapter (applied once), and for ``init`` its frozen twin."""
    from peft import LoraConfig, get_peft_model

    switch_off_dropout(model)
    if init is None:
        torch.manual_seed(settings.seed)  # the adapter's own random start
        config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=linear_targets(model, settings.lora_targets),
            modules_to_save=[PROJECTOR] if settings.train_projector else None,
        )
        return get_peft_model(model, config, **_peft_options())
    policy = attach(model, init, trainable=True, **_peft_options())
    kept = getattr(policy.peft_config["default"], "modules_to_save", None) or []
    if settings.train_projector and not any(PROJECTOR in module for module in kept):
        raise UserError(f"{init}: has no projector of its own, so train_projector cannot go on")
    if reference == "init":
        attach(model, init, REFERENCE, policy)
        policy.set_adapter("default")
    switch_off_dropout(policy)
    return policy


def _peft_options() -> dict[str, Any]:
    """ZeRO-3 gathers parameters of one type only, so there the adapter keeps the model's."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return {"autocast_adapter_dtype": False} if is_deepspeed_zero3_enabled() else {}


def _may_share(model: Any, settings: DpoTraining) -> bool:
    """Two answers behind one prompt need an attention that takes a mask."""
    text = model.config.text_config
    return settings.share_prefix and text._attn_implementation in ("sdpa", "eager")


def _identity(
    settings: DpoTraining, folders: dict[str, str], reference: str, pairs: Sequence[EncodedPair]
) -> dict[str, Any]:
    """What must be equal for a run to go on: settings, weights, pairs."""
    content = [[p.id, p.kind, p.chosen.key, p.rejected.key, p.redraw] for p in pairs]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    free = ("save_steps", "log_steps", "report_to", "workers", "cache_features", "cache_reference")
    chosen = {k: v for k, v in settings.to_dict().items() if k not in free}
    return {
        "settings": chosen,
        "model": folders["model"],
        "init_adapter": folders.get("init"),
        "reference": reference,
        "pairs": digest,
    }
