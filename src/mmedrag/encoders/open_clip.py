"""open_clip models: the seed's RN50-CC12M, BiomedCLIP, any architecture, hub id or folder."""

from __future__ import annotations

from typing import Any

import torch

from mmedrag.encoders import torchvision_shim
from mmedrag.encoders.base import TorchEncoder, Towers
from mmedrag.types import UserError


def load_parts(target: str) -> tuple[Any, Any, Any]:
    """(model, transform, tokenizer) of ``ARCH``, ``ARCH@TAG_OR_FILE``, ``hf-hub:`` or
    ``local-dir:``; weights are read with ``weights_only``."""
    torchvision_shim.ready()
    import open_clip

    name, _, pretrained = target.partition("@")
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained or None, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"encoder {target}: open_clip cannot load it: {reason}") from None
    return model, transform, tokenizer


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:  # a wrapped Hugging Face tokenizer
        return [len(ids) for ids in inner(texts, verbose=False)["input_ids"]]
    return [len(tokenizer.encode(text)) + 2 for text in texts]  # start and end tokens


def OpenClipEncoder(  # noqa: N802 - a loader that reads like the class it fills
    target: str, spec: str, device: str | None, dtype: str | None, long_text: str
) -> TorchEncoder:
    """A :class:`TorchEncoder` over an open_clip model."""
    model, transform, tokenizer = load_parts(target)
    context = int(getattr(model, "context_length", None) or tokenizer.context_length)

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        return {"text": tokenizer(texts, context_length=context)}

    towers = Towers(
        model=model,
        prepare=transform,
        tokenize=tokenize,
        lengths=lambda texts: _lengths(tokenizer, texts),
        image_features=model.encode_image,
        text_features=lambda tokens: model.encode_text(tokens["text"]),
        context=context,
        describe={
            "transform": str(transform),
            "tokenizer": type(tokenizer).__name__,
            "context": context,
        },
    )
    return TorchEncoder(towers, spec, device, dtype, long_text)
