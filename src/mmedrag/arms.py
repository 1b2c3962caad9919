"""Run folders as arms: one system under one condition, the unit of a table row.

Place in the picture: traces.jsonl and config.json -> arms -> evaluation and report. A run
folder whose traces have several conditions gives several arms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedrag.types import Trace, UserError, read_jsonl

TASKS = ("vqa_closed", "vqa_open", "report")
OVERALL = "overall"


@dataclass
class Arm:
    """One system under one condition: a row of the tables."""

    name: str
    run: Path
    condition: str
    system: str
    traces: list[Trace]
    config: dict[str, Any] = field(default_factory=dict)

    def of_task(self, task: str) -> list[Trace]:
        """The scored rows of a task; image twins are left to the reliance metrics."""
        return [t for t in self.traces if task_of(t) == task and not t.meta.get("twin_of")]


def task_of(trace: Trace) -> str | None:
    """``vqa_closed``, ``vqa_open`` or ``report``; None where there is no target to score."""
    if trace.target is None:
        return None
    if trace.task == "report":
        return "report"
    return "vqa_closed" if trace.answer_type == "closed" else "vqa_open"


def condition_of(trace: Trace) -> str:
    """``clean/selected``, ``noise:blank/none``, ...: image and references of a trace."""
    condition = trace.condition
    noise = f":{condition.noise.kind}" if condition.noise else ""
    return f"{condition.image}{noise}/{condition.references}"


def load_arms(runs: Sequence[str | Path]) -> list[Arm]:
    """Read run folders (``traces.jsonl``, ``config.json``) into arms, in the order given.

    Raises:
        UserError: no traces, or an example twice under one condition.
    """
    arms: list[Arm] = []
    names: dict[str, int] = {}
    for run in map(Path, runs):
        path = run / "traces.jsonl"
        if not path.is_file():
            raise UserError(f"{run}: no traces.jsonl, expected a run folder")
        config = read_config(run)
        by_condition: dict[str, dict[str, Trace]] = {}
        for number, trace in enumerate(read_jsonl(path, Trace), 1):
            rows = by_condition.setdefault(condition_of(trace), {})
            if trace.example_id in rows:
                raise UserError(f"{path}:{number}: example_id: {trace.example_id!r} stands twice")
            rows[trace.example_id] = trace
        if not by_condition:
            raise UserError(f"{path}: no traces, expected at least one row")
        name = str(config.get("label") or run.resolve().name)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}#{names[name]}"
        for condition, rows in by_condition.items():
            own = name if len(by_condition) == 1 else f"{name} [{condition}]"
            traces = [rows[i] for i in sorted(rows)]
            arms.append(Arm(own, run, condition, system_of(config, traces, name), traces, config))
    return arms


def read_config(run: Path) -> dict[str, Any]:
    """The run's ``config.json``; {} where there is none."""
    path = run / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def system_of(config: Mapping[str, Any], traces: Sequence[Trace], name: str) -> str:
    """What joins the conditions of one model: ``config["system_name"]``, else generator and
    adapter as configured, else the model that the answers name."""
    if config.get("system_name"):
        return str(config["system_name"])
    nested = [config, *(config.get(k) or {} for k in ("settings", "system", "config"))]
    for table in nested:
        generator = table.get("generator") if isinstance(table, Mapping) else None
        if isinstance(generator, Mapping) and generator.get("model"):
            parts = [str(generator["model"]), str(generator.get("adapter") or "")]
            return " + ".join(filter(None, parts))
    models = sorted({t.answer.model for t in traces if t.answer and t.answer.model})
    return " + ".join(models) or name
