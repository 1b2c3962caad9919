"""What never changes during a tuning, computed once: vision features, reference log-probabilities.

Place in the picture: between encoded pairs and training. Everything goes through the caches of
``cache``; several processes share the work, each writing its own part.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedrag.answering.generators import Inputs, vision
from mmedrag.models import Loaded
from mmedrag.preference.dpo.cache import VERSION, FeatureStore, Journal, folder_fingerprint
from mmedrag.preference.dpo.collate import Collator
from mmedrag.preference.dpo.encode import EncodedPair, View
from mmedrag.preference.dpo.policy import as_reference, vision_features
from mmedrag.records import UserError
from mmedrag.runtime import Processes, each

Pixels = Callable[[Sequence[View]], Tensor]
ENCODE_BATCH = 64  # images per pass of the vision tower while the cache is filled


@contextmanager
def unsharded(arguments: Any) -> Iterator[None]:
    """Load a whole model also where training will shard it (ZeRO-3).

    Caches are filled before training begins, so each device holds the frozen weights once; the
    trainer shards them afterwards.
    """
    plugin = getattr(arguments, "deepspeed_plugin", None)
    config = getattr(plugin, "dschf", None)
    if config is None:
        yield
        return
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


def fingerprints(model: str | Path, init: str | Path | None) -> dict[str, str]:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(model), local_files_only=True))
    found = {"model": folder_fingerprint(folder), "base": "base"}
    if init is not None:
        found["init"] = folder_fingerprint(Path(init))
    return found


def image_tokens(loaded: Loaded) -> int:
    """How many tokens the vision tower makes of an image, measured."""
    config = loaded.model.config.vision_config
    size = config.image_size
    blank = torch.zeros(1, config.num_channels, size, size, device=loaded.device)
    return int(vision_features(loaded.model, blank).shape[1])


def pixel_reader(inputs: Inputs) -> Pixels:
    """Views → pixel values, exactly as the generator sees them."""

    def pixels(views: Sequence[View]) -> Tensor:
        pictures = [vision.open_view((v.path, v.noise), inputs.image_size) for v in views]
        batch = inputs.processor.image_processor(images=pictures, return_tensors="pt")
        return batch["pixel_values"]

    return pixels


def fill_features(
    folder: Path, pairs: Sequence[EncodedPair], loaded: Loaded, pixels: Pixels, processes: Processes
) -> tuple[FeatureStore, dict[str, int]]:
    """Features of every view that does not change, each distinct one encoded once."""
    store = FeatureStore(folder, {"version": VERSION, "what": "vision features"}, processes.rank)
    views = {
        side.view.key: side.view
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
        if not (pair.redraw and side.view.noise is not None)
    }
    missing = store.missing(sorted(views))
    own = list(processes.own(missing))
    chunks = [own[i : i + ENCODE_BATCH] for i in range(0, len(own), ENCODE_BATCH)]
    with ThreadPoolExecutor(1) as reader:  # decode the next chunk while this one is encoded
        ahead = [reader.submit(pixels, [views[key] for key in c]) for c in chunks[:1]]
        for number, chunk in enumerate(each(chunks, "vision features")):
            values = ahead.pop().result()
            if number + 1 < len(chunks):
                ahead.append(reader.submit(pixels, [views[key] for key in chunks[number + 1]]))
            values = values.to(loaded.device, loaded.dtype)
            store.append(chunk, vision_features(loaded.model, values))
    processes.wait()
    if processes.size > 1:
        store.reload()
    return store, {"found": len(views) - len(missing), "computed": len(missing)}


def fill_reference(
    folder: Path,
    pairs: Sequence[EncodedPair],
    collator: Collator,
    policy: Any,
    processes: Processes,
) -> tuple[dict[str, float], dict[str, int]]:
    """log π_ref of every side that is not on disk yet."""
    journal = Journal(folder, {"version": VERSION, "what": "reference log-probs"}, processes.rank)
    keys = [side.key for pair in pairs for side in (pair.chosen, pair.rejected)]
    absent = set(journal.missing(keys))
    wanting = [p for p in pairs if p.chosen.key in absent or p.rejected.key in absent]
    own = processes.own(sorted(wanting, key=lambda pair: pair.id))
    device = next(policy.parameters()).device
    policy.eval()
    with torch.no_grad(), as_reference(policy), autocast(policy):
        for part in each(collator.cut(own), "reference log-probs"):
            fresh = _logps(part, collator, policy, device)
            journal.append([(k, v) for k, v in fresh.items() if k in absent])
    processes.wait()
    if processes.size > 1:
        journal.reload()
    found = {"found": len(set(keys)) - len(absent), "computed": len(absent)}
    return {key: float(journal.entries[key]) for key in keys}, found


def _logps(
    pairs: Sequence[EncodedPair], collator: Collator, policy: Any, device: torch.device
) -> dict[str, float]:
    """Side key → log-probability, of every side of these pairs."""
    batch = collator.part(pairs)
    batch.pop("kinds")
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    logps = policy(**batch).float().tolist()
    if not all(math.isfinite(value) for value in logps):
        names = ", ".join(pair.id for pair in pairs[:3])
        raise UserError(f"train dpo: a reference log-probability of {names}, ... is not finite")
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return {side.key: value for side, value in zip(sides, logps, strict=True)}


def autocast(policy: Any) -> contextlib.AbstractContextManager[Any]:
    """The number type that training computes in, outside the trainer."""
    parameter = next(policy.get_base_model().model.language_model.parameters())
    if parameter.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(parameter.device.type, dtype=parameter.dtype)
