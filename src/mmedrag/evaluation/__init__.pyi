from . import calibrate as calibrate, controls as controls
from .calibrate import fit_selection as fit_selection, write_recipe as write_recipe
from .evaluate_runs import evaluate as evaluate
from .fusion import (
    EFFECTS as EFFECTS,
    Asked as Asked,
    Fusion as Fusion,
    asked_twice as asked_twice,
    attainable as attainable,
    fit_fuser as fit_fuser,
    measured as measured,
)
from .keywords import findings_of as findings_of, load_keywords as load_keywords
from .metrics.statistics import Estimate as Estimate
from .of_domain import (
    EVERYDAY as EVERYDAY,
    blank as blank,
    evaluate_domain as evaluate_domain,
    everyday as everyday,
)
from .of_references import (
    Agreement as Agreement,
    Case as Case,
    agreement as agreement,
    asked_cells as asked_cells,
    case_of_reports as case_of_reports,
    cases_of as cases_of,
    reference_agreement as reference_agreement,
    stated as stated,
    true_of as true_of,
)
from .of_retriever import evaluate_retriever as evaluate_retriever
from .result import (
    Comparison as Comparison,
    EvaluationResult as EvaluationResult,
    NamedControl as NamedControl,
    NotComputed as NotComputed,
    Rate as Rate,
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
