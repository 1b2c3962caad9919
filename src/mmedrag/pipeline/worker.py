"""A chunk of rows through the pipeline, whatever its rows do.

Place in the picture: inside run, ask and serve, around every stage of :class:`Pipeline`. A failing
row carries its ``error`` and the others go on; running out of memory halves the slice that is
answered at a time. Both are recorded in ``timing``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedrag.pipeline.pipeline import Pipeline, Stage
from mmedrag.records import ConditionSpec, Example, Shrinking, Trace, UserError
from mmedrag.runtime import memory

log = logging.getLogger(__name__)


class Worker:
    """A chunk through the pipeline, under every condition; remembers what memory allows.

    ``last``: name of the stage to stop after. Where the pipeline does not answer, the stages after
    the answer find nothing to do.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        conditions: Mapping[str, ConditionSpec],
        at_a_time: int,
        last: str | None = None,
    ) -> None:
        self.pipeline, self.conditions, self.at_a_time = pipeline, conditions, at_a_time
        self.last = last
        self.timing: dict[str, Any] = {}

    def __call__(self, chunk: Sequence[Example]) -> dict[str, list[Trace]]:
        self.timing = {"rows": len(chunk) * len(self.conditions)}
        made = self.pipeline.run(chunk, self.conditions, self._stage, self.last)
        if backoffs := self._backoffs():
            self.timing["batch_backoffs"] = backoffs  # of this process so far
        return made

    def _backoffs(self) -> list[Any]:
        """How the generators went to smaller batches by themselves when memory ran out."""
        generators = [self.pipeline.generator, *self.pipeline.adapters.values()]
        found: list[Any] = []
        for generator in generators:
            if isinstance(generator, Shrinking):
                found += generator.backoffs
        return found

    def _stage(self, stage: Stage, traces: list[Trace]) -> None:
        start = time.perf_counter()
        self._careful(
            lambda part: stage.step(self.pipeline, part), [t for t in traces if not t.error]
        )
        self.timing[stage.name] = round(time.perf_counter() - start, 4)

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
            views = list(trace.example.images) if trace.example else []
            for path in views:
                if path not in why:
                    try:
                        load_image(path)
                        why[path] = None
                    except Exception as error:
                        why[path] = _one_line(error)
            if any(map(why.get, views)) and not trace.error:
                trace.error = "; ".join(filter(None, map(why.get, views)))
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
