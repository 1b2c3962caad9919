"""Requests through the pipeline: the work of the batcher's one thread.

Place in the picture: Example(image, question) → **Pipeline** → Trace, as ``mmedrag run`` does it
(the same :class:`mmedrag.pipeline.worker.Worker`), but for rows that arrive one by one. A request's
picture lies in a private folder under a random name while it is worked on. Nothing about it is kept
afterwards: neither the file nor its embedding. The answer carries the hash of the picture that
the pipeline was given.
"""

from __future__ import annotations

import base64
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmedrag.answering import neutralise, prompt_length
from mmedrag.pipeline import Pipeline, Pool, Worker, evidence, notices
from mmedrag.records import ConditionSpec, Example, Forgetting, Prompt, Trace, UserError
from mmedrag.serve.audit import Audit
from mmedrag.serve.decoder import Decoded, png
from mmedrag.serve.errors import Refused
from mmedrag.serve.queue import Batcher, Busy, Job, Stopped, contained
from mmedrag.serve.settings import ServeSettings
from mmedrag.serve.versions import describe

log = logging.getLogger(__name__)
Action = Literal["ask", "report", "retrieve", "chat"]
NOISE = "gaussian_clip"  # of the comparison, as in the paper's preference data
COMPARE = {
    "clean, with references": ("selected", None),
    "clean, without references": ("none", None),
    "noise, with references": ("selected", NOISE),
    "noise, without references": ("none", NOISE),
}


@dataclass(frozen=True)
class Asked:
    """One request, checked: decoded views and what is asked of them.

    ``plans``: condition name → (references, noise); the first is the answer.
    """

    action: Action
    views: tuple[Decoded, ...]
    plans: tuple[tuple[str, tuple[str, str | None]], ...]
    question: str | None = None
    answer_type: Literal["closed", "open"] | None = None
    patient: str | None = None
    preview: bool = False
    who: str = "-"


@dataclass(frozen=True)
class Ticket:
    """A request whose picture lies on disk."""

    asked: Asked
    example: Example
    image: str  # hash of the views


class Stages(Worker):
    """A worker that remembers what kind of failure ended a row."""

    faults: dict[int, Exception]

    def _careful(self, step: Callable[[list[Trace]], None], traces: list[Trace]) -> None:
        def watched(part: list[Trace]) -> None:
            try:
                step(part)
            except BaseException as error:
                fault = contained(error)
                if len(part) == 1:
                    self.faults[id(part[0])] = fault
                raise fault from None

        super()._careful(watched, traces)


