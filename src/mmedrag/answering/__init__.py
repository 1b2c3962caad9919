"""From question and kept references to an answer: ``prompts`` (x_t + x_r), ``generators`` (M).

Prompt sets are data (``prompt_sets.toml``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
