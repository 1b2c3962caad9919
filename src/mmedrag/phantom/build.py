"""Writes a benchmark DATA folder: images, reports, questions and exact truth."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmedrag.phantom.canvas import Canvas, Rng
from mmedrag.phantom.grammar import DOMAINS, DomainSpec, load_domain
from mmedrag.phantom.questions import Balance, Question, ask_closed, ask_open, balance
from mmedrag.phantom.regimes import load_regime, measured, regime_retriever
from mmedrag.phantom.sample import Knobs, Study, flip, picture, report, studies
from mmedrag.records import Example, Reference, Truth, UserError
from mmedrag.runtime import check_own, read_json, sync, write_json, write_jsonl, write_unsynced

LICENCE = "CC0-1.0"
FREE = ("size", "prior", "closed", "open")  # knobs that leave what a reference says as it is
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class Rows(NamedTuple):
    """What one study contributes to the data folder."""

    truth: list[Truth]
    corpus: list[Reference]
    examples: list[Example]


@lru_cache(maxsize=4)
def _canvas(size: int) -> Canvas:
    return Canvas(size)


def _save(domain: DomainSpec, study: Study, out: Path, knobs: Knobs) -> str:
    name = f"images/{study.id}.png"
    if not _whole(out / name):
        pixels, png = picture(domain, study, _canvas(knobs.size), knobs), BytesIO()
        Image.fromarray(pixels).save(png, format="PNG", compress_level=3)
        write_unsynced(out / name, png.getvalue())
    return name


def _whole(path: Path) -> bool:
    """Whether an earlier, interrupted build has finished this picture: it then ends as PNG files
    do (a power cut may leave a name without content, because the name was not waited for)."""
    try:
        with open(path, "rb") as handle:
            handle.seek(-len(PNG_END), os.SEEK_END)
            return handle.read() == PNG_END
    except OSError:
        return False


def questions_of(
    domain: DomainSpec, study: Study, knobs: Knobs, fair: Balance | None
) -> list[Question]:
    """The study's questions; no text twice."""
    rng = Rng(study.key, "questions")
    asked = [ask_closed(domain, study.findings, rng, fair) for _ in range(knobs.closed)]
    asked += [q for q in (ask_open(domain, study.findings, rng) for _ in range(knobs.open)) if q]
    return list({q.text: q for q in asked}.values())


