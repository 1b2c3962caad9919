"""The sweep: what retrieval is worth, against how good the references are.

Place in the picture: rows of :mod:`mmedrag.experiments.ablation`, on benchmarks whose similar cases
share more and more (or on a regime's), several seeds each. Every point is placed at the agreement
that was measured there (:mod:`mmedrag.evaluation.of_references`), not at the knob that was turned.
``OUT/POINT/seed-N`` holds data, indexes and runs; all of them stand on a re-run, so that further
points, seeds and adapters join by the same command. ``OUT/sweep.json``, ``.csv`` and ``.svg`` are
made of what is there.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any

from mmedrag.embedded import EMBEDDED
from mmedrag.evaluation import (
    Agreement,
    Asked,
    Case,
    agreement,
    asked_twice,
    cases_of,
    fit_fuser,
    measured,
)
from mmedrag.experiments import ablation
from mmedrag.experiments.ablation import CLEAN, OWN, Parts, Progress, Row
from mmedrag.experiments.settings import AblationSettings, SweepSettings
from mmedrag.phantom import Knobs, build_benchmark, load_domain, regime_retriever
from mmedrag.pipeline import Flags, resolve_system, retrieve_examples
from mmedrag.records import ConditionSpec, Example, Trace, UserError
from mmedrag.report import svg
from mmedrag.runtime import DataFolder, as_dict, read_json, read_jsonl, write_json, write_text

CLOSED = "closed"
PLACE = ("agreement", "agreement_low", "agreement_high")
FUSER_TITLE = "fuser of picture and references (other seeds)"
JOINS = ("points", "seeds", "first_seed", "workers")
OWN_REPORT, FUSER, IGNORED = "own-report", "fuser", "ignored"
NAIVE, SELECTION = "naive", "selection"
SELECTED = {"references": ConditionSpec("selected")}


@dataclass(frozen=True)
class Point:
    """One place on the axis: a similarity (0 to 1) of the benchmark's patients, or a regime."""

    name: str

    @property
    def knobs(self) -> dict[str, Any]:
        number = self._number()
        return {"regime": self.name} if number is None else {"similarity": number}

    @property
    def regime(self) -> str:
        return self.name if self._number() is None else "uniform"

    @property
    def folder(self) -> str:
        return self.name if self._number() is None else f"similarity-{self._number():g}"

    def _number(self) -> float | None:
        try:
            number = float(self.name)
        except ValueError:
            return None
        return number if isfinite(number) else None


