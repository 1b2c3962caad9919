"""CLIP and SigLIP from Hugging Face folders or hub ids (transformers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmedrag.records import UserError
from mmedrag.retrieval.encoders.base import Towers
from mmedrag.runtime import torchvision_shim


def load_parts(target: str) -> tuple[Any, Any, Any]:
    """(model, tokenizer, image processor); safetensors only, no code from the checkpoint.

    The processor runs on Pillow whether or not torchvision is installed, so that the same
    picture gives the same pixels on every machine.
    """
    torchvision_shim.ready()
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    safe: dict[str, Any] = {
        "local_files_only": Path(target).is_dir(),
        "trust_remote_code": False,  # None would ask at the terminal
    }
    try:
        model = AutoModel.from_pretrained(target, use_safetensors=True, **safe)
        tokenizer = AutoTokenizer.from_pretrained(target, **safe)
        processor = AutoImageProcessor.from_pretrained(target, backend="pil", **safe)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"encoder {target}: cannot be loaded: {reason}") from None
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise UserError(
            f"encoder {target}: {type(model).__name__} has no image and text towers, "
            "expected a CLIP or SigLIP model"
        )
    return model, tokenizer, processor


class TextInput:
    """Texts to padded token tensors, as the model was trained to see them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.context = int(model.config.text_config.max_position_embeddings)
        # SigLIP pools the last position and was trained on full-length padding
        self.padding = "max_length" if "siglip" in model.config.model_type else "longest"

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        batch = self.tokenizer(
            texts,
            padding=self.padding,
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        return {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]


def features(output: Any) -> torch.Tensor:
    """The projected features, whether a release returns them bare or inside an output."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def describe(tokenizer: Any, processor: Any) -> dict[str, Any]:
    """All that turns files into tensors, without names and paths of where it was loaded from."""
    settings = {k: v for k, v in processor.to_dict().items() if k not in ("_name_or_path",)}
    words: Any = type(tokenizer).__name__
    if hasattr(tokenizer, "backend_tokenizer"):
        words = json.loads(tokenizer.backend_tokenizer.to_str())
        words.pop("padding", None)  # state of the last call, not of the tokenizer
        words.pop("truncation", None)
    return {"processor": json.loads(json.dumps(settings, default=str)), "tokenizer": words}


def towers(target: str) -> Towers:
    """A Hugging Face CLIP or SigLIP model as :class:`~mmedrag.retrieval.encoders.base.Towers`."""
    model, tokenizer, processor = load_parts(target)
    text_input = TextInput(model, tokenizer)

    def prepare(picture: Image.Image) -> torch.Tensor:
        return processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)

    return Towers(
        model=model,
        prepare=prepare,
        tokenize=text_input,
        lengths=text_input.lengths,
        image_features=lambda pixels: features(model.get_image_features(pixel_values=pixels)),
        text_features=lambda tokens: features(model.get_text_features(**tokens)),
        context=text_input.context,
        describe=describe(tokenizer, processor),
        save=save,
    )
