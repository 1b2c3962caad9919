from . import prompts as prompts
from .prompts import TemplateSet as TemplateSet
from .prompts import neutralise as neutralise
