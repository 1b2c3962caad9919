"""From a data folder to preference pairs: four conditions in one pass, then the construction.

Place in the picture: Trace × {clean, noise} × {with, without references} ─► pairs. The four run
folders stay in ``PAIRS/traces/``, so that pairs can be built again, by other rules, without
answering again; a killed call goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmedrag.embedded import located
from mmedrag.pipeline import (
    TRACES,
    Pipeline,
    Pool,
    RunSettings,
    choose,
    load_system,
    missing,
    run_conditions,
)
from mmedrag.preference.pairs.construct import construct_pairs
from mmedrag.preference.pairs.files import write_pairs
from mmedrag.preference.pairs.held_out import HeldOut
from mmedrag.preference.pairs.settings import PairSettings
from mmedrag.records import CONDITIONS, KINDS, Encoding, Reopenable, Trace
from mmedrag.runtime import DataFolder, check_own, config, read_jsonl

log = logging.getLogger(__name__)


def make_pairs(
    pipeline: Callable[[], Pipeline],
    data: DataFolder,
    out: Path,
    settings: PairSettings,
    seed: int = 0,
    system: Any = None,
    held_out: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answer the examples under the conditions that the kinds compare, and build the pairs.

    Args:
        pipeline: gives the pipeline that answers.
        system: names of its parts, for the record (:class:`mmedrag.pipeline.system.System`).
        held_out: trained folders with ``train_ids.jsonl``: no pair may come from their data, nor
            from that of the pipeline's own retrievers where their folders have that file.

    Returns:
        ``out``, ``pairs`` per kind, ``dropped``, ``refused``, ``failed`` (rows with an error);
        ``without`` and ``nothing`` as of :func:`mmedrag.pipeline.run_examples`.
    """
    check_own(out / "pairs.jsonl", out / "config.json")
    needed = dict.fromkeys(spec for kind in settings.kinds for spec in KINDS[kind].conditions)
    conditions = {
        spec.slug: spec
        if spec.noise is None
        else replace(spec, noise=settings.noise, params=settings.noise_params)
        for spec in CONDITIONS
        if spec in needed
    }
    run_settings = RunSettings(
        split=settings.split, task=settings.task, limit=settings.limit, chunk=settings.chunk
    )
    described = system.describe() if system else {}
    pool = Pool.of(data, seed)
    rows = choose(pool.examples, run_settings)
    if system:
        system.caution((row.source for row in rows), answers=True)
    asked = pipeline()
    counts = run_conditions(
        asked,
        data,
        conditions,
        out / "traces",
        run_settings,
        seed,
        described,
        system.inputs() if system else {},
        progress,
        pool,
    )
    traces: list[Trace] = []
    for name in conditions:
        traces += read_jsonl(out / "traces" / name / TRACES, Trace)
    guard = HeldOut().add_test(pool.examples)
    trained = list(dict.fromkeys([*held_out, *_trained(asked)]))
    for folder in trained:
        guard.add_trained(folder)
    found = construct_pairs(
        traces,
        settings.mode,
        settings.kinds,
        settings.balance_seed,
        held_out=guard,
        prompts=settings.prompts,
        drawn=settings.drawn,
        even=settings.even_answers,
        root=data.path,
    )
    made_with = {
        **asdict(settings),
        "seed": seed,
        "system": described,
        "held_out": [folder.name for folder in trained],
    }
    write_pairs(found, out, data.path, made_with)
    lacking = missing([out / "traces" / name for name in conditions], bool(asked.retrievers))
    if not found.pairs:
        log.error("error: no pair was built of %d examples: %s", len(rows), _why_none(found.counts))
        lacking["nothing"] = True
    return {"out": str(out), **found.counts, "failed": counts["failed"], **lacking}


def _why_none(counts: Mapping[str, Any]) -> str:
    """The commonest reason why there is no pair."""
    left: Counter[str] = Counter()
    for part in ("dropped", "refused"):
        for reasons in (counts.get(part) or {}).values():
            left.update(reasons)
    if not left:
        return "no answer is on the side that any kind of pair needs"
    reason, count = left.most_common(1)[0]
    return f"most often {reason.replace('_', ' ')} ({count})"


def _trained(pipeline: Pipeline) -> list[Path]:
    """Folders of the pipeline's encoders that say what they were trained on."""
    encoders = [s.encoder for s in pipeline.retrievers.values() if isinstance(s, Encoding)]
    specs = {encoder.spec or "" for encoder in encoders if isinstance(encoder, Reopenable)}
    folders = [located(spec) for spec in sorted(specs - {""})]
    return [folder for folder in folders if (folder / "train_ids.jsonl").is_file()]


def build_pairs(
    data: DataFolder | str | Path,
    out: str | Path,
    system: Pipeline | str | Path | None = None,
    *,
    seed: int = 0,
    held_out: Sequence[str | Path] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Answer a data folder under the conditions that the kinds compare, and write PAIRS to ``out``.

    Args:
        system: the pipeline that answers, or a system file; by default the embedded system.
        held_out: as in :func:`make_pairs`.
        settings: fields of :class:`PairSettings`: ``split``, ``kinds``, ``limit``, ``mode``, ...

    Returns:
        As :func:`make_pairs`.

    Raises:
        UserError: an unknown setting, an unreadable folder, or nothing to answer.

    Example::

        counts = build_pairs("data", "pairs", pipeline, split="train", kinds=("copy", "resist"))
    """
    folder = data if isinstance(data, DataFolder) else DataFolder(data)
    chosen = config.settings(PairSettings, settings, "build_pairs")
    pipeline = system if isinstance(system, Pipeline) else load_system(system, seed=seed)
    trained = [Path(one) for one in held_out]
    return make_pairs(lambda: pipeline, folder, Path(out), chosen, seed, held_out=trained)
