"""open_clip models: the seed's RN50-CC12M, BiomedCLIP, any architecture, hub id or folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmedrag.records import UserError
from mmedrag.retrieval.encoders.base import Towers
from mmedrag.runtime import torchvision_shim, write_text


def load_parts(target: str) -> tuple[Any, Any, Any]:
    """(model, transform, tokenizer) of ``ARCH``, ``ARCH@TAG_OR_FILE``, ``hf-hub:`` or
    ``local-dir:``; weights are read with ``weights_only``."""
    torchvision_shim.ready()
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise UserError(
            f"encoder {target}: needs the package {error.name!r}; "
            "install it with: pip install 'mmedrag[clip]'"
        ) from None

    name, _, pretrained = target.partition("@")
    try:
        with _asking_nobody():
            model, _, transform = open_clip.create_model_and_transforms(
                name, pretrained=pretrained or None, weights_only=True
            )
            tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"encoder {target}: open_clip cannot load it: {reason}") from None
    return model, transform, tokenizer


@contextmanager
def _asking_nobody() -> Iterator[None]:
    """open_clip takes text towers of transformers without saying ``trust_remote_code=False``, and
    then transformers asks on the terminal whether to run a model's own code: it is refused."""
    from transformers import dynamic_module_utils as remote

    before, remote.TIME_OUT_REMOTE_CODE = remote.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        remote.TIME_OUT_REMOTE_CODE = before


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:  # a wrapped Hugging Face tokenizer
        return [len(ids) for ids in inner(texts, verbose=False)["input_ids"]]
    return [len(tokenizer.encode(text)) + 2 for text in texts]  # start and end tokens


def _save(model: Any, tokenizer: Any, name: str, folder: Path) -> None:
    """A ``local-dir:`` folder: open_clip_config.json and safetensors weights."""
    import open_clip
    from safetensors.torch import save_model

    source = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
    if name.startswith("local-dir:"):
        settings = json.loads(source.read_text(encoding="utf-8"))["model_cfg"]
    else:
        settings = open_clip.get_model_config(name)
    if settings is None:
        raise UserError(f"encoder {name}: open_clip does not tell its configuration")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": settings, "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}
    text = json.dumps(config, indent=1, sort_keys=True)
    write_text(folder / "open_clip_config.json", text + "\n")
    save_model(model, str(folder / "open_clip_model.safetensors"))
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))


def towers(target: str) -> Towers:
    """An open_clip model as :class:`~mmedrag.retrieval.encoders.base.Towers`."""
    model, transform, tokenizer = load_parts(target)
    context = int(getattr(model, "context_length", None) or tokenizer.context_length)

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        return {"text": tokenizer(texts, context_length=context)}

    return Towers(
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
        save=lambda folder: _save(model, tokenizer, target.partition("@")[0], folder),
    )
