from . import (
    evidence as evidence,
    interactive as interactive,
    retrieve as retrieve,
    system as system,
)
from .conditions import Pool as Pool
from .embedded import (
    CORPUS as CORPUS,
    data_folder as data_folder,
    generic_index as generic_index,
    real_domain_model as real_domain_model,
)
from .evidence import NOTICE as NOTICE, guess_answer_type as guess_answer_type
from .interactive import Reply as Reply, ask as ask, notices as notices
from .pipeline import GENERIC as GENERIC, STAGES as STAGES, Pipeline as Pipeline, Stage as Stage
from .retrieve import retrieve_examples as retrieve_examples
from .run import (
    TRACES as TRACES,
    choose as choose,
    merge as merge,
    missing as missing,
    run_conditions as run_conditions,
    run_examples as run_examples,
)
from .settings import Flags as Flags, RunSettings as RunSettings
from .system import (
    SIDECAR as SIDECAR,
    OneDomainTable as OneDomainTable,
    System as System,
    build_pipeline as build_pipeline,
    load_system as load_system,
    resolve_system as resolve_system,
)
from .worker import Worker as Worker
