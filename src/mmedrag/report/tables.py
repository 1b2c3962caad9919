"""Tables of the report, each as HTML cells, CSV and LaTeX from the same rows.

Place in the picture: the evaluation's dict -> tables. A cell is text for people and, for CSV, a
value with its bounds in columns of their own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from mmedrag.compare import rival

MARK = "†"
TASK_NAMES = {"vqa_closed": "Closed questions", "vqa_open": "Open questions", "report": "Reports"}
HEADLINE = {
    "vqa_closed": ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc", "ece",
                   "parse_rate"),
    "vqa_open": ("exact_match", "token_f1"),
    "report": ("finding_f1", "bleu_1", "bleu_4", "rouge_l", "meteor"),
}  # fmt: skip
LEADING = {"vqa_closed": "balanced_accuracy", "vqa_open": "token_f1", "report": "finding_f1"}
SECOND = {"report": "rouge_l", "vqa_closed": "accuracy", "vqa_open": "exact_match"}


@dataclass(frozen=True)
class Cell:
    """One cell: the number with bounds (None: text only), a note under it, a mark."""

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
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
        """One column per text cell; value, low and high for each numeric column."""
        numeric = [any(row[i].value is not None for row in self.rows)
                   for i in range(len(self.columns))]  # fmt: skip
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        header: list[str] = []
        for name, number in zip(self.columns, numeric, strict=True):
            header += [name, f"{name} low", f"{name} high"] if number else [name]
        writer.writerow(header)
        for row in self.rows:
            line: list[Any] = []
            for cell, number in zip(row, numeric, strict=True):
                bounds = [cell.value, cell.low, cell.high]
                line += ["" if v is None else v for v in bounds] if number else [cell.text]
            writer.writerow(line)
        return out.getvalue()

    def latex(self) -> str:
        """A booktabs table; intervals in brackets, marks as daggers."""
        kind = "l" * self.heads + "r" * (len(self.columns) - self.heads)
        body = [" & ".join(map(_tex, self.columns)) + r" \\ \midrule"]
        for row in self.rows:
            body.append(" & ".join(_tex(c.text) for c in row) + r" \\")
        return "\n".join(
            [r"\begin{table}", rf"\caption{{{_tex(self.caption)}}}", rf"\label{{tab:{self.id}}}",
             rf"\begin{{tabular}}{{{kind}}} \toprule", *body, r"\bottomrule", r"\end{tabular}",
             r"\end{table}", ""]
        )  # fmt: skip

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


_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
        "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        MARK: r"$^\dagger$", "–": "--", "−": "$-$", "≤": r"$\leq$", "…": r"\ldots{}"}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def number(cell: Mapping[str, Any] | None, marked: bool = False, note: str = "") -> Cell:
    """A metric's value with its interval; "–" where it is not defined."""
    if not cell or cell.get("value") is None:
        return Cell("–", note=note)
    value, low, high = cell["value"], cell.get("low"), cell.get("high")
    text = f"{value:.3f}{MARK if marked else ''}"
    if low is not None and high is not None:
        text += f" [{low:.3f}, {high:.3f}]"
    return Cell(text, value, low, high, note, marked)


def count(value: int) -> Cell:
    return Cell(str(value), float(value))


def best_control(group: Mapping[str, Any], metric: str) -> tuple[str, float] | None:
    """The control that a metric is held against: (name, value)."""
    return rival(group["controls"], metric)


def metric_cell(group: Mapping[str, Any], metric: str) -> Cell:
    """A metric beside its best control."""
    best = best_control(group, metric)
    note = f"{best[0].replace('_', ' ')} {best[1]:.3f}" if best else ""
    return number(group["metrics"].get(metric), metric in group["marked"], note)


