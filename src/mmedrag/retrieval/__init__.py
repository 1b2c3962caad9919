"""R_d of the paper: encoders, vectors, the index on disk, search, and how many hits to keep.

Read ``search`` (the k nearest, own studies excluded), ``select`` (adaptive selection, paper §3.2:
u_i = log(S_i / S_i+1)), ``encoders``, ``embeddings`` (encoded once, cached), ``index`` and
``index_build`` (one folder, each change whole or not at all), ``stores`` (nearest neighbours),
``ranks``; training: ``settings``, ``loss`` (InfoNCE), ``trainer``, ``train``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
