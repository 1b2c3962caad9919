"""RAG-PT tuning: two-image, two-prompt DPO of one adapter against a frozen reference.

Place in the picture: pairs ─► *train* ─► adapter ─► generator. The stages, in order: encode and
check every pair; compute once what never changes (vision features, reference log-probabilities)
and keep it on disk; train with ``transformers.Trainer``; write adapter, card, log, training ids.

The reference is the same model with adapters off (``base``), or with the first stage's adapter
(``init``). A trained projector is part of the adapter, so it never leaks into the reference.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmedrag.answering.generators import Inputs
from mmedrag.models import load_model
from mmedrag.preference.dpo.cache import default_folder
from mmedrag.preference.dpo.collate import Clock, Collator
from mmedrag.preference.dpo.encode import EncodedPair, Encoder
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
from mmedrag.runtime import Processes

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

    Returns:
        ``adapter`` (folder), ``pairs``, ``kinds``, ``steps``, last ``loss`` and ``metrics``,
        ``cache`` (found and computed), ``resumed_from``, ``seconds``, ...; every logged step is
        in ``out/training_log.jsonl``. A finished run is not repeated: its result is given again.

    Raises:
        UserError: unusable pairs (by id), a model of another shape, an ``out`` of another run.
    """
    settings, out, began = settings or DpoTraining(), Path(out), time.perf_counter()
    if not pairs:
        raise UserError("train dpo: no pairs, expected at least one")
    if reference == "init" and init_adapter is None:
        raise UserError("train dpo: reference 'init' needs an initial adapter")
    from mmedrag.preference.dpo import trainer as dpo_trainer

    arguments = dpo_trainer.arguments(settings, out / "checkpoints", len(pairs))
    processes = Processes(arguments.process_index, arguments.world_size)
    with unsharded(arguments):
        number = dpo_trainer.number_type(settings, arguments)
        loaded = load_model(model, str(arguments.device), number)
    install(loaded.model)
    inputs = Inputs(loaded.model, loaded.processor, max_images=1, cache_bytes=0)
    folders = fingerprints(model, init_adapter)
    context = getattr(loaded.model.config.text_config, "max_position_embeddings", None)
    longest = min(settings.max_length, context or settings.max_length)
    encoder = Encoder(inputs, image_tokens(loaded), longest, settings.count_end)
    encoded = encoder(pairs, settings.redraw_noise)
    identity = _identity(settings, folders, reference, encoded)
    done = _claim(out, identity, resume, processes) if not prepare_only else None
    if done is not None:
        log.info("%s: already trained with these pairs and settings", out)
        return done

    policy = _policy(loaded.model, settings, init_adapter, reference)
    redraw = any(pair.redraw for pair in encoded)
    place = Path(cache) if cache else default_folder()
    pixels = pixel_reader(inputs)
    collator = Collator(
        pixels,
        pad=inputs.pad_id,
        share=_may_share(loaded.model, settings),
        tokens=settings.tokens_per_pass,
        whole=_is_sharded(arguments),
    )
    caches: dict[str, Any] = {}
    if settings.cache_features:
        store, caches["features"] = fill_features(
            place / "features" / f"{folders['model'][:16]}-{number}",
            encoded,
            loaded,
            pixels,
            processes,
        )
        collator.features = store
    if settings.cache_reference and not redraw:
        folder = f"{folders['model'][:16]}-{folders[reference][:16]}-{number}"
        collator.reference, caches["reference"] = fill_reference(
            place / "reference" / folder, encoded, collator, policy, processes
        )
    prepared = time.perf_counter() - began
    facts = {
        "pairs": len(encoded),
        "kinds": dict(sorted(Counter(pair.kind for pair in encoded).items())),
        "truncated_answers": encoder.truncated,
        "reference": reference,
        "live_reference": collator.reference is None,
        "cache": caches,
    }
    if prepare_only:
        return {**facts, "seconds": {"prepare": prepared}}

    trainer = dpo_trainer.DpoTrainer(
        policy, arguments, encoded, collator, settings, clock=Clock(), reference=reference
    )
    last = dpo_trainer.last_checkpoint(out / "checkpoints") if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    trained = time.perf_counter() - began - prepared
    trainer.save_model(str(out))  # gathers a sharded model; PEFT writes safetensors
    history = trainer.state.log_history
    result = {
        "adapter": str(out),
        **facts,
        "steps": trainer.state.global_step,
        "loss": next((row["loss"] for row in reversed(history) if "loss" in row), None),
        "metrics": trainer.last_metrics(),
        "resumed_from": last.name if last else None,
        "images_encoded_in_training": collator.encoded,
    }
    if processes.first:
        from mmedrag.preference.dpo import card

        card.write(out, result, settings, identity, history, pairs, Path(str(model)).name)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    processes.wait()
    return {**result, "seconds": {"prepare": prepared, "train": trained}}


# --- what is trained --------------------------------------------------------------------------


def _policy(
    model: Any, settings: DpoTraining, init: str | Path | None, reference: Reference
) -> Any:
    """The model with one adapter (applied once), and for ``init`` its frozen twin."""
    from peft import LoraConfig, PeftModel, get_peft_model

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
    policy = PeftModel.from_pretrained(model, str(init), is_trainable=True, **_peft_options())
    kept = getattr(policy.peft_config["default"], "modules_to_save", None) or []
    if settings.train_projector and PROJECTOR not in kept:
        raise UserError(f"{init}: has no projector of its own, so train_projector cannot go on")
    if reference == "init":
        policy.load_adapter(str(init), adapter_name=REFERENCE, is_trainable=False)
        policy.set_adapter("default")
    switch_off_dropout(policy)
    return policy


def _is_sharded(arguments: Any) -> bool:
    return arguments.deepspeed_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _peft_options() -> dict[str, Any]:
    """ZeRO-3 gathers parameters of one type only, so there the adapter keeps the model's."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return {"autocast_adapter_dtype": False} if is_deepspeed_zero3_enabled() else {}


def _may_share(model: Any, settings: DpoTraining) -> bool:
    """Two answers behind one prompt need an attention that takes a mask."""
    text = model.config.text_config
    return settings.share_prefix and text._attn_implementation in ("sdpa", "eager")


# --- whose run it is --------------------------------------------------------------------------


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


def _claim(
    out: Path, identity: dict[str, Any], resume: bool, processes: Processes
) -> dict[str, Any] | None:
    """Take ``out`` for this run; the stored result when it is finished already."""
    file, result = out / "run.json", out / "result.json"
    if resume and file.exists():
        before = json.loads(file.read_text("utf-8"))
        if before != identity:
            changed = [k for k in identity if before.get(k) != identity[k]]
            raise UserError(
                f"{out}: holds a run with other {', '.join(changed)}; choose another folder, or "
                "resume=False to start again there"
            )
        if result.exists():
            return dict(json.loads(result.read_text("utf-8")))
    processes.wait()  # nobody writes before everybody has looked
    if processes.first:
        if not resume:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            result.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        part = file.with_name("run.json.part")
        part.write_text(json.dumps(identity, indent=2) + "\n", "utf-8")
        os.replace(part, file)
    processes.wait()
    return None
