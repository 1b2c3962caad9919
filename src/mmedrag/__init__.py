"""MMed-RAG: retrieval-augmented generation for medical vision-language models, done right.

Importing this package imports nothing heavy; each name below loads what it needs when it is used::

    load_system(path=None, **flags) -> Pipeline      a system file, flags, or the embedded system
    ask(image, question=None, system=None) -> Reply  one answer with its references and reasons
    Pipeline                                         the whole system; every part can be replaced
    Example, Reference, Trace                        what is asked, found, and recorded
    Index                                            Index.build, Index.open, index.search
    evaluate(runs, data=None) -> EvaluationResult    metrics with intervals and controls
    build_pairs(data, out, system=None) -> dict      preference pairs for RAG-PT

docs/python.md shows them at work.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
