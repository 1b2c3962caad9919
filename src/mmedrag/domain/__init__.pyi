from . import features as features, outliers as outliers
from .fit import fit_head as fit_head, fit_trees as fit_trees
from .identify import (
    DomainModel as DomainModel,
    embed as embed,
    open_domain as open_domain,
    predict_domain as predict_domain,
    standardise as standardise,
)
from .settings import DomainTraining as DomainTraining
from .train import (
    features_of as features_of,
    labelled_rows as labelled_rows,
    train_domain as train_domain,
    zero_shot_from as zero_shot_from,
)
