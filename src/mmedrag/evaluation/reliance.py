"""Reliance: does the model look at the image, or copy and trust what was retrieved?

Place in the picture: traces of one system under several conditions -> metrics. The paper's
copy-reference and over-reliance rates have unclear denominators; here each is a function of
named conditions over closed questions, joined by example id, with its denominator counted.

Notation: R(c) is "the answer under condition c is right" (strict parser).

| metric | definition | over rows (n) |
|---|---|---|
| copy_reference_rate | P(R(noise, refs)) | answered under both noise conditions |
| excess_copying | P(R(noise, refs)) - P(R(noise, none)) | the same |
| over_reliance_rate | P(not R(clean, refs) given R(clean, none)) | right without references |
| reference_gain | P(R(clean, refs) and not R(clean, none)) | answered under both |
| reference_harm | P(R(clean, none) and not R(clean, refs)) | answered under both |
| follow_rate | P(answer = reference's side) | its reference contradicts the truth |
| image_sensitivity | P(answer flips), without references | image twins whose asked finding flips |
| image_sensitivity_refs | the same with references | the same |

Accuracy with minus accuracy without references = reference_gain - reference_harm, and
over_reliance_rate = reference_harm / P(R(clean, none)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmedrag.evaluation.metrics.questions import proportion
from mmedrag.evaluation.metrics.statistics import RESAMPLES, Stat, intervals, ratio
from mmedrag.evaluation.result import Rate
from mmedrag.records import (
    CLEAN,
    CLEAN_REFERENCES,
    NOISE,
    NOISE_REFERENCES,
    ConditionSpec,
    Trace,
    is_right,
    label_of,
    target_of,
)

DENOMINATORS = {
    "copy_reference_rate": "closed questions answered on the noise image both with and without "
    "references (all such rows; the paper's own denominator is not stated)",
    "copy_reference_rate_still_right": "of those, the ones right on the clean image with "
    "references (the paper's wording 'still correct')",
    "excess_copying": "as copy_reference_rate, less the floor P(right | noise, none)",
    "noise_floor": "as copy_reference_rate: P(right | noise image, no references)",
    "over_reliance_rate": "closed questions right on the clean image without references",
    "reference_gain": "closed questions answered with and without references: wrong to right",
    "reference_harm": "closed questions answered with and without references: right to wrong",
    "oracle_accuracy": "the same: right with or without, as if an oracle chose per question",
    "follow_rate": "closed questions with a reference in the prompt that contradicts the truth",
    "follow_floor": "the same rows without references: how often the wrong side is taken anyway",
    "image_sensitivity": "image twins in which the truth of the asked question flips, without "
    "references",
    "image_sensitivity_refs": "the same with references",
    "image_false_flips": "image twins in which another finding flips and the truth stays, without "
    "references",
    "image_false_flips_refs": "the same with references",
}

_TWO = "clean runs with references and with --references none"
_NOISE = "runs with --noise, with references and with --references none"
NEEDS = {
    "copy_reference_rate": _NOISE,
    "excess_copying": _NOISE,
    "over_reliance_rate": _TWO,
    "reference_gain": _TWO,
    "reference_harm": _TWO,
    "follow_rate": "a run with --references contradicting",
    "image_sensitivity": "a run over image twins (meta.twin_of) with --references none",
    "image_sensitivity_refs": "a run over image twins (meta.twin_of) with references",
}


def is_closed(trace: Trace) -> bool:
    return trace.task == "vqa" and trace.answer_type == "closed" and trace.target is not None


def role(trace: Trace) -> str:
    """The slug of the trace's condition; twins (``meta.twin_of``) keep to themselves."""
    return f"{'twin-' if trace.meta.get('twin_of') else ''}{ConditionSpec.of(trace).slug}"


def by_role(traces: Sequence[Trace]) -> dict[str, dict[str, Trace]]:
    """role -> example id -> closed trace. Where ``selected`` and ``all`` were both run, the
    first is "with references"."""
    table: dict[str, dict[str, Trace]] = {}
    for trace in traces:
        if not is_closed(trace):
            continue
        rows = table.setdefault(role(trace), {})
        known = rows.get(trace.example_id)
        if known is None or known.condition.references == "all":
            rows[trace.example_id] = trace
    return table


def excess(above: Sequence[bool] | np.ndarray, floor: Sequence[bool] | np.ndarray) -> Stat:
    """P(above) - P(floor) over the same rows, as a resamplable metric."""
    table = np.stack([np.asarray(above, float), np.asarray(floor, float), np.ones(len(above))], 1)
    return Stat(table, _excess, table[:, 0] - table[:, 1], unit=False)


