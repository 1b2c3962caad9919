"""Preference pairs: traces under four conditions → D_cm, D_oa1, D_oa2 and more.

Read ``construct`` (Algorithm 1), ``judge`` (when an answer is right), ``sampling`` (drawn and
evened pairs), ``held_out`` (what no pair may come from), ``build`` (answers the conditions first),
``files`` (PAIRS folders and other trainers' formats).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
