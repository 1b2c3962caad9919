"""From a data folder to preference pairs: four conditions in one pass, then the construction.

Place in the picture: Trace × {clean, noise} × {with, without references} ─► pairs. The four run
folders stay in ``PAIRS/traces/``, so that pairs can be built again, by other rules, without
answering again; a killed call goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmedrag.embedded import located
from mmedrag.pipeline import TRACES, Pipeline, Pool, RunSettings, run_conditions
from mmedrag.preference.pairs.construct import Mode, build_pairs
from mmedrag.preference.pairs.files import write_pairs
from mmedrag.preference.pairs.held_out import HeldOut
from mmedrag.records import CONDITIONS, KINDS, PAPER_KINDS, Encoding, PairKind, Reopenable, Trace
from mmedrag.runtime import DataFolder, read_jsonl


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made (recipe table ``[pairs]``); see :func:`construct.build_pairs`.

    ``drawn``: kinds whose answers are drawn by the model's p(yes) (``sampling``).
    ``even_answers``: draw pairs so that the answer does not tell whether references were right
    (``sampling.even_answers``).
    """

    mode: Mode = "paper"
    kinds: tuple[PairKind, ...] = PAPER_KINDS
    noise: str = "gaussian_clip"
    noise_params: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = "val"
    task: str | None = None
    limit: int | None = None
    prompts: Literal["with_references", "own"] = "with_references"
    balance_seed: int = 42
    drawn: tuple[PairKind, ...] = ()
    even_answers: bool = False
    chunk: int = 128


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
    asked, pool = pipeline(), Pool.of(data, seed)
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
    found = build_pairs(
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
    return {"out": str(out), **found.counts, "failed": counts["failed"]}


def _trained(pipeline: Pipeline) -> list[Path]:
    """Folders of the pipeline's encoders that say what they were trained on."""
    encoders = [s.encoder for s in pipeline.retrievers.values() if isinstance(s, Encoding)]
    specs = {encoder.spec or "" for encoder in encoders if isinstance(encoder, Reopenable)}
    folders = [located(spec) for spec in sorted(specs - {""})]
    return [folder for folder in folders if (folder / "train_ids.jsonl").is_file()]
