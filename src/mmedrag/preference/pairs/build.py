"""From a data folder to preference pairs: four conditions in one pass, then the construction.

Place in the picture: Trace × {clean, noise} × {with, without references} ─► pairs. The four run
folders stay in ``PAIRS/traces/``, so that pairs can be built again, by other rules, without
answering again; a killed call goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmedrag.embedded import located
from mmedrag.pipeline import TRACES, Pipeline, Plan, RunSettings, load_system, run_plans
from mmedrag.preference.pairs import construct
from mmedrag.preference.pairs.files import write_pairs
from mmedrag.preference.pairs.held_out import HeldOut
from mmedrag.preference.pairs.settings import PairSettings
from mmedrag.records import Trace, by_condition
from mmedrag.runtime import DataFolder, config, read_jsonl

NEEDS: Mapping[str, tuple[str, ...]] = {  # kind → run folders it compares
    "cross_modal": ("clean-references", "noise-references"),
    "copy": ("clean", "clean-references"),
    "resist": ("clean", "clean-references"),
    "stage1": ("clean", "noise"),
    "unaided": ("clean",),
}


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
        ``out``, ``pairs`` per kind, ``dropped``, ``refused``, ``failed`` (rows with an error).
    """
    needed = sorted({name for kind in settings.kinds for name in NEEDS[kind]})
    plans = {name: _plan(name, settings) for name in needed}
    run_settings = RunSettings(
        split=settings.split, task=settings.task, limit=settings.limit, chunk=settings.chunk
    )
    described = system.describe() if system else {}
    asked = pipeline()
    counts = run_plans(
        asked,
        data,
        plans,
        out / "traces",
        run_settings,
        seed,
        described,
        system.inputs() if system else {},
        progress,
    )
    traces: list[Trace] = []
    for name in needed:
        traces += read_jsonl(out / "traces" / name / TRACES, Trace)
    guard = HeldOut().add_test(data.examples("test"))
    trained = list(dict.fromkeys([*held_out, *_trained(asked)]))
    for folder in trained:
        guard.add_trained(folder)
    found = construct.build_pairs(
        by_condition(traces),
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
    return {"out": str(out), **found.counts, "failed": counts["failed"]}


def _trained(pipeline: Pipeline) -> list[Path]:
    """Folders of the pipeline's encoders that say what they were trained on."""
    encoders = [getattr(searcher, "encoder", None) for searcher in pipeline.retrievers.values()]
    specs = {getattr(encoder, "spec", None) or "" for encoder in encoders}
    folders = [located(spec) for spec in sorted(specs - {""})]
    return [folder for folder in folders if (folder / "train_ids.jsonl").is_file()]


def _plan(name: str, settings: PairSettings) -> Plan:
    image, _, references = name.partition("-")
    return Plan(
        "selected" if references else "none",
        settings.noise if image == "noise" else None,
        settings.noise_params if image == "noise" else {},
    )


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
