"""Run folders as arms: one system under one condition, the unit of a table row.

Place in the picture: traces.jsonl and config.json -> arms -> evaluation and report. A run
folder whose traces have several conditions gives several arms.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedrag.evaluation.reliance import WITH_REFERENCES
from mmedrag.records import Trace, UserError
from mmedrag.runtime import read_jsonl

TASKS = ("vqa_closed", "vqa_open", "report")
OVERALL = "overall"


@dataclass
class Arm:
    """One system under one condition: a row of the tables.

    ``model`` is generator and adapter; ``system`` adds everything else that the run's
    configuration names (retrievers, rule, prompts), so that it tells ablation rows apart.
    """

    name: str
    run: Path
    condition: str
    model: str
    system: str
    traces: list[Trace]
    config: dict[str, Any] = field(default_factory=dict)
    title: str = ""  # what tables call it

    @property
    def plain(self) -> bool:
        """Clean image, and the references that the system itself chose (or none at all)."""
        return self.image == "clean" and self.references in ("none", *WITH_REFERENCES)

    @property
    def image(self) -> str:
        return self.condition.partition("/")[0]

    @property
    def references(self) -> str:
        return self.condition.partition("/")[2]

    def of_task(self, task: str) -> list[Trace]:
        """The scored rows of a task; image twins are left to the reliance metrics."""
        return [t for t in self.traces if task_of(t) == task and not t.meta.get("twin_of")]

    def belongs(self, other: Arm) -> bool:
        """Same system, or same model where neither sees references."""
        alone = self.references == other.references == "none"
        return self.system == other.system or (alone and self.model == other.model)


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

    An arm is called as its folder (with the parent's name in front where two folders are called
    alike), or as ``label`` in its ``config.json``.

    Raises:
        UserError: no traces, or an example twice under one condition.
    """
    arms: list[Arm] = []
    folders = [Path(run).resolve() for run in runs]
    alike = Counter(folder.name for folder in folders)
    for run in folders:
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
        own = run.name if alike[run.name] == 1 else f"{run.parent.name}/{run.name}"
        for condition, rows in by_condition.items():
            traces = [rows[i] for i in sorted(rows)]
            name = str(config.get("label") or own)
            if len(by_condition) > 1:
                name += f" [{condition}]"
            model = model_of(config, traces)
            system = json.dumps(config.get("system") or {}, sort_keys=True)
            arms.append(Arm(name, run, condition, model, f"{model} {system}", traces, config))
    twice = [name for name, count in Counter(a.name for a in arms).items() if count > 1]
    if twice:
        raise UserError(f"runs: two of them are called {twice[0]!r}, expected distinct folders")
    _entitle(arms)
    return arms


def _entitle(arms: Sequence[Arm]) -> None:
    """Titles of rows: ``system.title`` of the configuration, else the arm's name; with the
    condition where it is not a plain one, or where a plain one would be called alike."""
    for arm in arms:
        system = arm.config.get("system")
        title = system.get("title") if isinstance(system, Mapping) else None
        arm.title = str(title or arm.name)
    alike = Counter(a.title for a in arms if a.plain)
    for arm in arms:
        if arm.title == arm.name:
            continue
        if not arm.plain:
            arm.title += f" [{arm.condition}]"
        elif alike[arm.title] > 1:
            what = "no references" if arm.references == "none" else "references"
            arm.title += f", {what}"


def read_config(run: Path) -> dict[str, Any]:
    """The run's ``config.json``; {} where there is none."""
    path = run / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def model_of(config: Mapping[str, Any], traces: Sequence[Trace]) -> str:
    """Generator and adapter as configured, else the model that the answers name."""
    system = config.get("system")
    generator = system.get("generator") if isinstance(system, Mapping) else None
    if isinstance(generator, Mapping) and generator.get("model"):
        beams = system.get("beams", 1) if isinstance(system, Mapping) else 1
        return json.dumps([generator["model"], generator.get("adapter"), beams])
    models: list[Any] = sorted({t.answer.model for t in traces if t.answer and t.answer.model})
    return json.dumps(models)


def system_groups(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """name -> the conditions of one system, for the reliance metrics.

    A system with references borrows the reference-free arms of its model. It is called after
    the folder that holds all its arms (the run folder itself when it holds several conditions),
    else after its first arm.
    """
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.system, []).append(arm)
    out: dict[str, list[Arm]] = {}
    for own in groups.values():
        runs, parents = {a.run.name for a in own}, {a.run.parent.name for a in own}
        shared = runs if len(runs) == 1 else parents
        name = min(shared) if len(own) > 1 and len(shared) == 1 else own[0].name
        name = own[0].name if name in out or name == "" else name
        have = {a.condition for a in own}
        lent = [
            a
            for a in arms
            if a.references == "none" and a.model == own[0].model and a.condition not in have
        ]
        out[name] = own + (lent if any(a.references != "none" for a in own) else [])
    return out