def _meta(study: Study, question: Question | None = None, **more: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {"study": study.id}
    if question:
        meta |= {"finding": question.finding, "side": question.side, "form": question.form}
        if question.other:
            meta["other"] = question.other
    return meta | more


def _example(study: Study, image: str, question: Question, number: str, **meta: Any) -> Example:
    return Example(
        id=f"{study.id}-{number}",
        task="vqa",
        question=question.text,
        answer=question.answer,
        answer_type="closed" if question.closed else "open",
        meta=_meta(study, question, **meta),
        **_row(study, image),
    )


def rows(
    domain: DomainSpec,
    study: Study,
    out: Path,
    knobs: Knobs,
    twins: str | None,
    fair: Balance | None,
) -> Rows:
    """Draw a study (and its twins) and give its rows."""
    image = _save(domain, study, out, knobs)
    text = report(domain, study, knobs)
    asked = questions_of(domain, study, knobs, fair)
    row = _row(study, image) | {"meta": _meta(study)}
    examples = [_example(study, image, q, f"q{i}") for i, q in enumerate(asked)]
    examples.append(Example(id=f"{study.id}-report", task="report", answer=text, **row))
    own = Rows([_truth(study)], [Reference(id=study.id, text=text, **row)], examples)
    if twins and study.split == "test":
        twin = _twin(domain, study, out, knobs, twins, asked, image)
        return Rows(own.truth + twin.truth, own.corpus + twin.corpus, own.examples + twin.examples)
    return own


def _row(study: Study, image: str, source: str = "phantom") -> dict[str, Any]:
    """What all rows about a study have in common."""
    return dict(
        domain=study.domain,
        patient=study.patient,
        split=study.split,
        source=source,
        licence=LICENCE,
        image=image,
    )


def _truth(study: Study) -> Truth:
    return Truth(
        study=study.id, patient=study.patient, domain=study.domain, findings=study.findings
    )


def _twin(
    domain: DomainSpec,
    study: Study,
    out: Path,
    knobs: Knobs,
    kind: str,
    asked: list[Question],
    image: str,
) -> Rows:
    """The same study with one finding flipped, in the image only or in the report only.

    The flipped finding is that of the first presence question; a second presence question
    about another finding is asked of both pictures too, and must not change.
    """
    presence = [(f"q{i}", q) for i, q in enumerate(asked) if q.form == "presence"]
    if not presence:
        return Rows([], [], [])
    asked_first, first = presence[0]
    others = [(n, q) for n, q in presence[1:] if q.finding != first.finding]
    flipped = flip(domain, study.findings, first.finding, first.side, Rng(study.key, "twin"))
    twin = replace(study, id=f"{study.id}-twin-{kind}", findings=flipped)
    if kind == "report":
        meta = _meta(study, twin_of=study.id, flipped=first.finding, twin="report")
        shared = _row(study, image, "phantom-twin")
        text = report(domain, twin, knobs)
        return Rows([], [Reference(id=twin.id, text=text, meta=meta, **shared)], [])
    twin_image = _save(domain, twin, out, knobs)  # study.key unchanged: all else stays
    examples = []
    for number, question in [(asked_first, first), *others[:1]]:
        same = question.finding != first.finding
        answer = question.answer if same else ("no" if question.answer == "yes" else "yes")
        base = {"twin": "image", "twin_of": f"{study.id}-{number}", "flipped": first.finding}
        question = replace(question, answer=answer)
        examples.append(_example(twin, twin_image, question, number, **base))
    return Rows([_truth(twin)], [], examples)


Job = tuple[str, list[Study], str, Knobs, str | None, Balance | None]


def _work(job: Job) -> list[Rows]:
    name, batch, out, knobs, twins, fair = job
    domain = load_domain(name)
    made = [rows(domain, study, Path(out), knobs, twins, fair) for study in batch]
    pictures = {Path(out, str(row.image)) for r in made for row in (*r.corpus, *r.examples)}
    sync(*pictures, Path(out, "images"))
    return made


def _jobs(
    domains: Sequence[str], count: int, seed: int, knobs: Knobs, out: Path, twins: str | None
) -> Iterator[Job]:
    for name in domains:
        domain = load_domain(name)
        everyone = list(studies(domain, count, seed, knobs))
        balanced = knobs.prior == "balanced"
        fair = balance(domain, [s.findings for s in everyone]) if balanced else None
        for start in range(0, len(everyone), 50):
            yield name, everyone[start : start + 50], str(out), knobs, twins, fair


def build_benchmark(
    out: str | Path,
    studies: int = 200,
    domains: Sequence[str] | None = None,
    seed: int = 0,
    twins: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **knobs: Any,
) -> dict[str, int]:
    """Write ``studies`` studies per domain into the DATA folder ``out``.

    Args:
        domains: names of the benchmark's domains; all by default.
        twins: "image" or "report": adds counterfactual twins of the test studies.
        workers: processes (default: as many as there are CPUs). The output does not depend on it.
        progress: called with (studies done, studies in all).
        knobs: fields of :class:`mmedrag.phantom.sample.Knobs`.

    Returns:
        Counts of rows. The same arguments give the same bytes; an interrupted build goes on
        where it stopped.

    Raises:
        UserError: unknown domain or knob, or a folder that holds another build.
    """
    out, names = Path(out), list(domains or DOMAINS)
    for name in names:
        load_domain(name)
    setting = _checked(knobs, studies, twins)
    plan = dict(
        generator="mmedrag.phantom",
        version=1,
        studies=studies,
        domains=names,
        seed=seed,
        twins=twins,
        knobs=setting.turned(),
    )
    _claim(out, plan, expected(names, setting))
    jobs = list(_jobs(names, studies, seed, setting, out, twins))
    total, made = studies * len(names), list[Rows]()
    for batch in _results(jobs, workers or os.cpu_count() or 1):
        made += batch
        if progress:
            progress(len(made), total)
    return {
        "studies": total,
        **{
            name: write_jsonl(
                out / f"{name}.jsonl", (row for r in made for row in getattr(r, name)), own=True
            )
            for name in ("truth", "corpus", "examples")
        },
    }


def _checked(knobs: Mapping[str, Any], studies: int, twins: str | None) -> Knobs:
    """The knobs, if they and the build's other settings can be drawn."""
    unknown = sorted(set(knobs) - set(Knobs.__dataclass_fields__))
    if unknown:
        known = ", ".join(Knobs.__dataclass_fields__)
        raise UserError(f"phantom: unknown knob {unknown[0]!r}, expected one of {known}")
    if studies < 1:
        raise UserError(f"phantom: studies is {studies}, expected at least 1")
    if twins not in (None, "image", "report"):
        raise UserError(f"phantom: twins is {twins!r}, expected image or report")
    setting = Knobs(**knobs)
    _check_tables(setting)
    return setting


def _check_tables(knobs: Knobs) -> None:
    """Do the tables of a knob name what there is, and shares?"""
    for name, attributes in knobs.appearance.items():
        known = [spec.name for spec in load_domain(name).attributes]
        if unknown := [attribute for attribute in attributes if attribute not in known]:
            raise UserError(
                f"phantom: appearance: {name}: no attribute {unknown[0]!r}, "
                f"expected some of {', '.join(known)}"
            )
    for name, shares in knobs.similarity_of.items():
        findings = load_domain(name).by_name
        for finding, share in shares.items():
            where = f"phantom: similarity_of: {name}.{finding}"
            if finding not in findings:
                raise UserError(f"{where}: no such finding, expected one of {', '.join(findings)}")
            if not 0 <= share <= 1:
                raise UserError(f"{where}: got {share!r}, expected 0 to 1")


def _results(jobs: Sequence[Job], workers: int) -> Iterator[list[Rows]]:
    """What each job gives, in order."""
    if workers == 1 or len(jobs) == 1:
        yield from map(_work, jobs)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)))
    try:
        yield from pool.map(_work, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def expected(domains: Sequence[str], knobs: Knobs) -> dict[str, Any]:
    """What ``benchmark.json`` says of a build: its regime, what that aims at, what was measured.

    Both are of the regime as it stands: empty where another knob was turned that decides how far
    references agree.
    """
    regime, found = load_regime(knobs.regime), measured(knobs.regime) or {}
    standard = replace(Knobs(regime=knobs.regime), **{k: getattr(knobs, k) for k in FREE})
    if knobs != standard:
        regime, found = replace(regime, agreement={}), {}
    return {
        "regime": knobs.regime,
        "about": regime.about,
        "retriever": {name: regime_retriever(knobs.regime, name) for name in domains},
        "agreement": {n: dict(regime.agreement[n]) for n in domains if n in regime.agreement},
        "measured": {
            key: {n: value[n] for n in domains} if key == "agreement" else value
            for key, value in found.items()
        },
    }


def _claim(out: Path, plan: dict[str, Any], benchmark: dict[str, Any]) -> None:
    """Mark the folder as this build's; refuse to mix two builds."""
    path = out / "phantom.json"
    check_own(*(out / f"{name}.jsonl" for name in ("truth", "corpus", "examples")))
    if path.exists() and read_json(path) != plan:
        raise UserError(
            f"{out}: holds another phantom build (see {path.name}); choose a new folder"
        )
    pictures = out / "images"
    if not path.exists() and pictures.exists() and any(pictures.iterdir()):
        raise UserError(f"{out}: images/ is not empty and is no phantom build; choose a new folder")
    pictures.mkdir(parents=True, exist_ok=True)
    write_json(path, plan, sort_keys=True)
    write_json(out / "benchmark.json", benchmark)
