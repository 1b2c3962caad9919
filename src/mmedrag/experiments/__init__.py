"""Whole experiments: Tables 4 and 5, the demo, and the reproduction matrix.

``ablation`` (over any system and data) with its ``effects``, ``demo`` (on the embedded system),
``real_demo`` (a user's own pictures), ``sweep`` (against how good references are), ``repro``
(published and own numbers, with ``repro_checks``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
