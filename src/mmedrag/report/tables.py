"""Tables of the report, each as HTML cells, CSV and LaTeX from the same rows.

Place in the picture: :class:`mmedrag.evaluation.EvaluationResult` -> tables. A cell is text for
people and, for CSV, a value with its bounds and n in columns of their own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from mmedrag.evaluation import (
    OVERALL,
    Comparison,
    EvaluationResult,
    NamedControl,
    NotComputed,
    RunResult,
    Scores,
    best_control,
    generator_control,
)
from mmedrag.evaluation.metrics import FEWEST, LABELS, Difference, Estimate

MARK = "†"
TASK_NAMES = {"vqa_closed": "Closed questions", "vqa_open": "Open questions", "report": "Reports"}
HEADLINE = {
    "vqa_closed": "accuracy balanced_accuracy macro_f1 mcc auroc ece parse_rate".split(),
    "vqa_open": ["exact_match", "token_f1"],
    "report": ["finding_f1", "bleu_1", "bleu_4", "rouge_l", "meteor"],
}
LEADING = {"vqa_closed": "balanced_accuracy", "vqa_open": "token_f1", "report": "finding_f1"}
SECOND = {"report": "rouge_l", "vqa_closed": "accuracy", "vqa_open": "exact_match"}


@dataclass(frozen=True)
class Cell:
    """One cell: the number with bounds and n (None: text or a count), a note under it, a mark."""

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    note: str = ""
    marked: bool = False


@dataclass
class Table:
    """Rows of cells under column names; the first ``heads`` columns name the row."""

    id: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    heads: int = 1

    def csv(self) -> str:
        """One column for text and for counts; value, low, high and n for each estimate."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        numeric = [any(c.value is not None for c in cells) for cells in columns]
        bounded = [any(c.n is not None for c in cells) for cells in columns]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        header: list[str] = []
        for name, more in zip(self.columns, bounded, strict=True):
            header += [name, f"{name} low", f"{name} high", f"{name} n"] if more else [name]
        writer.writerow(header)
        for row in self.rows:
            line: list[Any] = []
            for cell, number, more in zip(row, numeric, bounded, strict=True):
                values = [cell.value, cell.low, cell.high, cell.n][: 4 if more else 1]
                line += ["" if v is None else v for v in values] if number else [cell.text]
            writer.writerow(line)
        return out.getvalue()

    def latex(self) -> str:
        """A booktabs table; intervals in brackets, marks as daggers."""
        kind = "l" * self.heads + "r" * (len(self.columns) - self.heads)
        body = [" & ".join(map(_tex, self.columns)) + r" \\ \midrule"]
        for row in self.rows:
            body.append(" & ".join(_tex(c.text) for c in row) + r" \\")
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_tex(self.caption)}}}",
                rf"\label{{tab:{self.id}}}",
                rf"\begin{{tabular}}{{{kind}}} \toprule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    @property
    def spans(self) -> list[int]:
        """Per row: over how many rows its first cell stands (0: the cell above covers it)."""
        out: list[int] = []
        for i, row in enumerate(self.rows):
            if self.heads > 1 and i and row[0].text == self.rows[i - 1][0].text:
                start = max(j for j, span in enumerate(out) if span)
                out[start] += 1
                out.append(0)
            else:
                out.append(1)
        return out

    @property
    def csv_link(self) -> str:
        return "data:text/csv;charset=utf-8," + quote(self.csv())

    @property
    def latex_link(self) -> str:
        return "data:application/x-tex;charset=utf-8," + quote(self.latex())


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MARK: r"$^\dagger$",
    "–": "--",
    "−": "$-$",
    "≤": r"$\leq$",
    "…": r"\ldots{}",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


Value = Estimate | Difference | Comparison


def number(
    found: Value | None, marked: bool = False, note: str = "", rows: int | None = None
) -> Cell:
    """A metric's value with its interval; "–" where it is not defined. Its n is printed where
    it is not that of the row (``rows``)."""
    if found is None or found.value is None:
        return Cell("–", note=note)
    text = f"{found.value:.3f}{MARK if marked else ''}{_bounds(found.low, found.high)}"
    if rows is not None and found.n != rows:
        text += f" (n {found.n})"
    return Cell(text, found.value, found.low, found.high, found.n, note, marked)


