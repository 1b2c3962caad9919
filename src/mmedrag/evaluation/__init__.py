"""Traces to numbers: metrics with intervals, controls beside them, reliance on references.

Read ``evaluate_runs`` (the order), ``arms`` (run folders → systems under conditions), ``scoring``
and ``metrics`` (one value a row, then intervals by patient), ``controls`` and ``predictions``
(what chance and simple rules reach), ``reliance`` (copying, over-reliance, following),
``compare``, ``subgroups``, ``classification``, ``of_retrieval``; of single parts:
``of_retriever``, ``of_domain``, ``calibrate``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
