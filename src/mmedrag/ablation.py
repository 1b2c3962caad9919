"""The ablation in one call: base model, naive retrieval, and the paper's parts one by one.

Place in the picture: each row is the same pipeline with one constructor argument changed
(paper Table 4; the sets of RAG-PT alone, Table 5). Finished rows are skipped on a re-run.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag import embedded
from mmedrag.conditions import Plan
from mmedrag.evaluate import evaluate
from mmedrag.pipeline import GENERIC, Pipeline
from mmedrag.protocols import DomainIdentifier, Generator, Searcher
from mmedrag.run import RunSettings, run_plans
from mmedrag.select import RuleSpec
from mmedrag.system import EMBEDDED, located
from mmedrag.types import DataFolder, Example, UserError

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]

CLEAN = {"none": Plan("none")}
ALONE = CLEAN | {"noise-none": Plan("none", "gaussian_clip")}
WITH = {"references": Plan("selected"), "noise-references": Plan("selected", "gaussian_clip")}
AGAINST = {"contradicting": Plan("contradicting")}
OWN = {"own-report": Plan("own")}


@dataclass(frozen=True)
class Row:
    """One row of the table: what is put into the pipeline, and the conditions it is run under."""

    name: str
    title: str
    plans: Mapping[str, Plan]
    retrieval: str | None = None  # None | "generic" | "domain"
    rule: RuleSpec | None = None  # None: all k hits are kept
    adapter: str | None = None
    beams: int = 1


@dataclass(frozen=True)
class Parts:
    """What the rows are assembled from."""

    domain: DomainIdentifier | str | None
    domain_retrievers: Mapping[str, Searcher]
    generic: Searcher | None
    generator: Callable[[str | None, int], Generator]  # (adapter, beams)
    rule: RuleSpec
    k: int = 4


def rows(parts: Parts, adapters: Mapping[str, str]) -> list[Row]:
    """The table's rows. ``adapters``: RAG-PT set -> folder; the key "all" is the full method."""
    acs = parts.rule
    table = [
        Row("base", "base model", ALONE),
        Row("beam", "base model, beam search", CLEAN, beams=4),
        Row("naive", "+ naive RAG (one generic retriever, top-k)", WITH, "generic"),
        Row("domain", "+ domain-aware retrieval", {"references": WITH["references"]}, "domain"),
        Row("selection", "+ adaptive selection", {**WITH, **AGAINST, **OWN}, "domain", acs),
    ]
    for name, folder in adapters.items():
        if name != "all":
            title = f"+ RAG-PT, {name.replace('_', '-')} pairs only"
            table.append(Row(f"pt-{name}", title, ALONE | WITH | AGAINST, "domain", acs, folder))
    if "all" in adapters:
        every = ALONE | WITH | AGAINST | OWN
        table.append(Row("pt-all", "+ RAG-PT (full method)", every, "domain", acs, adapters["all"]))
    return table


