from . import controls as controls
from .agreement import (
    Agreement as Agreement,
    Case as Case,
    FindingAgreement as FindingAgreement,
    agreement as agreement,
    asked_cells as asked_cells,
    stated as stated,
    true_of as true_of,
)
from .calibrate import fit_selection as fit_selection, write_recipe as write_recipe
from .evaluate_runs import evaluate as evaluate
from .of_domain import evaluate_domain as evaluate_domain
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
from .scoring import best_control as best_control
