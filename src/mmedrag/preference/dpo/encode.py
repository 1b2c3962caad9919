"""From a preference pair to token ids, checked before any training.

Place in the picture: pairs ─► *encode* ─► collate ─► policy. The prompt is rendered exactly as
the generator renders it. A pair without answer tokens, or whose prompt with its image tokens does
not leave room for one, stops the run with its id: the released trainer masked such pairs
silently, and they then carried no signal (B10 of docs/differences.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from mmedrag.answering.generators import Inputs, expand
from mmedrag.records import Noise, Pair, PairKind, Side, UserError
from mmedrag.runtime import seeded_int, sha256

log = logging.getLogger(__name__)
CONTENT_FREE = ("gaussian_clip", "blank")  # noise kinds that do not look at the picture
Ids = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """One image as the model sees it: the file, its noise, and a name of that content."""

    path: Path
    noise: Noise | None
    key: str


@dataclass(frozen=True)
class EncodedSide:
    """Model input of one side; ``key`` names ids and image, so it names the log-probability."""

    prompt: Ids  # image tokens expanded
    answer: Ids  # end token included, unless it does not count
    view: View
    key: str

    @cached_property
    def tokens(self) -> Ids:
        """What the model reads: the last token of an answer is only predicted."""
        return self.prompt + self.answer[:-1]


@dataclass(frozen=True)
class EncodedPair:
    id: str
    kind: PairKind
    chosen: EncodedSide
    rejected: EncodedSide
    redraw: bool  # the noise changes at every access

    @property
    def length(self) -> int:
        """Tokens of the longer side (for grouping by length)."""
        return max(len(side.prompt) + len(side.answer) for side in (self.chosen, self.rejected))


class PairTokenizer:
    """Renders, tokenises and checks pairs for one model.

    Args:
        inputs: the generator's own text and token rules, so that both see the same prompt.
        image_tokens: how many tokens an image becomes.
        max_length: of prompt, image and answer together.
        count_end: the end token belongs to an answer (see :class:`DpoTraining`).
    """

    def __init__(
        self, inputs: Inputs, image_tokens: int, max_length: int, count_end: bool = True
    ) -> None:
        self.inputs, self.image_tokens, self.max_length = inputs, image_tokens, max_length
        self.end = inputs.tokenizer.eos_token_id if count_end else None
        self.truncated = 0

    def __call__(self, pairs: Sequence[Pair], redraw: bool | None = None) -> list[EncodedPair]:
        """Encode all pairs; ``redraw`` overrides what the pairs say about their noise.

        Raises:
            UserError: the pairs that carry no signal or do not fit, by id.
        """
        encoded, faults = [], []
        for pair in pairs:
            try:
                chosen, rejected = self.side(pair, pair.chosen), self.side(pair, pair.rejected)
            except UserError as error:
                faults.append(f"{pair.id}: {error}")
                continue
            noisy = pair.chosen.noise is not None or pair.rejected.noise is not None
            again = bool(pair.meta.get("redraw_noise")) if redraw is None else redraw
            encoded.append(EncodedPair(pair.id, pair.kind, chosen, rejected, noisy and again))
        if faults:
            more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
            raise UserError(f"train dpo: {' · '.join(faults[:3])}{more}")
        return encoded

    def side(self, pair: Pair, side: Side) -> EncodedSide:
        answer = self.answer_ids(side.text)
        bare = self.inputs.prompt_ids(side.prompt.text, side.prompt.style, 1)
        prompt = expand(bare, self.inputs.image_token_id, [self.image_tokens])
        room = self.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"prompt and image take {len(prompt)} tokens of {self.max_length}, no room for the "
                "answer: image tokens would be cut"
            )
        if len(answer) > room:
            self.truncated += 1
            answer = answer[:room]
        view = self.view(pair, side)
        content = json.dumps([prompt, answer, view.key], separators=(",", ":"))
        return EncodedSide(prompt, answer, view, hashlib.sha256(content.encode()).hexdigest())

    def answer_ids(self, text: str) -> Ids:
        tokenizer = self.inputs.tokenizer
        ids = tuple(tokenizer(text.strip(), add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError("answer has no tokens, every label would be masked")
        if self.inputs.image_token_id in ids:
            raise UserError(f"answer contains {self.inputs.image_token!r}")
        return ids if self.end is None else (*ids, self.end)

    def view(self, pair: Pair, side: Side) -> View:
        name = side.image if isinstance(side.image, str) else (side.image or [""])[0]
        if not name:
            raise UserError("no image, expected one on each side")
        path = (pair.root or Path()) / name
        return View(path, side.noise, view_key(path, side.noise, self.inputs.image_size))


def view_key(path: Path, noise: Noise | None, size: int) -> str:
    """Name of what is seen: the file's bytes (unless the noise ignores them) and the noise."""
    parts: list[object] = []
    if noise is None or noise.kind not in CONTENT_FREE:
        parts.append(file_hash(path))
    else:
        file_hash(path)  # a missing file is an error also where its content does not matter
    if noise is not None:
        parts += [json.loads(noise.to_json()), size]
        if noise.kind == "other_patient" and "path" in noise.params:
            parts.append(file_hash(Path(str(noise.params["path"]))))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=65536)
def file_hash(path: Path) -> str:
    """sha256 of an image file, read once per process: several pairs share a picture."""
    if not path.is_file():
        raise UserError(f"{path}: image cannot be read: no such file")
    return sha256(path)


def redrawn(noise: Noise, epoch: int) -> Noise:
    """The noise of another access: the same kind under a seed of (seed, epoch)."""
    return noise.model_copy(update={"seed": seeded_int(noise.seed, epoch, joint=":")})
