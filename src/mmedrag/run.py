"""Batch runs: examples × conditions through the pipeline, resumable, shardable, row by row safe.

Place in the picture: Example → pipeline → Trace, for thousands of rows. Rows are cut into
chunks (all questions of an image in one chunk, so its features are computed once); a chunk is
routed and retrieved once and then answered under every asked condition in one call. A finished
chunk is appended to a journal and fsynced; a killed run repeats at most one chunk, and the final
file is the same, byte for byte. A failing row carries its ``error``; running out of memory
halves the slice that is answered at a time (a generator may halve its own batches before
that); both are recorded in ``timings.jsonl``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmedrag import runs
from mmedrag.conditions import Plan, Pool
from mmedrag.pipeline import Pipeline
from mmedrag.types import DataFolder, Example, Trace, UserError

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
TRACES, JOURNAL, TIMINGS, POSITIONS = (
    "traces.jsonl", "journal.log", "timings.jsonl", "positions.json"
)  # fmt: skip


@dataclass(frozen=True)
class RunSettings:
    """What is run of a data folder, and under which condition (recipe table ``[run]``).

    ``references`` and ``noise`` as in :mod:`mmedrag.conditions`; ``split``, ``domain``, ``task``,
    ``ids`` and ``limit`` choose rows (in file order); ``shard`` is "i/n"; ``chunk`` rows are the
    unit of work and of resumption.
    """

    references: str = "selected"
    noise: str | None = None
    noise_params: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None
    task: str | None = None
    domain: str | None = None
    ids: tuple[str, ...] = ()
    limit: int | None = None
    shard: str | None = None
    chunk: int = 128


def choose(examples: Sequence[Example], settings: RunSettings) -> list[Example]:
    """The rows a run is about, in file order."""
    rows = [
        row
        for row in examples
        if settings.split in (None, row.split)
        and settings.task in (None, row.task)
        and settings.domain in (None, row.domain)
    ]
    if settings.ids:
        wanted = set(settings.ids)
        missing = wanted - {row.id for row in examples}
        if missing:
            raise UserError(f"--ids: no example {min(missing)!r} in the data folder")
        rows = [row for row in rows if row.id in wanted]
    if settings.limit is not None:
        rows = rows[: settings.limit]
    if not rows:
        raise UserError("no example is left to run; check split, task, domain and ids")
    return rows


def chunks(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Rows of one image stay together (up to ``size``), in order of first appearance."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        key = str(example.image) if example.image else f"\0{example.id}"
        groups.setdefault(key, []).append(example)
    made: list[list[Example]] = []
    for group in groups.values():
        if not made or len(made[-1]) + len(group) > size:
            made.append([])
        made[-1].extend(group)
    return [whole[at : at + size] for whole in made for at in range(0, len(whole), size)]


def parse_shard(shard: str | None) -> tuple[int, int]:
    """ "i/n" → (i modulo n, n): 0..n-1 and 1..n both name every shard once."""
    if shard is None:
        return 0, 1
    part, slash, of = shard.partition("/")
    if not (slash and part.isdecimal() and of.isdecimal() and 0 < int(of) >= int(part)):
        raise UserError(f"--shard {shard}: expected i/n, such as 1/4")
    return int(part) % int(of), int(of)


def run(
    pipeline: Pipeline,
    data: DataFolder,
    out: Path,
    settings: RunSettings,
    seed: int = 0,
    system: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run one condition into the run folder ``out``.

    Args:
        system: description of the pipeline, kept in ``config.json``.
        inputs: name → file or folder, besides DATA, that the result depends on; hashed.

    Returns:
        ``rows``, ``failed`` (rows with an error), ``out``.
    """
    plan = Plan(settings.references, settings.noise, settings.noise_params)
    counts = run_plans(
        pipeline, data, {"": plan}, Path(out), settings, seed, system, inputs, progress
    )
    return {"out": str(out), **counts}


