from . import llava_layout as llava_layout
from .adapters import attach as attach
from .convert import (
    convert_checkpoint as convert_checkpoint,
    merge_adapter as merge_adapter,
    model_info as model_info,
)
from .load import Loaded as Loaded, load_model as load_model
