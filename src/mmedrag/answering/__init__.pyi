from .prompts import (
    TemplateSet as TemplateSet,
    neutralise as neutralise,
    prompt_length as prompt_length,
)
