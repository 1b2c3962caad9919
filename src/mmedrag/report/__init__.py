"""One self-contained HTML file of an evaluation, with its tables as CSV and LaTeX.

Read ``write`` (sections in order), ``tables``, ``view`` and ``svg`` (charts), ``gallery`` (cases).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
