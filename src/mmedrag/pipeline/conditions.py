"""What a condition puts in place of the retrieved references, and of the picture.

Place in the picture: between retrieve and select. The modes are those of
:class:`mmedrag.records.ConditionSpec`; what they draw from is the :class:`Pool`. Every draw is a
pure function of (seed, example id), that of noise of (seed, picture): the questions of a picture
see the same noise, which is then drawn, encoded and read once. No draw depends on batch or shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedrag.images import apply_noise, load_image, pixel_hash
from mmedrag.records import (
    Condition,
    ConditionSpec,
    Example,
    Finding,
    Hit,
    Noise,
    Reference,
    Trace,
    Truth,
    UserError,
)
from mmedrag.runtime import DataFolder, seeded_int

SHOWN = 224  # pixels of a degraded picture that is searched with: what most encoders take
TRIES = 64  # draws of a partner before all are looked at in turn


def study_of(row: Example | Reference) -> str | None:
    value = row.meta.get("study")
    return None if value is None else str(value)


def is_own(example: Example, other: Example | Reference) -> bool:
    """Same patient, study or image; an unknown patient or study never matches."""
    return bool(
        (example.patient and example.patient == other.patient)
        or (study_of(example) and study_of(example) == study_of(other))
        or set(example.images) & set(other.images)
    )


def picture_of(example: Example) -> str:
    """Names the picture of an example, wherever its data folder lies; without one, the example."""
    names = [example.image] if isinstance(example.image, str) else example.image or []
    return "\0".join(names) or example.id


@dataclass
class Pool:
    """What substitutes are drawn from: the examples and the corpus of a data folder.

    Args:
        examples: all examples of the folder, whatever part of them is run.
        corpus: reference rows; ``random`` and ``contradicting`` take those of split ``train``
            when there are any, as an index does.
        truth: ground truth by study (benchmark only).
        picture: names an example's picture: what has the same name gets the same noise.
    """

    examples: Sequence[Example] = ()
    corpus: Sequence[Reference] = ()
    truth: Mapping[str, Truth] = field(default_factory=dict)
    seed: int = 0
    picture: Callable[[Example], str] = picture_of

    @classmethod
    def of(cls, data: DataFolder, seed: int = 0) -> Pool:
        return cls(data.examples(), data.corpus(), data.truth(), seed)

    def __post_init__(self) -> None:
        self._peers: dict[tuple[str | None, str | None], list[Example]] = defaultdict(list)
        for example in self.examples:
            if example.images:
                self._peers[example.domain, example.split].append(example)
        self._own = {study_of(row): row for row in reversed(self.corpus) if study_of(row)}
        train = [row for row in self.corpus if row.split == "train"] or self.corpus
        self._rows: dict[str | None, list[Reference]] = defaultdict(list)
        for row in train:
            if row.text.strip():
                self._rows[row.domain].append(row)
        self._stated: dict[tuple[str, str, str | None, bool], list[Reference]] = {}

    def condition(self, example: Example, spec: ConditionSpec) -> Condition:
        """The condition of one example; its noise seed comes from (seed, picture)."""
        if spec.noise is None:
            return Condition(image="clean", noise=None, references=spec.references)
        params = dict(spec.params)
        if spec.noise == "other_patient":
            other = self.partner(example, "noise")
            if other is None:
                raise UserError(f"{example.id}: no other patient's image in its domain")
            params["path"] = str(other.images[0])
        noise = Noise(
            kind=spec.noise,  # type: ignore[arg-type]
            seed=seeded_int(self.seed, self.picture(example)),
            params=params,
        )
        return Condition(image="noise", noise=noise, references=spec.references)

    def partner(self, example: Example, purpose: str) -> Example | None:
        """Another example of the same domain and split: another patient, another image. It is
        the same for all questions of a picture, as what is retrieved is."""
        peers = self._peers[example.domain, example.split]
        return self._pick(example, peers, purpose, self.picture(example))

    def random(self, trace: Trace) -> list[Hit]:
        """As many random rows of the domain as there were hits, with the hits' scores."""
        example = trace.live
        rows = self._rows[trace.domain.label if trace.domain else example.domain]
        chosen: dict[str, Reference] = {}
        for hit in trace.hits:
            for turn in range(TRIES):
                row = self._pick(example, rows, f"random{hit.rank}.{turn}")
                if row is None or row.id not in chosen:
                    break
            if row is None:
                break
            chosen[row.id] = row
        return [
            Hit(id=row.id, text=row.text, score=hit.score, rank=hit.rank)
            for row, hit in zip(chosen.values(), trace.hits, strict=False)
        ]

    def own(self, trace: Trace) -> list[Hit]:
        """The study's own report, as the only hit."""
        row = self._own.get(study_of(trace.live))
        return [_hit(row)] if row and row.text.strip() else []

    def contradicting(self, trace: Trace) -> list[Hit]:
        """A report of another patient that states the opposite about the asked finding.

        Only for questions whose answer flips with one finding (forms presence and negated).
        """
        example = trace.live
        name, side = example.meta.get("finding"), example.meta.get("side")
        truth = self.truth.get(study_of(example) or "")
        one = example.meta.get("form", "presence") in ("presence", "negated")
        if not one or truth is None or name not in truth.findings:
            return []
        from mmedrag.phantom import has, load_domain

        present = has(load_domain(truth.domain), truth.findings[name], side)
        row = self._pick(example, self._stating(truth.domain, name, side, not present), "against")
        return [_hit(row)] if row else []

    def _stating(
        self, domain: str, name: str, side: str | None, present: bool
    ) -> Sequence[Reference]:
        """Corpus rows that state with certainty that the finding is (not) there."""
        key = (domain, name, side, present)
        if key not in self._stated:
            from mmedrag.phantom import has, label_report, load_domain

            spec, found = load_domain(domain), []
            for row in self._rows[domain]:
                said = label_report(domain, row.text)["findings"].get(name)
                if said is None or said["uncertain"]:
                    continue
                if side and said["present"] and said["side"] is None:
                    continue  # present, but the report does not say where
                state = Finding(present=said["present"], side=said["side"])
                if has(spec, state, side) == present:
                    found.append(row)
            self._stated[key] = found
        return self._stated[key]

    def _pick(
        self, example: Example, rows: Sequence[Any], purpose: str, key: str | None = None
    ) -> Any:
        """A seeded row that is not the example's own; None when there is none. Examples of one
        ``key`` (None: the example's id) draw alike."""
        if not rows:
            return None
        start = seeded_int(self.seed, key or example.id, purpose)
        for step in range(TRIES):
            row = rows[seeded_int(start, str(step)) % len(rows)]
            if not is_own(example, row):
                return row
        return next((row for row in rows if not is_own(example, row)), None)


def degraded(trace: Trace, folder: Path) -> Trace:
    """A trace of the same example whose pictures are the degraded ones, as files in ``folder``;
    equal pictures share a file, so that each is encoded once."""
    assert trace.condition.noise
    names = []
    for path in trace.live.images:
        try:
            made = apply_noise(load_image(path), trace.condition.noise, SHOWN)
        except (OSError, ValueError, UserError) as error:
            return Trace.of(trace.live).model_copy(update={"error": str(error)})
        name = f"{pixel_hash(made)}.png"
        if not (folder / name).exists():
            made.save(folder / name)
        names.append(name)
    example = trace.live.model_copy(update={"image": names, "root": folder})
    return Trace.of(example).model_copy(update={"domain": trace.domain})


def _hit(row: Reference) -> Hit:
    return Hit(id=row.id, text=row.text, score=1.0, rank=0)
