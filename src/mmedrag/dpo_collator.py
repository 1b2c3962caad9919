"""A batch of encoded pairs as tensors: every distinct image once, a shared prompt once.

Place in the picture: encoded pairs ─► *collate* ─► policy. Rows are padded on the right. A pair
whose sides share prompt and image becomes one row, prompt + both answers; otherwise each side is
a row. Which hidden state predicts which token of which side is listed, so the loss needs no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mmedrag.dpo_cache import FeatureStore
from mmedrag.dpo_encode import EncodedPair, EncodedSide, View, redrawn
from mmedrag.pairs import KINDS

KIND_NAMES = tuple(KINDS)


@dataclass
class Clock:
    """The epoch, as the sampler and the noise need it; the trainer sets it."""

    epoch: int = 0


class PairDataset(Dataset[tuple[EncodedPair, int]]):
    """Encoded pairs, each with the epoch of the access (for noise that is redrawn)."""

    def __init__(self, pairs: Sequence[EncodedPair], clock: Clock) -> None:
        self.pairs, self.clock = pairs, clock

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[EncodedPair, int]:
        return self.pairs[i], self.clock.epoch


class LengthGrouped(Sampler[int]):
    """Shuffled order with rows of similar length side by side.

    ``batch`` is the global batch, so that one process and several see the same batches. The
    order depends on (seed, epoch) alone, so a resumed run continues in it.
    """

    def __init__(self, lengths: Sequence[int], batch: int, clock: Clock, seed: int, group: bool):
        self.lengths, self.batch, self.clock = lengths, batch, clock
        self.seed, self.group = seed, group

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.clock.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group:
            return iter(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), 50 * self.batch):
            near = sorted(order[start : start + 50 * self.batch], key=lambda i: self.lengths[i])
            batches += [near[i : i + self.batch] for i in range(0, len(near), self.batch)]
        # a short batch stays last, or every later batch would straddle two groups
        full = [b for b in batches if len(b) == self.batch]
        rest = [i for b in batches if len(b) < self.batch for i in b]
        mixed = torch.randperm(len(full), generator=generator).tolist()
        return iter([i for j in mixed for i in full[j]] + rest)


@dataclass
class Collator:
    """Turns (pair, epoch) items into the keyword arguments of the policy, plus what the loss needs.

    Args:
        pixels: views → pixel values [n, 3, s, s] (decoded, noised, preprocessed).
        features: cached features; views that it lacks are decoded.
        reference: log-probabilities by side key; None computes them live.
        pad: padding token. share: put two answers behind one prompt where they share it.
        tokens: of one pass through the model; a larger batch takes several.
        whole: never cut a batch (sharded models must pass equally often in every process).
    """

    pixels: Callable[[Sequence[View]], Tensor]
    features: FeatureStore | None = None
    reference: Mapping[str, float] | None = None
    pad: int = 0
    share: bool = True
    tokens: int = 4096
    whole: bool = False
    encoded: int = field(default=0, init=False)  # images decoded for the vision tower so far

    def __call__(self, items: Sequence[tuple[EncodedPair, int]]) -> dict[str, Any]:
        """``{"parts": [...]}``: the batch, cut into passes of at most ``tokens`` tokens.

        The gradient of a batch is the sum of its parts', so the cut changes memory alone.
        """
        pairs = [_now(pair, epoch) for pair, epoch in items]
        parts = [self.part(part) for part in ([pairs] if self.whole else self.cut(pairs))]
        for part in parts:
            part["whole"] = len(pairs)
        return {"parts": parts}

    def cut(self, pairs: Sequence[EncodedPair]) -> list[list[EncodedPair]]:
        """Pairs of one shape and of similar length together, ``tokens`` at most in each group."""
        order = sorted(pairs, key=lambda p: (self._shares(p), p.length(self.share), p.id))
        parts: list[list[EncodedPair]] = [[]]
        rows, longest = 0, 0
        for pair in order:
            more, length = 2 - self._shares(pair), pair.length(self.share)
            if parts[-1] and (rows + more) * max(longest, length) > self.tokens:
                parts.append([])
                rows, longest = 0, 0
            parts[-1].append(pair)
            rows, longest = rows + more, max(longest, length)
        return [part for part in parts if part]

    def _shares(self, pair: EncodedPair) -> bool:
        return self.share and pair.shares_prefix

    def part(self, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
        """Keyword arguments of the policy for one pass, plus ``kinds`` and ``reference``."""
        images, batch = self._images(pairs)
        rows: list[_Row] = []
        for i, pair in enumerate(pairs):
            at = [images[side.view.key] for side in (pair.chosen, pair.rejected)]
            numbers = (i, len(pairs) + i)  # sides: all chosen, then all rejected
            if self._shares(pair):
                answers = [pair.chosen.answer, pair.rejected.answer]
                rows.append(_Row(at[0], pair.chosen.prompt, answers, numbers))
            else:
                for side, place, number in zip(
                    (pair.chosen, pair.rejected), at, numbers, strict=True
                ):
                    rows.append(_Row(place, side.prompt, [side.answer], (number,)))
        batch.update(_tensors(rows, self.pad), sides=2 * len(pairs))
        batch["kinds"] = torch.tensor([KIND_NAMES.index(pair.kind) for pair in pairs])
        sides = [p.chosen for p in pairs] + [p.rejected for p in pairs]
        if self.reference is not None:
            batch["reference"] = torch.tensor([self.reference[side.key] for side in sides])
        return batch

    def _images(self, pairs: Sequence[EncodedPair]) -> tuple[dict[str, int], dict[str, Any]]:
        """Place of each distinct view: cached features first, then pixels to be encoded."""
        views = {s.view.key: s.view for pair in pairs for s in (pair.chosen, pair.rejected)}
        live = list(views) if self.features is None else self.features.missing(views)
        cached = [key for key in views if key not in set(live)]
        batch: dict[str, Any] = {}
        if cached and self.features is not None:
            batch["features"] = self.features.get(cached)
        if live:
            batch["pixel_values"] = self.pixels([views[key] for key in live])
            self.encoded += len(live)
        return {key: place for place, key in enumerate(cached + live)}, batch


@dataclass
class _Row:
    image: int
    prompt: tuple[int, ...]
    answers: list[tuple[int, ...]]
    sides: tuple[int, ...]


def _now(pair: EncodedPair, epoch: int) -> EncodedPair:
    """The pair with this epoch's noise, where noise is redrawn."""
    if not pair.redraw:
        return pair

    def again(side: EncodedSide) -> EncodedSide:
        if side.view.noise is None:
            return side
        noise = redrawn(side.view.noise, epoch)
        view = View(side.view.path, noise, f"{side.view.key}@{noise.seed}")
        return replace(side, view=view)

    return replace(pair, chosen=again(pair.chosen), rejected=again(pair.rejected))


