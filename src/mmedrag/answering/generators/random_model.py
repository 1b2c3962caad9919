"""A LLaVA of random weights in an ordinary folder: for tests and for measuring speed.

``tiny`` has some 200,000 parameters, ``embedded`` the size of the embedded model, ``7b`` the shape
of LLaVA-Med-1.5 (Mistral-7B, CLIP ViT-L/14-336, two-layer projector), ``336`` its picture and
vocabulary in a model of 80 million parameters. Nothing in it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmedrag.runtime import torchvision_shim

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "vision": dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        ),
        "text": dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        ),
    },
    "embedded": {
        "vision": dict(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            projection_dim=128,
        ),
        "text": dict(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
        ),
    },
    "336": {
        "vision": dict(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=336,
            patch_size=14,
            projection_dim=384,
        ),
        "text": dict(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=4096,
        ),
    },
    "7b": {
        "vision": dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        "text": dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            sliding_window=None,
        ),
    },
}


def random_llava(
    folder: str | Path, shape: str = "tiny", seed: int = 0, corpus: Sequence[str] = ()
) -> Path:
    """Write a random model, its processor and a byte-level tokenizer to ``folder``."""
    config, processor = random_parts(shape, corpus)
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(config)
    if shape == "7b":
        model.to(torch.bfloat16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def random_parts(shape: str = "tiny", corpus: Sequence[str] = ()) -> tuple[Any, Any]:
    """Configuration and processor of a model of random weights, without the weights."""
    torchvision_shim.ready()
    from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

    sizes = SHAPES[shape]
    eye = sizes["vision"]
    tokenizer = byte_tokenizer(corpus)
    processor = llava_processor(tokenizer, eye["image_size"], eye["patch_size"])
    text = MistralConfig(
        **{"sliding_window": None, **sizes["text"]},
        vocab_size=32064 if shape in ("336", "7b") else len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**eye),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, processor


def byte_tokenizer(corpus: Sequence[str] = (), image_token: str = "<image>") -> Any:
    """A byte-level BPE tokenizer trained on ``corpus`` (or on a dozen words)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = list(corpus) or ["USER: ASSISTANT: yes no Question: Answer yes or no. Yes No"] * 20
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<pad>", "<s>", "</s>", image_token],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": image_token},
    )


def llava_processor(tokenizer: Any, image_size: int, patch_size: int, pad: bool = True) -> Any:
    """CLIP preprocessing as LLaVA does it, padded to a square with the CLIP mean colour."""
    torchvision_shim.ready()
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    images = LlavaImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        do_pad=pad,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT,
    )
