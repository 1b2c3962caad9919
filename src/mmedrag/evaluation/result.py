"""What an evaluation found: the content of ``metrics.json``, as types.

Place in the picture: evaluation -> :class:`EvaluationResult` -> ``metrics.json``, report, repro,
demo. Fields stand in the order of the file. A field with a default is left out of the file where
it holds that default, so that what was absent stays absent; all others are always there, ``null``
where a number is not defined.

Groups are ``overall`` and the domains; tasks are those of
:data:`mmedrag.evaluation.runs.TASKS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mmedrag.evaluation.metrics.statistics import Difference, Estimate
from mmedrag.records import UserError
from mmedrag.runtime import explain, write_json

SCHEMA = 1
# controls as earlier versions called them
RENAMED = {"noise_image": "generator_noise", "blank_image": "generator_blank"}


@dataclass(frozen=True, slots=True)
class ControlScore(Estimate):
    """A metric of a control, and how far the run is above it (paired by draw)."""

    difference: Difference


@dataclass(frozen=True, slots=True)
class NamedControl:
    """The control that a score is held against."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Scores:
    """The metrics of one group of rows, with the controls of each."""

    n: int  # rows
    patients: int
    failed: int  # rows without an answer; they count as wrong
    metrics: dict[str, Estimate]
    controls: dict[str, dict[str, ControlScore]]  # control -> metric
    not_computed: dict[str, str]  # control or metric -> why
    marked: dict[str, str]  # metric that is not clearly above its best control -> that control
    rules: list[str] | None = None  # of retrieval: the selection rules of the rows
    # metric that is not clearly above the generator without a picture -> that control
    generator_marked: dict[str, str] = field(default_factory=dict)
    without_p_yes: int = 0  # rows that auroc and ece leave out

    def known(self, metric: str) -> Estimate | None:
        """The metric, where it was computed and is defined."""
        found = self.metrics.get(metric)
        return found if found and found.value is not None else None


@dataclass(frozen=True, slots=True)
class ReliabilityPoint:
    """A bin of P(yes): its mean, and the share of yes among the truth."""

    p_yes: Estimate
    share_yes: Estimate


Shares = dict[str, Estimate]  # class -> share of the rows that were put into it


@dataclass(frozen=True, slots=True)
class RunResult:
    """One system under one condition. The last three are of plain runs alone."""

    title: str
    condition: str  # image/references, such as clean/selected
    plain: bool  # clean image, and the system's own references or none
    n: int
    failed: int
    tasks: dict[str, dict[str, Scores]]  # task -> group
    retrieval: dict[str, Scores]  # group; of images, not questions
    confusion: dict[str, dict[str, Shares]] | None = None  # group -> truth -> answer
    routing: dict[str, Shares] | None = None  # domain -> identified domain
    reliability: list[ReliabilityPoint] | None = None

    def scores(self, task: str, group: str = "overall") -> Scores | None:
        """The scores of a task, None where the run has no rows of it."""
        return self.tasks.get(task, {}).get(group)


@dataclass(frozen=True, slots=True)
class Rate(Estimate):
    """A reliance metric, with its denominator in words."""

    denominator: str


@dataclass(frozen=True, slots=True)
class SystemReliance:
    """Reliance of one system, over all conditions that it was run under."""

    title: str
    model: str
    metrics: dict[str, Rate]
    not_computed: dict[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired test between two runs: b - a, on the rows that both answered."""

    task: str
    metric: str
    a: str
    b: str
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    test: str
    p_holm: float | None  # adjusted within the task


@dataclass(frozen=True, slots=True)
class SubgroupScore(Estimate):
    control: NamedControl | None
    marked: bool


@dataclass(frozen=True, slots=True)
class Gap(Estimate):
    """The best minus the worst subgroup; ``p``: of as large a gap by chance."""

    p: float | None


@dataclass(frozen=True, slots=True)
class Breakdown:
    """One metric by the values of one field of the rows."""

    values: dict[str, SubgroupScore]
    gap: Gap | None
    note: str | None = None  # why there is no gap


@dataclass(frozen=True, slots=True)
class NotComputed:
    not_computed: str  # why


Subgroups = dict[str, dict[str, Breakdown] | NotComputed]  # field -> metric


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the evaluation ran, and the commit that each run was made with."""

    versions: dict[str, str]
    commit: str | None
    platform: str
    cpus: int | None
    runs: dict[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """The content of ``metrics.json``. Equal inputs and seed, equal bytes."""

    schema: int
    seed: int
    resamples: int
    runs: dict[str, RunResult]
    reliance: dict[str, SystemReliance]  # system
    comparisons: list[Comparison]
    subgroups: dict[str, dict[str, Subgroups]]  # run -> task
    signatures: dict[str, str]  # family of text metrics -> what exactly it is
    not_computed: dict[str, str] = field(default_factory=dict)  # row or metric -> why
    environment: Environment

    def of_task(self, task: str) -> dict[str, dict[str, Scores]]:
        """run -> group -> scores, of the runs that have the task."""
        return {name: run.tasks[task] for name, run in self.runs.items() if task in run.tasks}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        found: dict[str, Any] = _adapter().dump_python(self, exclude_defaults=True)
        return found

    def write(self, path: str | Path) -> None:
        """Write ``metrics.json``, atomically."""
        write_json(Path(path), self.to_json(), own=True)

    @classmethod
    def read(cls, path: str | Path) -> EvaluationResult:
        """Read a ``metrics.json``, also of an earlier version; unknown keys are left out.

        Raises:
            UserError: it cannot be read, or is something else.
        """
        try:
            content = Path(path).read_bytes()
            for old, new in RENAMED.items():
                content = content.replace(f'"{old}"'.encode(), f'"{new}"'.encode())
            return _adapter().validate_json(content)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            raise UserError(
                f"{path}: {explain(error)}, expected a metrics.json of mmedrag eval"
            ) from None


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[EvaluationResult]:
    return TypeAdapter(EvaluationResult)