def run_plans(
    pipeline: Pipeline,
    data: DataFolder,
    plans: Mapping[str, Plan],
    out: Path,
    settings: RunSettings,
    seed: int = 0,
    system: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Run several conditions together: each becomes the run folder ``out/<name>``.

    Routing, retrieval and the vision features of clean images are shared between them.
    """
    everyone = data.examples()
    rows = choose(everyone, settings)
    if settings.chunk < 1:
        raise UserError(f"[run]: chunk is {settings.chunk}, expected at least 1")
    index, of = parse_shard(settings.shard)
    all_chunks = chunks(rows, settings.chunk)
    own = [chunk for at, chunk in enumerate(all_chunks) if at % of == index]
    position = {row.id: at for at, row in enumerate(rows)}
    ids = sorted((row.id for chunk in own for row in chunk), key=position.__getitem__)
    pool = Pool(everyone, data.corpus(), data.truth(), seed)

    _claim_all(out, plans, settings, seed, system, _inputs(data, rows, inputs), pipeline)
    folders = {name: out / name for name in plans}
    if all((folder / TRACES).exists() for folder in folders.values()):
        failed = sum(_failed(folder / TRACES) for folder in folders.values())
        return {"rows": len(ids) * len(plans), "failed": failed}

    journal = runs.Journal(out / JOURNAL)
    worker = Worker(pipeline, plans, pool, settings.chunk * len(plans))
    try:
        for chunk in own:
            done = len(journal.where) // len(plans)
            if progress:
                progress(done, len(ids))
            keys = [f"{name}/{row.id}" for name in plans for row in chunk]
            if all(key in journal for key in keys):
                continue
            traces = worker(chunk)
            journal.append(
                {f"{n}/{t.example_id}": t.to_json() for n, group in traces.items() for t in group}
            )
            runs.append_line(out / TIMINGS, json.dumps(worker.timing))
        if progress:
            progress(len(ids), len(ids))
        for name, folder in folders.items():
            if of > 1:
                runs.write_json(folder / POSITIONS, [position[i] for i in ids])
            journal.write(folder / TRACES, [f"{name}/{i}" for i in ids])
        journal.close(remove=True)
    finally:
        journal.close()
    failed = sum(_failed(folder / TRACES) for folder in folders.values())
    return {"rows": len(ids) * len(plans), "failed": failed}


class Worker:
    """A chunk through the pipeline's stages, under every plan; remembers what memory allows."""

    def __init__(
        self,
        pipeline: Pipeline,
        plans: Mapping[str, Plan],
        pool: Pool,
        at_a_time: int,
        last: Literal["select", "answer"] = "answer",
    ) -> None:
        self.pipeline, self.plans, self.pool, self.at_a_time = pipeline, plans, pool, at_a_time
        self.last = last
        self.timing: dict[str, Any] = {}

    def __call__(self, chunk: Sequence[Example]) -> dict[str, list[Trace]]:
        self.timing = {"rows": len(chunk) * len(self.plans)}
        base = [Trace.of(example) for example in chunk]
        self._stage("route", self.pipeline.route, base)
        if any(plan.references != "none" for plan in self.plans.values()):
            self._stage("retrieve", self.pipeline.retrieve, base)
        made = {name: [self._under(plan, t) for t in base] for name, plan in self.plans.items()}
        every = [trace for group in made.values() for trace in group]
        self._stage("references", self.substitute, every)
        self._stage("select", self.pipeline.select, every)
        if self.last == "select":
            return made
        self._stage("prompt", self.pipeline.prompt, every)
        self._stage("answer", self.pipeline.answer, every)
        if backoffs := self._backoffs():
            self.timing["batch_backoffs"] = backoffs  # of this process so far
        return made

    def _backoffs(self) -> list[Any]:
        """How the generators went to smaller batches by themselves when memory ran out."""
        generators = [self.pipeline.generator, *self.pipeline.adapters.values()]
        return [step for one in generators for step in getattr(one, "backoffs", ())]

    def _under(self, plan: Plan, base: Trace) -> Trace:
        """A fresh trace of the same example under a plan, with the shared first stages."""
        assert base.example is not None
        trace = Trace.of(base.example)
        try:
            trace.condition = plan.condition(base.example, self.pool)
        except UserError as error:
            trace.error = str(error)
            return trace
        trace.domain, trace.excluded, trace.hits = base.domain, base.excluded, list(base.hits)
        if plan.references == "none":
            trace.hits, trace.excluded = [], 0
        if base.error:
            trace.error = base.error
        return trace

    def substitute(self, traces: Sequence[Trace]) -> None:
        """Replace the hits where the condition asks for other references than the retrieved."""
        for trace in traces:
            mode = trace.condition.references
            if mode == "random":
                trace.hits = self.pool.random(trace)
            elif mode == "own":
                trace.hits = self.pool.own(trace)
            elif mode == "contradicting":
                trace.hits = self.pool.contradicting(trace)
        shuffled = [t for t in traces if t.condition.references == "shuffled"]
        if shuffled:
            self._shuffle(shuffled)

    def _shuffle(self, traces: Sequence[Trace]) -> None:
        """The hits of the partner example; none of them may be the example's own."""
        partners = [self.pool.partner(t.example, "shuffle") if t.example else None for t in traces]
        probes = [Trace.of(p) if p else None for p in partners]
        for trace, probe in zip(traces, probes, strict=True):
            if probe:
                probe.domain = trace.domain
        self.pipeline.retrieve([probe for probe in probes if probe])
        for trace, probe in zip(traces, probes, strict=True):
            trace.hits = list(probe.hits) if probe else []

    def _stage(
        self, name: str, step: Callable[[list[Trace]], None], traces: Sequence[Trace]
    ) -> None:
        start = time.perf_counter()
        self._careful(step, [t for t in traces if not t.error])
        self.timing[name] = round(time.perf_counter() - start, 4)

    def _careful(self, step: Callable[[list[Trace]], None], traces: list[Trace]) -> None:
        """Run a stage; what fails is halved until the failing rows stand alone."""
        waiting = [traces]
        while waiting:
            part = waiting.pop(0)
            if not part:
                continue
            if len(part) > self.at_a_time:
                waiting[:0] = list(_slices(part, self.at_a_time))
                continue
            try:
                step(part)
                continue
            except Exception as error:
                short = out_of_memory(error)
                if len(part) == 1:
                    part[0].error = _one_line(error)
                    log.warning("%s: %s", part[0].example_id, part[0].error)
                    log.debug("traceback", exc_info=True)
                    continue
            if not short and self._unreadable(part):
                waiting.insert(0, [trace for trace in part if not trace.error])
                continue
            half = (len(part) + 1) // 2
            if short:
                self.at_a_time = min(self.at_a_time, half)
                self.timing["out_of_memory"] = {"rows": len(part), "now_at_most": half}
                log.warning("out of memory with %d rows: now at most %d", len(part), half)
                _free_memory()
            waiting[:0] = [part[:half], part[half:]]

    def _unreadable(self, traces: Sequence[Trace]) -> int:
        """Give rows whose image cannot be read their error: the commonest failure, found without
        answering the others again and again. Returns how many rows those are."""
        from mmedrag.images import load_image

        why: dict[Path, str | None] = {}
        for trace in traces:
            for path in trace.example.images if trace.example else []:
                if path not in why:
                    try:
                        load_image(path)
                        why[path] = None
                    except Exception as error:
                        why[path] = _one_line(error)
                if why[path] and not trace.error:
                    trace.error = why[path]
        found = [trace for trace in traces if trace.error]
        for trace in found:
            log.warning("%s: %s", trace.example_id, trace.error)
        return len(found)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch (any device) or Python means that memory ran out."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def merge(shards: Sequence[Path], out: Path) -> dict[str, Any]:
    """Put the shards of one run together; the result is the run that was never split."""
    configs = [runs.read_json(Path(path) / "config.json") for path in shards]
    found: dict[int, Path] = {}
    wanted = 0
    for path, config in zip(shards, configs, strict=True):
        index, of = parse_shard((config.get("settings") or {}).get("run", {}).get("shard"))
        if of == 1 or not (Path(path) / POSITIONS).exists():
            raise UserError(f"{path}: not a finished shard (made by run --shard i/n)")
        if index in found:
            raise UserError(f"{path}: the same shard as {found[index]}")
        found[index], wanted = Path(path), of
        config["settings"]["run"]["shard"] = None
        for part in runs.IDENTITY:
            if config.get(part) != configs[0].get(part):
                what = runs.difference(configs[0].get(part), config.get(part))
                raise UserError(f"{path}: was made with other {part} ({what})")
    if len(found) != wanted:
        missing = next(i for i in range(wanted) if i not in found)
        raise UserError(f"run merge: {len(found)} of {wanted} shards given, {missing} is missing")
    runs.claim(Path(out), configs[0])
    lines: list[tuple[int, bytes]] = []
    for shard in found.values():
        rows = (shard / TRACES).read_bytes().rstrip(b"\n").split(b"\n")
        lines += zip(runs.read_json(shard / POSITIONS), rows, strict=True)
    target = Path(out) / (TRACES + ".part")
    target.write_bytes(b"".join(row + b"\n" for _, row in sorted(lines)))
    target.replace(Path(out) / TRACES)
    times = b"".join((p / TIMINGS).read_bytes() for p in found.values() if (p / TIMINGS).exists())
    (Path(out) / TIMINGS).write_bytes(times)
    return {"out": str(out), "rows": len(lines), "failed": _failed(Path(out) / TRACES)}


def _inputs(
    data: DataFolder, rows: Sequence[Example], more: Mapping[str, Path] | None
) -> dict[str, Any]:
    names = ("examples.jsonl", "corpus.jsonl", "truth.jsonl")
    files = {str(path): path for name in names if (path := data.path / name).exists()}
    pictures = runs.picture_inputs(path for row in rows for path in row.images)
    return {"inputs": runs.inputs({**files, **(more or {})}), "images": pictures}


def _claim_all(
    out: Path, plans: Mapping[str, Plan], settings: RunSettings, seed: int,
    system: Mapping[str, Any] | None, inputs: dict[str, Any], pipeline: Pipeline,
) -> None:  # fmt: skip
    facts: dict[str, Any] = getattr(pipeline.generator, "facts", dict)()
    environment = runs.environment()
    for name, plan in plans.items():
        mine = replace(
            settings, references=plan.references, noise=plan.noise, noise_params=dict(plan.params)
        )
        config = {
            "command": "run",
            "settings": {"run": asdict(mine), "k": pipeline.k},
            "system": dict(system or {}),
            "seeds": {"run": seed},
            **inputs,
            **{key: facts.get(key) for key in ("model", "device", "dtype", "batch_size")},
            "environment": environment,
        }
        runs.claim(out / name, config)


def _failed(traces: Path) -> int:
    with open(traces, encoding="utf-8") as lines:
        return sum(bool(json.loads(line).get("error")) for line in lines)


def _slices(rows: list[Trace], size: int) -> Iterator[list[Trace]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