def run_sweep(
    out: Path,
    settings: SweepSettings | None = None,
    adapters: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run what is missing of every point and seed, and draw the figure of all.

    Args:
        adapters: RAG-PT adapters (folders or ``embedded:NAME``); each adds a tuned row.

    Returns:
        The content of ``OUT/sweep.json``.

    Raises:
        UserError: no such regime or domain, or a folder of another sweep.
    """
    settings = settings or SweepSettings()
    points = [Point(name) for name in settings.points]
    for point in points:
        Knobs(**point.knobs)
        for domain in settings.domains:
            load_domain(domain)
            regime_retriever(point.regime, domain)
    table = _rows(adapters)
    _claim(out, settings)
    done = []
    for point in points:
        for seed in settings.all_seeds:
            folder = out / point.folder / f"seed-{seed}"
            run_seed(folder, point, seed, settings, table, _named(progress, point, seed))
        done.append(_measure(out / point.folder, point, settings, table))
    done.sort(key=lambda found: found["agreement"]["mean"]["value"] or 0.0)
    result = {"settings": asdict(settings), "adapters": list(adapters), "points": done}
    write_json(out / "sweep.json", result)
    write_text(out / "sweep.csv", as_csv(done))
    write_text(out / "sweep.svg", as_svg(done))
    return result


def _claim(out: Path, settings: SweepSettings) -> None:
    """Mark the folder as this sweep's; further points, seeds and adapters may join, no more."""
    path = out / "plan.json"
    plan = {name: value for name, value in asdict(settings).items() if name not in JOINS}
    if path.exists() and read_json(path) != as_dict(plan):
        raise UserError(f"{out}: holds a sweep of other settings (see {path.name})")
    write_json(path, plan)


def _named(progress: Progress | None, point: Point, seed: int) -> Progress | None:
    if progress is None:
        return None
    return lambda row, done, total: progress(f"{point.name}, seed {seed}, {row}", done, total)


def _rows(adapters: Sequence[str]) -> list[Row]:
    """The ablation's rows that the figure shows, under the conditions that it shows them."""
    plain = [
        Row("base", "references ignored (untuned, none)", CLEAN),
        Row(NAIVE, "naive retrieval, untuned", SELECTED, "generic"),
        Row(SELECTION, "+ selection, untuned", SELECTED | OWN, "domain"),
    ]
    tuned = {_called(adapter): adapter for adapter in adapters}
    if len(tuned) < len(adapters):
        raise UserError("sweep: two adapters have the same name, expected different ones")
    for adapter in adapters:
        if why := ablation.absent(adapter):
            raise UserError(f"sweep: {why}")
    return plain + [
        Row(f"pt-{name}", f"+ RAG-PT ({name})", CLEAN | SELECTED | OWN, "domain", adapter=adapter)
        for name, adapter in tuned.items()
    ]


def _called(adapter: str) -> str:
    """The name of an adapter, as a row and its folder have it."""
    return adapter.rstrip("/").rsplit("/", 1)[-1].replace(":", "-")


def run_seed(
    folder: Path,
    point: Point,
    seed: int,
    settings: SweepSettings,
    table: Sequence[Row],
    progress: Progress | None = None,
) -> None:
    """Draw, index and answer one seed of a point; what is finished stands."""
    data = folder / "data"
    build_benchmark(
        data,
        settings.studies,
        settings.domains,
        seed,
        workers=settings.workers,
        open=0,
        **point.knobs,
    )
    every = _closed(DataFolder(data).examples(settings.split, "vqa"))
    questions = _closed(ablation.sample(DataFolder(data), settings.asked, settings.split))
    finished = [
        folder / "runs" / row.name / name / "finished.json" for row in table for name in row.plans
    ]
    hits = {name: folder / f"hits-{name}.jsonl" for name in (NAIVE, SELECTION)}
    if all(path.exists() for path in (*finished, *hits.values())):
        return
    parts = _parts(folder, point, settings)
    acs = [replace(row, rule=parts.rule if row.retrieval == "domain" else None) for row in table]
    ablation.run_rows(acs, parts, DataFolder(data), questions, folder, seed, progress)
    for row in acs:
        if row.name in hits and not hits[row.name].exists():
            retrieve_examples(ablation.assemble(row, parts), every, hits[row.name])


def _closed(rows: Sequence[Example]) -> list[Example]:
    return [row for row in rows if row.answer_type == CLOSED]


def _parts(folder: Path, point: Point, settings: SweepSettings) -> Parts:
    """The embedded system over this seed's indexes, without an adapter."""
    from mmedrag.retrieval import build_index

    indexes = {}
    for domain in (*settings.domains, None):
        path = folder / f"index-{domain or 'generic'}"
        if not (path / "manifest.json").exists():
            encoder = regime_retriever(point.regime, domain) if domain else f"{EMBEDDED}:encoder"
            build_index([DataFolder(folder / "data")], path, domain=domain, encoder=encoder)
        indexes[domain] = str(path)
    generic = indexes.pop(None)
    system = resolve_system(Flags(index=list(indexes.values()), adapter="none"))
    parts = ablation.parts_of(system, AblationSettings(k=settings.k, generic=generic))
    return replace(parts, adapts=True)


def _measure(
    folder: Path, point: Point, settings: SweepSettings, table: Sequence[Row]
) -> dict[str, Any]:
    """Agreement and the effects of every row at one point, over all seeds."""
    seeds = [folder / f"seed-{seed}" for seed in settings.all_seeds]

    def runs(row: str, condition: str) -> list[list[Trace]]:
        paths = (seed / "runs" / row / condition / "traces.jsonl" for seed in seeds)
        return [list(read_jsonl(path, Trace)) for path in paths]

    base = runs("base", "none")
    sizes = [len(DataFolder(s / "data").corpus("train", settings.domains[0])) for s in seeds]
    corpus = sum(sizes) // len(sizes)
    hits = {
        name: [list(read_jsonl(seed / f"hits-{name}.jsonl", Trace)) for seed in seeds]
        for name in (NAIVE, SELECTION)
    }
    own_report = runs(SELECTION, OWN_REPORT)
    asked = [asked_twice(*two) for two in zip(base, runs(SELECTION, "references"), strict=True)]
    rows = {IGNORED: _row(table[0].title, {}, _flat(asked), IGNORED)}
    for row in table[1:]:
        alone = runs(row.name, "none") if "none" in row.plans else base
        with_ = runs(row.name, "references")
        pairs = [asked_twice(*two) for two in zip(alone, with_, strict=True)]
        rows[row.name] = _row(row.title, {}, _flat(pairs), "reader")
        if row.adapter:
            rows[f"{row.name}-none"] = _row(
                f"{row.title}, references ignored", {}, _flat(pairs), IGNORED
            )
    shown = [asked_twice(*two) for two in zip(base, own_report, strict=True)]
    rows[OWN_REPORT] = _row("the study's own report, untuned", {}, _flat(shown), "reader")
    try:
        answers, policies = _fused(asked, settings.first_seed)
        rows[FUSER] = _row(FUSER_TITLE, {FUSER: answers}, _flat(asked), FUSER)
    except UserError as error:  # too few of other seeds to fit on
        policies = [str(error)]
    return {
        "point": point.name,
        "regime": point.regime,
        "agreement": asdict(pooled_agreement(hits[SELECTION], corpus)),
        "agreement_naive": asdict(pooled_agreement(hits[NAIVE], corpus)),
        "fuser": policies,
        "rows": rows,
    }


def _fused(asked: Sequence[Sequence[Asked]], seed: int) -> tuple[list[str], list[str]]:
    """Answers of a fuser to each seed's questions, fitted on those of the others, and which."""
    answers, policies = [], []
    for n, pairs in enumerate(asked):
        others = _flat([other for m, other in enumerate(asked) if m != n])
        fuser = fit_fuser(others, seed)
        answers += fuser(pairs)
        policies.append(fuser.policy)
    return answers, policies


def _flat(parts: Sequence[Sequence[Asked]]) -> list[Asked]:
    return [pair for part in parts for pair in part]


def _row(
    title: str, answers: Mapping[str, Sequence[str]], pairs: Sequence[Asked], which: str
) -> dict[str, Any]:
    found = measured(pairs, answers)[which]
    return {"title": title, "effects": {name: asdict(cell) for name, cell in found.items()}}


def pooled_agreement(seeds: Sequence[Sequence[Trace]], corpus: int) -> Agreement:
    """Agreement over the runs of several seeds and all their domains; findings are called
    DOMAIN/FINDING, and the mean is over all of them."""
    cases = [
        Case(
            case.patient,
            {(f"{domain}/{name}", side): there for (name, side), there in case.truth.items()},
            case.said and frozenset((f"{domain}/{name}", side) for name, side in case.said),
        )
        for traces in seeds
        for domain, group in cases_of(traces).items()
        for case in group
    ]
    return agreement(cases, corpus)


def _place(point: Mapping[str, Any], row: str) -> Mapping[str, Any]:
    """Agreement of the references that a row gets."""
    mean: Mapping[str, Any] = point["agreement_naive" if row == NAIVE else "agreement"]["mean"]
    return mean


def as_csv(points: Sequence[Mapping[str, Any]]) -> str:
    """One line a point, row and effect: where it stands, and how well it did."""
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["point", *PLACE, "corpus", "row", "title", "effect", "value", "low", "high", "n"]
    )
    for point in points:
        for name, row in point["rows"].items():
            place = _place(point, name)
            for effect, cell in row["effects"].items():
                table.writerow(
                    [
                        point["point"],
                        *(place[key] for key in ("value", "low", "high")),
                        point["agreement"]["corpus"],
                        name,
                        row["title"],
                        effect,
                        *(cell[key] for key in ("value", "low", "high", "n")),
                    ]
                )
    return text.getvalue()


