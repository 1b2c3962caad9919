"""What a row's references do to its answers, between the two ends: ignored, and as used at best.

Place in the picture: between an ablation's runs and its tables. Of every row with retrieval:
accuracy of closed questions and following of the retrieved reference, beside the over-reliance that
is there already. Two more rows stand first: *references ignored* (the untuned model without any),
and the attainable, where the user has fitted a fuser (``python -m training.fusion``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mmedrag.evaluation import (
    EFFECTS,
    Estimate,
    EvaluationResult,
    Fusion,
    Rate,
    SystemReliance,
    asked_twice,
    measured,
)
from mmedrag.experiments.ablation import Row
from mmedrag.records import Trace, UserError
from mmedrag.runtime import explain, read_jsonl

IGNORED = "references ignored (untuned, none)"
ATTAINABLE = "attainable"
REFERENCES = "references"


def read_fusion(path: str | Path) -> Fusion:
    """What ``python -m training.fusion --out`` wrote; UserError where it is something else."""
    try:
        return TypeAdapter(Fusion).validate_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}, expected the JSON of training.fusion") from None


def with_effects(
    result: EvaluationResult, table: Sequence[Row], runs: Path, fusion: Fusion | None = None
) -> EvaluationResult:
    """The evaluation of an ablation with the effects of its rows, and their two ends.

    Args:
        runs: the folder ``ROW/CONDITION`` of its runs.
        fusion: the attainable, on these questions.
    """
    base = _traces(runs / table[0].name / "none")
    added: dict[str, dict[str, Rate]] = {}
    ends: dict[str, SystemReliance] = {}
    for row in table:
        with_ = _traces(runs / row.name / REFERENCES)
        alone = _traces(runs / row.name / "none") if "none" in row.plans else base
        try:
            pairs = asked_twice(alone, with_)
        except UserError:  # no such row here, or nothing is known of what its references say
            continue
        against = _traces(runs / row.name / "contradicting")
        against_ = asked_twice(alone, against) if against else []
        effects = measured(pairs, None, against_, None, result.seed, result.resamples)
        added[row.title] = _rates(effects["reader"])
        if not row.adapter:
            model = next((s.model for s in result.reliance.values() if s.title == row.title), "")
            ends[IGNORED] = SystemReliance(IGNORED, model, _rates(effects["ignored"]), {})
    if fusion and ends:
        title = f"{ATTAINABLE} ({fusion.policy}, fitted on {fusion.fitted} other questions)"
        rates = _rates(fusion.effects["fuser"])
        ends[ATTAINABLE] = SystemReliance(title, ends[IGNORED].model, rates, {})
    own = {
        name: replace(system, metrics={**added.get(system.title, {}), **system.metrics})
        for name, system in result.reliance.items()
    }
    return replace(result, reliance={**ends, **own})


def _traces(folder: Path) -> list[Trace]:
    path = folder / "traces.jsonl"
    return list(read_jsonl(path, Trace)) if path.exists() else []


def _rates(effects: Mapping[str, Estimate]) -> dict[str, Rate]:
    return {name: Rate.of(cell, denominator=EFFECTS[name]) for name, cell in effects.items()}


def effect_lines(result: EvaluationResult) -> list[str]:
    """The effects in words, the two ends first; empty where none are known."""
    rows = [s for s in result.reliance.values() if "follow_retrieved" in s.metrics]
    if not rows:
        return []
    lines = [f"closed questions: {', '.join(EFFECTS)}"]
    for system in rows:
        cells = []
        for name in EFFECTS:
            rate = system.metrics.get(name)
            known = rate is not None and rate.value is not None
            cells.append(f"{rate.value:.3f} n={rate.n}" if rate and known else "-")
        lines.append(f"{system.title:<48} {'   '.join(f'{cell:<14}' for cell in cells)}".rstrip())
    return lines
