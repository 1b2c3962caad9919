"""Two-image, two-prompt DPO: L_pt of the paper, on an adapter.

Read ``loss`` (the equation), ``settings``, ``train`` (prepare, fit, write), ``encode`` (pair →
tokens), ``prepare`` and ``cache`` (features and reference log-probabilities, computed once),
``collate``, ``policy`` (adapter and reference in one model), ``trainer``, ``card``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
