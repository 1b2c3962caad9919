from . import bounds as bounds, questions as questions, text as text
from .clinical import NAMES as NAMES
from .questions import CONTRACT_NAMES as CONTRACT_NAMES, LABELS as LABELS
from .statistics import (
    FEWEST as FEWEST,
    RESAMPLES as RESAMPLES,
    Difference as Difference,
    Estimate as Estimate,
)
