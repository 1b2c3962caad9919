"""RAG-PT preference pairs: traces under four conditions become D_cm, D_oa1, D_oa2 and more.

Place in the picture: traces × {clean, noise} × {with, without references} ─► pairs ─► train_dpo.

What is compared with what is the table ``records.KINDS`` (paper, Algorithm 1). ``mode="paper"``
prefers the ground truth and reads answers strictly; ``mode="released"`` follows the released
construction script: the chosen text is the model's own right answer (reports: the ground truth),
its permissive parser, reports right by first-sentence BLEU against the mean, and D_cm sampled down
to half of the rest.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmedrag.preference.pairs.held_out import HeldOut
from mmedrag.preference.pairs.judge import Criterion, judge
from mmedrag.preference.pairs.sampling import can_draw, draw_answer, even_answers
from mmedrag.records import (
    CLEAN,
    CONDITIONS,
    KINDS,
    PAPER_KINDS,
    ConditionSpec,
    Kind,
    Noise,
    Pair,
    PairKind,
    PairSet,
    Prompt,
    Side,
    Trace,
    UserError,
    by_condition,
    target_of,
    trace_id,
)
from mmedrag.runtime import python_rng

log = logging.getLogger(__name__)

Mode = Literal["paper", "released"]


def build_pairs(
    traces: Mapping[str, Sequence[Trace]] | Iterable[Trace],
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
        traces: of any number of conditions, or slug of a condition → traces (see
            :func:`mmedrag.records.by_condition`). Only the conditions that the asked ``kinds``
            compare need to be there.
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
            (see ``sampling``); ``unaided`` always is.
        even: first draw ``copy`` and ``resist`` pairs whose answers give nothing away (see
            :func:`sampling.even_answers`), by ``seed``.
        root: DATA folder that image paths are relative to.

    Raises:
        UserError: unknown mode or kind, a condition that is missing, one example twice in it.
    """
    if mode not in ("paper", "released"):
        raise UserError(f"pairs: mode {mode!r} is not known, expected paper or released")
    if stray := [kind for kind in drawn if kind not in kinds]:
        raise UserError(f"pairs: drawn has {stray[0]!r}, expected some of {', '.join(kinds)}")
    groups = traces if isinstance(traces, Mapping) else by_condition(traces)
    index = _index(groups, kinds)
    build = _Construction(mode, index, criterion or Criterion(), held_out, prompts, root, seed)
    built = {kind: build.pairs(kind, KINDS[kind].drawn or kind in drawn) for kind in kinds}
    if even:
        build.even(built)
    share = (0.5 if mode == "released" else None) if balance == "mode" else balance
    if share is not None and "cross_modal" in built:
        build.balance(built, share)
    counts = {
        "mode": mode,
        "examples": len({i for group in index.values() for i in group}),
        "pairs": {kind: len(built[kind]) for kind in kinds},
        "dropped": _sorted(build.dropped),
        "refused": _sorted(build.refused),
        "score_means": {kind: value for kind, value in build.means.items() if value},
    }
    log.info("pairs: %s", counts)
    return PairSet([pair for kind in kinds for pair in built[kind]], counts)


@dataclass
class _Construction:
    """Kind by kind: align, draw, judge, make; and what was dropped or refused on the way."""

    mode: Mode
    index: Mapping[str, Mapping[str, Trace]]  # slug of a condition → example id → trace
    criterion: Criterion
    held_out: HeldOut | None
    prompts: str
    root: Path | None
    seed: int
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    refused: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    means: dict[str, dict[str, float]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)  # pair id → what its chosen side says

    def pairs(self, kind: PairKind, drawn: bool) -> list[Pair]:
        """All pairs of one kind."""
        rule, dropped = KINDS[kind], self.dropped[kind]
        better, worse = _aligned(self._traces(rule.better), self._traces(rule.worse), dropped)
        if drawn:
            both = [two for two in zip(better, worse, strict=True) if all(map(can_draw, two))]
            if undrawn := len(better) - len(both):
                dropped["no_probability"] += undrawn
            better = [draw_answer(trace, f"{self.seed}/{kind}/better") for trace, _ in both]
            worse = [draw_answer(trace, f"{self.seed}/{kind}/worse") for _, trace in both]
        verdicts, self.means[kind] = judge(better, worse, self.mode, self.criterion)
        built = []
        for first, second, verdict in zip(better, worse, verdicts, strict=True):
            if "unclear" in verdict:
                dropped["unclear"] += 1
                continue
            if verdict != ("right", rule.verdict):
                continue
            source = self._traces(rule.prompt)[first.example_id]
            pair = _pair(kind, rule, first, second, source, self.mode, self.prompts, self.root)
            if reason := _unusable(pair, kind, first, second):
                dropped[reason] += 1
            elif violation := _violation(first, pair, self.held_out):
                self.refused[kind][violation] += 1
            else:
                built.append(pair)
                if first.answer_type == "closed":
                    self.labels[pair.id] = target_of(first)  # what is right is chosen
        return built

    def even(self, built: dict[PairKind, list[Pair]]) -> None:
        """Leave pairs out until answers tell nothing, drawn by the seed."""
        shuffled = [pair for pairs in built.values() for pair in pairs]
        python_rng(self.seed).shuffle(shuffled)
        kept = {pair.id for pair in even_answers(shuffled, self.labels)}
        for kind, pairs in built.items():
            if uneven := sum(pair.id not in kept for pair in pairs):
                self.dropped[kind]["uneven"] = uneven
            built[kind] = [pair for pair in pairs if pair.id in kept]

    def balance(self, built: dict[PairKind, list[Pair]], share: float) -> None:
        """Sample D_cm down to ``share`` of the other two sets together."""
        keep = int(share * sum(len(built.get(kind, [])) for kind in ("resist", "copy")))
        have = built["cross_modal"]
        if len(have) > keep:
            self.dropped["cross_modal"]["balance"] = len(have) - keep
            built["cross_modal"] = python_rng(self.seed).sample(have, keep)

    def _traces(self, spec: ConditionSpec) -> Mapping[str, Trace]:
        return self.index[spec.slug]


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
    needed = dict.fromkeys(spec for kind in kinds for spec in KINDS[kind].conditions)
    index: dict[str, dict[str, Trace]] = {}
    for name in [spec.slug for spec in CONDITIONS if spec in needed]:
        if not groups.get(name):
            raise UserError(
                f"pairs: no traces under condition {name!r}, needed for {', '.join(kinds)}"
            )
        index[name] = {}
        for trace in groups[name]:
            if (own := ConditionSpec.of(trace).slug) != name:
                raise UserError(
                    f"pairs: {trace.example_id}: trace of condition {own!r} given as {name!r}"
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