def _tensors(rows: Sequence[_Row], pad: int) -> dict[str, Any]:
    ids, positions, segments = [], [], []
    predictor: list[tuple[int, int]] = []
    target: list[int] = []
    side: list[int] = []
    for number, row in enumerate(rows):
        start = len(row.prompt)
        tokens, place, part = list(row.prompt), list(range(start)), [0] * start
        for segment, (answer, owner) in enumerate(zip(row.answers, row.sides, strict=True), 1):
            # the last prompt token predicts the first token; the last token predicts nothing
            first = len(tokens)
            predictor += [(number, start - 1)]
            predictor += [(number, first + k) for k in range(len(answer) - 1)]
            target += answer
            side += [owner] * len(answer)
            tokens += answer[:-1]
            place += range(start, start + len(answer) - 1)
            part += [segment] * (len(answer) - 1)
        ids.append(tokens)
        positions.append(place)
        segments.append(part)
    out = {
        "input_ids": _padded(ids, pad),
        "image": torch.tensor([row.image for row in rows]),
        "predictor": torch.tensor(predictor),
        "target": torch.tensor(target),
        "side": torch.tensor(side),
    }
    if any(len(row.answers) > 1 for row in rows):
        out["position_ids"] = _padded(positions, 0)
        out["segments"] = _padded(segments, -1)
    return out


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
