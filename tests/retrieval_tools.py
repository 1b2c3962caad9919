"""For the retrieval tests: encoders without torch, tiny real ones, and small data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedrag.records.records import Example, Reference
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import write_jsonl

FINDINGS = ("effusion", "nodule", "cardiomegaly", "fracture", "oedema", "pneumothorax")


class ColourEncoder:
    """A deterministic encoder: words and colours share a space.

    A picture that was painted by :func:`paint` for some words embeds near a text of those
    words. Counts what it encodes.
    """

    dim = 24

    def __init__(self, name: str = "colour", noise: float = 0.0) -> None:
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()
        self.spec, self.noise = name, noise
        self.encoded_images = self.encoded_texts = 0
        self._axes = np.random.default_rng(7).standard_normal((len(FINDINGS), self.dim))

    def images(self, images: Sequence[Path | Image.Image]) -> np.ndarray:
        self.encoded_images += len(images)
        rows = []
        for item in images:
            picture = item if isinstance(item, Image.Image) else Image.open(item)
            cells = np.asarray(picture.convert("L").resize((len(FINDINGS), 1)), float)[0]
            rows.append(cells / 255 - 0.2)
        return self._unit(np.array(rows))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded_texts += len(texts)
        return self._unit(np.array([[float(f in t) - 0.2 for f in FINDINGS] for t in texts]))

    def _unit(self, codes: np.ndarray) -> np.ndarray:
        rows = codes @ self._axes
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def paint(path: Path, present: Sequence[bool], seed: int) -> None:
    """A picture of vertical bands, bright where a finding is present."""
    rng = np.random.default_rng(seed)
    bands = np.repeat(np.where(present, 230, 25), 8)[None].repeat(24, axis=0)
    pixels = np.clip(bands + rng.integers(-20, 21, bands.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert("RGB").save(path)


def make_data(
    path: Path,
    count: int = 40,
    seed: int = 0,
    split: str = "train",
    domain: str = "radiology",
    first: int = 0,
    patients: int = 2,
) -> DataFolder:
    """``count`` studies, ``patients`` per patient, whose text names what the picture shows."""
    rng = np.random.default_rng(seed)
    corpus, examples = [], []
    for n in range(first, first + count):
        present = rng.random(len(FINDINGS)) < 0.4
        name = f"images/s{n:04d}.png"
        paint(path / name, present.tolist(), seed * 10_000 + n)
        shown = [f for f, p in zip(FINDINGS, present, strict=True) if p]
        text = f"Study {n}. " + ("There is " + ", ".join(shown) + "." if shown else "Normal.")
        shared: dict[str, Any] = dict(
            image=name, domain=domain, patient=f"p{n // patients}", split=split, source="made"
        )
        meta = {"study": f"s{n:04d}", "date": f"2020-01-{n % 28 + 1:02d}"}
        corpus.append(Reference(id=f"s{n:04d}", text=text, meta=meta, **shared))
        examples.append(
            Example(
                id=f"s{n:04d}-q",
                task="vqa",
                question="Is there a nodule?",
                answer="yes" if present[1] else "no",
                answer_type="closed",
                **shared,
            )
        )
    write_jsonl(path / "corpus.jsonl", corpus)
    write_jsonl(path / "examples.jsonl", examples)
    return DataFolder(path)


def tiny_clip(path: Path, context: int = 32, size: int = 32, seed: int = 0) -> Path:
    """A random Hugging Face CLIP folder: word-level tokenizer, 32 px, 2 layers."""
    from mmedrag.runtime import torchvision_shim

    torchvision_shim.ready()
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=context, **shape, **ids)
    vision = dict(image_size=size, patch_size=8, **shape)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return _save(path, model, tokenizer, size)


def tiny_siglip(path: Path, context: int = 32, size: int = 32) -> Path:
    from mmedrag.runtime import torchvision_shim

    torchvision_shim.ready()
    import torch
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=context, pad_token_id=0, **shape)
    vision = dict(image_size=size, patch_size=8, **shape)
    return _save(
        path, SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), tokenizer, size
    )


def tiny_open_clip(path: Path) -> Path:
    """A random open_clip ``local-dir`` folder: its own BPE tokenizer, 32 px."""
    import json

    from mmedrag.runtime import torchvision_shim

    torchvision_shim.ready()
    import open_clip
    import torch
    from safetensors.torch import save_model

    torch.manual_seed(0)
    vision = dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8)
    text = dict(context_length=32, vocab_size=49408, width=32, heads=2, layers=2)
    settings = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    model = open_clip.model.CLIP(**settings)
    path.mkdir(parents=True, exist_ok=True)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocess = dict(size=32, mean=mean, std=std, interpolation="bicubic")
    config = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    save_model(model, str(path / "open_clip_model.safetensors"))
    return path


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("study there is normal no left right small large " + " ".join(FINDINGS)).split()
    words += [".", ","] + [str(n) for n in range(200)]
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def _save(path: Path, model: Any, tokenizer: Any, size: int) -> Path:
    from transformers import CLIPImageProcessorPil

    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(path)
    return path


def colour(spec: str = "", device: str | None = None) -> ColourEncoder:
    """What ``retrieval_tools:colour`` loads."""
    return ColourEncoder(spec)
