"""A bounded queue and one thread that takes what waits, in batches.

Place in the picture: between the HTTP handlers and the pipeline, which runs in this thread
alone. While a batch runs, requests gather for the next one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


class Busy(Exception):
    """The queue is full; ``retry_after`` seconds is when there should be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after = retry_after


class Stopped(Exception):
    """The service is stopping and takes no more work."""


def contained(error: BaseException) -> Exception:
    """What ends a request and not the service: SystemExit and the panics of libraries in Rust
    are no ``Exception``."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)


@dataclass
class Job(Generic[T]):
    """One request. ``work`` settles ``future``; what it leaves unsettled is failed for it."""

    payload: T
    future: Future[Any] = field(default_factory=Future)

    def done(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Batcher(Generic[T]):
    """Runs ``work(jobs)`` on batches of at most ``batch`` jobs, in order of arrival.

    Args:
        max_waiting: jobs that wait or run; more raise :class:`Busy`.
        linger: seconds that a first job waits for others.
    """

    def __init__(
        self,
        work: Callable[[list[Job[T]]], None],
        max_waiting: int = 64,
        batch: int = 16,
        linger: float = 0.005,
    ) -> None:
        self.work, self.max_waiting, self.batch, self.linger = work, max_waiting, batch, linger
        self.running: list[Job[T]] = []
        self.running_since: float | None = None
        self.seconds = 0.1  # per job, smoothed
        self.stopping = False
        self._waiting: deque[Job[T]] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="mmedrag-batcher", daemon=True)
        self._thread.start()

    def submit(self, payload: T) -> Future[Any]:
        """The future of the result.

        Raises:
            Busy: no room. Stopped: no more work is taken.
        """
        job = Job(payload)
        with self._changed:
            if self.stopping:
                raise Stopped("the service is stopping")
            if len(self._waiting) + len(self.running) >= self.max_waiting:
                raise Busy(self._retry_after())
            self._waiting.append(job)
            self._changed.notify_all()
        return job.future

    @property
    def depth(self) -> int:
        """Jobs that wait or run."""
        with self._changed:
            return len(self._waiting) + len(self.running)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stuck_for(self) -> float:
        """How long the running batch has been running, in seconds."""
        since = self.running_since
        return 0.0 if since is None else time.monotonic() - since

    def retry_after(self) -> int:
        with self._changed:
            return self._retry_after()

    def stop(self, grace: float = 30.0) -> bool:
        """Take no more, finish what waits and runs within ``grace`` seconds; True if all was."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
        self._thread.join(grace)
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for job in [*left, *self.running]:
            job.fail(Stopped("the service stopped before this request was answered"))
        return not self._thread.is_alive() and not left

    def _retry_after(self) -> int:
        ahead = len(self._waiting) + len(self.running)
        return max(1, min(60, math.ceil(ahead * self.seconds)))

    def _next(self) -> list[Job[T]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.stopping)
            if self.linger and len(self._waiting) < self.batch and not self.stopping:
                self._changed.wait_for(
                    lambda: len(self._waiting) >= self.batch or self.stopping, self.linger
                )
            taken: list[Job[T]] = []
            while self._waiting and len(taken) < self.batch:
                job = self._waiting.popleft()
                if job.future.set_running_or_notify_cancel():  # False: its caller has given up
                    taken.append(job)
            self.running = taken
            self.running_since = time.monotonic() if taken else None
            return taken

    def _loop(self) -> None:
        while True:
            jobs = self._next()
            if not jobs:
                if self.stopping and not self._waiting:
                    return
                continue
            start = time.monotonic()
            try:
                self.work(jobs)
            except BaseException as error:
                log.exception("a batch failed")
                for job in jobs:
                    job.fail(contained(error))
            for job in jobs:
                job.fail(RuntimeError("the batch ended without an answer to this request"))
            spent = (time.monotonic() - start) / len(jobs)
            with self._changed:
                self.seconds += 0.2 * (spent - self.seconds)
                self.running, self.running_since = [], None
