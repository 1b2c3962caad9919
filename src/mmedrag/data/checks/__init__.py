"""What is wrong with rows, texts and pictures of a data folder, with file and line.

Read ``check`` (the order of the passes), ``rows`` (any folder or released file as items), ``text``
and ``cross_rows`` (within and across rows), ``pictures``, ``baselines`` and ``counts``, then how it
is shown: ``report`` and ``page``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
