"""The small image-text encoders: a CLIPModel around the trained tower, to be tuned per domain."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing

from mmedrag.runtime import torchvision_shim

torchvision_shim.ready()
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from training.embedded.vlm import image_processor

CONTEXT = 128  # tokens; the benchmark's reports are shorter


def text_tokenizer(words: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The shared vocabulary with CLIP's manners: <s> text </s>, padded on the right."""
    own = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=CONTEXT,
    )
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", words.bos_token_id), ("</s>", words.eos_token_id)],
    )
    return own


def new_encoder(
    tower: CLIPVisionModel, words: PreTrainedTokenizerFast, folder: Path, seed: int = 0
) -> Path:
    """Save an encoder with the trained tower and an untrained text side; returns its folder."""
    torch.manual_seed(seed)
    width = tower.config.hidden_size
    config = CLIPConfig(
        vision_config=tower.config.to_dict(),
        text_config=CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            projection_dim=width,
        ).to_dict(),
        projection_dim=width,
    )
    model = CLIPModel(config)
    missing = model.vision_model.load_state_dict(
        {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}, strict=True
    )
    assert not missing.missing_keys
    model.save_pretrained(folder)
    text_tokenizer(words).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def ship(trained: Path, folder: Path, rows: str) -> None:
    """Copy a trained encoder with its weights in half precision (half the download).

    The list of training rows is larger than the weights and stays behind: the card says ``rows``
    instead, which is enough to draw them again.
    """
    CLIPModel.from_pretrained(trained, dtype=torch.float16).save_pretrained(folder)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "training.json",
        "README.md",
    ):
        if (trained / name).exists():
            shutil.copy(trained / name, folder / name)
    card = folder / "README.md"
    card.write_text(card.read_text().replace("`train_ids.jsonl`", rows))
