from . import prefix as prefix, vision as vision
from .hf import HFGenerator as HFGenerator
from .inputs import Inputs as Inputs, expand as expand
from .load import EXTRAS as EXTRAS, GENERATORS as GENERATORS, load_generator as load_generator
from .prefix import common_length as common_length
from .random_model import random_llava as random_llava, random_parts as random_parts
from .scripted import ScriptedGenerator as ScriptedGenerator
from .vision import open_view as open_view
