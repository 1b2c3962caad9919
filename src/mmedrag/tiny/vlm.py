"""Stages 2 and 3: a small LLaVA that first looks, then reads references."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mmedrag.encoders import torchvision_shim
from mmedrag.phantom.canvas import Dice
from mmedrag.phantom.questions import ask_closed
from mmedrag.tiny import vision
from mmedrag.tiny.data import SIZE
from mmedrag.tiny.dialogue import Dialogue, Writer

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

log = logging.getLogger(__name__)
TOKENS = (SIZE // 8) ** 2  # image tokens


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE},
        image_mean=[vision.MEAN] * 3, image_std=[vision.STD] * 3,
    )  # fmt: skip


def new_model(
    tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 4
) -> LlavaForConditionalGeneration:
    """An untrained LLaVA around a trained, frozen vision tower."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        ),
        image_token_id=image, image_token_index=image, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


@torch.no_grad()
def start_projector(
    model: LlavaForConditionalGeneration,
    heads: Mapping[str, torch.Tensor],
    words: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Let every patch begin by saying, in word embeddings, what the tower sees in it.

    The projector starts as Σ_c logit_c · e_c: the vision stage's read-out of each cell c times
    the embedding of the words that ask about c (``words``: domain -> one text per cell), less
    what all cells share. gelu(x) - gelu(-x) = x, so a pair of hidden units passes a logit through.
    Matching a question's words with the image is then one mechanism for all cells, the same as
    for a reference's words. From a random projector, or from one axis per cell, the language
    model had not begun to use the image after 200 to 400 steps: each of some fifty cells had to
    be learned by itself.
    """
    table = model.model.language_model.embed_tokens.weight
    rows, weights, biases = [], [], []
    for domain, texts in words.items():
        bags = torch.zeros(len(texts), len(table))
        for row, text in enumerate(texts):
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
                bags[row, token] += 1
        bags = bags / bags.sum(1, keepdim=True)
        rows.append((bags - bags.mean(0)) @ table)
        weights.append(heads[f"cells.{domain}.weight"])
        biases.append(heads[f"cells.{domain}.bias"])
    directions = torch.cat(rows)
    directions = directions / directions.norm(dim=1, keepdim=True) * table.norm(dim=1).mean()
    projector = model.model.multi_modal_projector
    first, second, n = projector.linear_1, projector.linear_2, len(directions)
    assert 2 * n <= first.out_features, "more cells than pairs of hidden units"
    first.weight[:n], first.weight[n : 2 * n] = torch.cat(weights), -torch.cat(weights)
    first.bias[:n], first.bias[n : 2 * n] = torch.cat(biases), -torch.cat(biases)
    second.weight.mul_(0.1)
    second.weight[:, :n], second.weight[:, n : 2 * n] = directions.T, -directions.T
    second.bias.zero_()


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=image_processor(), tokenizer=tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>", chat_template=tokenizer.chat_template,
    )  # fmt: skip


@torch.no_grad()
def features(tower: nn.Module, pixels: np.ndarray) -> torch.Tensor:
    """Patch features of every picture, bfloat16 [n, 64, width]; the tower is frozen."""
    return torch.cat(
        [
            tower(pixel_values=vision.to_pixels(pixels[i : i + 256]))
            .last_hidden_state[:, 1:]
            .to(torch.bfloat16)
            for i in range(0, len(pixels), 256)
        ]
    )


def encode(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue with its image tokens, and labels (-100 but on the answers)."""
    tok = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = [tokenizer.bos_token_id, *tok("USER: "), *[image] * TOKENS]
    labels = [-100] * len(ids)
    for i, (text, answer) in enumerate(dialogue.turns):
        user = tok(("\n" if i == 0 else "USER: ") + text + "\nASSISTANT:\n")
        said = [*tok(answer), tokenizer.eos_token_id]
        ids += user + said
        labels += [-100] * len(user) + said
    return ids, labels


def answer_logits(
    model: LlavaForConditionalGeneration,
    feats: torch.Tensor,
    rows: list[tuple[list[int], list[int]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the answer tokens and the tokens themselves; rows are padded on the right."""
    inner, pad = model.model, model.config.get_text_config().pad_token_id
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [pad] * (length - len(r)) for r, _ in rows])
    labels = torch.tensor([r + [-100] * (length - len(r)) for _, r in rows])
    embeds = inner.language_model.embed_tokens(ids)
    image = inner.multi_modal_projector(feats.float())
    start = rows[0][0].index(model.config.image_token_id)
    embeds = torch.cat([embeds[:, :start], image, embeds[:, start + TOKENS :]], 1)
    hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    told = labels[:, 1:] != -100
    return model.lm_head(hidden[told]), labels[:, 1:][told]


def texts(writers: Mapping[str, Writer], count: int) -> list[str]:
    """Samples of everything the model will read and write, for the tokenizer."""
    out = []
    for name, writer in writers.items():
        for i in range(count):
            dice = Dice("text", name, i)
            row = dice.integer(0, len(writer.studies.studies) - 1)
            make = writer.read if i % 2 else writer.look
            dialogue = make(row, dice)
            out.append("".join(f"USER: {q}\nASSISTANT:\n{a}" for q, a in dialogue.turns))
    return out


def train(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast,
    writers: Mapping[str, Writer], feats: Mapping[str, torch.Tensor], steps: int, reading: float,
    state: Path, rate: float = 1e-3, batch: int = 32, seed: int = 0, check: object = None,
) -> None:  # fmt: skip
    """Train projector and language model; ``reading`` is the share of dialogues with references.

    Resumes from ``state`` when interrupted.
    """
    model.train()
    model.model.vision_tower.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
    names, began, losses = list(writers), time.time(), []
    for step in range(start, steps):
        rows, images = [], []
        reads = Dice("kind", seed, step).chance(reading)  # one kind a step: little padding
        for i in range(batch):
            name = names[i % len(names)]
            writer, dice = writers[name], Dice("train", seed, step, i)
            row = dice.integer(0, len(writer.studies.studies) - 1)
            dialogue = (writer.read if reads else writer.look)(row, dice)
            if dialogue.turns:
                rows.append(encode(tokenizer, dialogue))
                images.append(feats[name][dialogue.image])
        logits, labels = answer_logits(model, torch.stack(images), rows)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            log.info("vlm %d loss %.4f %.0fs", step + 1, np.mean(losses[-50:]), time.time() - began)
        if step % 100 == 99 or step == steps - 1:
            if callable(check):
                log.info("vlm %d %s", step + 1, check(model))
                model.train()
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "schedule": schedule.state_dict(), "step": step + 1}, state,
            )  # fmt: skip
    model.eval()


@torch.no_grad()
def probe(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, writer: Writer,
    feats: torch.Tensor, count: int = 150,
) -> dict[str, float]:  # fmt: skip
    """Balanced accuracy on balanced presence questions under the conditions that matter.

    none: image alone · own: own report · mate: a similar case's report · noise_own: noise
    image, own report, findings it mentions · noise: noise image alone.
    """
    model.eval()
    domain = writer.studies.domain
    yes, no = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("yes", "no"))
    rng = np.random.default_rng(0)
    raw = np.clip(rng.standard_normal((64, SIZE, SIZE, 3)), 0, 1) * 255
    noise = features(model.model.vision_tower, raw.astype(np.uint8))
    results: dict[str, list[tuple[bool, bool]]] = {}
    for i in range(0, count, 50):
        rows: dict[str, list] = {}
        for j in range(i, min(i + 50, count)):
            study, dice = writer.studies.studies[j], Dice("probe", j)
            own = writer.report(study, dice)
            mates = writer.alike[writer._phenotype(study)]
            mate = writer.report(writer.studies.studies[dice.choice(mates)], dice)
            asked = [
                ask_closed(domain, study.findings, dice, writer.fair, "presence") for _ in range(2)
            ]
            told = writer.mentioned(study, own, dice, 1)
            for q in asked:
                for kind, refs, image in (
                    ("none", [], feats[j]), ("own", [own], feats[j]), ("mate", [mate], feats[j]),
                    ("noise", [], noise[j % 64]),
                ):  # fmt: skip
                    rows.setdefault(kind, []).append((q, refs, image))
            for q in told:
                rows.setdefault("noise_own", []).append((q, [own], noise[j % 64]))
        for kind, items in rows.items():
            encoded = [
                encode(tokenizer, Dialogue(0, [(writer.prompt("vqa", q.text, True, refs), "yes")]))
                for q, refs, _ in items
            ]
            logits, labels = answer_logits(model, torch.stack([im for *_, im in items]), encoded)
            first = logits[labels == yes]
            guess = (first[:, yes] > first[:, no]).tolist()
            results.setdefault(kind, []).extend(
                (g, q.answer == "yes") for g, (q, *_) in zip(guess, items, strict=True)
            )
    out = {}
    for kind, pairs in results.items():
        sides = [[g == t for g, t in pairs if t == side] for side in (True, False)]
        out[kind] = round(float(np.mean([np.mean(s) for s in sides if s])), 3)
    return out
