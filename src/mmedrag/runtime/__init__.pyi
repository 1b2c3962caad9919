from . import (
    config as config,
    memory as memory,
    run_folder as run_folder,
    torchvision_shim as torchvision_shim,
)
from .config import as_dict as as_dict, read_toml as read_toml
from .data_folder import DataFolder as DataFolder
from .draws import seeded_int as seeded_int
from .files import (
    BadRow as BadRow,
    append_line as append_line,
    explain as explain,
    read_json as read_json,
    read_jsonl as read_jsonl,
    sha256 as sha256,
    write_json as write_json,
    write_jsonl as write_jsonl,
    write_rows as write_rows,
)
from .journal import Journal as Journal
from .processes import Processes as Processes
from .run_folder import environment as environment
from .trained import write_train_ids as write_train_ids
