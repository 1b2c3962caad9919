"""Numbers of aligned predictions and targets, one module a kind of metric.

``questions`` (short answers), ``text`` (reports), ``clinical``, ``retrieval``; ``statistics`` holds
what all share: resampling by patient, intervals, tests.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
