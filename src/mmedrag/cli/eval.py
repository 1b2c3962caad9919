"""``mmedrag eval``: run folders to metrics; no model needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command

if TYPE_CHECKING:
    from mmedrag.evaluation import EvaluationResult, Scores


@command("eval")
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=FILE, required=True, help="metrics.json to write.")
@click.option("--data", type=FOLDER, help="DATA folder: train controls and benchmark truth.")
@click.option("--resamples", type=click.IntRange(100), help="Of the bootstrap.")
@click.option("--subgroup", "subgroups", multiple=True, help="Repeatable: source, meta.sex, ...")
@click.option("--clinical", is_flag=True, help="Also RadEval's metrics (extra `clinical`).")
def noun(
    call: Call,
    runs: tuple[Path, ...],
    out: Path,
    data: Path | None,
    resamples: int | None,
    subgroups: tuple[str, ...],
    clinical: bool,
) -> None:
    """Score run folders; the first one is the baseline of the paired tests."""
    from mmedrag.evaluation import evaluate
    from mmedrag.evaluation.metrics import RESAMPLES
    from mmedrag.pipeline import missing
    from mmedrag.runtime import DataFolder

    result = evaluate(
        runs,
        DataFolder(data) if data else None,
        out=out,
        seed=call.seed,
        resamples=resamples or RESAMPLES,
        subgroups=subgroups,
        clinical=clinical,
    )
    lacking = missing(runs)
    call.finish(result.to_json(), headline(result, out), ok=not lacking.get("nothing"))


def headline(result: EvaluationResult, out: Path) -> str:
    """The main numbers with interval and best control, a line each; then what was asked for and
    could not be computed."""
    from mmedrag.evaluation.metrics import NAMES

    lines = []
    lacking = {f"not computed: {why}" for why in result.not_computed.values()}
    for name, run in result.runs.items():
        for task, groups in run.tasks.items():
            for group, found in groups.items():
                why = found.not_computed
                lacking |= {f"not computed: {why[key]}" for key in NAMES if key in why}
                for metric in ("balanced_accuracy", "token_f1", "finding_f1", "rouge_l"):
                    if text := score(found, metric):
                        lines.append(f"{name}  {task}/{group}  {metric} {text}")
    return "\n".join([*lines, *sorted(lacking), f"written to {out}"])


def score(found: Scores, metric: str) -> str:
    """A value and its best control, each with its interval, and n; "" without a value."""
    from mmedrag.evaluation import best_control, generator_control
    from mmedrag.report import beside

    estimate = found.known(metric)
    if not estimate:
        return ""
    low, high = estimate.low, estimate.high
    bounds = "no interval" if low is None else f"[{low:.3f}, {high:.3f}]"
    control = beside(best_control(found.controls, metric))
    against = f"  control {control}" if control else ""
    mark = ", not clearly below" if control and metric in found.marked else ""
    generator = beside(generator_control(found.controls, metric))
    if generator and metric in found.generator_marked:
        mark += f"  not clearly above {generator}"
    return f"{estimate.value:.3f} {bounds} n={estimate.n}{against}{mark}"
