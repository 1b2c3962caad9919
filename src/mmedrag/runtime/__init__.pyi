from . import (
    config as config,
    journal as journal,
    launch as launch,
    memory as memory,
    run_folder as run_folder,
    torchvision_shim as torchvision_shim,
    training as training,
)
from .cache import cache_folder as cache_folder
from .config import (
    Settings as Settings,
    as_dict as as_dict,
    read_toml as read_toml,
    setting as setting,
)
from .data_folder import DataFolder as DataFolder, counted as counted
from .draws import (
    named_random as named_random,
    numpy_rng as numpy_rng,
    python_rng as python_rng,
    random_words as random_words,
    seeded_int as seeded_int,
    seeded_share as seeded_share,
    torch_rng as torch_rng,
)
from .files import (
    PART as PART,
    BadRow as BadRow,
    check_own as check_own,
    explain as explain,
    new_folder as new_folder,
    part_of as part_of,
    read_json as read_json,
    read_jsonl as read_jsonl,
    replacing as replacing,
    sha256 as sha256,
    sha256_of as sha256_of,
    sync as sync,
    write_bytes as write_bytes,
    write_json as write_json,
    write_jsonl as write_jsonl,
    write_text as write_text,
    write_unsynced as write_unsynced,
)
from .journal import (
    Journal as Journal,
    append_bytes as append_bytes,
    append_line as append_line,
    lock_file as lock_file,
    open_log as open_log,
)
from .model_card import Figures as Figures, ModelCard as ModelCard
from .processes import Processes as Processes
from .progress import Progress as Progress, each as each
from .run_folder import environment as environment
from .trained import write_train_ids as write_train_ids
