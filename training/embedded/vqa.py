"""The answering model's training: what is practised when, the loop, and probes of what it can.

Its stages differ in their :class:`TrainingMix` alone (``stages``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mmedrag.phantom import Question, Rng, ask_closed
from training.embedded.dialogue import Dialogue, Writer
from training.embedded.loop import fast_half, fit
from training.embedded.vlm import DialogueEncoder, Row, answer_logits

QUESTIONS = 10  # in a dialogue
DECIDES = 4.0  # weight of a yes or no in the loss: one token among the many of a report

Batch = list[tuple[str, int, Row]]  # domain, row of its study set, tokens
Share = Callable[[float], float]  # share of steps done -> share of something


@dataclass(frozen=True)
class TrainingMix:
    """What is practised when.

    Args:
        easy: share of plain pictures. What to look for is learned from them first: the gradient
            of a cell that is seen half of the time is lost in the noise.
        simple: share of steps with simple questions (:meth:`Writer.simple`).
        reports: share of steps in which the report is asked for.
        references: share of steps with references.
        stray: share of the dialogues with references that stand beside a stray image.
    """

    steps: int
    rate: float
    seed: int
    easy: Share = lambda done: 0.0
    simple: Share = lambda done: 0.0
    reports: Share = lambda done: 0.2
    references: Share = lambda done: 0.0
    stray: Share = lambda done: 0.4
    batch: int = 30


class Batches(Dataset):
    """The batch of every step; same seed, same batches."""

    def __init__(
        self, writers: Mapping[str, Writer], tokenizer: PreTrainedTokenizerFast, mix: TrainingMix
    ) -> None:
        self.writers, self.mix, self.encode = dict(writers), mix, DialogueEncoder(tokenizer)

    def __getitem__(self, step: int) -> Batch:
        # One kind a step keeps rows of about one length together.
        mix, done = self.mix, step / self.mix.steps
        kind = Rng("kind", mix.seed, step)
        references, reports = kind.chance(mix.references(done)), kind.chance(mix.reports(done))
        simple, count = kind.chance(mix.simple(done)), 0 if reports else QUESTIONS
        names, out = list(self.writers), []
        for i in range(mix.batch):
            name, rng = names[i % len(names)], Rng("train", mix.seed, step, i)
            writer = self.writers[name]
            row = rng.integer(0, len(writer.studies.studies) - 1)
            if references:
                dialogue = writer.with_references(row, rng, count, mix.stray(done))
            else:
                dialogue = writer.unaided(row, rng, count, simple)
            if dialogue.turns:
                out.append((name, dialogue.image, self.encode(dialogue)))
        return out


def texts(writers: Mapping[str, Writer], count: int) -> list[str]:
    """Samples of everything the model will read and write, for the tokenizer."""
    out = []
    for name, writer in writers.items():
        for i in range(count):
            rng = Rng("text", name, i)
            row = rng.integer(0, len(writer.studies.studies) - 1)
            write = writer.with_references if i % 2 else writer.unaided
            dialogue = write(row, rng, 6 if i % 4 > 1 else 0)
            out += [f"USER: {q}\nASSISTANT:\n{a}" for q, a in dialogue.turns]
    return out


def train(
    model: LlavaForConditionalGeneration,
    batches: Batches,
    features: Mapping[str, Sequence[torch.Tensor]],
    state: Path,
    check: Callable[[], object] | None = None,
) -> None:
    """Train projector and language model by the batches' mix; resumes from ``state``.

    ``features``: per domain the standardised features of the pictures at the benchmark's contrast,
    and of the plain ones.
    """
    mix = batches.mix
    weight = torch.ones(model.config.get_text_config().vocab_size)
    weight[[batches.encode.piece(word)[0] for word in ("yes", "no")]] = DECIDES

    def loaded(todo: range) -> DataLoader:  # a process of its own writes the dialogues
        return DataLoader(
            batches,
            batch_size=None,
            sampler=todo,
            num_workers=1,
            prefetch_factor=4,
            collate_fn=lambda batch: batch,
        )

    def loss_of(step: int, batch: Batch) -> torch.Tensor:
        plain = Rng("contrast", mix.seed, step).chance(mix.easy(step / mix.steps))
        images = torch.stack([features[name][plain][image] for name, image, _ in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_half()):
            logits, tokens = answer_logits(model, images, [row for *_, row in batch])
        return F.cross_entropy(logits, tokens, weight)

    fit(model, loaded, loss_of, state, mix.steps, mix.rate, 100, check, betas=(0.9, 0.95))


@torch.no_grad()
def probe(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    writer: Writer,
    features: torch.Tensor,
    noise: torch.Tensor,
    count: int = 150,
) -> dict[str, float]:
    """Balanced accuracy on balanced presence questions under the conditions that matter.

    none: image alone · own: own report · similar: a similar case's report · noise: noise image
    alone · noise_own: noise image, own report, findings it mentions.
    """
    model.eval()
    encode = DialogueEncoder(tokenizer)
    rows: dict[str, list[tuple[torch.Tensor, Row]]] = {}
    truths: dict[str, list[bool]] = {}
    for j in range(min(count, len(features))):
        blank = noise[j % len(noise)]
        for kind, references, questions in _probes(writer, j):
            if questions:
                image = blank if kind.startswith("noise") else features[j]
                turns = [(writer.prompt("vqa", q.text, True, references), "yes") for q in questions]
                rows.setdefault(kind, []).append((image, encode(Dialogue(j, turns))))
                truths.setdefault(kind, []).extend(q.answer == "yes" for q in questions)
    yes, no = (encode.piece(word)[0] for word in ("yes", "no"))
    out = {}
    for kind, items in rows.items():
        guess: list[bool] = []
        for i in range(0, len(items), 50):
            images, part = zip(*items[i : i + 50], strict=True)
            logits, tokens = answer_logits(model, torch.stack(images), part)
            first = logits[tokens == yes]
            guess += (first[:, yes] > first[:, no]).tolist()
        truth = np.array(truths[kind])
        right = np.array(guess) == truth
        out[kind] = round(float((right[truth].mean() + right[~truth].mean()) / 2), 3)
    return out


def _probes(writer: Writer, row: int) -> Iterator[tuple[str, list[str], list[Question]]]:
    """Condition, references and questions of each probe of a study."""
    study, rng = writer.studies.studies[row], Rng("probe", row)
    own = writer.report(study, rng)
    similar = writer.studies.studies[rng.choice(writer.similar(study))]
    other = writer.report(similar, rng)
    domain = writer.studies.domain
    asked = [ask_closed(domain, study.findings, rng, writer.balance, "presence") for _ in range(4)]
    mentioned = writer.mentioned(study, own, rng, 2)
    yield from (("none", [], asked), ("own", [own], asked), ("similar", [other], asked))
    yield from (("noise", [], asked), ("noise_own", [own], mentioned))
