from . import questions as questions
from . import text as text
from .clinical import NAMES as NAMES
from .questions import CONTRACT_NAMES as CONTRACT_NAMES
from .questions import LABELS as LABELS
from .statistics import RESAMPLES as RESAMPLES
from .statistics import Difference as Difference
from .statistics import Estimate as Estimate
