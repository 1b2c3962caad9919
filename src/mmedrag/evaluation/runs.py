"""Run folders as system runs: one system under one condition, the unit of a table row.

Place in the picture: traces.jsonl and config.json -> system runs -> evaluation and report. A run
folder whose traces have several conditions gives several system runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedrag.records import WITH_REFERENCES, ConditionSpec, Trace, UserError, group_of
from mmedrag.runtime import read_json, read_jsonl, run_folder

TASKS = ("vqa_closed", "vqa_open", "report")
OVERALL = "overall"


@dataclass
class SystemRun:
    """One system under one condition: a row of the tables.

    ``model`` is generator and adapter; ``system`` adds everything else that the run's
    configuration names (retrievers, rule, prompts), so that it tells ablation rows apart.
    """

    name: str
    folder: Path
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

    @property
    def system_title(self) -> str:
        """What the configuration calls the system; "" where it has no title for it."""
        system = self.config.get("system")
        return str(system.get("title") or "") if isinstance(system, Mapping) else ""

    @property
    def commit(self) -> str | None:
        """The commit that it was made with."""
        environment = self.config.get("environment")
        return environment.get("commit") if isinstance(environment, Mapping) else None

    def of_task(self, task: str) -> list[Trace]:
        """The scored rows of a task; image twins are left to the reliance metrics."""
        return [t for t in self.traces if task_of(t) == task and not t.meta.get("twin_of")]

    def belongs(self, other: SystemRun) -> bool:
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


def one_per_image(traces: Sequence[Trace]) -> list[Trace]:
    """The first trace of each image, twins aside: retrieval sees images, not questions."""
    seen: dict[str, Trace] = {}
    for trace in traces:
        if not trace.meta.get("twin_of"):
            seen.setdefault(str(trace.image or trace.example_id), trace)
    return list(seen.values())


def by_domain(traces: Sequence[Trace]) -> dict[str, list[Trace]]:
    """domain -> its traces, in alphabetical order of domains."""
    out: dict[str, list[Trace]] = {}
    for trace in traces:
        out.setdefault(group_of(trace), []).append(trace)
    return dict(sorted(out.items()))


def load_runs(folders: Sequence[str | Path]) -> list[SystemRun]:
    """Read run folders (``traces.jsonl``, ``config.json``), in the order given.

    A system run is called as its folder (with the parent's name in front where two folders are
    called alike), or as ``label`` in its ``config.json``.

    Raises:
        UserError: no traces, or an example twice under one condition.
    """
    runs: list[SystemRun] = []
    paths = [Path(folder).resolve() for folder in folders]
    alike = Counter(path.name for path in paths)
    for folder in paths:
        run_folder.check_finished(folder)
        conditions = _by_condition(folder / "traces.jsonl")
        config = read_config(folder)
        own = folder.name if alike[folder.name] == 1 else f"{folder.parent.name}/{folder.name}"
        for condition, traces in conditions.items():
            name = str(config.get("label") or own)
            if len(conditions) > 1:
                name += f" [{condition}]"
            model = model_of(config, traces)
            system = f"{model} {json.dumps(config.get('system') or {}, sort_keys=True)}"
            runs.append(SystemRun(name, folder, condition, model, system, traces, config))
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise UserError(f"runs: two of them are called {twice[0]!r}, expected distinct folders")
    _set_titles(runs)
    return runs


def _by_condition(path: Path) -> dict[str, list[Trace]]:
    """condition -> traces by example id."""
    if not path.is_file():
        raise UserError(f"{path.parent}: no traces.jsonl, expected a run folder")
    found: dict[str, dict[str, Trace]] = {}
    for number, trace in enumerate(read_jsonl(path, Trace), 1):
        rows = found.setdefault(ConditionSpec.of(trace).name, {})
        if trace.example_id in rows:
            raise UserError(f"{path}:{number}: example_id: {trace.example_id!r} stands twice")
        rows[trace.example_id] = trace
    if not found:
        raise UserError(f"{path}: no traces, expected at least one row")
    return {condition: [rows[i] for i in sorted(rows)] for condition, rows in found.items()}


def _set_titles(runs: Sequence[SystemRun]) -> None:
    """Titles of rows: ``system.title`` of the configuration, else the run's name; with the
    condition where it is not a plain one, or where a plain one would be called alike."""
    for run in runs:
        run.title = run.system_title or run.name
    alike = Counter(run.title for run in runs if run.plain)
    for run in runs:
        if run.title == run.name:
            continue
        if not run.plain:
            run.title += f" [{run.condition}]"
        elif alike[run.title] > 1:
            what = "no references" if run.references == "none" else "references"
            run.title += f", {what}"


def read_config(run: Path) -> dict[str, Any]:
    """The run's ``config.json``; {} where there is none."""
    path = run / "config.json"
    found = read_json(path) if path.is_file() else {}
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


def system_groups(runs: Sequence[SystemRun]) -> dict[str, list[SystemRun]]:
    """name -> the conditions of one system, for the reliance metrics.

    A system with references borrows the reference-free runs of its model. It is called after
    the folder that holds all its runs (the run folder itself when it holds several conditions),
    else after its first run.
    """
    groups: dict[str, list[SystemRun]] = {}
    for run in runs:
        groups.setdefault(run.system, []).append(run)
    out: dict[str, list[SystemRun]] = {}
    for own in groups.values():
        folders, parents = {r.folder.name for r in own}, {r.folder.parent.name for r in own}
        shared = folders if len(folders) == 1 else parents
        name = min(shared) if len(own) > 1 and len(shared) == 1 else own[0].name
        name = own[0].name if name in out or name == "" else name
        have = {run.condition for run in own}
        borrowed = [
            run
            for run in runs
            if run.references == "none" and run.model == own[0].model and run.condition not in have
        ]
        out[name] = own + (borrowed if any(run.references != "none" for run in own) else [])
    return out
