"""``mmedrag eval``: run folders to metrics; no model needed."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command


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
    call.finish(result, headline(result, out))


def headline(result: dict, out: Path) -> str:
    """The main numbers with interval and best control, a line each; then what was asked for and
    could not be computed."""
    from mmedrag.evaluation.metrics import NAMES

    lines = []
    lacking = {f"not computed: {why}" for why in result.get("not_computed", {}).values()}
    for name, arm in result["runs"].items():
        for task, groups in arm["tasks"].items():
            for group, found in groups.items():
                why = found.get("not_computed", {})
                lacking |= {f"not computed: {why[key]}" for key in NAMES if key in why}
                for metric in ("balanced_accuracy", "token_f1", "finding_f1", "rouge_l"):
                    if said := score(found, metric):
                        lines.append(f"{name}  {task}/{group}  {metric} {said}")
    return "\n".join([*lines, *sorted(lacking), f"written to {out}"])


def score(found: dict, metric: str) -> str:
    """A value and its best control, each with its interval, and n; "" without a value."""
    from mmedrag.evaluation import best_control
    from mmedrag.report import beside

    value = found["metrics"].get(metric)
    if not value or value["value"] is None:
        return ""
    low, high = value["low"], value["high"]
    bounds = "no interval" if low is None else f"[{low:.3f}, {high:.3f}]"
    control = beside(best_control(found, metric))
    against = f"  control {control}" if control else ""
    mark = ", not clearly below" if control and metric in found.get("marked", {}) else ""
    return f"{value['value']:.3f} {bounds} n={value['n']}{against}{mark}"
