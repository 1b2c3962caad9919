"""d = F(x_v) (paper §3.1): which domain a picture belongs to, or *unknown*.

Read ``identify`` (the model at work), ``features`` (picture statistics), ``fit`` (head,
temperature, thresholds), ``outliers`` (pictures that belong to no domain), ``tune``, ``train``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
