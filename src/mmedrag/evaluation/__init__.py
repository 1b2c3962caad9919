"""Traces to numbers: metrics with intervals, controls beside them, reliance on references.

Read ``evaluate_runs`` (the order), then in that order: ``runs`` (run folders → systems under
conditions), ``controls`` (what chance and simple rules answer), ``scoring`` and ``metrics`` (one
value a row, intervals by patient, differences to the controls, marks), ``plain_runs`` (worth of
references, confusion, routing, calibration), ``reliance`` (copying, over-reliance, following),
``compare`` (tests between runs), ``subgroups``. ``result`` holds what comes out, as types: the
content of ``metrics.json``. Of single parts: ``of_retriever``, ``of_domain``, ``calibrate``. How
good references are: ``agreement`` (with ``keywords``); what could be made of them: ``fusion``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
