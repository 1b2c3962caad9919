"""Data folders: importing what people have, checking it, writing it back.

Read ``importing`` (the commands' functions), ``writer`` (one row at a time into DATA), ``rows``
and ``common`` (what the formats share), ``formats`` (one module a format), ``splits`` (no group
crosses a split), ``checks`` (leakage, wrong images, doubtful rows), ``deidentify`` and ``ocr``
(DICOM).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
