"""Whole experiments: ``ablation`` (Tables 4 and 5), ``demo`` (on the embedded system), ``repro``
(published and own numbers, with ``repro_checks``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