def _excess(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0] - sums[..., 1], sums[..., 2])


def reliance_stats(traces: Sequence[Trace]) -> dict[str, tuple[Stat, list[Trace]]]:
    """Every reliance metric that the given conditions allow, with its rows.

    Args:
        traces: all traces of one system, whatever their condition.

    Returns:
        name -> (metric, traces behind its rows, in order). Metrics whose conditions were not
        run are absent.
    """
    roles = by_role(traces)
    out: dict[str, tuple[Stat, list[Trace]]] = {}

    def joined(*conditions: ConditionSpec) -> list[tuple[Trace, ...]]:
        tables = [roles.get(condition.slug, {}) for condition in conditions]
        ids = sorted(set.intersection(*(set(t) for t in tables)))
        return [tuple(t[i] for t in tables) for i in ids]

    rows = joined(NOISE_REFERENCES, NOISE)
    if rows:
        with_, none = ([is_right(t) for t in column] for column in zip(*rows, strict=True))
        own = [row[0] for row in rows]
        out["copy_reference_rate"] = proportion(with_), own
        out["noise_floor"] = proportion(none), own
        out["excess_copying"] = excess(with_, none), own
    rows = joined(NOISE_REFERENCES, CLEAN_REFERENCES)
    if rows:
        out["copy_reference_rate_still_right"] = (
            proportion([is_right(a) for a, _ in rows], [is_right(b) for _, b in rows]),
            [row[0] for row in rows],
        )
    rows = joined(CLEAN_REFERENCES, CLEAN)
    if rows:
        with_, none = ([is_right(t) for t in column] for column in zip(*rows, strict=True))
        pairs = list(zip(with_, none, strict=True))
        own = [row[0] for row in rows]
        out["over_reliance_rate"] = proportion([not a for a, _ in pairs], none), own
        out["reference_gain"] = proportion([a and not b for a, b in pairs]), own
        out["reference_harm"] = proportion([b and not a for a, b in pairs]), own
        out["oracle_accuracy"] = proportion([a or b for a, b in pairs]), own
    follow = [t for t in roles.get(ConditionSpec("contradicting").slug, {}).values() if _shown(t)]
    if follow:
        out["follow_rate"] = proportion([_other_side(t) for t in follow]), follow
        base = [roles.get(CLEAN.slug, {}).get(t.example_id) for t in follow]
        known = [t for t in base if t is not None]
        if len(known) == len(follow):
            out["follow_floor"] = proportion([_other_side(t) for t in known]), follow
    out |= _twins(roles)
    return out


def _shown(trace: Trace) -> bool:
    return bool(trace.prompt and trace.prompt.references)


def _other_side(trace: Trace) -> bool:
    return label_of(trace) == {"yes": "no", "no": "yes"}[target_of(trace)]


def _twins(roles: Mapping[str, Mapping[str, Trace]]) -> dict[str, tuple[Stat, list[Trace]]]:
    """Image twins: ``meta.twin_of`` names the example whose image differs in one finding."""
    out: dict[str, tuple[Stat, list[Trace]]] = {}
    for suffix, condition in (("", CLEAN), ("_refs", CLEAN_REFERENCES)):
        originals = roles.get(condition.slug, {})
        twins = sorted(roles.get(f"twin-{condition.slug}", {}).items())
        pairs = [
            (originals[str(t.meta["twin_of"])], t)
            for _, t in twins
            if str(t.meta["twin_of"]) in originals
        ]
        turned = [target_of(a) != target_of(b) for a, b in pairs]
        flips = [{label_of(a), label_of(b)} == {"yes", "no"} for a, b in pairs]
        own = [a for a, _ in pairs]
        if any(turned):
            out[f"image_sensitivity{suffix}"] = proportion(flips, turned), own
        if not all(turned):
            out[f"image_false_flips{suffix}"] = proportion(flips, [not t for t in turned]), own
    return out


def reliance(traces: Sequence[Trace], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Rate]:
    """Reliance metrics of one system: value, 95 % interval, n and denominator of each.

    Args:
        traces: all its traces; the conditions decide which metrics exist.
    """
    out = {}
    for name, (stat, rows) in reliance_stats(traces).items():
        found = intervals({name: stat}, [t.patient for t in rows], resamples, seed)[name]
        out[name] = Rate.of(found, denominator=DENOMINATORS[name])
    return out


def missing(found: Mapping[str, Rate]) -> dict[str, str]:
    """Which reliance metrics were not computed, and the runs that they need."""
    return {name: needs for name, needs in NEEDS.items() if name not in found}
