"""Decoding choices, and yes/no probabilities at the first answer token.

``p_yes = Σ p(yes verbalizers) / (Σ p(yes) + Σ p(no))``; what lies outside both is reported as
``other_mass``, so that a confident "p_yes" of a model that wanted to say something else shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmedrag.records import UserError, closes_reasoning, opens_reasoning
from mmedrag.runtime import seeded_int, torch_rng

YES = ("yes", "Yes", "YES")
NO = ("no", "No", "NO")
WORD_MARKS = ("", "▁", "Ġ", " ")  # how tokenizers write "after a space"
TAG = 16  # tokens that a closing tag may take at most


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn: greedy (default), ``num_beams`` > 1, or ``temperature`` > 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.num_beams < 1:
            raise UserError(
                f"decoding: temperature {self.temperature}, top_p {self.top_p}, num_beams "
                f"{self.num_beams}; expected temperature >= 0, 0 < top_p <= 1, num_beams >= 1"
            )
        if self.temperature > 0 and self.num_beams > 1:
            raise UserError("decoding: sampling and beam search exclude each other")


class SeededSampler:
    """Sampling whose draws depend on the row alone, not on the batch it is in.

    Gumbel-max: argmax(log p + G) with G ~ Gumbel(0, 1) is a draw from p. Each row has its own
    generator, seeded by ``seed`` and the row's key, so resumed and re-batched runs agree. Used
    as a logits processor in front of greedy search.
    """

    def __init__(self, decoding: Decoding, keys: Sequence[str]) -> None:
        self.decoding = decoding
        self.generators = [
            torch_rng(seeded_int(decoding.seed, key, joint="|", bits=63)) for key in keys
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logp = torch.log_softmax(scores.float() / self.decoding.temperature, dim=-1)
        if self.decoding.top_p < 1:
            ordered, order = logp.sort(dim=-1, descending=True)
            before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the better tokens
            cut = (before >= self.decoding.top_p).scatter(-1, order, before >= self.decoding.top_p)
            logp = logp.masked_fill(cut, float("-inf"))
        uniform = torch.stack(
            [torch.rand(logp.shape[-1], generator=g, dtype=torch.float64) for g in self.generators]
        )
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return logp + gumbel.to(logp)


@dataclass(frozen=True)
class ReasoningBudget:
    """A stopping criterion: tokens of reasoning do not count towards the answer's length.

    A row ends ``answer`` tokens after its reasoning does, or, where it does not reason, after
    ``answer`` tokens. Rows are judged by their tokens alone, so beams may change places.

    Attributes:
        decode: token ids to text with the marks of reasoning. skip: prompt tokens in front.
        opened: whether each request's prompt opened the reasoning already.
        room: tokens of reasoning that each request may take.
    """

    decode: Callable[[torch.Tensor], str]
    skip: int
    answer: int
    opened: Sequence[bool]
    room: Sequence[int]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        rows, each = input_ids[:, self.skip :], len(input_ids) // len(self.room)
        ended = [self._ended(ids, row // each) for row, ids in enumerate(rows)]
        return torch.tensor(ended, device=input_ids.device)

    def _ended(self, ids: torch.Tensor, request: int) -> bool:
        if len(ids) < self.answer:
            return False
        begun = self.opened[request] or opens_reasoning(self.decode(ids[: self.answer]))
        if not begun or len(ids) >= self.answer + self.room[request]:
            return True
        return closes_reasoning(self.decode(ids[-self.answer - TAG : -self.answer]))


@dataclass(frozen=True)
class Verbalizers:
    """Token ids that say yes and no at the start of an answer."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Verbalizers:
        """Whole-word tokens of the listed verbalizers, with and without leading space; where a
        tokenizer has none of a side, the first tokens of that side that the other lacks."""
        vocabulary = tokenizer.get_vocab()

        def whole(words: Sequence[str]) -> list[int]:
            ids = {vocabulary.get(mark + word) for word in words for mark in WORD_MARKS}
            return sorted(i for i in ids if i is not None)

        def first(words: Sequence[str]) -> set[int]:
            found = set()
            for word in words:
                for text in (word, " " + word):
                    ids = tokenizer.encode(text, add_special_tokens=False)
                    ids = [i for i in ids if i != tokenizer.unk_token_id]
                    found |= {next((i for i in ids if tokenizer.decode([i]).strip()), -1)} - {-1}
            return found

        yes, no = whole(YES), whole(NO)
        if not yes or not no:
            firsts = first(YES), first(NO)
            yes, no = yes or sorted(firsts[0] - firsts[1]), no or sorted(firsts[1] - firsts[0])
        return cls(tuple(yes), tuple(no))

    def read(self, logits: torch.Tensor) -> list[tuple[float, float] | None]:
        """(p_yes, other_mass) for each row of first-token logits [n, vocabulary].

        None where the tokenizer cannot say yes or no. Rounded to six digits: batches of
        different sizes differ in the last bits of a float32.
        """
        if not self.yes or not self.no:
            return [None] * len(logits)
        logp = torch.log_softmax(logits.float(), dim=-1)
        yes = torch.logsumexp(logp[:, list(self.yes)], dim=-1)
        no = torch.logsumexp(logp[:, list(self.no)], dim=-1)
        p_yes = torch.sigmoid(yes - no)
        other = (1 - yes.exp() - no.exp()).clamp(0, 1)
        return [
            (round(p, 6), round(o, 6)) for p, o in zip(p_yes.tolist(), other.tolist(), strict=True)
        ]