def as_svg(points: Sequence[Mapping[str, Any]], effect: str = "accuracy") -> str:
    """Every row's accuracy against the agreement of its references: a line with its interval as a
    band over the similarities, a diamond for each regime, which is another construction."""
    titles = {name: row["title"] for point in points for name, row in point["rows"].items()}
    series: list[tuple[str, list[tuple[float, float]]]] = []
    bands, marks = [], []
    for number, (name, title) in enumerate(titles.items()):
        cells = [
            (_place(point, name)["value"], point["rows"][name]["effects"][effect], point)
            for point in points
            if name in point["rows"] and _place(point, name)["value"] is not None
        ]
        cells.sort(key=lambda cell: cell[0])
        joined = [(x, cell) for x, cell, point in cells if point["point"] != point["regime"]]
        series.append((title, [(x, cell["value"]) for x, cell in joined]))
        bands.append([(x, c["low"], c["high"]) for x, c in joined if c["low"] is not None])
        marks += [
            (number, x, cell["value"], cell["low"], cell["high"])
            for x, cell, point in cells
            if point["point"] == point["regime"]
        ]
    return svg.standalone(
        svg.lines(
            series,
            "Accuracy against the agreement of the references",
            "agreement of the reference at rank 1 with the case"
            + (" (diamonds: regimes)" if marks else ""),
            "accuracy of closed questions",
            bands,
            marks=marks,
        )
    )
