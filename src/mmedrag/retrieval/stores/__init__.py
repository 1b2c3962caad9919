"""Vector stores: nearest neighbours by inner product, behind ``records.Store``.

Read ``engines`` (the names), ``faiss``, ``folder`` (manifest, lock and commit of an index folder).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
