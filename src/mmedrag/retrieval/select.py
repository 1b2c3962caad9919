"""Selection rules: how many of the retrieved references to keep, and why the cut is there.

Place in the picture: between retrieval and the prompt (x_r of paper §3.2). A rule is a pure
function ``(scores best first, **params) -> (how many to keep, reason)``; :class:`RuleSpec` is a
rule with its parameters, applied to hits. What every rule means by odd similarities:

- NaN: not a similarity; it and everything after it is dropped.
- zero or negative: the ratio rules are undefined there (the released code keeps them: B6 of
  docs/differences.md), so such references are dropped; ``fixed_k`` and the floors look at the
  order alone.
- ``k`` caps every rule (None: no cap). ``k`` = 0 keeps nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmedrag.records import Hit, Selection, UserError, resolve_object

Cut = tuple[int, str]


def _usable(scores: Sequence[float], positive: bool) -> Cut:
    """Length of the prefix that a rule may look at, and why it ends where it does."""
    for i, score in enumerate(scores):
        if math.isnan(score):
            return i, f"similarity {i + 1} is not a number"
        if positive and score <= 0:
            return i, f"similarity {i + 1} is {score:.4g}, not positive"
    return len(scores), "" if scores else "nothing was retrieved"


def _capped(count: int, reason: str, k: int | None) -> Cut:
    if k is not None and count > k:
        return max(k, 0), f"capped at k = {k}"
    return count, reason


def log_ratio(
    scores: Sequence[float], gamma: float = 0.1, min_k: int = 0, k: int | None = None
) -> Cut:
    """Paper §3.2: truncate at the first i with u_i = log(S_i / S_{i+1}) > gamma.

    The paper gives no value for gamma. ``min_k`` references are kept before the first gap may
    cut (as far as their similarities are positive).
    """
    end, why = _usable(scores, positive=True)
    for i in range(max(min_k, 1) - 1, end - 1):
        gap = math.log(scores[i] / scores[i + 1])
        if gap > gamma:
            return _capped(i + 1, f"gap {i + 1}: log ratio {gap:.4g} > gamma {gamma:g}", k)
    return _capped(end, why or f"no log ratio above gamma {gamma:g}", k)


def top1_ratio(scores: Sequence[float], threshold: float = 1.5, k: int | None = None) -> Cut:
    """Released rule (retrieve_clip_VQA.py:36-51): keep S_j while S_1 / S_j < threshold, then cap.

    log(S_1 / S_j) is the sum of the paper's adjacent gaps. With a threshold of 1 or less the
    released code keeps nothing at all, the best included (B6); here that is an error.
    """
    if not threshold > 1:
        raise UserError(f"selection: threshold: got {threshold:g}, expected more than 1")
    end, why = _usable(scores, positive=True)
    for i in range(1, end):
        ratio = scores[0] / scores[i]
        if not ratio < threshold:
            return _capped(i, f"S1/S{i + 1} = {ratio:.4g} >= threshold {threshold:g}", k)
    return _capped(end, why or f"every S1/Sj below threshold {threshold:g}", k)


def fixed_k(scores: Sequence[float], k: int = 1) -> Cut:
    """The k best, whatever their similarities (as far as they are numbers)."""
    end, why = _usable(scores, positive=False)
    return (max(k, 0), f"fixed k = {k}") if end >= k else (end, why or f"only {end} of k = {k}")


def score_floor(scores: Sequence[float], floor: float = 0.0, k: int | None = None) -> Cut:
    """Keep S_j >= floor."""
    end, why = _usable(scores, positive=False)
    for i in range(end):
        if scores[i] < floor:
            return _capped(i, f"similarity {i + 1} is {scores[i]:.4g} < floor {floor:g}", k)
    return _capped(end, why or f"every similarity reaches the floor {floor:g}", k)


def calibrated(
    scores: Sequence[float],
    threshold: float | None = None,
    precision: float | None = None,
    k: int | None = None,
) -> Cut:
    """A floor fitted by :func:`fit_threshold`, so that kept references reach ``precision``.

    ``threshold`` None means that no floor reached it on the validation data: keep nothing.
    """
    aim = "" if precision is None else f" for precision {precision:g}"
    if threshold is None:
        return 0, f"no threshold reached the aim{aim} on validation data"
    count, reason = score_floor(scores, threshold)
    return _capped(count, reason.replace("floor", "fitted threshold") + aim, k)


def fit_threshold(
    scores: Sequence[float], agrees: Sequence[bool], precision: float, z: float = 1.0
) -> dict[str, Any]:
    """Parameters of :func:`calibrated` from validation references and whether each agrees.

    The lowest observed score t for which the Wilson lower bound (``z`` standard errors) of
    P(agrees | score >= t) reaches ``precision``; at least 20 references must stand above it.
    """
    pairs = sorted(
        ((s, bool(a)) for s, a in zip(scores, agrees, strict=True) if not math.isnan(s)),
        reverse=True,
    )
    best, right = None, 0
    for n, (score, agree) in enumerate(pairs, 1):
        right += agree
        tied = n < len(pairs) and pairs[n][0] == score
        if n >= 20 and not tied and wilson_lower(right, n, z) >= precision:
            best = score
    return {"threshold": best, "precision": precision}


def wilson_lower(successes: int, n: int, z: float) -> float:
    """Lower bound of the Wilson score interval (Wilson 1927, JASA 22:209)."""
    p, z2 = successes / n, z * z
    spread = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (p + z2 / (2 * n) - spread) / (1 + z2 / n)


RULES = {
    name: f"mmedrag.retrieval.select:{name}"
    for name in ("log_ratio", "top1_ratio", "fixed_k", "score_floor", "calibrated")
}


@dataclass(init=False)
class RuleSpec:
    """A rule and its parameters: ``RuleSpec("log_ratio", gamma=0.1)(hits) -> Selection``.

    Raises:
        UserError: unknown rule or parameter (the known ones are listed), or one that is not a
            number.
    """

    rule: str = "log_ratio"
    params: dict[str, Any] = field(default_factory=dict)

    def __init__(self, rule: str = "log_ratio", **params: Any) -> None:
        self.rule = rule
        known = [name for name in inspect.signature(self.function).parameters if name != "scores"]
        for name, value in params.items():
            if name not in known:
                raise UserError(
                    f"selection rule {rule!r}: {name!r} is not known, expected {', '.join(known)}"
                )
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value)):
                raise UserError(f"selection: {name}: got {value!r}, expected a number")
        self.params = params

    @property
    def resolved(self) -> dict[str, Any]:
        """The parameters as they act: those given over the rule's defaults, without None."""
        declared = inspect.signature(self.function).parameters
        values = {n: self.params.get(n, p.default) for n, p in declared.items() if n != "scores"}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def function(self) -> Callable[..., Cut]:
        return resolve_object(self.rule, RULES, "selection rule")

    def __call__(self, hits: Sequence[Hit]) -> Selection:
        count, reason = self.function([hit.score for hit in hits], **self.params)
        return Selection(
            rule=self.rule,
            params=self.resolved,
            kept=[hit.id for hit in hits[:count]],
            reason=reason,
        )
