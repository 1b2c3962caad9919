"""A batch of encoded pairs as tensors: every distinct image once, a shared beginning once.

Place in the picture: encoded pairs ─► *collate* ─► policy. Rows are padded on the right. Sides
that show one image and begin alike become one row, a tree: picture and references, then each
question, then each answer. Which hidden state predicts which token of which side is listed, so
the loss needs no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mmedrag.answering.generators import common_length
from mmedrag.preference.dpo.cache import FeatureStore
from mmedrag.preference.dpo.encode import EncodedPair, EncodedSide, View, redrawn
from mmedrag.records import KINDS
from mmedrag.runtime import torch_rng, training

KIND_NAMES = tuple(KINDS)


class PairDataset(Dataset[tuple[EncodedPair, int]]):
    """Encoded pairs, each with the epoch of the access (for noise that is redrawn)."""

    def __init__(self, pairs: Sequence[EncodedPair], clock: training.Clock) -> None:
        self.pairs, self.clock = pairs, clock

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[EncodedPair, int]:
        return self.pairs[i], self.clock.epoch


class LengthGrouped(Sampler[int]):
    """Shuffled order with rows of one picture, and of similar length, side by side.

    ``batch`` is the global batch, so that one process and several see the same batches. The
    order depends on (seed, epoch) alone, so a resumed run continues in it. ``pictures`` names
    each row's picture (none: each its own).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch: int,
        clock: training.Clock,
        seed: int,
        group: bool,
        pictures: Sequence[str] = (),
    ):
        self.batch, self.clock, self.seed, self.group = batch, clock, seed, group
        members: dict[str, list[int]] = {}
        for i in range(len(lengths)):
            members.setdefault(pictures[i] if pictures else str(i), []).append(i)
        self.rows = list(members.values())
        self.longest = {i: max(lengths[k] for k in rows) for rows in self.rows for i in rows}

    def __len__(self) -> int:
        return len(self.longest)

    def __iter__(self) -> Any:
        generator = torch_rng(self.seed + 1_000_003 * self.clock.epoch)
        if not self.group:
            return iter(torch.randperm(len(self), generator=generator).tolist())
        mixed = torch.randperm(len(self.rows), generator=generator).tolist()
        order = [i for j in mixed for i in self.rows[j]]
        batches: list[list[int]] = []
        for start in range(0, len(order), 50 * self.batch):  # sorting leaves a picture's together
            near = sorted(order[start : start + 50 * self.batch], key=self.longest.__getitem__)
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
        pad: padding token. share: compute what sides of one image begin with once.
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
        """A picture's pairs, and those of similar length, together; ``tokens`` at most in each
        group of several."""
        longest: dict[str, int] = {}
        for pair in pairs:
            key = pair.chosen.view.key
            longest[key] = max(longest.get(key, 0), pair.length)

        def order(pair: EncodedPair) -> tuple[int, str, str]:
            return longest[pair.chosen.view.key], pair.chosen.view.key, pair.id

        parts: list[list[EncodedPair]] = []
        for pair in sorted(pairs, key=order):
            if parts and self._size([*parts[-1], pair]) <= self.tokens:
                parts[-1].append(pair)
            else:
                parts.append([pair])
        return parts

    def _size(self, pairs: Sequence[EncodedPair]) -> int:
        """Tokens of a pass, padding included."""
        sides = _sides(pairs)
        rows = self._rows(sides)
        return len(rows) * max(sum(len(sides[n].tokens) - c for n, c in row) for row in rows)

    def _rows(self, sides: Sequence[EncodedSide]) -> list[list[tuple[int, int]]]:
        """Rows of (side, tokens that it has in common with the one before). Sides of one image
        share a row where that is half of their tokens; sorted, what begins alike is together."""
        rows: list[list[tuple[int, int]]] = []
        last: EncodedSide | None = None
        for number in sorted(range(len(sides)), key=lambda n: (sides[n].view.key, sides[n].tokens)):
            side, common = sides[number], 0
            if self.share and last is not None and last.view.key == side.view.key:
                common = common_length(last.tokens, side.tokens)
            if 2 * common < len(side.tokens) or not rows:
                rows.append([])
                common = 0
            rows[-1].append((number, common))
            last = side
        return rows

    def part(self, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
        """Keyword arguments of the policy for one pass, plus ``kinds`` and ``reference``."""
        images, batch = self._images(pairs)
        sides = _sides(pairs)
        rows = [_tree(row, sides) for row in self._rows(sides)]
        batch.update(_tensors(rows, sides, images, self.pad), sides=len(sides))
        batch["kinds"] = torch.tensor([KIND_NAMES.index(pair.kind) for pair in pairs])
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
    """A tree of sequences about one image, depth first: what they begin with is in it once."""

    view: str
    tokens: list[int]
    depths: list[int]
    ends: list[int]  # last place of what follows each token
    paths: dict[int, list[int]]  # side → places of its tokens


def _tree(row: Sequence[tuple[int, int]], sides: Sequence[EncodedSide]) -> _Row:
    made = _Row(sides[row[0][0]].view.key, [], [], [], {})
    path: list[int] = []
    for number, common in row:
        tokens, start = sides[number].tokens, len(made.tokens)
        made.tokens += tokens[common:]
        made.depths += range(common, len(tokens))
        path = [*path[:common], *range(start, len(made.tokens))]
        made.paths[number] = path
    made.ends = list(range(len(made.tokens)))
    for path in made.paths.values():  # in order: the last that passes through a place decides
        for place in path:
            made.ends[place] = path[-1]
    return made


def _sides(pairs: Sequence[EncodedPair]) -> list[EncodedSide]:
    """All chosen, then all rejected."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


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


def _tensors(
    rows: Sequence[_Row], sides: Sequence[EncodedSide], images: Mapping[str, int], pad: int
) -> dict[str, Any]:
    predictor: list[tuple[int, int]] = []
    target: list[int] = []
    side: list[int] = []
    for at, row in enumerate(rows):
        for number, path in row.paths.items():
            answer = sides[number].answer
            # the last prompt token predicts the first token; the last token predicts nothing
            predictor += [(at, place) for place in path[-len(answer) :]]
            target += answer
            side += [number] * len(answer)
    out = {
        "input_ids": _padded([row.tokens for row in rows], pad),
        "image": torch.tensor([images[row.view] for row in rows]),
        "predictor": torch.tensor(predictor),
        "target": torch.tensor(target),
        "side": torch.tensor(side),
    }
    if any(row.depths != list(range(len(row.depths))) for row in rows):
        out["position_ids"] = _padded([row.depths for row in rows], 0)
        # padding sees itself: a softmax over nothing is not a number
        out["ends"] = _padded([row.ends for row in rows], out["input_ids"].shape[1])
    return out


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
