"""The small LLaVA: first it looks (stages look, mix), then it reads (spell, read)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mmedrag.phantom import Rng, ask_closed
from mmedrag.runtime import torchvision_shim
from training.embedded import vision
from training.embedded.data import SIZE
from training.embedded.dialogue import Dialogue, Writer

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
TOKENS = (SIZE // vision.PATCH) ** 2  # image tokens
LOOK, READ = 10, 10  # questions in a dialogue
DECIDES = 4.0  # weight of a yes or no in the loss: one token among the many of a report


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
    token belongs to, ``label`` the token to be said there (-100: none). A token sees the common
    part and its own rest only, so every prompt is computed as if it stood alone.
    """

    ids: list[int]
    label: list[int]
    branch: list[int]
    place: list[int]


class Encode:
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
            said = self.piece(answer)
            rest = [*prompt[n:], *said]
            ids += rest
            label += [-100] * (len(rest) - len(said) - 1) + [*said, self.end]
            branch += [number + 1] * len(rest)
            place += range(n, n + len(rest))
        return Row(ids, label, branch, place)


def answer_logits(
    model: LlavaForConditionalGeneration, feats: torch.Tensor, rows: Sequence[Row]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] where something is to be said, and what it is [n]."""
    inner, pad = model.model, model.config.get_text_config().pad_token_id
    length = max(len(r.ids) for r in rows)
    fill = lambda name, value: torch.tensor(  # noqa: E731
        [getattr(r, name) + [value] * (length - len(r.ids)) for r in rows]
    )
    ids, label, branch, place = (
        fill("ids", pad),
        fill("label", -100),
        fill("branch", -1),
        fill("place", 0),
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
    told = label != -100
    return model.lm_head(hidden[told]).float(), label[told]


def texts(writers: Mapping[str, Writer], count: int) -> list[str]:
    """Samples of everything the model will read and write, for the tokenizer."""
    out = []
    for name, writer in writers.items():
        for i in range(count):
            rng = Rng("text", name, i)
            row = rng.integer(0, len(writer.studies.studies) - 1)
            write = writer.read if i % 2 else writer.look
            dialogue = write(row, rng, 6 if i % 4 > 1 else 0)
            out += [f"USER: {q}\nASSISTANT:\n{a}" for q, a in dialogue.turns]
    return out


Batch = list[tuple[str, int, Row]]  # domain, row of its study set, tokens


Share = Callable[[float], float]  # share of steps done -> share of something


@dataclass(frozen=True)
class Plan:
    """What is practised when.

    Args:
        easy: share of plain pictures. What to look for is learned from them first: the gradient
            of a cell that is seen half of the time is lost in the noise.
        simple: share of steps with simple questions (:meth:`Writer.simple`).
        reports: share of steps in which the report is asked for.
        reading: share of steps with references.
        practice: share of the dialogues with references that stand beside a stray image.
    """

    steps: int
    rate: float
    seed: int
    easy: Share = lambda done: 0.0
    simple: Share = lambda done: 0.0
    reports: Share = lambda done: 0.2
    reading: Share = lambda done: 0.0
    practice: Share = lambda done: 0.4
    batch: int = 30


class Batches(Dataset):
    """The batch of every step; same seed, same batches."""

    def __init__(
        self, writers: Mapping[str, Writer], tokenizer: PreTrainedTokenizerFast, plan: Plan
    ) -> None:
        self.writers, self.plan, self.encode = dict(writers), plan, Encode(tokenizer)

    def __getitem__(self, step: int) -> Batch:
        # One kind a step keeps rows of about one length together.
        plan, done = self.plan, step / self.plan.steps
        kind = Rng("kind", plan.seed, step)
        reads, reports = kind.chance(plan.reading(done)), kind.chance(plan.reports(done))
        simple = kind.chance(plan.simple(done))
        names, out = list(self.writers), []
        for i in range(plan.batch):
            name, rng = names[i % len(names)], Rng("train", plan.seed, step, i)
            writer = self.writers[name]
            row = rng.integer(0, len(writer.studies.studies) - 1)
            if reads:
                dialogue = writer.read(row, rng, 0 if reports else READ, plan.practice(done))
            else:
                dialogue = writer.look(row, rng, 0 if reports else LOOK, simple)
            if dialogue.turns:
                out.append((name, dialogue.image, self.encode(dialogue)))
        return out


def train(
    model: LlavaForConditionalGeneration,
    batches: Batches,
    feats: Mapping[str, Sequence[torch.Tensor]],
    state: Path,
    check: Callable[[LlavaForConditionalGeneration], str] | None = None,
) -> None:
    """Train projector and language model by the batches' plan; resumes from ``state``.

    ``feats``: per domain the standardised features of the pictures at the benchmark's contrast,
    and of the plain ones.
    """
    plan, half = batches.plan, vision.fast_half()
    model.train()
    model.model.vision_tower.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.rate, plan.steps + 1, pct_start=0.1
    )
    weight = torch.ones(model.config.get_text_config().vocab_size)
    weight[[batches.encode.piece(word)[0] for word in ("yes", "no")]] = DECIDES
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
    began, losses = time.time(), []
    todo = range(start, plan.steps)
    # A process of its own writes the dialogues.
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=todo,
        num_workers=1,
        prefetch_factor=4,
        collate_fn=lambda batch: batch,
    )
    for step, batch in zip(todo, loader, strict=True):
        plain = Rng("contrast", plan.seed, step).chance(plan.easy(step / plan.steps))
        images = torch.stack([feats[name][plain][image] for name, image, _ in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits, said = answer_logits(model, images, [row for *_, row in batch])
        loss = F.cross_entropy(logits, said, weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49 or step == plan.steps - 1:
            log.info("vlm %d loss %.4f %.0fs", step + 1, np.mean(losses[-50:]), time.time() - began)
        if step % 100 == 99 or step == plan.steps - 1:
            if check:
                log.info("vlm %d %s", step + 1, check(model))
                model.train()
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                },
                state,
            )
    model.eval()


@torch.no_grad()
def probe(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    writer: Writer,
    feats: torch.Tensor,
    noise: torch.Tensor,
    count: int = 150,
) -> dict[str, float]:
    """Balanced accuracy on balanced presence questions under the conditions that matter.

    none: image alone · own: own report · mate: a similar case's report · noise: noise image
    alone · noise_own: noise image, own report, findings it mentions.
    """
    model.eval()
    domain, encode = writer.studies.domain, Encode(tokenizer)
    yes, no = (encode.piece(w)[0] for w in ("yes", "no"))
    jobs: dict[str, list[tuple[torch.Tensor, Row]]] = {}
    truths: dict[str, list[bool]] = {}
    for j in range(count):
        study, rng = writer.studies.studies[j], Rng("probe", j)
        own = writer.report(study, rng)
        mates = writer.alike[writer._phenotype(study)]
        mate = writer.report(writer.studies.studies[rng.choice(mates)], rng)
        asked = [ask_closed(domain, study.findings, rng, writer.fair, "presence") for _ in "1234"]
        blank = noise[j % len(noise)]
        for kind, references, image, questions in (
            ("none", [], feats[j], asked),
            ("own", [own], feats[j], asked),
            ("mate", [mate], feats[j], asked),
            ("noise", [], blank, asked),
            ("noise_own", [own], blank, writer.mentioned(study, own, rng, 2)),
        ):
            if questions:
                turns = [(writer.prompt("vqa", q.text, True, references), "yes") for q in questions]
                jobs.setdefault(kind, []).append((image, encode(Dialogue(j, turns))))
                truths.setdefault(kind, []).extend(q.answer == "yes" for q in questions)
    out = {}
    for kind, items in jobs.items():
        guess = []
        for i in range(0, len(items), 50):
            part = items[i : i + 50]
            logits, said = answer_logits(
                model, torch.stack([im for im, _ in part]), [row for _, row in part]
            )
            first = logits[said == yes]
            guess += (first[:, yes] > first[:, no]).tolist()
        right = np.array(guess) == np.array(truths[kind])
        truth = np.array(truths[kind])
        out[kind] = round(float((right[truth].mean() + right[~truth].mean()) / 2), 3)
    return out


@torch.no_grad()
def noise_features(tower: nn.Module, count: int = 64) -> torch.Tensor:
    """Features of pure-noise pictures (the released ``gaussian_clip``)."""
    raw = np.clip(np.random.default_rng(0).standard_normal((count, SIZE, SIZE, 3)), 0, 1) * 255
    return features(tower, raw.astype(np.uint8))
