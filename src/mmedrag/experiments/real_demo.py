"""`demo --real`: a user's own pictures, indexed and looked up without any training, on one page.

Place in the picture: beside ``demo``. DATA folders -> the domain of every picture by the shipped
model for real ones -> an index per domain whose key is the picture -> how far the similar cases
agree, beside chance and shuffled pictures -> ``OUT/report.html`` with the cases. Folder::

    OUT/demo.json                the state: of which data, what was measured
    OUT/index-DOMAIN/            ordinary indexes, for `--index`
    OUT/cache/                   features of the pictures that were looked up
    OUT/report.html
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmedrag.domain import open_domain, predict_domain
from mmedrag.embedded import located
from mmedrag.evaluation import evaluate_retriever
from mmedrag.pipeline import real_domain_model
from mmedrag.records import UNKNOWN, Example, Reference, UserError
from mmedrag.retrieval import build_index, open_retriever
from mmedrag.retrieval.encoders import load_encoder
from mmedrag.runtime import DataFolder, numpy_rng, read_json, sha256, write_json

log = logging.getLogger(__name__)
ENCODER = "real:lite0"
QUERIES, GALLERY = ("val", "test"), "train"
CASES, NEAREST = 8, 5  # of each domain on the page
Progress = Callable[[str, int, int], None]


@dataclass
class Neighbour:
    """A similar case: its row and the cosine similarity of the pictures."""

    row: Reference
    score: float


@dataclass
class SimilarCase:
    """A picture that was looked up, what the domain model said of it, and its nearest."""

    row: Reference
    identified: Mapping[str, Any] | None
    nearest: list[Neighbour] = field(default_factory=list)


@dataclass
class RealDemo:
    """What was found.

    ``domains``: domain -> result of :func:`mmedrag.evaluation.of_retriever.evaluate_retriever`.
    ``skipped``: domain -> why it has none. ``identified``: stated domain ("" where a row states
    none) -> identified one -> number. ``trained_on``: pictures that the domain model was fitted on.
    """

    report: Path
    pictures: int
    domains: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    identified: dict[str, dict[str, int]]
    trained_on: int
    cases: dict[str, list[SimilarCase]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**{k: v for k, v in vars(self).items() if k != "cases"}, "report": str(self.report)}

    def headline(self) -> str:
        """Agreement of the best similar case in words, beside chance and shuffled pictures."""
        lines = [f"{self.pictures} pictures; agreement of the most similar case, chance, shuffled"]
        for domain, found in self.domains.items():
            lines.append(f"{domain}: {found['n']} looked up among {found['gallery']}")
            for name, cell in found.get("agreement", {}).items():
                shares = (cell, cell.get("random"), cell.get("shuffled"))
                told = " ".join(f"{c['value']:.3f}" for c in shares if c and c["n"])
                lines += [f"  {name:<24} {told} n={cell['n']}"] if cell["n"] else []
        lines += [f"{domain}: left out, {why}" for domain, why in self.skipped.items()]
        return "\n".join([*lines, f"report: {self.report}"])


class _Routed(DataFolder):
    """A data folder whose rows without a domain have the one that was identified."""

    def __init__(self, path: Path, found: Mapping[str, str]) -> None:
        super().__init__(path)
        self.found = found

    def corpus(self, split: str | None = None, domain: str | None = None) -> list[Reference]:
        rows = super().corpus(split)
        for row in rows:
            row.domain = row.domain or self.found.get(row.id)
        return [r for r in rows if domain in (None, r.domain)]


def run_real_demo(
    data: Sequence[str | Path],
    out: str | Path,
    seed: int = 0,
    progress: Progress | None = None,
    encoder: str = ENCODER,
) -> RealDemo:
    """Index, look up, measure, and write the page; finished steps stand.

    Args:
        data: DATA folders. Split ``train`` is searched by the pictures of ``val`` and ``test``.
        encoder: of pictures; the one for real pictures needs the extra ``real``.

    Raises:
        UserError: no pictures, ``out`` holds something else, or the encoder is not installed.
    """
    from mmedrag.report import write_similar

    out, folders = Path(out), [DataFolder(path) for path in data]
    _check_rows(folders)
    state = _state(folders, out, encoder, seed)
    load_encoder(encoder)  # says in one line what is missing, before anything is written
    write_json(out / "demo.json", state, own=True)
    found = _identify(folders, state, out)
    labels = {i: d["label"] for i, d in found.items() if d["label"] != UNKNOWN}
    routed = [_Routed(f.path, labels) for f in folders]
    domains: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    cases: dict[str, list[SimilarCase]] = {}
    for domain in sorted({r.domain or UNKNOWN for f in routed for r in f.corpus() if r.images}):
        counts = Counter(str(r.split) for f in routed for r in f.corpus(None, domain) if r.images)
        asked = sum(counts[split] for split in QUERIES)
        if domain == UNKNOWN or not counts[GALLERY] or asked < 2:
            skipped[domain] = (
                "rows without a domain that the model does not know"
                if domain == UNKNOWN
                else f"{counts[GALLERY]} pictures in split train, {asked} in val and test; "
                "expected some and at least two"
            )
            log.warning("demo: %s left out: %s", domain, skipped[domain])
            continue
        log.info("%s: %d pictures searched by %d", domain, counts[GALLERY], asked)
        index = _index(routed, domain, out, encoder, progress)
        domains[domain] = _measure(routed, domain, index, state, out, seed)
        cases[domain] = _cases(routed, domain, index, found, seed)
    if not domains:
        raise UserError(
            "demo: no domain has pictures to search (split train) and two to look up (val, test): "
            + "; ".join(f"{name}: {why}" for name, why in skipped.items())
        )
    rows = [r for f in folders for r in f.corpus() if r.images]
    table: dict[str, Counter[str]] = {}
    for row in rows if found else ():
        table.setdefault(row.domain or "", Counter())[found[row.id]["label"]] += 1
    made = RealDemo(
        out / "report.html",
        len(rows),
        domains,
        skipped,
        {stated: dict(sorted(counts.items())) for stated, counts in sorted(table.items())},
        _trained_on(rows),
        cases,
    )
    write_similar(made, made.report)
    return made


def _check_rows(folders: Sequence[DataFolder]) -> None:
    rows = [r for f in folders for r in f.corpus() if r.images]
    if not rows:
        raise UserError(
            f"{', '.join(str(f.path) for f in folders)}: no corpus row with a picture, expected a "
            "DATA folder; `mmedrag data import` makes one"
        )
    twice = [name for name, n in Counter(r.id for r in rows).items() if n > 1]
    if twice:
        raise UserError(f"demo: id {twice[0]!r} stands in two DATA folders, expected unique")


def _state(folders: Sequence[DataFolder], out: Path, encoder: str, seed: int) -> dict[str, Any]:
    """The state that ``out`` holds of these very inputs, or a new one.

    Raises:
        UserError: ``out`` is of other inputs, or not ours.
    """
    made_of = {
        "demo": "real",
        "encoder": encoder,
        "domain_model": _fingerprint(),
        "seed": seed,
        "data": {str(f.path.resolve()): sha256(f.path / "corpus.jsonl") for f in folders},
    }
    file = out / "demo.json"
    if file.is_file():
        known = read_json(file)
        if isinstance(known, dict) and known.get("of") == made_of:
            return known
        raise UserError(f"{out}: made of other data or models, choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not empty and not of `demo --real`, choose another --out")
    return {"of": made_of}


def _fingerprint() -> str | None:
    model = real_domain_model()
    return sha256(located(model) / "head.safetensors") if model else None


def _identify(
    folders: Sequence[DataFolder], state: dict[str, Any], out: Path
) -> dict[str, dict[str, Any]]:
    """Row id -> what the shipped model says of its picture; nothing where none ships."""
    model = real_domain_model()
    if model is None:
        return {}
    if "identified" not in state:
        log.info("identifying the domain of every picture")
        opened = open_domain(model)
        rows = [row for folder in folders for row in predict_domain(folder, opened)]
        state["identified"] = {row["id"]: row for row in rows}
        write_json(out / "demo.json", state, own=True)
    return state["identified"]


def _index(
    routed: Sequence[DataFolder], domain: str, out: Path, encoder: str, progress: Progress | None
) -> Path:
    index = out / f"index-{domain}"
    if not (index / "manifest.json").exists():

        def step(done: int, total: int | None = None, note: str = "") -> None:
            if progress:
                progress(f"index of {domain}", done, total or 0)

        build_index(
            routed, index, domain, encoder, GALLERY, "image", progress=step if progress else None
        )
    return index


def _measure(
    routed: Sequence[DataFolder],
    domain: str,
    index: Path,
    state: dict[str, Any],
    out: Path,
    seed: int,
) -> dict[str, Any]:
    done = state.setdefault("measured", {})
    if domain not in done:
        log.info("%s: looking up its pictures of val and test", domain)
        cache = out / "cache"
        cache.mkdir(exist_ok=True)
        for file in (index / "cache").glob("*.emb"):  # what the index has is not encoded again
            if not (cache / file.name).exists():
                shutil.copy(file, cache / file.name)
        encoder = state["of"]["encoder"]
        found = evaluate_retriever(
            routed, encoder, domain, QUERIES, untrained=False, cache=cache, seed=seed, key="image"
        )
        said = found.get("finding_agreement", {})
        found["finding_agreement"] = {name: asdict(agreement) for name, agreement in said.items()}
        done[domain] = found
        write_json(out / "demo.json", state, own=True)
    return done[domain]


def _cases(
    routed: Sequence[DataFolder],
    domain: str,
    index: Path,
    found: Mapping[str, dict[str, Any]],
    seed: int,
) -> list[SimilarCase]:
    """A few pictures drawn by the seed, and what their index finds for them."""
    rows = [r for f in routed for s in QUERIES for r in f.corpus(s, domain) if r.images]
    drawn = numpy_rng(seed).permutation(len(rows))[:CASES]
    asked = [rows[n] for n in drawn]
    known = {r.id: r for f in routed for r in f.corpus(GALLERY, domain)}
    questions = [_as_example(row) for row in asked]
    hits, _ = open_retriever(index).search(questions, NEAREST)
    return [
        SimilarCase(row, found.get(row.id), [Neighbour(known[h.id], h.score) for h in near])
        for row, near in zip(asked, hits, strict=True)
    ]


def _as_example(row: Reference) -> Example:
    example = Example(
        id=row.id, task="report", image=row.image, answer="", patient=row.patient, split=row.split
    )
    example.root = row.root
    return example


def _trained_on(rows: Sequence[Reference]) -> int:
    """How many of the pictures (sha256 of their files) the shipped domain model was fitted on."""
    model = real_domain_model()
    if model is None:
        return 0
    lines = (located(model) / "train_ids.jsonl").read_text(encoding="utf-8").splitlines()
    seen = {json.loads(line)["image_sha256"] for line in lines}
    return sum(any(path.is_file() and sha256(path) in seen for path in r.images) for r in rows)
