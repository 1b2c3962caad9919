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
    from mmedrag.evaluate import RESAMPLES, evaluate
    from mmedrag.types import DataFolder

    result = evaluate(
        runs, DataFolder(data) if data else None, out=out, seed=call.seed,
        resamples=resamples or RESAMPLES, subgroups=subgroups, clinical=clinical,
    )  # fmt: skip
    call.finish(result, headline(result, out))


def headline(result: dict, out: Path) -> str:
    """The main numbers with intervals and the best control, a line each; then what was asked
    for and could not be computed."""
    from mmedrag.metrics_clinical import NAMES

    lines, lacking = [], set()
    for name, arm in result["runs"].items():
        for task, groups in arm["tasks"].items():
            for group, found in groups.items():
                why = found.get("not_computed", {})
                lacking |= {f"not computed: {why[key]}" for key in NAMES if key in why}
                for metric in ("balanced_accuracy", "token_f1", "finding_f1", "rouge_l"):
                    value = found["metrics"].get(metric)
                    if not value or value["value"] is None:
                        continue
                    low, high = value["low"], value["high"]
                    mark = found.get("marked", {}).get(metric)
                    lines.append(
                        f"{name}  {task}/{group}  {metric} {value['value']:.3f} "
                        f"[{low:.3f}, {high:.3f}] n={value['n']}"
                        + (f"  not above control {mark}" if mark else "")
                    )
    return "\n".join([*lines, *sorted(lacking), f"written to {out}"])