def of_task(result: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """arm -> groups, of the arms that have the task."""
    return {name: arm["tasks"][task] for name, arm in result["runs"].items()
            if task in arm["tasks"]}  # fmt: skip


def shown_metrics(result: Mapping[str, Any], task: str) -> list[str]:
    arms = of_task(result, task).values()
    return [m for m in HEADLINE[task] if any(m in g["overall"]["metrics"] for g in arms)]


def headline(result: Mapping[str, Any], task: str, arms: Sequence[str], suffix: str = "") -> Table:
    """All rows overall: every headline metric with interval, best control and mark."""
    metrics = shown_metrics(result, task)
    table = Table(
        f"headline-{task}{suffix}",
        f"{TASK_NAMES[task]}: value [95 % interval], best control below it. {MARK}: not clearly "
        "above that control.",
        ["row", "n", *metrics],
    )
    for name, groups in of_task(result, task).items():
        if name in arms:
            whole = groups["overall"]
            table.rows.append(
                [Cell(result["runs"][name]["title"]), count(whole["n"]),
                 *(metric_cell(whole, m) for m in metrics)]
            )  # fmt: skip
    return table


def by_domain(result: Mapping[str, Any], task: str, arms: Sequence[str]) -> Table:
    metrics = [m for m in (LEADING[task], SECOND[task]) if m in shown_metrics(result, task)]
    table = Table(
        f"domains-{task}", f"{TASK_NAMES[task]} by domain",
        ["row", "domain", "n", "patients", *metrics], heads=2,
    )  # fmt: skip
    for name, groups in of_task(result, task).items():
        for domain, group in groups.items():
            if name in arms and domain != "overall":
                table.rows.append(
                    [Cell(result["runs"][name]["title"]), Cell(domain), count(group["n"]),
                     count(group["patients"]), *(metric_cell(group, m) for m in metrics)]
                )  # fmt: skip
    return table


def controls(result: Mapping[str, Any], task: str, arms: Sequence[str]) -> Table:
    """Every control of every row, with the paired difference to it."""
    metrics = [m for m in (LEADING[task], SECOND[task]) if m in shown_metrics(result, task)]
    columns = [c for m in metrics for c in (m, f"{m}: row − control")]
    table = Table(
        f"controls-{task}", f"{TASK_NAMES[task]}: every control, overall",
        ["row", "control", *columns], heads=2,
    )  # fmt: skip
    for name, groups in of_task(result, task).items():
        if name not in arms:
            continue
        for control, cells in sorted(groups["overall"]["controls"].items()):
            row = [Cell(result["runs"][name]["title"]), Cell(control.replace("_", " "))]
            for metric in metrics:
                cell = cells.get(metric)
                row += [number(cell), number(cell and cell["difference"])]
            table.rows.append(row)
    return table


def comparisons(result: Mapping[str, Any]) -> Table:
    table = Table(
        "comparisons",
        "Paired tests between rows on the examples that both answered (Holm-adjusted within a "
        "task)",
        ["task", "metric", "from", "to", "change", "n", "p", "p (Holm)", "test"], heads=4,
    )  # fmt: skip
    titles = {name: arm["title"] for name, arm in result["runs"].items()}
    for row in result["comparisons"]:
        table.rows.append(
            [Cell(TASK_NAMES[row["task"]]), Cell(row["metric"]), Cell(titles[row["a"]]),
             Cell(titles[row["b"]]), number(row), count(row["n"]), _p(row["p"]),
             _p(row["p_holm"]), Cell(row["test"])]
        )  # fmt: skip
    return table


def retrieval(result: Mapping[str, Any]) -> Table:
    """What the references of each row are worth, by domain."""
    columns: list[str] = []
    for arm in result["runs"].values():
        for group in arm.get("retrieval", {}).values():
            columns += [m for m in group["metrics"] if m not in columns]
    table = Table(
        "retrieval", "Retrieved references: agreement of their study's findings with the image's, "
        "shuffled references below it; recall of the image's own report",
        ["row", "domain", "images", *columns], heads=2,
    )  # fmt: skip
    for arm in result["runs"].values():
        for domain, group in arm.get("retrieval", {}).items():
            table.rows.append(
                [Cell(arm["title"]), Cell(domain), count(group["n"]),
                 *(metric_cell(group, m) for m in columns)]
            )  # fmt: skip
    return table


def _p(value: float | None) -> Cell:
    return Cell("–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}")


def reliance(result: Mapping[str, Any]) -> Table:
    table = Table(
        "reliance", "Reliance on references and on the image; every rate with its denominator",
        ["system", "metric", "value", "n", "denominator"], heads=2,
    )  # fmt: skip
    for found in result["reliance"].values():
        for metric, cell in found["metrics"].items():
            table.rows.append(
                [Cell(found["title"]), Cell(metric), number(cell), count(cell["n"]),
                 Cell(cell["denominator"])]
            )  # fmt: skip
    return table


def subgroups(result: Mapping[str, Any]) -> Table:
    table = Table(
        "subgroups", "Subgroups: value per group and the gap between the best and the worst "
        "(p: how often a random relabelling of patients gives as large a gap)",
        ["row", "task", "field", "group", "metric", "value", "n"], heads=5,
    )  # fmt: skip
    for arm, tasks in result["subgroups"].items():
        for task, fields in tasks.items():
            for path, metrics in fields.items():
                if "not_computed" in metrics:
                    continue
                start = [Cell(result["runs"][arm]["title"]), Cell(TASK_NAMES[task]), Cell(path)]
                for metric, cell in metrics.items():
                    for name, value in cell["values"].items():
                        table.rows.append([*start, Cell(name), Cell(metric), _held(value),
                                           count(value["n"])])  # fmt: skip
                    if cell["gap"]:
                        gap = f"gap (p = {cell['gap']['p']:.3f})"
                        table.rows.append([*start, Cell(gap), Cell(metric), number(cell["gap"]),
                                           Cell("")])  # fmt: skip
    return table


def _held(value: Mapping[str, Any]) -> Cell:
    """A subgroup's value beside its control."""
    best = value["control"]
    note = f"{best['name'].replace('_', ' ')} {best['value']:.3f}" if best else ""
    return number(value, value["marked"], note)


def not_computed(result: Mapping[str, Any]) -> Table:
    """What is missing, why, and in which of the plain rows."""
    table = Table(
        "not-computed", "What was not computed, and what it needs", ["what", "needs", "in rows"]
    )
    plain = {name: arm for name, arm in result["runs"].items() if arm["plain"]}
    titles = [arm["title"] for arm in plain.values()]
    seen: dict[tuple[str, str], dict[str, None]] = {
        item: {} for item in result.get("not_computed", {}).items()
    }

    def note(title: str, missing: Mapping[str, str]) -> None:
        for item in missing.items():
            seen.setdefault(item, {})[title] = None

    for name, arm in plain.items():
        for groups in arm["tasks"].values():
            note(arm["title"], groups["overall"]["not_computed"])
        for fields in result["subgroups"].get(name, {}).values():
            lacking = {p: m["not_computed"] for p, m in fields.items() if "not_computed" in m}
            note(arm["title"], lacking)
    for found in result["reliance"].values():
        note(found["title"], found["not_computed"] if found["metrics"] else {})
    for (what, why), where in sorted(seen.items()):
        said = "all" if set(titles) <= set(where) else "; ".join(where)
        table.rows.append([Cell(what.replace("_", " ")), Cell(why), Cell(said)])
    return table
