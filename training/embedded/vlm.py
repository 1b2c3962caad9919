"""The small LLaVA, and how dialogues become its tokens: a picture's prompts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix

import numpy as np
import torch
from torch import nn

from mmedrag.runtime import torchvision_shim
from training.embedded import vision
from training.embedded.data import SIZE
from training.embedded.dialogue import Dialogue

torchvision_shim.ready()
from transformers import (  # noqa: E402
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TOKENS = (SIZE // vision.PATCH) ** 2  # image tokens


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[vision.MEAN] * 3,
        image_std=[vision.STD] * 3,
    )


def new_model(
    tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 4
) -> LlavaForConditionalGeneration:
    """An untrained LLaVA around a trained, frozen vision tower.

    The usual initial spread of 0.02 is meant for wide models. At this width it makes products of
    question and picture vanish: nothing was learned from the picture in 400 steps, with
    1/sqrt(width) balanced accuracy passes 0.7 after 200.
    """
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
            initializer_range=width**-0.5,
        ),
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=vision.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )


@torch.no_grad()
def features(tower: nn.Module, pixels: np.ndarray) -> torch.Tensor:
    """Patch features of every picture, bfloat16 [n, TOKENS, width]; the tower is frozen."""
    return torch.cat(
        [
            tower(pixel_values=vision.to_pixels(pixels[i : i + 256]))
            .last_hidden_state[:, 1:]
            .to(torch.bfloat16)
            for i in range(0, len(pixels), 256)
        ]
    )


@dataclass(frozen=True)
class Scale:
    """Mean and spread of patch features, each [width].

    The tower's features are large and differ little (norm 42, of which a hundredth varies), so
    that a projector hardly moves on them. Training sees them standardised; afterwards
    :meth:`fold` puts the same affine map into the projector's first layer.
    """

    mean: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, feats: Sequence[torch.Tensor]) -> Scale:
        sample = torch.cat([f[:: max(len(f) // 2000, 1)].float().flatten(0, 1) for f in feats])
        return cls(sample.mean(0), sample.std(0))

    def __call__(self, feats: torch.Tensor) -> torch.Tensor:
        return ((feats.float() - self.mean) / self.spread).to(feats.dtype)

    @torch.no_grad()
    def fold(self, first: nn.Linear) -> None:
        first.weight.div_(self.spread)
        first.bias.sub_(first.weight @ self.mean)


@dataclass(frozen=True)
class Row:
    """Token ids of a picture's prompts side by side: what they have in common, then each rest.

    ``branch`` numbers the rests (0: common), ``place`` is the position in the prompt that a
    token belongs to, ``label`` the token to predict there (-100: none). A token sees the common
    part and its own rest only, so every prompt is computed as if it stood alone.
    """

    ids: list[int]
    label: list[int]
    branch: list[int]
    place: list[int]


class DialogueEncoder:
    """Dialogues to rows; remembers tokenised pieces, as questions recur."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.piece = lru_cache(maxsize=200_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.start = (tokenizer.bos_token_id, *self.piece("USER: "), *(image,) * TOKENS)
        self.end = tokenizer.eos_token_id

    def prompt(self, text: str) -> tuple[int, ...]:
        """Ids of a whole prompt, as the chat template and the processor give them."""
        # A line break is a token of its own, so lines can be tokenised one by one.
        lines = ("\n" + text + "\nASSISTANT:\n").splitlines(keepends=True)
        return self.start + sum((self.piece(line) for line in lines), ())

    def __call__(self, dialogue: Dialogue) -> Row:
        prompts = [self.prompt(text) for text, _ in dialogue.turns]
        common = commonprefix([p[:-1] for p in prompts])
        n = len(common)
        ids, label, branch, place = list(common), [-100] * n, [0] * n, list(range(n))
        for number, (prompt, (_, answer)) in enumerate(zip(prompts, dialogue.turns, strict=True)):
            spoken = self.piece(answer)
            rest = [*prompt[n:], *spoken]
            ids += rest
            label += [-100] * (len(rest) - len(spoken) - 1) + [*spoken, self.end]
            branch += [number + 1] * len(rest)
            place += range(n, n + len(rest))
        return Row(ids, label, branch, place)


def answer_logits(
    model: LlavaForConditionalGeneration, feats: torch.Tensor, rows: Sequence[Row]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] where an answer's token is predicted, and these tokens [n]."""
    inner, pad = model.model, model.config.get_text_config().pad_token_id
    length = max(len(r.ids) for r in rows)
    ids, label, branch, place = (
        torch.tensor([getattr(r, name) + [value] * (length - len(r.ids)) for r in rows])
        for name, value in (("ids", pad), ("label", -100), ("branch", -1), ("place", 0))
    )
    embeds = inner.language_model.embed_tokens(ids)
    image = inner.multi_modal_projector(feats.float())
    start = rows[0].ids.index(model.config.image_token_index)
    embeds = torch.cat([embeds[:, :start], image, embeds[:, start + TOKENS :]], 1)
    own, seen = branch[:, :, None], branch[:, None, :]
    allowed = ((seen == 0) | (seen == own)) & torch.ones(length, length, dtype=torch.bool).tril()
    hidden = inner.language_model(
        inputs_embeds=embeds, attention_mask=allowed[:, None], position_ids=place, use_cache=False
    ).last_hidden_state
    answers = label != -100
    return model.lm_head(hidden[answers]).float(), label[answers]


@torch.no_grad()
def noise_features(tower: nn.Module, count: int = 64) -> torch.Tensor:
    """Features of pure-noise pictures (the released ``gaussian_clip``)."""
    raw = np.clip(np.random.default_rng(0).standard_normal((count, SIZE, SIZE, 3)), 0, 1) * 255
    return features(tower, raw.astype(np.uint8))
