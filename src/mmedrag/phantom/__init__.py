"""A controllable three-domain benchmark: images, reports, questions and exact ground truth.

Read ``grammar`` (findings ↔ sentences, both ways), ``sample`` (studies, similar cases, knobs),
``questions``, ``build`` (a DATA folder), ``reading`` (what a reference says of a question), then
the drawings: ``canvas``, ``scene``, ``chest``, ``fundus``, ``histology``. What a domain says
stands beside its drawing (``chest.toml``); ``words`` reads it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
