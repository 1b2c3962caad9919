from . import ablation as ablation, real_demo as real_demo, repro_checks as repro_checks
from .ablation import PAIRWISE as PAIRWISE, SETS as SETS
from .demo import STUDIES as STUDIES, ablate as ablate, headline as headline, run_demo as run_demo
from .real_demo import run_real_demo as run_real_demo
from .repro import adopt as adopt, run_matrix as run_matrix
from .settings import AblationSettings as AblationSettings, SweepSettings as SweepSettings
from .sweep import run_sweep as run_sweep
