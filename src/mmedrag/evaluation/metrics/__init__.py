"""Numbers of aligned predictions and targets: ``questions``, ``text`` (reports), ``clinical``,
``retrieval``; ``statistics`` holds what all share: resampling by patient, intervals, tests.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