def _bounds(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def count(value: int) -> Cell:
    return Cell(str(value), float(value))


def beside(control: NamedControl | None) -> str:
    """A control in words, for the note below a value."""
    if control is None:
        return ""
    bounds = _bounds(control.low, control.high)
    return f"{_words(control.name)} {control.value:.3f}{bounds}"


def metric_cell(group: Scores, metric: str) -> Cell:
    """A metric beside its best control; AUROC and ECE also with how many rows they leave out."""
    note = beside(best_control(group.controls, metric))
    if metric in ("auroc", "ece") and group.without_p_yes:
        note = f"{group.without_p_yes} rows without p(yes); {note}".removesuffix("; ")
    return number(group.metrics.get(metric), metric in group.marked, note, group.n)


def generator_cell(group: Scores, metric: str) -> Cell:
    """The generator without a picture, with the references of the clean one."""
    found = generator_control(group.controls, metric)
    if found is None:
        return Cell("–")
    note = _words(found.name)
    if metric in group.generator_marked:
        note += ": row not clearly above it"
    return Cell(
        f"{found.value:.3f}{_bounds(found.low, found.high)}",
        found.value,
        found.low,
        found.high,
        found.n,
        note,
    )


def shown_metrics(result: EvaluationResult, task: str, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted metrics that any run has."""
    found = [groups[OVERALL].metrics for groups in result.of_task(task).values()]
    return [m for m in wanted if any(m in metrics for metrics in found)]


def _leading(result: EvaluationResult, task: str) -> list[str]:
    return shown_metrics(result, task, (LEADING[task], SECOND[task]))


def headline(result: EvaluationResult, task: str, runs: Sequence[str], suffix: str = "") -> Table:
    """All rows overall: every headline metric with interval, best control and mark."""
    metrics = shown_metrics(result, task, HEADLINE[task])
    shown = {n: groups[OVERALL] for n, groups in result.of_task(task).items() if n in runs}
    leading = next(iter(_leading(result, task)), None)
    blind = [leading] if leading and _any_generator(shown.values(), leading) else []
    table = Table(
        f"headline-{task}{suffix}",
        f"{TASK_NAMES[task]}: value [95 % interval], best control below it. {MARK}: not clearly "
        "above that control.",
        ["row", "n", *metrics, *(f"{m}: generator without a picture" for m in blind)],
    )
    for name, whole in shown.items():
        cells = [metric_cell(whole, m) for m in metrics]
        cells += [generator_cell(whole, m) for m in blind]
        table.rows.append([Cell(result.runs[name].title), count(whole.n), *cells])
    for metric in blind:
        below = [result.runs[n].title for n, own in shown.items() if metric in own.generator_marked]
        if below:
            table.caption += (
                f" Not clearly above their generator without a picture ({metric}; it has the "
                f"references of the clean one): {'; '.join(below)}."
            )
    small = sorted({own.patients for own in shown.values() if own.patients < FEWEST})
    if small:
        table.caption += (
            f" From fewer than {FEWEST} patients intervals are too narrow, and no difference is "
            "claimed."
        )
    return table


def _any_generator(groups: Iterable[Scores], metric: str) -> bool:
    return any(generator_control(group.controls, metric) for group in groups)


def by_domain(result: EvaluationResult, task: str, runs: Sequence[str]) -> Table:
    metrics = _leading(result, task)
    table = Table(
        f"domains-{task}",
        f"{TASK_NAMES[task]} by domain",
        ["row", "domain", "n", "patients", *metrics],
        heads=2,
    )
    for name, groups in result.of_task(task).items():
        for domain, group in groups.items():
            if name in runs and domain != OVERALL:
                start = [Cell(result.runs[name].title), Cell(domain)]
                cells = [metric_cell(group, m) for m in metrics]
                table.rows.append([*start, count(group.n), count(group.patients), *cells])
    return table


def controls(result: EvaluationResult, task: str, runs: Sequence[str]) -> Table:
    """Every control of every row, with the paired difference to it."""
    metrics = _leading(result, task)
    columns = [c for m in metrics for c in (m, f"{m}: row − control")]
    table = Table(
        f"controls-{task}",
        f"{TASK_NAMES[task]}: every control, overall",
        ["row", "control", "n", *columns],
        heads=2,
    )
    for name, groups in result.of_task(task).items():
        whole = groups[OVERALL]
        for control, own in sorted(whole.controls.items()) if name in runs else ():
            row = [Cell(result.runs[name].title), Cell(_words(control)), count(whole.n)]
            for metric in metrics:
                found = own.get(metric)
                row += [number(found, rows=whole.n)]
                row += [number(found and found.difference, rows=whole.n)]
            table.rows.append(row)
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def comparisons(result: EvaluationResult) -> Table:
    table = Table(
        "comparisons",
        "Paired tests between rows on the examples that both answered (Holm-adjusted within a "
        "task)",
        ["task", "metric", "from", "to", "change", "n", "p", "p (Holm)", "test"],
        heads=4,
    )
    for row in result.comparisons:
        names = [TASK_NAMES[row.task], row.metric, *(result.runs[r].title for r in (row.a, row.b))]
        found = [number(row), count(row.n), _p(row.p), _p(row.p_holm), Cell(row.test)]
        table.rows.append([*map(Cell, names), *found])
    return table


SELECTION = {
    "kept": "mean kept",
    "kept_all": "all kept",
    "kept_none": "none kept",
    "excluded": "own or near-identical, excluded per image",
}
HUBNESS = {
    "distinct_share": "distinct top-1 references per image",
    "top_share": "images served by the most used",
    "top_ten_share": "images served by the ten most used",
}


PER_IMAGE = {
    "retrieval": "Retrieved references: agreement of their study's findings with the image's, "
    "shuffled references below it; recall of the image's own report",
    "selection": "Selection: how many references are kept, and what was left out",
    "hubness": "Hubness: do a few references come up for everyone? (Of these images: more of them "
    "show other references, so that there is no interval.)",
    "similarity": "Similarity of retrieved references by rank: mean over images",
}


def retrieval(result: EvaluationResult) -> list[Table]:
    """What the references of each row are worth, how many are kept, whether a few come up for
    everyone, and how similar they are; by domain."""
    groups = [group for run in result.runs.values() for group in run.retrieval.values()]
    found = {metric: metric for group in groups for metric in group.metrics}
    similar = {m: m for m in found if m.startswith("similarity@")}
    columns = {
        "retrieval": {m: m for m in found if m not in {*SELECTION, *HUBNESS, *similar}},
        "selection": {m: name for m, name in SELECTION.items() if m in found},
        "hubness": {m: name for m, name in HUBNESS.items() if m in found},
        "similarity": similar,
    }
    return [_per_image(result, name, metrics) for name, metrics in columns.items()]


def _per_image(result: EvaluationResult, name: str, metrics: Mapping[str, str]) -> Table:
    """Metrics of ``retrieval`` under the given names; empty without any."""
    extra = ["rule"] if name == "selection" else []
    columns = ["row", "domain", *extra, "images", *metrics.values()]
    table = Table(name, PER_IMAGE[name], columns, heads=2)
    for run in result.runs.values():
        for domain, group in run.retrieval.items() if metrics else ():
            rule = [Cell("; ".join(group.rules or [])) for _ in extra]
            cells = [metric_cell(group, m) for m in metrics]
            table.rows.append([Cell(run.title), Cell(domain), *rule, count(group.n), *cells])
    return table


def classification(result: EvaluationResult) -> list[Table]:
    """Confusion of closed questions, the points of the reliability diagram, and of domains."""
    routed = [run for run in result.runs.values() if run.routing]  # most rows share their model
    return [_confusion(result), _reliability(result), *map(_routing, routed[-1:])]


def _confusion(result: EvaluationResult) -> Table:
    table = Table(
        "confusion",
        "Confusion of closed questions by domain (strict parser): share of each answer",
        ["row", "domain", "truth", "n", *(f"said {answer}" for answer in LABELS)],
        heads=3,
    )
    for run in result.runs.values():
        for domain, sides in (run.confusion or {}).items():
            for side, shares in sides.items():
                start = [Cell(run.title), Cell(domain), Cell(side), count(shares["yes"].n)]
                table.rows.append([*start, *(number(shares[answer]) for answer in LABELS)])
    return table


def _reliability(result: EvaluationResult) -> Table:
    table = Table(
        "reliability",
        "Reliability: share of yes among the questions of a bin of P(yes)",
        ["row", "P(yes), mean of the bin", "share of yes", "n"],
        heads=2,
    )
    for run in result.runs.values():
        for point in run.reliability or ():
            found = [number(point.p_yes), number(point.share_yes), count(point.share_yes.n)]
            table.rows.append([Cell(run.title), *found])
    return table


def _routing(run: RunResult) -> Table:
    """Domain of one row's images against the one that was identified."""
    found = run.routing or {}
    labels = list(next(iter(found.values())))
    table = Table(
        "routing",
        f"{run.title}: domain of each image against the one that was identified",
        ["domain", "images", *(f"identified as {label}" for label in labels)],
    )
    for domain, shares in found.items():
        cells = [number(shares[label]) for label in labels]
        table.rows.append([Cell(domain), count(shares[labels[0]].n), *cells])
    return table


def _p(value: float | None) -> Cell:
    return Cell("–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}")


def reliance(result: EvaluationResult) -> Table:
    table = Table(
        "reliance",
        "Reliance on references and on the image; every rate with its denominator",
        ["system", "metric", "value", "n", "denominator"],
        heads=2,
    )
    for system in result.reliance.values():
        for metric, rate in system.metrics.items():
            found = [number(rate), count(rate.n), Cell(rate.denominator)]
            table.rows.append([Cell(system.title), Cell(metric), *found])
    return table


def subgroups(result: EvaluationResult) -> Table:
    table = Table(
        "subgroups",
        "Subgroups: value per group and the gap between the best and the worst "
        "(p: how often a random relabelling of patients gives as large a gap)",
        ["row", "task", "field", "group", "metric", "value", "n"],
        heads=5,
    )
    for run, tasks in result.subgroups.items():
        for task, fields in tasks.items():
            for path, metrics in fields.items():
                if isinstance(metrics, NotComputed):
                    continue
                start = [Cell(result.runs[run].title), Cell(TASK_NAMES[task]), Cell(path)]
                for metric, found in metrics.items():
                    cells = [
                        (name, number(score, score.marked, beside(score.control)), score.n)
                        for name, score in found.values.items()
                    ]
                    if gap := found.gap:
                        cells.append((f"gap (p = {gap.p:.3f})", number(gap), gap.n))
                    for name, cell, n in cells:
                        table.rows.append([*start, Cell(name), Cell(metric), cell, count(n)])
    return table


def not_computed(result: EvaluationResult) -> Table:
    """What is missing, why, and in which of the plain rows."""
    table = Table(
        "not-computed", "What was not computed, and what it needs", ["what", "needs", "in rows"]
    )
    plain = {name: run for name, run in result.runs.items() if run.plain}
    seen: dict[tuple[str, str], dict[str, None]] = {
        item: {} for item in result.not_computed.items()
    }

    def note(title: str, missing: Mapping[str, str]) -> None:
        for item in missing.items():
            seen.setdefault(item, {})[title] = None

    for name, run in plain.items():
        for groups in run.tasks.values():
            note(run.title, groups[OVERALL].not_computed)
        for fields in result.subgroups.get(name, {}).values():
            lacking = {p: m.not_computed for p, m in fields.items() if isinstance(m, NotComputed)}
            note(run.title, lacking)
    for system in result.reliance.values():
        note(system.title, system.not_computed if system.metrics else {})
    titles = {run.title for run in plain.values()}
    for (what, why), where in sorted(seen.items()):
        rows = "all" if titles <= set(where) else "; ".join(where)
        table.rows.append([Cell(_words(what)), Cell(why), Cell(rows)])
    return table