class Engine:
    """A pipeline behind a queue.

    Args:
        pipeline: as the command line builds it. audit: where answers are recorded, or None.
        versions: names and fingerprints of the parts, recorded with every answer.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: ServeSettings,
        audit: Audit | None = None,
        versions: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        # noise is drawn from the picture's hash: the same request gives the same answer
        pool = Pool(seed=seed, picture=lambda example: str(example.meta["image_sha256"]))
        self.pipeline = replace(pipeline, pool=pool)
        self.settings, self.audit = settings, audit
        self.versions = dict(versions or describe(pipeline))
        self.batches = self.answered = self.failed = 0
        self._folder = Path(tempfile.mkdtemp(prefix="mmedrag-serve-"))  # mode 0700
        self._lock = threading.Lock()
        self.batcher: Batcher[Ticket] = Batcher(
            self.work, settings.max_waiting, settings.batch, settings.linger
        )

    @property
    def notices(self) -> tuple[str, ...]:
        return notices(self.pipeline)

    def submit(self, asked: Asked) -> Future[dict[str, Any]]:
        """Queue a request; its files are removed when its future is settled.

        Raises:
            Refused: 429 when the queue is full, 503 when stopping or the disk is full.
        """
        name = uuid.uuid4().hex
        paths = [self._folder / f"{name}-{i}.ppm" for i in range(len(asked.views))]
        try:
            for path, view in zip(paths, asked.views, strict=True):
                path.write_bytes(view.ppm)
            ticket = Ticket(asked, self._example(name, asked, paths), joined_hash(asked.views))
            future = self.batcher.submit(ticket)
        except (Busy, Stopped, OSError) as error:
            _remove(paths)
            if isinstance(error, Busy):
                raise Refused(429, "busy", str(error), error.retry_after) from None
            reason = "stopping" if isinstance(error, Stopped) else "storage"
            text = str(error) if isinstance(error, Stopped) else _storage(error)
            raise Refused(503, reason, text, 30) from None
        future.add_done_callback(lambda _: _remove(paths))
        return future

    def stop(self) -> bool:
        """Finish what runs; True when nothing was cut off."""
        clean = self.batcher.stop(self.settings.grace)
        shutil.rmtree(self._folder, ignore_errors=True)
        return clean

    def problems(self) -> list[str]:
        """Why the service cannot answer right now; empty when it can."""
        found = []
        if self.batcher.stopping:
            found.append("stopping")
        if not self.batcher.alive:
            found.append("the worker thread has ended")
        if self.batcher.stuck_for() > 2 * self.settings.timeout:
            found.append("the model does not return")
        places = {"storage": self._folder}
        if self.audit is not None:
            places["audit log"] = self.audit.path.parent
        for what, folder in places.items():
            try:
                _probe(folder)
            except OSError as error:
                found.append(_storage(error, what))
        return found

    # --- in the batcher's thread ----------------------------------------------------------------

    def work(self, jobs: list[Job[Ticket]]) -> None:
        """Settle every job. Short answers first: a report does not hold up a yes or no."""
        groups: dict[Any, list[Job[Ticket]]] = {}
        for job in jobs:
            asked = job.payload.asked
            key = (asked.action == "retrieve", job.payload.example.task, asked.plans)
            groups.setdefault(key, []).append(job)
        for (retrieve, task, plans), group in sorted(
            groups.items(), key=lambda item: (not item[0][0], item[0][1] == "report", len(item[1]))
        ):
            log.debug("batch: %d %s under %d conditions", len(group), task, len(plans))
            self._run(group, dict(plans), "select" if retrieve else None)
        self._forget()

    def _run(
        self, jobs: list[Job[Ticket]], plans: dict[str, tuple[str, str | None]], last: str | None
    ) -> None:
        start = time.perf_counter()
        worker = Stages(
            self.pipeline,
            {name: ConditionSpec(*plan) for name, plan in plans.items()},
            max(self.settings.batch, 1) * len(plans),
            last,
        )
        worker.faults = {}
        made = worker([job.payload.example for job in jobs])
        seconds = round(time.perf_counter() - start, 4)
        finished: list[tuple[Job[Ticket], dict[str, Any]]] = []
        for at, job in enumerate(jobs):
            traces = {name: made[name][at] for name in plans}
            try:
                body = self._body(job.payload, traces, worker.faults)
            except Exception as error:
                self._fail(job, error)
                continue
            body["batch"] = {"size": len(jobs), "seconds": seconds}
            finished.append((job, body))
        self.batches += 1
        if self.audit is not None and finished:
            try:
                self.audit.write([self._record(job.payload, body) for job, body in finished])
            except OSError as error:  # an answer that cannot be recorded is not given
                for job, _ in finished:
                    self._fail(job, Refused(503, "storage", _storage(error, "audit log"), 30))
                return
        for job, body in finished:
            self.answered += 1
            job.done(body)

    def _body(
        self, ticket: Ticket, traces: dict[str, Trace], faults: Mapping[int, Exception]
    ) -> dict[str, Any]:
        asked = ticket.asked
        for trace in traces.values():
            if trace.example_id != ticket.example.id:
                raise RuntimeError("an answer to another request came back")
            if trace.error is not None:
                raise faults.get(id(trace)) or RuntimeError(trace.error)
        body = {
            "id": ticket.example.id,
            "image": {"sha256": ticket.image, "views": [view.facts for view in asked.views]},
            **evidence.result(
                traces,
                self.notices,
                self.settings.min_confidence or 0.0,
                self.pipeline.benchmark_only,
            ),
            "versions": self.versions,
        }
        if asked.preview:
            body["previews"] = self._previews(ticket, traces)
        if asked.action == "chat":
            body["usage"] = self._usage(next(iter(traces.values())), len(asked.views))
        return body

    def _previews(self, ticket: Ticket, traces: Mapping[str, Trace]) -> dict[str, str]:
        """What the model saw of the first view, as PNG data URLs: clean, and with noise."""
        from mmedrag.images import apply_noise, load_image

        picture = load_image(ticket.example.images[0])
        found = {"clean": data_url(png(picture))}
        noise = next((t.condition.noise for t in traces.values() if t.condition.noise), None)
        if noise is not None and self.pipeline.generator is not None:
            seen = apply_noise(picture, noise, self.pipeline.generator.image_size)
            found["noise"] = data_url(png(seen))
        return found

    def _usage(self, trace: Trace, views: int) -> dict[str, int]:
        generator = self.pipeline.generator
        assert generator is not None and trace.prompt is not None and trace.answer is not None
        asked = prompt_length(trace.prompt, trace, generator, views)
        # raw: without the chat template, which would hide what a short answer adds to it
        empty, written = (
            generator.count_tokens(Prompt(template="", text=text, style="raw"), 0)
            for text in ("", neutralise(trace.answer.text))
        )
        answer = max(0, written - empty)
        return {"prompt_tokens": asked, "completion_tokens": answer, "total_tokens": asked + answer}

    def _record(self, ticket: Ticket, body: Mapping[str, Any]) -> dict[str, Any]:
        """What the audit log says of an answer: no question, no answer, no text of a patient."""
        conditions = body.get("conditions", {"": body})
        return {
            "request": ticket.example.id,
            "who": ticket.asked.who,
            "action": ticket.asked.action,
            "image": ticket.image,
            "domain": (body["domain"] or {}).get("label"),
            "references": [r["id"] for r in body["references"] if r["used"]],
            "templates": sorted(
                {c["prompt"]["template"] for c in conditions.values() if c["prompt"]}
            ),
            "abstained": body["abstained"],
            "versions": self.versions,
        }

    def _fail(self, job: Job[Ticket], error: Exception) -> None:
        self.failed += 1
        if isinstance(error, Refused):
            job.fail(error)
        elif isinstance(error, UserError):
            job.fail(Refused(422, "cannot_answer", self._without_paths(str(error))))
        else:
            log.error("request %s failed", job.payload.example.id, exc_info=error)
            kind = type(error).__name__
            job.fail(Refused(500, "model_failed", f"the model failed on this request ({kind})"))

    def _without_paths(self, text: str) -> str:
        return text.replace(str(self._folder) + "/", "")

    def _example(self, name: str, asked: Asked, paths: Sequence[Path]) -> Example:
        return Example(
            id=name,
            task="report" if asked.action == "report" or asked.question is None else "vqa",
            image=[path.name for path in paths] if len(paths) > 1 else paths[0].name,
            question=asked.question,
            answer_type=asked.answer_type,
            patient=asked.patient,
            meta={"image_sha256": joined_hash(asked.views)},
            root=self._folder,
        )

    def _forget(self) -> None:
        """Leave no embedding of a request's picture behind, in memory or on disk."""
        forget(self.pipeline)


def forget(pipeline: Pipeline) -> None:
    """Keep nothing of the pictures that were asked about, neither in memory nor on disk."""
    for retriever in pipeline.retrievers.values():
        if isinstance(retriever, Forgetting):
            retriever.forget()


def joined_hash(views: Sequence[Decoded]) -> str:
    """The hash of one view is that of its pixels; of several, of their hashes in order."""
    import hashlib

    if len(views) == 1:
        return views[0].sha256
    return hashlib.sha256("".join(view.sha256 for view in views).encode()).hexdigest()


def data_url(png_bytes: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes).decode()


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()


def _probe(folder: Path) -> None:
    """See that the disk takes a page. Looked at anew each time: a service that is taken out of
    turn while its disk is full gets no request that would show that there is room again."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.write(file.fileno(), bytes(4096))


def _storage(error: BaseException, what: str = "storage") -> str:
    return f"{what}: {getattr(error, 'strerror', None) or 'cannot be written'}"
