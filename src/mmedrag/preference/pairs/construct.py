"""RAG-PT preference pairs: traces under four conditions become D_cm, D_oa1, D_oa2 and more.

Place in the picture: traces × {clean, noise} × {with, without references} ─► pairs ─► train_dpo.

Paper, Algorithm 1 (x* is the noisy image, x_r the references, y the ground truth):

    cross_modal  M(x, q+x_r) = y  and  M(x*, q+x_r) = y   (x, y) ≻ (x*, M(x*, q+x_r))    D_cm
    copy         M(x, q+x_r) = y  and  M(x, q) ≠ y               y ≻ M(x, q)              D_oa1
    resist       M(x, q) = y      and  M(x, q+x_r) ≠ y           y ≻ M(x, q+x_r)          D_oa2
    stage1       M(x, q) = y      and  M(x*, q) ≠ y       (x, y) ≻ (x*, M(x*, q))    released only
    unaided      M(x, q) = y      and  M(x, q) ≠ y        y ≻ M(x, q), two draws  ours, optional

``unaided`` pairs hold what the model can without references; the paper's three sets never ask so.

The kinds differ only in the table ``KINDS``. ``mode="paper"`` prefers the ground truth and
reads answers strictly; ``mode="released"`` follows the released construction script: the chosen
text is the model's own right answer (reports: the ground truth), its permissive parser, reports
right by first-sentence BLEU against the mean, and D_cm sampled down to half of the rest.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mmedrag.preference.pairs.even import even_answers
from mmedrag.preference.pairs.held_out import HeldOut
from mmedrag.preference.pairs.judge import Criterion, judge
from mmedrag.preference.pairs.sampling import can_draw, draw_answer
from mmedrag.preference.pairs.settings import Mode
from mmedrag.records import (
    CLEAN,
    CONDITIONS,
    KINDS,
    PAPER_KINDS,
    Kind,
    Noise,
    Pair,
    PairKind,
    PairSet,
    Prompt,
    Side,
    Trace,
    UserError,
    condition_of,
    trace_id,
)

log = logging.getLogger(__name__)


def build_pairs(
    traces_by_condition: Mapping[str, Sequence[Trace]],
    mode: Mode = "paper",
    kinds: Sequence[PairKind] = PAPER_KINDS,
    seed: int = 42,
    *,
    held_out: HeldOut | None = None,
    criterion: Criterion | None = None,
    prompts: Literal["with_references", "own"] = "with_references",
    balance: float | None | Literal["mode"] = "mode",
    drawn: Sequence[PairKind] = (),
    even: bool = False,
    root: Path | None = None,
) -> PairSet:
    """Build preference pairs from traces, joined by example id (never by position).

    Args:
        traces_by_condition: keys of ``CONDITIONS`` → traces (see :func:`by_condition`). Only
            the conditions that the asked ``kinds`` compare need to be there.
        mode: ``paper`` or ``released`` (see the module's text).
        kinds: which sets to build, in output order.
        seed: of the D_cm sample and of drawn answers.
        held_out: patients and images that no pair may come from; test traces are always refused.
        criterion: when a report or an open answer is right.
        prompts: ``with_references`` gives both sides the with-references prompt (as released and
            as at test time); ``own`` gives each side the prompt its text was produced with.
        balance: D_cm is sampled down to this share of the other two sets together; ``"mode"``:
            0.5 in ``released``, no sampling in ``paper``.
        drawn: kinds of which only closed questions are taken, answers drawn by the model's p(yes)
            (see :mod:`mmedrag.preference.pairs.sampling`); ``unaided`` always is.
        even: first draw ``copy`` and ``resist`` pairs whose answers give nothing away (see
            :func:`mmedrag.preference.pairs.even.even_answers`), by ``seed``.
        root: DATA folder that image paths are relative to.

    Raises:
        UserError: unknown mode or kind, a condition that is missing, one example twice in it.
    """
    if mode not in ("paper", "released"):
        raise UserError(f"pairs: mode {mode!r} is not known, expected paper or released")
    if stray := [kind for kind in drawn if kind not in kinds]:
        raise UserError(f"pairs: drawn has {stray[0]!r}, expected some of {', '.join(kinds)}")
    index = _index(traces_by_condition, kinds)
    criterion = criterion or Criterion()
    dropped: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    refused: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    means: dict[str, dict[str, float]] = {}
    built: dict[PairKind, list[Pair]] = {}
    for kind in kinds:
        rule = KINDS[kind]
        better, worse = _aligned(index[rule.better], index[rule.worse], dropped[kind])
        if rule.drawn or kind in drawn:
            both = [two for two in zip(better, worse, strict=True) if all(map(can_draw, two))]
            if undrawn := len(better) - len(both):
                dropped[kind]["no_probability"] += undrawn
            better = [draw_answer(trace, f"{seed}/{kind}/better") for trace, _ in both]
            worse = [draw_answer(trace, f"{seed}/{kind}/worse") for _, trace in both]
        verdicts, means[kind] = judge(better, worse, mode, criterion)
        built[kind] = []
        for first, second, verdict in zip(better, worse, verdicts, strict=True):
            if "unclear" in verdict:
                dropped[kind]["unclear"] += 1
                continue
            if verdict != ("right", rule.verdict):
                continue
            source = index[rule.prompt][first.example_id]
            pair = _pair(kind, rule, first, second, source, mode, prompts, root)
            reason = _unusable(pair, kind, first, second)
            if reason is not None:
                dropped[kind][reason] += 1
                continue
            violation = _violation(first, pair, held_out)
            if violation is not None:
                refused[kind][violation] += 1
                continue
            built[kind].append(pair)
    if even:
        shuffled = [pair for kind in kinds for pair in built[kind]]
        random.Random(seed).shuffle(shuffled)
        kept = {pair.id for pair in even_answers(shuffled)}
        for kind in kinds:
            if uneven := sum(pair.id not in kept for pair in built[kind]):
                dropped[kind]["uneven"] = uneven
            built[kind] = [pair for pair in built[kind] if pair.id in kept]
    share = (0.5 if mode == "released" else None) if balance == "mode" else balance
    if share is not None and "cross_modal" in built:
        rest = sum(len(built.get(kind, [])) for kind in ("resist", "copy"))
        keep = int(share * rest)
        have = built["cross_modal"]
        if len(have) > keep:
            dropped["cross_modal"]["balance"] = len(have) - keep
            built["cross_modal"] = random.Random(seed).sample(have, keep)
    pairs = [pair for kind in kinds for pair in built[kind]]
    counts = {
        "mode": mode,
        "examples": len({i for group in index.values() for i in group}),
        "pairs": {kind: len(built[kind]) for kind in kinds},
        "dropped": _sorted(dropped),
        "refused": _sorted(refused),
        "score_means": {kind: value for kind, value in means.items() if value},
    }
    log.info("pairs: %s", counts)
    return PairSet(pairs, counts)


def _sorted(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {kind: dict(sorted(found.items())) for kind, found in counts.items() if found}


def _index(
    groups: Mapping[str, Sequence[Trace]], kinds: Sequence[PairKind]
) -> dict[str, dict[str, Trace]]:
    """Traces by condition and example id, for the conditions that the kinds need."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or len(set(kinds)) != len(kinds) or not kinds:
        raise UserError(
            f"pairs: kinds {list(kinds)!r} not understood, expected some of {', '.join(KINDS)}"
        )
    needed = {name for kind in kinds for name in (KINDS[kind].better, KINDS[kind].worse)}
    index: dict[str, dict[str, Trace]] = {}
    for name in CONDITIONS:
        if name not in needed:
            continue
        if not groups.get(name):
            raise UserError(
                f"pairs: no traces under condition {name!r}, needed for {', '.join(kinds)}"
            )
        index[name] = {}
        for trace in groups[name]:
            if condition_of(trace) != name:
                raise UserError(
                    f"pairs: {trace.example_id}: trace of condition {condition_of(trace)!r} "
                    f"given as {name!r}"
                )
            if trace.example_id in index[name]:
                raise UserError(f"pairs: {trace.example_id}: two traces under condition {name!r}")
            index[name][trace.example_id] = trace
    return index


def _aligned(
    first: Mapping[str, Trace], second: Mapping[str, Trace], dropped: Counter[str]
) -> tuple[list[Trace], list[Trace]]:
    """The examples answered under both conditions, in the order of the first."""
    ids = [i for i in first if i in second]
    if alone := len(first.keys() ^ second.keys()):
        dropped["incomplete"] += alone
    good = []
    for i in ids:
        failed = any(t.error or t.answer is None or t.prompt is None for t in (first[i], second[i]))
        if failed:
            dropped["failed"] += 1
        elif not (first[i].target or "").strip():
            dropped["no_target"] += 1
        else:
            good.append(i)
    return [first[i] for i in good], [second[i] for i in good]


def _pair(
    kind: PairKind,
    rule: Kind,
    better: Trace,
    worse: Trace,
    source: Trace,
    mode: Mode,
    prompts: str,
    root: Path | None,
) -> Pair:
    assert better.answer and worse.answer and source.prompt  # _aligned let only such through
    own_answer = mode == "released" and better.task == "vqa"
    chosen_text = better.answer.text if own_answer else better.target or ""

    def side(trace: Trace, text: str) -> Side:
        prompt = trace.prompt if prompts == "own" else source.prompt
        assert prompt is not None
        noise = trace.condition.noise
        if noise is not None and mode == "released":  # trained on pure noise whatever was asked on
            noise = Noise(kind="gaussian_clip", seed=noise.seed)
        return Side(prompt=prompt, image=trace.image, noise=noise, text=text.strip())

    return Pair(
        id=f"{kind}:{better.example_id}",
        kind=kind,
        chosen=side(better, chosen_text),
        rejected=side(worse, worse.answer.text),
        reference_ids=list(source.prompt.references),
        trace_ids=sorted({trace_id(t) for t in (better, worse, source)}),
        reason=rule.reason,
        patient=better.patient,
        meta={
            "task": better.task,
            "domain": better.target_domain or (better.domain.label if better.domain else None),
            "mode": mode,
            **({"redraw_noise": True} if mode == "released" else {}),
        },
        root=root,
    )


def _unusable(pair: Pair, kind: PairKind, better: Trace, worse: Trace) -> str | None:
    """Why a pair carries no signal, or None."""
    if not pair.chosen.text or not pair.rejected.text:
        return "empty"
    if not pair.chosen.image:
        return "no_image"
    if KINDS[kind].prompt != CLEAN and not pair.reference_ids:
        return "no_references"  # unknown domain or nothing kept: the conditions do not differ
    if kind == "cross_modal" and _text(better.prompt) != _text(worse.prompt):
        return "prompts_differ"  # x_r must be the clean image's on both sides
    if pair.chosen == pair.rejected:
        return "identical"
    return None


def _text(prompt: Prompt | None) -> str:
    return prompt.text if prompt else ""


def _violation(trace: Trace, pair: Pair, held_out: HeldOut | None) -> str | None:
    if trace.split == "test":
        return "test_split"
    return held_out.violation(trace, pair.root) if held_out else None
