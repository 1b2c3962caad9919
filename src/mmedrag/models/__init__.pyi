from . import llava_layout as llava_layout
from . import load as load
from .convert import convert_checkpoint as convert_checkpoint
from .convert import merge_adapter as merge_adapter
from .convert import model_info as model_info
from .load import Loaded as Loaded
from .load import attach as attach
from .load import load_model as load_model