def run_rows(
    table: Sequence[Row],
    parts: Parts,
    data: DataFolder,
    examples: Sequence[Example],
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Run every row under its conditions into ``out/runs/ROW/CONDITION``; finished ones stand."""
    folders = []
    for row in table:
        found: Mapping[str, Searcher] = {}
        if row.retrieval == "generic":
            if parts.generic is None:
                raise UserError(f"ablation: row {row.name} needs a generic retriever")
            found = {GENERIC: parts.generic}
        elif row.retrieval == "domain":
            found = parts.domain_retrievers
        pipeline = Pipeline(
            domain=parts.domain, retrievers=found, rule=row.rule, k=parts.k,
            generator=parts.generator(row.adapter, row.beams),
        )  # fmt: skip
        system = {
            "row": row.name, "title": row.title, "retrieval": row.retrieval, "k": parts.k,
            "rule": str(row.rule), "beams": row.beams,
            "generator": {"model": pipeline.generator.name if pipeline.generator else "",
                          "adapter": row.adapter},
        }  # fmt: skip
        settings = RunSettings(ids=tuple(example.id for example in examples))

        def report(done: int, total: int, name: str = row.title) -> None:
            if progress:
                progress(name, done, total)

        folder = out / "runs" / row.name
        run_plans(pipeline, data, dict(row.plans), folder, settings, seed, system, progress=report)
        folders += [folder / name for name in row.plans]
    return folders


def sample(data: DataFolder, studies: int | None, split: str = "test") -> list[Example]:
    """All questions and reports of the first ``studies`` studies of each domain, with twins.

    The first ones in file order, so that nobody chose them; None takes every study.
    """
    counts: dict[str | None, dict[str, None]] = {}
    chosen = []
    for example in data.examples(split):
        study = str(example.meta.get("study", example.id)).split("-twin-")[0]
        seen = counts.setdefault(example.domain, {})
        if study not in seen and studies is not None and len(seen) >= studies:
            continue
        seen[study] = None
        chosen.append(example)
    return chosen


def stated(data: DataFolder, studies: int | None, examples: Sequence[Example]) -> str:
    """The sample of :func:`sample` in a sentence."""
    which = "all" if studies is None else f"the first {studies}"
    per = ", ".join(f"{n} {d}" for d, n in Counter(e.domain or "?" for e in examples).items())
    return f"{which} test studies of each domain ({len(examples)} examples: {per})."


def embedded_parts(rule: RuleSpec | None = None) -> Parts:
    """The parts of the embedded system; indexes are built on first use."""
    from mmedrag.domain import open_domain
    from mmedrag.generators import load_generator
    from mmedrag.retriever import open_retriever

    loaded: dict[tuple[str | None, int], Generator] = {}

    def generator(adapter: str | None, beams: int) -> Generator:
        key = (adapter, beams)
        if key not in loaded:
            folder = located(adapter) if adapter else None
            loaded[key] = load_generator(
                "hf", embedded.path("vlm"), folder, num_beams=beams, name="embedded"
            )
        return loaded[key]

    return Parts(
        domain=open_domain(embedded.path("domain")),
        domain_retrievers={d: open_retriever(p) for d, p in embedded.index_folders().items()},
        generic=open_retriever(embedded.generic_index()),
        generator=generator,
        rule=rule or RuleSpec(),
    )


def embedded_adapters() -> dict[str, str]:
    """RAG-PT set -> name of the adapters that ship; "all" is the full method."""
    found = {}
    for name in embedded.available():
        if name.startswith("adapter"):
            found[name.partition("-")[2] or "all"] = f"{EMBEDDED}:{name}"
    return {key: found[key] for key in sorted(found, key=lambda k: (k == "all", k))}


def demo(
    out: Path,
    studies: int | None = 24,
    seed: int = 0,
    sets: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The main job on the embedded system: ablation, metrics.json and the HTML report in ``out``.

    Args:
        studies: test studies per domain; None runs all of them.
        sets: also the rows of each RAG-PT set alone.

    Returns:
        The evaluation (see :func:`mmedrag.evaluate.evaluate`) with ``report``: the page's path.
    """
    from mmedrag.report import write_report

    parts = embedded_parts()
    adapters = embedded_adapters()
    if not sets:
        adapters = {key: folder for key, folder in adapters.items() if key == "all"}
    data = DataFolder(embedded.data_folder())
    examples = sample(data, studies)
    folders = run_rows(rows(parts, adapters), parts, data, examples, out, seed, progress)
    result = evaluate(folders, data, out=out / "metrics.json", seed=seed)
    page = write_report(
        folders, out, data=data, metrics=result, title="Ablation of the embedded system",
        note=f"Small models on drawn pictures: {stated(data, studies, examples)} They say how the "
        "method works and nothing about real images.",
    )  # fmt: skip
    (out / "sample.json").write_text(
        json.dumps({"studies_per_domain": studies, "examples": len(examples), "seed": seed}) + "\n"
    )
    return {**result, "report": str(page), "examples": len(examples)}


def headline(result: Mapping[str, Any]) -> str:
    """The demo's table in words: closed questions and reports, overall, clean images."""
    lines = [
        f"{result['examples']} examples; balanced accuracy of closed questions and finding F1 of "
        "reports, with 95 % intervals",
        f"{'':<46} {'closed questions':<24} reports",
    ]
    for arm in result["runs"].values():
        if arm["condition"].startswith("clean"):
            cells = [
                _cell(arm["tasks"].get(task, {}).get("overall"), metric)
                for task, metric in (("vqa_closed", "balanced_accuracy"), ("report", "finding_f1"))
            ]
            lines.append(f"{arm['title']:<46} {cells[0]:<24} {cells[1]}")
    lines.append("* not above its best control (see the report)")
    lines.append(f"report: {result['report']}")
    return "\n".join(lines)


def _cell(table: Mapping[str, Any] | None, metric: str) -> str:
    found = (table or {}).get("metrics", {}).get(metric)
    if not found or found["value"] is None:
        return "-"
    mark = "*" if metric in (table or {}).get("marked", {}) else ""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{mark}"
