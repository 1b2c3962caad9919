"""HTTP API and web page over the same pipeline as the command line (extra ``serve``).

Reading order: ``app`` (routes) → ``uploads`` and ``decoder`` (bytes to pixels) → ``engine`` and
``queue`` (pixels through the pipeline, in batches) → ``openai``, ``security``, ``audit``,
``metrics``, ``page``; ``server`` binds and runs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
