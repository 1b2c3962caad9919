"""The whole system: route → retrieve → references → select → prompt → answer, and who runs it.

Read ``pipeline`` (the stages), ``conditions`` (which references, which noise), ``worker`` (a chunk
of rows, whatever they do), ``run`` (thousands of rows), ``retrieve`` (without answering),
``interactive`` (one picture, one question) with ``evidence``, ``system`` (file and flags →
pipeline), ``embedded`` (the small system that ships).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
