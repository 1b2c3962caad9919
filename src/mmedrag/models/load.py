"""Model, processor and adapter from folders; device and number type by measurement."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmedrag.models.checkpoints import Shard, shard_paths
from mmedrag.records import UserError
from mmedrag.runtime import torchvision_shim

log = logging.getLogger(__name__)
LARGE = 500_000_000  # parameters from which half precision is worth its rounding on a CPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A model ready to answer, and what it was loaded as."""

    model: Any  # the plain transformers model; adapters are injected into it
    processor: Any
    device: torch.device
    dtype: torch.dtype
    parameters: int


def load_model(
    model: str | Path, device: str | None = None, dtype: str = "auto", local_files_only: bool = True
) -> Loaded:
    """Any ``AutoModelForImageTextToText`` folder or hub id with its own processor.

    Args:
        device: torch device; None takes a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto" (:func:`choose_dtype`).
        local_files_only: False allows a download of a hub id.

    Raises:
        UserError: no such model, or one that is not an image-text-to-text model.
    """
    torchvision_shim.ready()
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging as progress

    name = str(model)
    progress.disable_progress_bar()
    chosen_device = torch.device(device or best_device())
    try:
        # said aloud, or transformers asks on the terminal whether to run a folder's own code
        safe: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(name, **safe)
        size = _parameters(config)
        number = choose_dtype(chosen_device, size) if dtype == "auto" else _dtype(dtype)
        processor = _processor(name, safe)
        loaded = AutoModelForImageTextToText.from_pretrained(name, dtype=number, **safe)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: cannot be loaded as an image-text-to-text model with its processor: {reason}"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"{name}: expected a processor for images and text, found a part of one")
    processor.tokenizer.padding_side = "left"
    loaded.eval().requires_grad_(False).to(chosen_device)
    log.info("%s: %s parameters, %s on %s", name, f"{size:,}", number, chosen_device)
    return Loaded(loaded, processor, chosen_device, number, size)


def _processor(name: str, safe: dict[str, Any]) -> Any:
    """The model's processor, with images through PIL: the same pixels without torchvision."""
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name, backend="pil", **safe)
    except ImportError:  # a video processor comes along, and those know torchvision alone
        found = AutoProcessor.from_pretrained(name, **safe)
        found.image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", **safe)
        return found


def attach(model: Any, adapter: str | Path, name: str = "default", peft: Any = None) -> Any:
    """A PEFT adapter injected into ``model`` (or added to the ``peft`` model around it).

    PEFT only warns when an adapter's tensors find no place, and answers as if there were none
    (A1 of docs/differences.md); here that is an error.

    Raises:
        UserError: no adapter there, or one that does not fit the model in every tensor.
    """
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter here, expected adapter_config.json in a folder")
    try:
        if peft is None:
            peft = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        else:
            peft.load_adapter(str(folder), adapter_name=name)
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the adapter does not fit the model: {reason}") from error
    held = set(get_peft_model_state_dict(peft, adapter_name=name))
    stored = {key for path in shard_paths(folder) for key in Shard(path).specs}
    if held != stored:
        odd = sorted(held ^ stored)
        raise UserError(
            f"{folder}: the adapter does not fit the model: {len(odd)} tensors differ, the first "
            f"is {odd[0]}"
        )
    return peft.eval().requires_grad_(False)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"dtype: {name!r} is not known, expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _parameters(config: Any) -> int:
    """Size of the model without its weights (built on the meta device)."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in empty.parameters())


def choose_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """float32 for small models (exact, the same on every CPU). Large ones: bfloat16 on a GPU that
    has it (a product of :func:`speed`'s size would time its launch alone there), elsewhere where
    it is measured to be faster: some CPUs emulate it a hundred times slower."""
    if parameters < LARGE:
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    fast = speed(device.type, torch.bfloat16) > 1.2 * speed(device.type, torch.float32)
    return torch.bfloat16 if fast else torch.float32


@cache
def speed(device: str, dtype: torch.dtype, width: int = 512) -> float:
    """Measured matrix-product rate of a decode-like shape, in GFLOP/s (best of three)."""
    a = torch.ones(64, width, device=device, dtype=dtype)
    b = torch.ones(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 64 * width * width / best / 1e9
