"""A chunk of rows through the pipeline under every condition, whatever its rows do.

Place in the picture: inside run, ask and serve: Example → route ─► retrieve ─► references ─►
select ─► prompt ─► answer → Trace per condition. The first two stages are shared by all
conditions. A failing row carries its ``error`` and the others go on; running out of memory halves
the slice that is answered at a time. Both are recorded in ``timing``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmedrag.pipeline.conditions import Plan, Pool
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.records import Example, Trace, UserError
from mmedrag.runtime import memory

log = logging.getLogger(__name__)


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
                short = memory.ran_out(error)
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
                memory.empty_cache()
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


def _slices(rows: list[Trace], size: int) -> Iterator[list[Trace]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
