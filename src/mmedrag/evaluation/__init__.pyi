from . import controls as controls
from .arms import Arm as Arm, load_arms as load_arms, task_of as task_of
from .calibrate import fit_selection as fit_selection, write_recipe as write_recipe
from .compare import best_control as best_control
from .evaluate_runs import evaluate as evaluate
from .of_domain import evaluate_domain as evaluate_domain
from .of_retrieval import one_per_image as one_per_image
from .of_retriever import evaluate_retriever as evaluate_retriever
from .reliance import label as label, right as right, truth as truth
