"""The main job: an ablation, its evaluation and its report, on the embedded or on a user's system.

Place in the picture: the end of it. Rows of :mod:`mmedrag.experiments.ablation` -> ``OUT/runs`` ->
``OUT/metrics.json`` -> ``OUT/report.html``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag.evaluation import EvaluationResult, Scores, evaluate
from mmedrag.experiments import ablation
from mmedrag.experiments.ablation import AblationSettings, Progress
from mmedrag.experiments.effects import effect_lines, read_fusion, with_effects
from mmedrag.pipeline import Flags, System, data_folder, generic_index, resolve_system
from mmedrag.runtime import DataFolder, check_own, write_text

STUDIES = 10  # of each domain: what two slow cores answer in under five minutes


@dataclass(frozen=True)
class Ablation:
    """An ablation that was run and scored.

    ``report``: path of the page. ``examples``: their number. ``not_run``: title of a row -> what
    it lacks.
    """

    evaluation: EvaluationResult
    report: Path
    examples: int
    not_run: dict[str, str]

    @property
    def failed(self) -> int:
        """Rows without an answer."""
        return sum(run.failed for run in self.evaluation.runs.values())

    def to_json(self) -> dict[str, Any]:
        """The content of ``metrics.json``, with the rest beside it."""
        return {
            **self.evaluation.to_json(),
            "report": str(self.report),
            "examples": self.examples,
            "failed": self.failed,
            "not_run": self.not_run,
        }


def run_demo(
    out: Path,
    studies: int = STUDIES,
    seed: int = 0,
    pairwise: bool = False,
    progress: Progress | None = None,
) -> Ablation:
    """The ablation of the embedded system on its own benchmark.

    Args:
        studies: test studies per domain; 0 runs all of them.
        pairwise: also the rows of RAG-PT with two sets of pairs.
    """
    settings = AblationSettings(
        studies=studies,
        pairwise=pairwise,
        adapters=ablation.embedded_adapters(),
        generic=str(generic_index()),
    )
    data = DataFolder(data_folder())
    return ablate(
        resolve_system(Flags()),
        data,
        out,
        settings,
        seed,
        progress,
        title="Ablation of the embedded system",
        note="Small models on drawn pictures: they say how the method works and nothing about "
        "real images.",
    )


def ablate(
    system: System,
    data: DataFolder,
    out: Path,
    settings: AblationSettings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    title: str = "Ablation",
    note: str = "",
) -> Ablation:
    """Run every row of the ablation, score them, and write the report; finished rows stand.

    Args:
        system: names of the parts; its adapter is the full method, the base goes without.
        data: examples; its corpus gives the random references, its split train the controls.
        note: what the page says before the sample.

    Raises:
        UserError: nothing to run, a part that cannot be opened, or ``out`` of other parts.
    """
    from mmedrag.report import write_report

    check_own(*(out / name for name in ("metrics.json", "report.html", "sample.json")))
    settings = settings or AblationSettings()
    fusion = read_fusion(settings.attainable) if settings.attainable else None
    examples = ablation.sample(data, settings.studies, settings.split)
    parts = ablation.parts_of(system, settings, seed)
    table = ablation.rows(
        parts, ablation.system_adapters(system, settings), settings.pairwise, bool(data.truth())
    )
    folders = ablation.run_rows(table, parts, data, examples, out, seed, progress)
    lacking = {row.title: row.lacks for row in table if row.lacks}
    result = evaluate(folders, data, out=out / "metrics.json", seed=seed, not_run=lacking)
    result = with_effects(result, table, out / "runs", fusion)
    result.write(out / "metrics.json")
    sample = ablation.describe_sample(settings.studies, examples, settings.split)
    note = f"{note} Sample: {sample}".strip()
    if lacking:
        note += f" Not run: {'; '.join(f'{row} ({why})' for row, why in lacking.items())}."
    page = write_report(folders, out, data=data, metrics=result, title=title, note=note)
    state = {"studies_per_domain": settings.studies, "examples": len(examples), "seed": seed}
    write_text(out / "sample.json", json.dumps(state) + "\n", own=True)
    return Ablation(result, page, len(examples), lacking)


def headline(made: Ablation) -> str:
    """The table in words: closed questions and reports, overall, clean images."""
    lines = [
        f"{made.examples} examples; balanced accuracy of closed questions and finding F1 "
        "(ROUGE-L without exact findings) of reports, with 95 % intervals and n",
        f"{'':<48} {'closed questions':<30} reports",
    ]
    for run in made.evaluation.runs.values():
        if run.plain:
            closed = _cell(run.scores("vqa_closed"), "balanced_accuracy")
            report = run.scores("report")
            reports = _cell(report, "finding_f1") or _cell(report, "rouge_l")
            lines.append(f"{run.title:<48} {closed or '-':<30} {reports or '-'}")
    lines += [f"{title:<48} not run: {why}" for title, why in made.not_run.items()]
    lines += effect_lines(made.evaluation)
    lines.append("* not above its best control (see the report)")
    lines.append(f"report: {made.report}")
    return "\n".join(lines)


def _cell(scores: Scores | None, metric: str) -> str:
    found = scores and scores.known(metric)
    if not scores or not found:
        return ""
    mark = "*" if metric in scores.marked else ""
    bounds = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.value:.3f}{bounds}{mark} n={found.n}"
