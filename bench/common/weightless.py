"""A random model whose folder holds no weights: they are made on the device when it is loaded.

A 7B of random weights is 15 GB; writing and reading it would cost more than what is measured.
Its folder holds configuration and processor, and the seed in place of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEED = 0


def write(folder: Path, shape: str, corpus: Sequence[str]) -> Path:
    """A folder that only :func:`serve` can load."""
    import torch
    from safetensors.torch import save_file

    from mmedrag.answering.generators import random_parts

    config, processor = random_parts(shape, corpus)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file({"seed": torch.tensor(SEED)}, folder / "model.safetensors")  # what is fingerprinted
    return folder


def serve() -> None:
    """From here on every ``load_model`` of this process makes the weights on its device.

    Number type and device are chosen as for any other model."""
    from importlib import import_module

    from mmedrag.runtime import torchvision_shim

    torchvision_shim.ready()
    for name in ("models", "answering.generators.hf", "preference.dpo.train"):
        import_module(f"mmedrag.{name}").load_model = _make


def _make(
    model: str | Path, device: str | None = None, dtype: str = "auto", local_files_only: bool = True
) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from mmedrag.models import Loaded
    from mmedrag.models.load import DTYPES, best_device, choose_dtype

    place = torch.device(device or best_device())
    config = AutoConfig.from_pretrained(str(model))
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config)
    size = sum(p.numel() for p in empty.parameters())
    number = choose_dtype(place, size) if dtype == "auto" else DTYPES[dtype]
    torch.manual_seed(SEED)
    with place:  # always drawn in bfloat16: the same weights whatever type was asked for
        made = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    if number != torch.bfloat16:
        made.to(number)
    made.eval().requires_grad_(False)
    processor = AutoProcessor.from_pretrained(str(model), backend="pil")
    processor.tokenizer.padding_side = "left"
    return Loaded(made, processor, place, number, size)
