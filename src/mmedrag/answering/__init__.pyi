from .prompts import TemplateSet as TemplateSet, neutralise as neutralise
