"""Batch runs: examples × conditions through the pipeline, resumable, shardable, row by row safe.

Place in the picture: Example → pipeline → Trace, for thousands of rows. Rows are cut into
chunks (all questions of an image in one chunk, so its features are computed once); a chunk is
routed and retrieved once and then answered under every asked condition in one call. A finished
chunk is appended to a journal and fsynced; a killed run repeats at most one chunk, and the final
file is the same, byte for byte. What a chunk goes through is
:class:`Pipeline`, guarded row by row by ``worker``.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmedrag.pipeline.conditions import Pool
from mmedrag.pipeline.found import Found
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.pipeline.settings import RunSettings
from mmedrag.pipeline.worker import Worker
from mmedrag.records import ConditionSpec, Describable, Example, UserError
from mmedrag.runtime import (
    DataFolder,
    Journal,
    append_line,
    read_json,
    run_folder,
    write_bytes,
    write_json,
)

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
TRACES, JOURNAL = "traces.jsonl", "journal.log"
TIMINGS, POSITIONS = "timings.jsonl", "positions.json"


def choose(examples: Sequence[Example], settings: RunSettings, tell: bool = True) -> list[Example]:
    """The rows a run is about, in file order; ``tell``: log how many.

    Raises:
        UserError: there are none.
    """
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
        raise UserError(f"no example {_described(settings)}; there are: {_counted(examples)}")
    if tell:
        log.info("%d examples %s", len(rows), _described(settings))
    return rows


def _described(settings: RunSettings) -> str:
    """Which rows were asked for, in words."""
    asked = [f"of split {settings.split}" if settings.split else "of any split"]
    asked += [f"task {settings.task}"] if settings.task else []
    asked += [f"domain {settings.domain}" if settings.domain else "any domain"]
    asked += [f"among {len(settings.ids)} ids"] if settings.ids else []
    return ", ".join(asked)


def _counted(examples: Sequence[Example]) -> str:
    """What a data folder holds, by split, task and domain."""
    if not examples:
        return "none at all (the data folder has no questions and no reports to write)"
    per = Counter(f"split {e.split}, {e.task}, domain {e.domain or 'not stated'}" for e in examples)
    return "; ".join(f"{count} of {name}" for name, count in sorted(per.items()))


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


def run_examples(
    pipeline: Pipeline,
    data: DataFolder,
    out: Path,
    settings: RunSettings,
    seed: int = 0,
    system: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """Run one condition into the run folder ``out``.

    Args:
        system: description of the pipeline, kept in ``config.json``.
        inputs: name → file or folder, besides DATA, that the result depends on; hashed.

    Returns:
        ``rows``, ``failed`` (rows with an error), ``out``; ``without`` (how many rows lack a
        picture, a reference or an answer) and ``nothing`` (all of them do) where some do.
    """
    spec = ConditionSpec(settings.references, settings.noise, settings.noise_params)
    counts = run_conditions(
        pipeline, data, {"": spec}, Path(out), settings, seed, system, inputs, progress, pool
    )
    lacking = missing([Path(out)], bool(pipeline.retrievers), pipeline.generator is not None)
    return {"out": str(out), **counts, **lacking}


def missing(folders: Iterable[Path], index: bool = False, model: bool = True) -> dict[str, Any]:
    """What the rows of run folders lack, told in the log; empty where nothing is missing.

    Args:
        index, model: as of :class:`mmedrag.pipeline.found.Found`.
    """
    found = Found(index, model)
    for folder in folders:
        with open(folder / TRACES, encoding="utf-8") as lines:
            found.add(map(json.loads, lines))
    without = found.tell()
    return {"without": without, "nothing": found.nothing} if without else {}


def run_conditions(
    pipeline: Pipeline,
    data: DataFolder,
    conditions: Mapping[str, ConditionSpec],
    out: Path,
    settings: RunSettings,
    seed: int = 0,
    system: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
    pool: Pool | None = None,
) -> dict[str, int]:
    """Run several conditions together: each becomes the run folder ``out/<name>``.

    Routing, retrieval and the vision features of clean images are shared between them. ``pool``:
    the rows of ``data``, where they have been read already.
    """
    pool = pool or Pool.of(data, seed)
    rows = choose(pool.examples, settings, tell=False)
    index, of = parse_shard(settings.shard)
    all_chunks = chunks(rows, settings.chunk)
    own = [chunk for at, chunk in enumerate(all_chunks) if at % of == index]
    position = {row.id: at for at, row in enumerate(rows)}
    ids = sorted((row.id for chunk in own for row in chunk), key=position.__getitem__)

    _claim_all(out, conditions, settings, seed, system, _inputs(data, rows, inputs), pipeline)
    folders = {name: out / name for name in conditions}
    for folder in folders.values():
        run_folder.check_finished(folder)
    if all((folder / TRACES).exists() for folder in folders.values()) and not _left(out, folders):
        failed = sum(_failed(folder / TRACES) for folder in folders.values())
        return {"rows": len(ids) * len(conditions), "failed": failed}

    journal = Journal(out / JOURNAL)
    worker = Worker(replace(pipeline, pool=pool), conditions, settings.chunk * len(conditions))
    try:
        for chunk in own:
            done = len(journal.where) // len(conditions)
            if progress:
                progress(done, len(ids))
            keys = [f"{name}/{row.id}" for name in conditions for row in chunk]
            if all(key in journal for key in keys):
                continue
            traces = worker(chunk)
            journal.append(
                {f"{n}/{t.example_id}": t.to_json() for n, group in traces.items() for t in group}
            )
            append_line(out / TIMINGS, json.dumps(worker.timing))
        if progress:
            progress(len(ids), len(ids))
        for name, folder in folders.items():
            if of > 1:
                write_json(folder / POSITIONS, [position[i] for i in ids])
            journal.write(folder / TRACES, [f"{name}/{i}" for i in ids])
            run_folder.finish(folder, TRACES)
        journal.close(remove=True)
    finally:
        journal.close()
    failed = sum(_failed(folder / TRACES) for folder in folders.values())
    return {"rows": len(ids) * len(conditions), "failed": failed}


def _left(out: Path, folders: Mapping[str, Path]) -> bool:
    """Whether a run was killed between its traces and the note of what they hold."""
    noted = all((folder / run_folder.FINISHED).exists() for folder in folders.values())
    return (out / JOURNAL).exists() and not noted


def merge(shards: Sequence[Path], out: Path, mixed: bool = False) -> dict[str, Any]:
    """Put the shards of one run together; the result is the run that was never split.

    Args:
        mixed: take shards made with different versions, devices or numbers; the config of the
            result then says of each what it was made with (``shards``).
    """
    configs = [read_json(Path(path) / "config.json") for path in shards]
    found: dict[int, Path] = {}
    wanted = 0
    for path, config in zip(shards, configs, strict=True):
        run_folder.check_finished(Path(path))
        index, of = parse_shard((config.get("settings") or {}).get("run", {}).get("shard"))
        if of == 1 or not (Path(path) / POSITIONS).exists():
            raise UserError(f"{path}: not a finished shard (made by run --shard i/n)")
        if index in found:
            raise UserError(f"{path}: the same shard as {found[index]}")
        found[index], wanted = Path(path), of
        config["settings"]["run"]["shard"] = None
        for part in run_folder.IDENTITY:
            if config.get(part) != configs[0].get(part):
                what = run_folder.difference(configs[0].get(part), config.get(part))
                raise UserError(f"{path}: was made with other {part} ({what})")
    if made := _made_with(shards, configs, mixed):
        configs[0]["shards"] = made
    if len(found) != wanted:
        missing = next(i for i in range(wanted) if i not in found)
        raise UserError(f"run merge: {len(found)} of {wanted} shards given, {missing} is missing")
    run_folder.claim(Path(out), configs[0])
    run_folder.check_finished(Path(out))
    lines: list[tuple[int, bytes]] = []
    for shard in found.values():
        rows = [row for row in (shard / TRACES).read_bytes().split(b"\n") if row]
        places = read_json(shard / POSITIONS)
        if len(places) != len(rows):
            raise UserError(f"{shard / TRACES}: {len(rows)} rows, expected {len(places)}")
        lines += zip(places, rows, strict=True)
    write_bytes(Path(out) / TRACES, b"".join(row + b"\n" for _, row in sorted(lines)))
    run_folder.finish(Path(out), TRACES)
    times = b"".join((p / TIMINGS).read_bytes() for p in found.values() if (p / TIMINGS).exists())
    write_bytes(Path(out) / TIMINGS, times)
    return {"out": str(out), "rows": len(lines), "failed": _failed(Path(out) / TRACES)}


def _made_with(
    shards: Sequence[Path], configs: Sequence[dict[str, Any]], mixed: bool
) -> list[dict[str, Any]]:
    """What each shard was made with, where they differ in what may change an answer.

    Raises:
        UserError: they do, and ``mixed`` does not allow it.
    """
    made = [
        {
            "model": config.get("model"),
            "dtype": config.get("dtype"),
            "device": str(config.get("device")).partition(":")[0],  # cuda:0 and cuda:1 are alike
            "versions": (config.get("environment") or {}).get("versions"),
            "commit": (config.get("environment") or {}).get("commit"),
        }
        for config in configs
    ]
    for path, one in zip(shards, made, strict=True):
        if one != made[0] and not mixed:
            what = run_folder.difference(made[0], one)
            raise UserError(
                f"{path}: was made with another {what}; run it again alike, or allow it: --mixed"
            )
    return made if any(one != made[0] for one in made) else []


def _inputs(
    data: DataFolder, rows: Sequence[Example], more: Mapping[str, Path] | None
) -> dict[str, Any]:
    names = ("examples.jsonl", "corpus.jsonl", "truth.jsonl")
    files = {str(path): path for name in names if (path := data.path / name).exists()}
    pictures = run_folder.picture_inputs(path for row in rows for path in row.images)
    return {"inputs": run_folder.inputs({**files, **(more or {})}), "images": pictures}


def _claim_all(
    out: Path,
    conditions: Mapping[str, ConditionSpec],
    settings: RunSettings,
    seed: int,
    system: Mapping[str, Any] | None,
    inputs: dict[str, Any],
    pipeline: Pipeline,
) -> None:
    generator = pipeline.generator
    facts: dict[str, Any] = generator.facts() if isinstance(generator, Describable) else {}
    environment = run_folder.environment()
    for name, spec in conditions.items():
        condition = {"references": spec.references, "noise": spec.noise}
        mine = {**asdict(settings), **condition, "noise_params": dict(spec.params)}
        config = {
            "command": "run",
            "settings": {"run": mine, "k": pipeline.k},
            "system": dict(system or {}),
            "seeds": {"run": seed},
            **inputs,
            **{key: facts.get(key) for key in ("model", "device", "dtype", "batch_size")},
            "environment": environment,
        }
        run_folder.claim(out / name, config)


def _failed(traces: Path) -> int:
    with open(traces, encoding="utf-8") as lines:
        return sum(bool(json.loads(line).get("error")) for line in lines)
