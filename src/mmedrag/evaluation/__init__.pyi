from . import calibrate as calibrate, controls as controls
from .calibrate import fit_selection as fit_selection, write_recipe as write_recipe
from .evaluate_runs import evaluate as evaluate
from .of_domain import (
    EVERYDAY as EVERYDAY,
    blank as blank,
    evaluate_domain as evaluate_domain,
    everyday as everyday,
)
from .of_retriever import evaluate_retriever as evaluate_retriever
from .result import (
    Comparison as Comparison,
    EvaluationResult as EvaluationResult,
    NamedControl as NamedControl,
    NotComputed as NotComputed,
    ReliabilityPoint as ReliabilityPoint,
    RunResult as RunResult,
    Scores as Scores,
    SystemReliance as SystemReliance,
)
from .runs import (
    OVERALL as OVERALL,
    SystemRun as SystemRun,
    by_domain as by_domain,
    load_runs as load_runs,
    one_per_image as one_per_image,
    task_of as task_of,
)
from .scoring import best_control as best_control, generator_control as generator_control
