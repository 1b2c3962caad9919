"""Progress with throughput and time left: a bar on a terminal, else a log line each 30 seconds.

Place in the picture: around every long loop. Builds, imports and runs call ``progress(done,
total)``, trainings through ``training.Steps``; loops without a callback use :func:`each`. All of it
goes to stderr: stdout is for the one result.
"""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger("mmedrag")
EVERY = 30  # seconds between two lines of a log


class Progress:
    """A callback ``(done, total)``; ``note`` is shown after it."""

    def __init__(self, what: str) -> None:
        self.what, self.start, self.logged = what, time.monotonic(), time.monotonic()
        self.first: int | None = None
        self.bar: Any = None
        self.task: Any = None

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        if self.first is None:  # rows that an earlier, interrupted call finished
            self.first, self.start = done, time.monotonic()
            if not sys.stderr.isatty() and done != total:
                log.info("%s: %d%s", self.what, done, f" of {total}" if total else "")
        now = time.monotonic()
        rate = (done - self.first) / max(now - self.start, 1e-9)
        if sys.stderr.isatty():
            self._draw(done, total, f"{rate:.1f}/s {note}".strip())
        elif now - self.logged >= EVERY or done == total:
            self.logged = now
            of, left = (f" of {total}", total - done) if total else ("", 0)
            when = f", {left / rate:.0f} s left" if rate and left > 0 else ""
            said = f", {note}" if note else ""
            log.info("%s: %d%s, %.1f/s%s%s", self.what, done, of, rate, when, said)

    def _draw(self, done: int, total: int | None, text: str) -> None:
        if self.bar is None:
            self._open(done, total)
        self.bar.update(self.task, completed=done, total=total, text=text)
        if total and done >= total:
            self.close()

    def _open(self, done: int, total: int | None) -> None:
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn(self.what),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.bar.start()
        atexit.register(self.bar.stop)  # an error leaves the terminal with its cursor
        self.task = self.bar.add_task(self.what, total=total, completed=done, text="")

    def close(self) -> None:
        """End the bar where the loop ends before its total."""
        if self.bar is not None:
            atexit.unregister(self.bar.stop)
            self.bar.stop()
            self.bar = None


def each(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with progress as they are used up."""
    progress = Progress(what)
    try:
        for number, item in enumerate(items):
            progress(number, len(items))
            yield item
        progress(len(items), len(items))
    finally:
        progress.close()
