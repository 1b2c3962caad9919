"""Model and processor from folders; device and number type by measurement."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from mmedrag.models.checkpoints import Shard, no_pointers, shard_paths
from mmedrag.records import UserError
from mmedrag.runtime import torchvision_shim

log = logging.getLogger(__name__)
LARGE = 500_000_000  # parameters from which half precision is worth its rounding on a CPU
LOAD_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, EOFError),
    *(SafetensorError, UnpicklingError),
)
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
        UserError: no such model, one that is not an image-text-to-text model, or one whose weights
            lack tensors, bear other names, hold NaN, or are a cut file or a Git LFS pointer.
    """
    torchvision_shim.ready()
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging as progress

    name = str(model)
    progress.disable_progress_bar()
    no_pointers(name)
    if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
        raise UserError(f"{name}: an adapter and no model: give it with --adapter")
    chosen_device = torch.device(device or best_device())
    try:
        # said aloud, or transformers asks on the terminal whether to run a folder's own code
        safe: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(name, **safe)
        size = _parameters(config)
        number = choose_dtype(chosen_device, size) if dtype == "auto" else _dtype(dtype)
        processor = _processor(name, safe)
        how = {"dtype": number, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with _without_reports():
            found: Any = AutoModelForImageTextToText.from_pretrained(name, **how, **safe)
        loaded, info = found
    except LOAD_ERRORS as error:
        _readable(name)
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: cannot be loaded as an image-text-to-text model with its processor: {reason}"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"{name}: expected a processor for images and text, found a part of one")
    processor.tokenizer.padding_side = "left"
    loaded.eval().requires_grad_(False).to(chosen_device)
    _complete(name, loaded, info)
    log.info("%s: %s parameters, %s on %s", name, f"{size:,}", number, chosen_device)
    return Loaded(loaded, processor, chosen_device, number, size)


@contextmanager
def _without_reports() -> Iterator[None]:
    """Without transformers' tables of lacking tensors: :func:`_complete` says it in one line."""
    from transformers.utils import logging as progress

    before = progress.get_verbosity()
    progress.set_verbosity_error()
    try:
        yield
    finally:
        progress.set_verbosity(before)


def _readable(name: str) -> None:
    """Raises UserError for the weight file that is damaged, by its name."""
    if Path(name).is_dir():
        for path in shard_paths(Path(name)):
            Shard(path)


def _processor(name: str, safe: dict[str, Any]) -> Any:
    """The model's processor, with images through PIL: the same pixels without torchvision."""
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name, backend="pil", **safe)
    except ImportError:  # a video processor comes along, and those know torchvision alone
        found = AutoProcessor.from_pretrained(name, **safe)
        found.image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", **safe)
        return found


def _complete(name: str, loaded: Any, info: Mapping[str, Any]) -> None:
    """Raises UserError where the weights are not the whole model: transformers fills what lacks
    with random numbers and only warns."""
    missing, foreign = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        key, stored, wanted = wrong[0]
        raise UserError(
            f"{name}: {len(wrong)} tensors have another shape than config.json says, the first is "
            f"{key}: {tuple(stored)}, expected {tuple(wanted)}"
        )
    if missing:
        others = f"; {len(foreign)} bear unknown names: {_some(foreign)}" if foreign else ""
        raise UserError(
            f"{name}: {len(missing)} tensors of the model are missing from its weights: "
            f"{_some(missing)}{others}; {_hint(missing, foreign)}"
        )
    if any("lora_" in key for key in foreign):
        raise UserError(
            f"{name}: holds an adapter's tensors ({_some(foreign)}), which would not be used; "
            "merge it with `mmedrag model merge`, or give it with --adapter"
        )
    if foreign:
        log.warning("%s: %d tensors are not used: %s", name, len(foreign), _some(foreign))
    for key, tensor in loaded.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name}: tensor {key} holds NaN or infinity as {tensor.dtype}: a training that "
                "diverged, a damaged file, or float16 too narrow for it (then --set dtype=float32)"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _hint(missing: Sequence[str], foreign: Sequence[str]) -> str:
    """What most likely happened to weights that lack tensors."""
    wrapped = (
        re.match(r"(?:module|_orig_mod|base_model\.model|_fsdp_wrapped_module)\.", foreign[0])
        if foreign
        else None
    )
    if wrapped:
        return f"a wrapper added {wrapped[0]!r} to every name: save the model inside it"
    if any(".base_layer." in key or "lora_" in key for key in foreign):
        return "an adapter was saved inside the model: merge it before saving"
    if any("mm_projector" in key or re.match(r"model\.layers\.", key) for key in foreign):
        return "the official LLaVA layout is converted with `mmedrag model convert`"
    if any("projector" in key for key in missing):
        return (
            "LLaVA keeps a projector that was trained apart in mm_projector.bin or "
            "non_lora_trainables.bin: get it, and convert again"
        )
    return "get the whole checkpoint, or the config.json that belongs to it"


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
