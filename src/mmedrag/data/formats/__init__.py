"""One module a format; each yields rows for the writer.

``manifest``, ``released`` (with ``released_pairs``), ``llava``, ``vqa``, ``table``, ``dicom``,
``data`` (``folders``); ``table_files`` reads the files of tables, ``trainer_pairs`` preference
pairs. A format of your own is a function ``load(source, writer, **options)``, named
``package.module:function``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
