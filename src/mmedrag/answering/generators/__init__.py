"""Models that answer, behind ``records.Generator``; a third party's is ``package.module:Class``.

Read ``load`` (the names), ``scripted`` (the smallest one), ``hf`` (any image-text-to-text folder)
with ``inputs``, ``vision``, ``decoding`` and ``prefix`` (what is computed once), ``openai`` (a
server), ``random_model`` (tiny models with random weights, for tests).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
