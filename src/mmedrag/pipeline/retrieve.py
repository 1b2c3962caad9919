"""Examples to hits and selections, without answering: what ``mmedrag retrieve`` writes.

Place in the picture: route → retrieve → select, then a file instead of a prompt. ``native`` rows
are traces that end at the selection; ``released`` rows are those of the released scripts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmedrag.pipeline.found import Found
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.pipeline.run import chunks
from mmedrag.pipeline.worker import Worker
from mmedrag.records import ConditionSpec, Example, Trace
from mmedrag.runtime import write_jsonl

CHUNK = 2048  # several hundred images at a time, so that decoding and the model overlap


def retrieve_examples(
    pipeline: Pipeline,
    examples: Sequence[Example],
    out: Path,
    format: str = "native",
    progress: Callable[[int, int], None] | None = None,
    tops: list[str | None] | None = None,
) -> dict[str, Any]:
    """Write one row per example, in order.

    Args:
        tops: gains the text of each example's reference at rank 1; None: none was found.

    Returns:
        ``rows``, ``failed``, ``kept`` (mean number of references kept), ``excluded``; ``without``
        and ``nothing`` as of :func:`mmedrag.pipeline.run.run_examples`.
    """
    worker = Worker(pipeline, {"": ConditionSpec()}, CHUNK, last="select")
    found: dict[str, Trace] = {}
    if progress:
        progress(0, len(examples))
    for chunk in chunks(examples, CHUNK):
        found |= {trace.example_id: trace for trace in worker(chunk)[""]}
        if progress:
            progress(len(found), len(examples))
    traces = [found[example.id] for example in examples]
    if tops is not None:
        tops += [trace.hits[0].text if trace.hits else None for trace in traces]
    write_jsonl(out, _rows(examples, traces, format), own=True)
    missing = Found(index=bool(pipeline.retrievers)).add(
        json.loads(trace.to_json()) for trace in traces
    )
    without = missing.tell()
    return {
        "out": str(out),
        "rows": len(traces),
        "failed": sum(t.error is not None for t in traces),
        "kept": round(sum(len(t.selection.kept) for t in traces if t.selection) / len(traces), 3),
        "excluded": sum(t.excluded for t in traces),
        **({"without": without, "nothing": missing.nothing} if without else {}),
    }


def _rows(
    examples: Sequence[Example], traces: Sequence[Trace], format: str
) -> Sequence[str | dict[str, Any]]:
    if format == "native":
        return [trace.to_json() for trace in traces]
    from mmedrag.retrieval import released_rows

    rows = released_rows(examples, [t.hits for t in traces], [t.selection for t in traces])
    return rows
